"""LongCat-Image, the second model family: a tiny one with random weights, beside diffusers."""

import json
import re
import shutil

import pytest
import torch
from helpers import (
    CPU,
    LIVELY,
    LORA,
    PROMPTS,
    QUARTERS,
    assert_same_figures,
    build,
    cdm_main,
    check_mistake,
    finish,
    finished,
    inputs,
    log,
    results,
    torchrun,
)
from PIL import Image

import cdm


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


@pytest.fixture(scope="session")
def longcat(work):
    """The flags of a short run with the tiny teacher."""
    tiny_longcat(work / "longcat_teacher")
    teacher = ["--teacher", work / "longcat_teacher", "--resolution", 32]
    return [*teacher, "--batch-size", 4, "--iterations", 4]


@pytest.fixture(scope="session", params=LORA)
def trained(request, longcat, work):
    """Flags and folder of a run, full or anchor-aware LoRA. Tests do not change it."""
    flags = [*longcat, *LORA[request.param]]
    if request.param == "lora":
        flags.append("--anchor-aware-fake")
    return flags, finished(work / f"longcat_{request.param}", *flags)


def load_family(flags):
    return cdm.load_family(cdm.parse_args([*LIVELY, *map(str, flags)]), CPU)


def start(family):
    """The noise of seed 0, from which all pictures here are drawn."""
    return torch.randn(1, *family.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def family(longcat):
    """The tiny teacher as cdm.py loads it, and diffusers' pipeline of the same parts."""
    family = load_family(longcat)
    assert type(family) is cdm.LongCatImage and family.pipe.text_processor is None
    family.pipe.set_progress_bar_config(disable=True)
    return family


def pipeline_draws(family, output_type, **options):
    """diffusers' picture, or its latents (1, C, h, w), of PROMPTS[3] and the noise of seed 0."""
    side = family.resolution
    (found,) = family.pipe(
        PROMPTS[3],
        height=side,
        width=side,
        generator=torch.Generator().manual_seed(0),
        enable_prompt_rewrite=False,
        output_type=output_type,
        **options,
    ).images
    if output_type == "pil":
        return found
    return family.pipe._unpack_latents(found[None], side, side, family.pipe.vae_scale_factor)


@torch.no_grad()
def test_the_text_encoder_computes_no_logits(family):
    """They would be 152,064 numbers a token, and nobody reads them."""
    encoder = family.pipe.text_encoder
    output = encoder(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert torch.equal(output.logits, output.hidden_states[-1])


# --- Sampling. ---


@pytest.mark.parametrize("steps", [1, 4, 7])
@torch.no_grad()
def test_few_steps_equal_the_pipelines(steps, family):
    """uniform_times(steps, shift) draws what LongCatImagePipeline draws with the same times before
    their shift: latents to 1e-5, pictures byte for byte.
    """
    model = cdm.Model(family.transformer, family)
    times = cdm.uniform_times(steps, family.shift)
    options = {"sigmas": cdm.uniform_times(steps).tolist(), "guidance_scale": 1.0}
    cond = family.encode([PROMPTS[3]])
    latents = cdm.sample(model, start(family), times, cond)
    expected = pipeline_draws(family, "latent", **options)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    (image,) = family.images(model, [start(family)], times, cond)
    assert image.tobytes() == pipeline_draws(family, "pil", **options).tobytes()
    (other,) = family.images(model, [start(family)], times, family.encode([PROMPTS[4]]))
    assert image.tobytes() != other.tobytes()


@torch.no_grad()
def test_the_guided_teacher_equals_the_pipelines(family):
    """The sample grid's teacher, 28 steps under guidance, is the pipeline without CFG
    renormalisation, which no loss of CDM has.
    """
    model = family.guided(cdm.Model(family.transformer, family), 4.0)
    times = cdm.uniform_times(28, family.shift)
    latents = cdm.sample(model, start(family), times, family.encode([PROMPTS[3]]))
    options = {"num_inference_steps": 28, "guidance_scale": 4.0}
    expected = pipeline_draws(family, "latent", **options, enable_cfg_renorm=False)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    renormalised = pipeline_draws(family, "latent", **options)
    assert not torch.allclose(latents, renormalised, atol=1e-3)


def test_the_shift_is_the_schedulers(longcat, family):
    """At 32 pixels the times are those that the pipeline's call leaves in its scheduler. At
    1024, with the real configuration's numbers, 4 steps are at 1, 0.905, 0.760 and 0.513.
    """
    pipeline_draws(family, "latent", sigmas=QUARTERS, guidance_scale=1.0)
    torch.testing.assert_close(
        family.pipe.scheduler.sigmas,
        torch.cat([cdm.uniform_times(4, family.shift), torch.zeros(1)]),
    )
    large = load_family([*longcat, "--resolution", 1024])
    assert large.shape == (16, 128, 128)
    assert cdm.uniform_times(4, large.shift).tolist() == pytest.approx(
        [1, 0.905, 0.760, 0.513], abs=5e-4
    )
    assert load_family([*longcat, "--resolution", 0]).resolution == 1024


# --- Training. ---


@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_all_roles_start_as_the_teacher(kind, dtype, longcat, monkeypatch):
    """Student, fake score and the anchor-aware fake score give the teacher's output to the last
    bit, also with a GPU's bf16: a frozen network in bf16, trained weights in float32, autocast.
    """
    flags = [*longcat, *LORA[kind], "--anchor-aware-fake"]
    load = cdm.Family.__init__

    def load_as_on_a_gpu(family, *args):
        load(family, *args)
        family.dtype = torch.bfloat16
        if kind == "lora":
            family.transformer.bfloat16()

    if dtype == "bfloat16":
        monkeypatch.setattr(cdm.Family, "__init__", load_as_on_a_gpu)
    run = build(*flags)
    weights = {p.dtype for p in run.teacher.transformer.parameters()}
    assert (torch.bfloat16 in weights) == (dtype == "bfloat16")
    assert {p.dtype for p in run.student.params.values()} == {torch.float32}
    x, t, cond = inputs(run)
    expected = run.teacher(x, t, cond)
    assert torch.equal(run.student.model(x, t, cond), expected)
    assert torch.equal(run.fake_score.model(x, t, cond), expected)
    assert torch.equal(run.fake_score.model(x, t, cond, made_at=t.flip(0)), expected)


def test_resume_bit_for_bit(trained, tmp_path):
    """The last two of four iterations come again from the checkpoint of the second: the same
    bytes in checkpoint and student/, the same log.
    """
    flags, folder = trained
    again = shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(again / "checkpoint_000004")
    shutil.rmtree(again / "student")
    finished(again, *flags, "--resume")
    assert results(again) == results(folder)


def test_memory_flags_change_nothing(trained, tmp_path):
    """Offloaded text encoders and kept activations give the same bytes."""
    flags, folder = trained
    memory = ["--offload-text-encoders", "--no-gradient-checkpointing"]
    assert results(finished(tmp_path / "out", *flags, *memory)) == results(folder)


@pytest.mark.slow
def test_two_processes_are_one_run(trained, tmp_path):
    """Two processes with 2 samples each log the figures of one process with 4. Their sample grids
    leave the weights alone. A user sees no warning.
    """
    flags, folder = trained
    samples = ["--sample-every", 2, "--sample-count", 1]
    code, _, err = finish(torchrun(*LIVELY, *flags, *samples, "--output-dir", tmp_path / "two"))
    assert code == 0 and "Warning" not in err, err
    assert_same_figures(log(tmp_path / "two"), log(folder))


# --- The exported student. ---


def readme_picture(folder):
    """The picture of student/README.md's own code, in float32, with the noise of seed 0."""
    readme = (folder / "student" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert "bfloat16" in code and code.count("sigmas=") == 1
    code = code.replace("bfloat16", "float32").replace("image.png", f"{folder}.png")
    seed = "generator=torch.Generator().manual_seed(0), sigmas="
    exec(code.replace("sigmas=", seed), {})
    return Image.open(f"{folder}.png")


def test_the_exported_student_draws_what_the_run_draws(trained, family, tmp_path):
    """student/README.md, followed to the letter, and --generate draw the picture of the run's
    EMA. The teacher draws another.
    """
    flags, folder = trained
    run = build("--output-dir", folder, "--resume", *flags)
    few = cdm.uniform_times(4, family.shift)
    prompt = run.prompts[0]
    cond = family.encode([prompt])
    (expected,) = family.images(run.ema_model, [start(family)], few, cond)
    assert readme_picture(folder).tobytes() == expected.tobytes()
    out = ["--output-dir", tmp_path, "--device", "cpu"]
    assert cdm_main(*flags[:4], "--student", folder, "--generate", prompt, *out) == 0
    (file,) = tmp_path.glob("*.png")
    assert Image.open(file).tobytes() == expected.tobytes()
    (teacher,) = family.images(run.teacher, [start(family)], few, cond)
    assert teacher.tobytes() != expected.tobytes()


# --- Mistakes. ---


def test_no_t5_is_refused(longcat, tmp_path, capfd):
    """LongCat-Image has no T5 to leave out."""
    flags = [*LIVELY, *longcat, "--output-dir", tmp_path / "out", "--no-t5"]
    check_mistake(capfd, tmp_path, flags, "--no-t5", "LongCatImagePipeline")


def test_other_families_are_refused(tmp_path, capfd):
    """A Flux pipeline: the sentence names both families."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    words = ("FluxPipeline", "StableDiffusion3Pipeline", "LongCatImagePipeline")
    check_mistake(capfd, tmp_path, [*LIVELY, "--teacher", tmp_path], *words)
