"""LongCat-Image, the second model family: a tiny one with random weights, beside diffusers."""

import json
import shutil
from functools import partial

import pytest
import torch
from helpers import KINDS, PROMPTS, load_family, small_run
from pictures import (
    QUARTERS,
    check_sampling,
    draw_with,
    grid,
    levels,
    readme_picture,
    sample_noise,
)
from results import assert_same_run, check_mistake

import cdm

SIDE = 32


def tiny_longcat(folder):
    """Save a LongCatImagePipeline whose configuration is the real one but for its sizes.

    Its tokenizer knows 256 bytes and the names of two special tokens. The prompt rewriter is named
    but not there, so whoever loads it fails.
    """
    import diffusers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    torch.manual_seed(0)
    special = ["<|im_start|>", "<|im_end|>"]
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", *special]
    vocabulary = {word: i for i, word in enumerate(words)}
    small = {"hidden_size": 16, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = {"vocab_size": len(words), "rope_parameters": rope}
    vision = {"depth": 1, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=small | heads | text, vision_config=small | vision)
    )
    for p in encoder.parameters():
        p.data.mul_(10)  # Qwen's initial weights are small, and all prompts would look alike
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": [4, 6, 6]}
    transformer = diffusers.LongCatImageTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, joint_attention_dim=16, **heads
    )
    for name, p in transformer.named_parameters():
        if ".norm_" in name and p.ndim == 1:
            p.data.uniform_(0.5, 1.5)  # the norms of queries and keys
        elif "attn" in name:
            p.data.mul_(5)  # so that attention finds the prompt among its padding
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    latents = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    vae = diffusers.AutoencoderKL(block_out_channels=[4] * 4, norm_num_groups=2, **kinds, **latents)
    diffusers.LongCatImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=Qwen2Tokenizer(vocabulary, [], extra_special_tokens=special),
        text_processor=None,
        transformer=transformer.bfloat16(),  # as released
    ).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def teacher(work):
    """The flags that name the tiny teacher."""
    tiny_longcat(work / "longcat_teacher")
    return ["--teacher", work / "longcat_teacher", "--resolution", SIDE]


@pytest.fixture(scope="module")
def family(teacher):
    """The tiny teacher as cdm.py loads it. Its pipe is diffusers' pipeline of the same parts."""
    family = load_family(*teacher)
    assert type(family) is cdm.LongCatImage
    assert family.pipe.text_processor is None
    family.pipe.set_progress_bar_config(disable=True)
    return family


@pytest.fixture(scope="module", params=KINDS)
def trained(request, teacher, work):
    """Flags and folder of a run, full or LoRA. Tests do not change it."""
    flags = [*teacher, "--iterations", 4, *KINDS[request.param]]
    grids = ["--sample-every", 4, "--sample-count", 1]
    return flags, small_run(work / f"longcat_{request.param}", *flags, *grids, "--save-every", 2)


def draw(family, prompt=PROMPTS[0], **options):
    """What diffusers draws, or its latents, from the noise of the grid's first picture."""
    pipe = family.pipe
    noise = sample_noise(family)
    packed = pipe._pack_latents(noise, 1, *family.shape)
    rewrite = {"enable_prompt_rewrite": False}
    found = draw_with(pipe, prompt, packed, family.resolution, **rewrite, **options)
    if not torch.is_tensor(found):
        return found
    side = family.resolution
    return pipe._unpack_latents(found[None], side, side, pipe.vae_scale_factor)


# --- Sampling. ---


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_sampling_equals_the_pipelines(steps, family):
    """And it depends on the prompt."""
    image = check_sampling(family, PROMPTS[3], steps, partial(draw, family, PROMPTS[3]))
    other = draw(family, PROMPTS[4], sigmas=[1 - i / steps for i in range(steps)])
    assert image != other


def test_the_shift_is_the_schedulers(teacher, family):
    """At 32 pixels the times are those that the pipeline's call leaves in its scheduler.

    At 1024, its own size, 4 steps are at 1, 0.905, 0.760 and 0.513.
    """
    draw(family, sigmas=QUARTERS, output_type="latent")
    times = torch.cat([cdm.sampling_times(4, family.shift), torch.zeros(1)])
    torch.testing.assert_close(family.pipe.scheduler.sigmas, times)
    large = load_family(*teacher, "--resolution", 0)
    assert (large.resolution, large.shape) == (1024, (16, 128, 128))
    times = cdm.sampling_times(4, large.shift).tolist()
    assert times == pytest.approx([1, 0.905, 0.760, 0.513], abs=5e-4)


# --- Training and export. ---


def test_resume_bit_for_bit(trained, tmp_path):
    """The last two of four iterations come again from the checkpoint of the second."""
    flags, folder = trained
    again = shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(again / "checkpoint_000004")
    small_run(again, *flags, "--resume")
    assert_same_run(again, folder)


def test_the_export_draws_what_the_grid_shows(trained, family):
    """student/README.md, followed to the letter, draws the last grid's student, to a level."""
    _, folder = trained
    noise = family.pipe._pack_latents(sample_noise(family), 1, *family.shape)
    rows = [row[0] for row in grid(folder, 4, rows=3, count=1, side=SIDE)]
    teacher_28, teacher_4, student_4 = rows
    assert levels(readme_picture(folder, noise), student_4) <= 1
    assert levels(draw(family, sigmas=QUARTERS), teacher_4) <= 1
    guided = draw(family, guidance_scale=2.0, num_inference_steps=28, enable_cfg_renorm=False)
    assert levels(guided, teacher_28) <= 1
    assert levels(student_4, teacher_4) > 10


def test_other_families_are_refused(tmp_path, capfd):
    """A Flux pipeline: the sentence names both families."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    flags = ["--teacher", tmp_path, "--output-dir", tmp_path / "out"]
    words = ("FluxPipeline", "StableDiffusion3Pipeline", "LongCatImagePipeline")
    check_mistake(capfd, tmp_path, flags, *words)
