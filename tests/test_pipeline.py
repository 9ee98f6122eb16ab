"""Sampling, roles and export: what diffusers makes of the same student."""

import ast
import re
import shutil

import pytest
import torch
from digits import PROMPTS
from helpers import (
    LORA,
    TEACHER,
    build,
    cdm_main,
    finished,
    inputs,
    load_family,
    load_student,
    pipeline_images,
    shard,
)
from PIL import Image
from safetensors.torch import load_file

import cdm


def unshifted(times, shift=3.0):
    """The sigmas that FlowMatchEulerDiscreteScheduler, which shifts what it is given, turns
    into these times.
    """
    return [t / (shift - (shift - 1) * t) for t in times]


@pytest.fixture(scope="session")
def student(whole):
    return load_student(whole / "student")


def generated(folder, *flags):
    """The picture that --generate writes for PROMPTS[3] and seed 0."""
    assert (
        cdm_main(
            "--generate",
            PROMPTS[3],
            "--teacher",
            TEACHER,
            "--seed",
            0,
            "--output-dir",
            folder,
            "--device",
            "cpu",
            *flags,
        )
        == 0
    )
    (file,) = folder.glob("*.png")
    return Image.open(file)


UNEVEN = [1.0, 0.8, 0.33, 0.1]


GRIDS = {
    "--sample-steps 4": [1.0, 0.75, 0.5, 0.25],
    "--times 1,0.9,0.75,0.5": [1.0, 0.75, 0.5, 0.25],
    "--sample-steps 1": [1.0],
    "--sample-steps 6": [1 - i / 6 for i in range(6)],
    "--sample-steps 50": [1 - i / 50 for i in range(50)],
    "--times " + ",".join(map(str, UNEVEN)): unshifted(UNEVEN),
}


@pytest.mark.parametrize("flags", GRIDS)
def test_generate_equals_the_pipeline(flags, whole, student, tmp_path):
    """`--sample-steps 4 --seed 0` writes, pixel for pixel, what pipe(sigmas=[1, .75, .5, .25],
    guidance_scale=1, generator=manual_seed(0)) returns: the scheduler shifts these sigmas to 1,
    0.9, 0.75, 0.5, and so do we.
    """
    (expected,) = pipeline_images(student, PROMPTS[3], GRIDS[flags])
    image = generated(tmp_path / "out", "--student", whole / "student", *flags.split())
    assert image.size == (8, 8) and image.tobytes() == expected.tobytes()


def test_latents_equal_the_pipelines(student):
    """The same before decoding, where no rounding to 256 levels hides a difference: to 1e-5."""
    sd3 = load_family()
    noise = torch.randn(1, *sd3.shape, generator=torch.Generator().manual_seed(0))
    model = cdm.Role(student.transformer, sd3)
    for times, sigmas in (
        (cdm.uniform_times(4, 3.0), [1.0, 0.75, 0.5, 0.25]),
        (torch.tensor(UNEVEN), unshifted(UNEVEN)),
    ):
        with torch.no_grad():
            latent = cdm.sample(model, noise, times, sd3.encode([PROMPTS[3]]))
        torch.testing.assert_close(
            latent,
            pipeline_images(student, PROMPTS[3], sigmas, output_type="latent"),
            rtol=0,
            atol=1e-5,
        )


def test_generate_writes_one_picture_a_prompt_and_prints_their_names(whole, tmp_path, capfd):
    """Two prompts, two PNGs, whose names are what stdout says; other seeds and prompts are
    other pictures.
    """
    flags = [
        "--teacher",
        TEACHER,
        "--student",
        whole / "student",
        "--output-dir",
        tmp_path,
        "--device",
        "cpu",
    ]
    for seed in (0, 1):
        assert cdm_main("--generate", *PROMPTS[:2], *flags, "--seed", seed) == 0
    names = capfd.readouterr().out.split("\n")[:-1]
    assert sorted(names) == sorted(map(str, tmp_path.glob("*.png"))) and len(names) == 4
    assert len({Image.open(name).tobytes() for name in names}) == 4


def ema_pictures(folder, tmp_path, *flags):
    """The pictures of the last checkpoint's average, through the resumed run itself: what
    student/ has to reproduce.
    """
    run = build(
        "--output-dir",
        shutil.copytree(folder, tmp_path / "copy"),
        "--iterations",
        6,
        "--resume",
        *flags,
    )
    assert run.k == 6
    run.swap_ema()
    noise = torch.randn(1, *run.family.shape, generator=torch.Generator().manual_seed(0))
    times = cdm.uniform_times(4, run.family.shift)
    return [
        image.tobytes()
        for image in run.family.images(run.student.role, [noise] * 10, times, PROMPTS)
    ]


