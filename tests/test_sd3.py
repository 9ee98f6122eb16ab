"""Stable Diffusion 3: conditions, sampling, roles and export beside diffusers' own pipeline."""

import json
import shutil
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from helpers import DATA, KINDS, PROMPTS, SMALL, TEACHER, load_family, small_run, watch
from pictures import QUARTERS, check_sampling, draw_with, grid, levels, readme_picture, sample_noise
from results import check_mistake, tensors
from safetensors.torch import load_file

SIDE = 32  # pixels of the demo teacher's pictures
GUIDED_28 = {"sigmas": [1 - i / 28 for i in range(28)], "guidance_scale": 2.0}  # 1 + alpha


@pytest.fixture(scope="module")
def family():
    """The demo teacher as cdm.py loads it."""
    return load_family()


def load_pipe(folder=TEACHER):
    """The same as diffusers loads it."""
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return load_pipe()


def draw(pipe, prompt, noise, **options):
    """What the pipeline draws: its call reads T5's tokens up to a length, here the demo's 4."""
    return draw_with(pipe, prompt, noise, SIDE, max_sequence_length=4, **options)


@torch.no_grad()
def conditions(pipe, prompts):
    text, _, pooled, _ = pipe.encode_prompt(prompts, None, None, max_sequence_length=4)
    return text, pooled


# --- Conditions. ---


def test_conditions_are_the_pipelines(family, pipe):
    """Another one for each prompt. uncond is the empty prompt's, of one sample."""
    found, expected = family.encode(PROMPTS), conditions(pipe, PROMPTS)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, family.uncond, conditions(pipe, "")))
    assert len({tuple(row) for row in found[1].tolist()}) == len(PROMPTS)


@pytest.mark.parametrize("longest, read", [(512, 256), (256, 256), (100, 100)])
def test_t5_reads_256_tokens(longest, read, family, monkeypatch):
    """The authors' max_sequence_length, or fewer if T5's tokenizer has fewer. CLIP's are 4 here."""
    monkeypatch.setattr(family.pipe.tokenizer_3, "model_max_length", longest)
    assert family.encode(PROMPTS[:1])[0].shape[1] == 4 + read


def test_without_t5_its_tokens_are_zero(family):
    """--no-t5 loads no T5. CLIP's tokens stay."""
    bare = load_family("--no-t5")
    assert bare.pipe.text_encoder_3 is None
    (text, pooled), (expected, expected_pooled) = bare.encode(PROMPTS), family.encode(PROMPTS)
    assert torch.equal(text[:, :4], expected[:, :4])
    assert text.shape == expected.shape
    assert not text[:, 4:].any()
    assert torch.equal(pooled, expected_pooled)


# --- Sampling. ---


@pytest.mark.parametrize("steps", [1, 4, 6, 28])
def test_sampling_equals_the_pipelines(steps, family, pipe):
    drawn = partial(draw, pipe, PROMPTS[3], sample_noise(family))
    check_sampling(family, PROMPTS[3], steps, drawn)


# --- Teachers that differ from the demo's. ---


@pytest.fixture
def teacher(tmp_path):
    """A copy of the teacher's folder, to be changed."""
    return Path(shutil.copytree(TEACHER, tmp_path / "teacher"))


def edit_scheduler(teacher, options):
    path = teacher / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def test_the_shift_is_the_teachers(teacher, tmp_path, monkeypatch):
    """With shift 5, DMD2's fixed schedule is 1, 15/16, 5/6, 5/8. The grid has such times."""
    edit_scheduler(teacher, {"shift": 5.0})
    schedules = []
    watch(monkeypatch, lambda call: schedules.append(call.draw.schedule.tolist()))
    flags = ["--teacher", teacher, "--iterations", 2, "--sample-every", 2, "--sample-count", 1]
    folder = small_run(tmp_path / "run", *flags, "--schedule", "fixed")
    assert schedules == 2 * [pytest.approx([1, 15 / 16, 5 / 6, 5 / 8])]
    noise, pipe = sample_noise(load_family()), load_pipe(teacher)
    (teacher_28,), (teacher_4,), _ = grid(folder, 2, rows=3, count=1, side=SIDE)
    assert levels(teacher_28, draw(pipe, PROMPTS[0], noise, **GUIDED_28)) <= 1
    assert levels(teacher_4, draw(pipe, PROMPTS[0], noise, sigmas=QUARTERS)) <= 1
    assert levels(teacher_4, draw(load_pipe(), PROMPTS[0], noise, sigmas=QUARTERS)) > 1


# transformers makes a tokenizer without files empty: to it all prompts are alike. The schedulers
# would train and sample at other times than diffusers.
MISLEADING = ["tokenizer", "tokenizer_2", "tokenizer_3", "use_karras_sigmas", "invert_sigmas"]


@pytest.mark.parametrize("what", MISLEADING)
def test_a_teacher_that_would_mislead_is_refused(what, teacher, tmp_path, capfd):
    if what.startswith("tokenizer"):
        (teacher / what / "tokenizer.json").unlink()
        word = what
    else:
        edit_scheduler(teacher, {what: True})
        word = "scheduler"
    flags = [*DATA, *SMALL, "--teacher", teacher, "--output-dir", tmp_path / "out"]
    check_mistake(capfd, tmp_path, flags, word)