def readme_pictures(folder):
    """The pictures of student/README.md's own code, float32 for bfloat16, with each prompt and
    the noise of seed 0.
    """
    (code,) = re.findall(
        r"```python\n(.*?)```", (folder / "student" / "README.md").read_text(), re.S
    )
    assert code.count(PROMPTS[0]) == 1 and "bfloat16" in code
    code, pictures = (
        code.replace("bfloat16", "float32").replace("image.png", f"{folder.parent}/image.png"),
        [],
    )
    load, call = code[: code.index("image =")], code[code.index("image =") :]
    scope = {}
    exec(load, scope)
    scope["pipe"].set_progress_bar_config(disable=True)
    for prompt in PROMPTS:
        exec(
            call.replace(PROMPTS[0], prompt).replace(
                "sigmas=", "generator=torch.Generator().manual_seed(0), sigmas="
            ),
            scope,
        )
        pictures.append(scope["image"].tobytes())
    assert Image.open(folder.parent / "image.png").tobytes() == pictures[-1]
    return pictures


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_the_exported_student_used_as_its_readme_says(kind, request, pipe, tmp_path):
    """student/README.md, followed to the letter, draws the pictures of the run's EMA, pixel for
    pixel. For LoRA that takes alpha = 2 x rank from the file. The teacher draws others, so it
    is not the teacher that is compared with itself.
    """
    folder = request.getfixturevalue(kind)
    expected = ema_pictures(folder, tmp_path, *(["--lora-rank", 4] if kind == "lora" else []))
    assert readme_pictures(folder) == expected
    teacher = [
        pipeline_images(pipe, prompt, [1.0, 0.75, 0.5, 0.25])[0].tobytes() for prompt in PROMPTS
    ]
    assert all(a != b for a, b in zip(teacher, expected, strict=True))


def test_students_readme_survives_any_prompt(tmp_path):
    """The first prompt appears in student/README.md's code.

    One with quotes and a backslash leaves it valid Python.
    """
    (tmp_path / "prompts.txt").write_text('a "quoted" cat, \\ and {braces}\n', encoding="utf-8")
    finished(tmp_path / "out", "--iterations", 1, "--prompts", tmp_path / "prompts.txt")
    (code,) = re.findall(
        r"```python\n(.*?)```", (tmp_path / "out" / "student" / "README.md").read_text(), re.S
    )
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert 'a "quoted" cat, \\ and {braces}' in strings


def test_generate_with_a_lora_student(lora, tmp_path):
    """--generate takes a LoRA student/ too; with 4 steps it writes what the EMA student draws."""
    image = generated(tmp_path / "out", "--student", lora / "student")
    assert image.tobytes() == ema_pictures(lora, tmp_path, "--lora-rank", 4)[3]


def test_role_is_the_transformer_at_a_thousand_t(pipe):
    """Role(net, 1000)(x, t, (embeds, pooled)) is net(x, timestep=1000 t, ...): t = 0.75 is
    timestep 750.
    """
    sd3 = load_family()
    x = torch.randn(4, *sd3.shape)
    embeds, pooled = sd3.encode(PROMPTS[:4])
    t = torch.tensor([1.0, 0.75, 0.3, 0.02])
    with torch.no_grad():
        v = pipe.transformer(
            hidden_states=x,
            timestep=1000 * t,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
        ).sample
        assert torch.equal(cdm.Role(sd3.transformer, sd3)(x, t, (embeds, pooled)), v)


@torch.no_grad()
def test_conditions_are_the_pipelines(pipe):
    """encode() gives what the pipeline's encode_prompt gives; uncond(n) is the empty prompt n
    times; no T5 is zeros.
    """
    sd3 = load_family()
    tokens = pipe.tokenizer_3.model_max_length
    embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=tokens)
    empty, _, empty_pooled, _ = pipe.encode_prompt("", None, None, max_sequence_length=tokens)
    assert torch.equal(sd3.encode(PROMPTS)[0], embeds) and torch.equal(
        sd3.encode(PROMPTS)[1], pooled
    )
    assert len({tuple(row) for row in pooled.tolist()}) == 10
    for ours, theirs in zip(sd3.uncond(3), (empty, empty_pooled), strict=True):
        assert torch.equal(ours, theirs.expand_as(ours)) and len(ours) == 3
    without = load_family("--no-t5")
    assert without.pipe.text_encoder_3 is None
    text = without.encode(PROMPTS)[0]
    clip = text.shape[1] - without.tokens()
    assert torch.equal(text[:, :clip], embeds[:, :clip]) and not text[:, clip:].any()


@torch.no_grad()
def test_all_roles_start_as_the_teacher(pipe, tmp_path):
    """Full and LoRA: student, fake score and the anchor-aware fake score, whatever anchor it is
    told, give the teacher's output to the last bit before the first iteration.
    """
    for flags in (
        [],
        ["--lora-rank", 4],
        ["--anchor-aware-fake"],
        ["--lora-rank", 4, "--anchor-aware-fake"],
    ):
        run = build("--output-dir", tmp_path / "none", *flags)
        x, t, cond = inputs(run)
        expected = cdm.Role(pipe.transformer, run.family)(x, t, cond)
        for role in (run.teacher, run.student.role, run.fake_score.role, run.teacher):
            assert torch.equal(role(x, t, cond), expected)
        if "--anchor-aware-fake" in flags:
            assert torch.equal(run.fake_score.role(x, t, cond, anchor_t=t.flip(0)), expected)
    assert not (tmp_path / "none").exists()


def test_the_anchor_aware_fake_score_learns_to_use_its_anchor(tmp_path):
    """After six iterations its output depends on the anchor's time.

    Student and teacher have no such input.
    """
    run = build("--output-dir", tmp_path, "--anchor-aware-fake", "--iterations", 6)
    run.train()
    x, t, cond = inputs(run)
    with torch.no_grad():
        near, far = (
            run.fake_score.role(x, t, cond, anchor_t=torch.full((4,), a)) for a in (0.5, 1.0)
        )
    assert not torch.equal(near, far)
    assert not any(
        "anchor" in name
        for name in load_file(tmp_path / "student" / "diffusion_pytorch_model.safetensors")
    )


def student_gradients(run, others_in_between):
    """Gradients of the student's parameters, by name, optionally with teacher and fake score
    run before backward.
    """
    x, t, cond = inputs(run)
    v = run.student.role(x, t, cond)
    if others_in_between:
        with torch.no_grad():
            for role in (run.teacher, run.fake_score.role, run.teacher):
                role(x, t, cond)
    v.square().mean().backward()
    grads = {name: p.grad for name, p in run.student.params.items()}
    assert all(p.grad is None for p in run.fake_score.params.values())
    return grads


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_gradients_survive_checkpointing_and_other_roles(kind, request, tmp_path):
    """On a trained student: forward, then the teacher and the fake score, then backward gives
    the gradients of forward and backward alone without checkpointing. With LoRA, three roles
    share one transformer, and an adapter switched off before backward would leave no gradient
    at all, or the wrong adapter's recomputed activations.
    """
    folder = request.getfixturevalue(kind)
    calls = []

    def count(*_):
        calls.append(1)

    grads = {}
    # A block is called twice where activations are really recomputed.
    for checkpointing, expected_calls in (
        ("--no-gradient-checkpointing", 1),
        ("--gradient-checkpointing", 2),
    ):
        run = build("--output-dir", folder, "--resume", checkpointing, *LORA[kind])
        run.student.role.transformer.transformer_blocks[0].register_forward_pre_hook(count)
        for others in (False, True):
            calls.clear()
            grads[checkpointing, others] = student_gradients(run, others)
            shared = 3 if others and LORA[kind] else 0  # the other roles call the same block
            assert len(calls) == expected_calls + shared
            run.student.optimizer.zero_grad()
    expected = grads["--no-gradient-checkpointing", False]
    idle = [name for name, g in expected.items() if g is None or not g.any()]
    assert len(expected) > 60
    # SD3 drops the output of its last text stream.
    assert all("blocks.2.attn.add_q_proj" in name for name in idle), idle
    for found in grads.values():
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def test_lora_leaves_the_base_alone(lora, pipe):
    """After training, student and fake score differ from the teacher, which with adapters off
    is the teacher to the bit. Only adapters are in checkpoints; the exported file has rank 4
    and alpha 8.
    """
    run = build("--output-dir", lora, "--resume", "--lora-rank", 4)
    x, t, cond = inputs(run)
    with torch.no_grad():
        outputs = [
            role(x, t, cond) for role in (run.student.role, run.fake_score.role, run.teacher)
        ]
        assert torch.equal(outputs[2], cdm.Role(pipe.transformer, run.family)(x, t, cond))
    assert not torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[1], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    for file in ("student", "fake_score", "ema"):
        assert all(
            "lora_" in name for name in load_file(shard(lora / "checkpoint_000006" / file, 1))
        )
    (file,) = (lora / "student").glob("*.safetensors")
    weights = load_file(file)
    assert weights and all(x.shape[0] == 4 for name, x in weights.items() if "lora_A" in name)
    assert {config.lora_alpha for config in run.student.role.transformer.peft_config.values()} == {
        8
    }