# --- Roles. ---


@pytest.mark.parametrize("kind", KINDS)
def test_all_roles_start_as_the_teacher(kind, family, pipe, tmp_path, monkeypatch):
    """Student and fake score give the pipeline's transformer's output at timestep 1000 t to the
    last bit, the EMA is the student's. After updates they differ, and the teacher is what it was.
    """
    gen = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, *family.shape, generator=gen), torch.tensor([1.0, 0.75, 0.3, 0.02])
    text, pooled = conditions(pipe, PROMPTS[:4])
    with torch.no_grad():
        expected = pipe.transformer(x, text, pooled, timestep=1000 * t).sample
    seen = []

    @torch.no_grad()
    def look(call):
        roles = call.teacher, call.student.model, call.fake_score.model
        seen.append([torch.equal(model(x, t, (text, pooled)), expected) for model in roles])
        seen[-1].append(all(torch.equal(call.ema[n], p) for n, p in call.student.params.items()))

    watch(monkeypatch, look)
    small_run(tmp_path / "run", "--iterations", 3, *KINDS[kind])
    assert seen[0] == [True, True, True, True]
    assert seen[1] == [True, True, False, True]
    assert seen[2] == [True, False, False, False]


# Attention and feed-forward layers, as the authors list them for SD3.
LORA_LAYERS = "attn.to_q attn.to_k attn.to_v attn.to_out.0 ff.net.0.proj ff.net.2 attn.add_q_proj "
LORA_LAYERS += "attn.add_k_proj attn.add_v_proj "
NOT_IN_LAST = "attn.to_add_out ff_context.net.0.proj ff_context.net.2"


def test_lora_layers_are_the_authors(lora):
    """In each of the 4 blocks, but for three that the last block lacks. The rank is 4."""
    weights = load_file(lora / "student" / "pytorch_lora_weights.safetensors")
    expected = {f"transformer_blocks.3.{name}" for name in LORA_LAYERS.split()}
    for i in range(3):
        names = (LORA_LAYERS + NOT_IN_LAST).split()
        expected |= {f"transformer_blocks.{i}.{name}" for name in names}
    assert {name[len("transformer.") : name.index(".lora_")] for name in weights} == expected
    assert {len(x) for name, x in weights.items() if "lora_A" in name} == {4}


def test_bf16_weights_have_a_float32_ema(tmp_path):
    """--weights bfloat16 on a CPU: weights, moments and the exported student are bf16."""
    folder = small_run(tmp_path / "run", "--weights", "bfloat16", "--iterations", 2)
    types = {}
    for name, x in tensors(folder / "checkpoint_000002").items():
        if not name.endswith("step"):
            types.setdefault(name.split(".")[0], set()).add(x.dtype)
    assert types["ema"] == {torch.float32}
    assert types["student"] == types["fake_score"] == {torch.bfloat16}
    student = load_file(folder / "student" / "diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in student.values()} == {torch.bfloat16}


# --- The exported student. ---


def test_the_export_is_the_ema(trained):
    """With a LoRA's factor alpha / rank = 2 in its B, because the file has no alpha."""
    folder, flags = trained
    saved = tensors(folder / "checkpoint_000006")
    (file,) = (folder / "student").glob("*.safetensors")
    exported = load_file(file)
    names = [name.removeprefix("ema.") for name in saved if name.startswith("ema.")]
    for name in names:
        x = saved[f"ema.{name}"]
        if flags:
            factor = 2 if "lora_B" in name else 1
            x = factor * x
            name = "transformer." + name.replace(".default.", ".")
        assert torch.equal(exported[name], x), name
    moved = [not torch.equal(saved[f"ema.{n}"], saved[f"student.weights.{n}"]) for n in names]
    assert sum(moved) > 20


def test_the_export_draws_what_the_grid_shows(trained, pipe, family):
    """student/README.md, followed to the letter, draws the last grid's student, to a level.

    The rows above it are the teacher's, as diffusers draws them: guided by 1 + alpha, and not.
    """
    folder, _ = trained
    noise = sample_noise(family)
    columns = zip(*grid(folder, 6, rows=5, count=2, side=SIDE), strict=True)
    (teacher_28, teacher_4, student_4, teacher_1, student_1), (_, second, *_) = columns
    assert levels(readme_picture(folder, noise), student_4) <= 1
    assert levels(teacher_28, draw(pipe, PROMPTS[0], noise, **GUIDED_28)) <= 1
    assert levels(teacher_4, draw(pipe, PROMPTS[0], noise, sigmas=QUARTERS)) <= 1
    assert levels(teacher_1, draw(pipe, PROMPTS[0], noise, sigmas=[1.0])) <= 1
    assert levels(second, draw(pipe, PROMPTS[1], sample_noise(family, 1), sigmas=QUARTERS)) <= 1
    # Trained students draw other pictures, and are not taken for one another.
    assert levels(student_4, teacher_4) > 10
    assert levels(student_1, teacher_1) > 10
