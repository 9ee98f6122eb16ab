"""Sampling, roles and export: what diffusers makes of the same networks."""

import ast
import re

import pytest
import torch
from helpers import (
    LORA,
    PROMPTS,
    QUARTERS,
    SIDE,
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


@pytest.fixture(scope="session")
def student(whole):
    """The pipeline with the student of the run `whole`."""
    return load_student(whole / "student")


@pytest.fixture(scope="session", params=LORA)
def trained(request):
    """Folder and flags of a run of each kind: full fine-tuning, LoRA."""
    return request.getfixturevalue(request.param), LORA[request.param]


# --- Sampling. ---


def unshifted(times, shift=3.0):
    """The sigmas that FlowMatchEulerDiscreteScheduler, which shifts them, turns into `times`."""
    return [t / (shift - (shift - 1) * t) for t in times]


def generate(folder, *flags):
    """Run --generate with the demo teacher."""
    teacher = ["--teacher", TEACHER, "--device", "cpu", "--output-dir", folder]
    assert cdm_main(*teacher, *flags) == 0


def generated(folder, *flags):
    """The picture that --generate writes for PROMPTS[3] and seed 0."""
    generate(folder, "--generate", PROMPTS[3], "--seed", 0, *flags)
    (file,) = folder.glob("*.png")
    return Image.open(file)


UNEVEN = [1.0, 0.8, 0.33, 0.1]
GRIDS = {
    "--sample-steps 4": QUARTERS,
    "--times 1 0.9 0.75 0.5": QUARTERS,
    "--sample-steps 1": [1.0],
    "--sample-steps 6": [1 - i / 6 for i in range(6)],
    "--sample-steps 50": [1 - i / 50 for i in range(50)],
    "--times 1 0.8 0.33 0.1": unshifted(UNEVEN),
}


@pytest.mark.parametrize("flags", GRIDS)
def test_generate_equals_the_pipeline(flags, whole, student, tmp_path):
    """`--sample-steps 4 --seed 0` writes, pixel for pixel, what the pipeline draws with the sigmas
    1, 0.75, 0.5, 0.25, which its scheduler shifts to 1, 0.9, 0.75, 0.5.
    """
    (expected,) = pipeline_images(student, PROMPTS[3], GRIDS[flags])
    image = generated(tmp_path / "out", "--student", whole / "student", *flags.split())
    assert image.size == (SIDE, SIDE)
    assert image.tobytes() == expected.tobytes()


TIMES = [(cdm.uniform_times(4, 3.0), QUARTERS), (torch.tensor(UNEVEN), unshifted(UNEVEN))]


@pytest.mark.parametrize("times, sigmas", TIMES, ids=["uniform", "uneven"])
@torch.no_grad()
def test_latents_equal_the_pipelines(times, sigmas, student):
    """The same before decoding, where no rounding to 256 levels hides a difference: to 1e-5."""
    sd3 = load_family()
    noise = torch.randn(1, *sd3.shape, generator=torch.Generator().manual_seed(0))
    model = cdm.Model(student.transformer, sd3)
    latent = cdm.sample(model, noise, times, sd3.encode([PROMPTS[3]]))
    expected = pipeline_images(student, PROMPTS[3], sigmas, output_type="latent")
    torch.testing.assert_close(latent, expected, rtol=0, atol=1e-5)


def test_generate_writes_a_picture_for_each_prompt_and_seed(whole, tmp_path, capfd):
    """Two prompts and two seeds are four different PNGs, whose names are what stdout says."""
    for seed in (0, 1):
        flags = ["--student", whole / "student", "--seed", seed]
        generate(tmp_path, "--generate", *PROMPTS[:2], *flags)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == 2 * [f"{p}, 32 pixels" for p in PROMPTS[:2]]
    names = [line.split(": ")[0] for line in lines]
    assert sorted(names) == sorted(map(str, tmp_path.glob("*.png")))
    assert len({Image.open(name).tobytes() for name in names}) == len(names) == 4


# --- The exported student. ---


@pytest.fixture(scope="session")
def ema(trained):
    """The pictures of the last checkpoint's average for all prompts, by the resumed run itself."""
    folder, flags = trained
    run = build("--output-dir", folder, "--resume", *flags)
    assert run.k == 6
    noise = torch.randn(1, *run.family.shape, generator=torch.Generator().manual_seed(0))
    times = cdm.uniform_times(4, run.family.shift)
    pictures = []
    for prompt in PROMPTS:  # one by one: in a batch an encoder's last bits may differ
        (image,) = run.family.images(run.ema_model, [noise], times, run.family.encode([prompt]))
        pictures.append(image.tobytes())
    return pictures


def readme_code(folder):
    """The code of student/README.md."""
    text = (folder / "student" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    return code


def readme_pictures(folder):
    """The pictures of that code for all prompts, in float32 and from the noise of seed 0."""
    code = readme_code(folder)
    assert code.count(repr(PROMPTS[0])) == 1
    assert "bfloat16" in code
    code = code.replace("bfloat16", "float32").replace("image.png", f"{folder.parent}/image.png")
    code = code.replace("sigmas=", "generator=torch.Generator().manual_seed(0), sigmas=")
    at = code.index("image =")
    scope = {}
    exec(code[:at], scope)
    scope["pipe"].set_progress_bar_config(disable=True)
    pictures = []
    for prompt in PROMPTS:
        exec(code[at:].replace(repr(PROMPTS[0]), repr(prompt)), scope)
        pictures.append(scope["image"].tobytes())
    assert Image.open(folder.parent / "image.png").tobytes() == pictures[-1]
    return pictures


def test_the_exported_student_used_as_its_readme_says(trained, ema, pipe):
    """student/README.md, followed to the letter, draws the pictures of the run's EMA.

    The teacher draws others, so it is not the teacher that is compared with itself.
    """
    assert readme_pictures(trained[0]) == ema
    teacher = [pipeline_images(pipe, prompt, QUARTERS)[0].tobytes() for prompt in PROMPTS]
    assert all(a != b for a, b in zip(teacher, ema, strict=True))


def test_generate_draws_what_the_ema_draws(trained, ema, tmp_path):
    """--generate with 4 steps writes the picture of the run's EMA, for LoRA too."""
    image = generated(tmp_path / "out", "--student", trained[0])
    assert image.tobytes() == ema[3]


def test_generate_leaves_out_what_training_left_out(tmp_path):
    """A student of --no-t5 is drawn without T5, with and without the flag."""
    folder = finished(tmp_path / "run", "--no-t5", "--iterations", 2)
    image = generated(tmp_path / "plain", "--student", folder).tobytes()
    assert generated(tmp_path / "flag", "--student", folder, "--no-t5").tobytes() == image
    (folder / "student" / "cdm.json").unlink()
    assert generated(tmp_path / "with_t5", "--student", folder).tobytes() != image


def test_students_readme_survives_any_prompt(tmp_path):
    """A first prompt with quotes, a backslash and braces leaves the README's code valid Python."""
    prompt = 'a "quoted" cat, \\ and {braces}'
    (tmp_path / "prompts.txt").write_text(prompt + "\n", encoding="utf-8")
    out = finished(tmp_path / "out", "--iterations", 1, "--prompts", tmp_path / "prompts.txt")
    tree = ast.parse(readme_code(out))
    assert prompt in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]


# --- Roles. ---


@torch.no_grad()
def test_role_is_the_transformer_at_a_thousand_t(pipe):
    """Model(net, family)(x, t, cond) is net(x, timestep=1000 t, ...): t = 0.75 is timestep 750."""
    sd3 = load_family()
    x = torch.randn(4, *sd3.shape)
    embeds, pooled = sd3.encode(PROMPTS[:4])
    t = torch.tensor([1.0, 0.75, 0.3, 0.02])
    v = pipe.transformer(x, embeds, pooled, timestep=1000 * t).sample
    assert torch.equal(cdm.Model(sd3.transformer, sd3)(x, t, (embeds, pooled)), v)


def pipeline_conditions(pipe, prompt):
    """What the pipeline's encode_prompt gives."""
    tokens = pipe.tokenizer_3.model_max_length
    embeds, _, pooled, _ = pipe.encode_prompt(prompt, None, None, max_sequence_length=tokens)
    return embeds, pooled


@torch.no_grad()
def test_conditions_are_the_pipelines(pipe):
    """encode() gives what the pipeline's encode_prompt gives, another one for each prompt."""
    embeds, pooled = pipeline_conditions(pipe, PROMPTS)
    ours = load_family().encode(PROMPTS)
    assert torch.equal(ours[0], embeds)
    assert torch.equal(ours[1], pooled)
    assert len({tuple(row) for row in pooled.tolist()}) == len(PROMPTS)


@torch.no_grad()
def test_uncond_is_the_empty_prompt(pipe):
    """uncond(n) is the empty prompt n times."""
    for ours, theirs in zip(load_family().uncond(3), pipeline_conditions(pipe, ""), strict=True):
        assert len(ours) == 3
        assert torch.equal(ours, theirs.expand_as(ours))


@torch.no_grad()
def test_without_t5_its_tokens_are_zero(pipe):
    """--no-t5 loads no T5. Its tokens are zeros, CLIP's stay."""
    embeds, _ = pipeline_conditions(pipe, PROMPTS)
    sd3 = load_family("--no-t5")
    assert sd3.pipe.text_encoder_3 is None
    text, _ = sd3.encode(PROMPTS)
    clip = text.shape[1] - sd3.max_tokens()
    assert torch.equal(text[:, :clip], embeds[:, :clip])
    assert not text[:, clip:].any()


ROLES = ["", "--lora-rank 4", "--anchor-aware-fake", "--lora-rank 4 --anchor-aware-fake"]


@pytest.mark.parametrize("flags", ROLES)
@torch.no_grad()
def test_all_roles_start_as_the_teacher(flags, pipe, tmp_path):
    """Student and fake score give the teacher's output to the last bit, whatever their anchor."""
    run = build("--output-dir", tmp_path / "none", *flags.split())
    x, t, cond = inputs(run)
    expected = cdm.Model(pipe.transformer, run.family)(x, t, cond)
    for role in (run.teacher, run.student.model, run.fake_score.model, run.teacher):
        assert torch.equal(role(x, t, cond), expected)
    if "--anchor-aware-fake" in flags:
        assert torch.equal(run.fake_score.model(x, t, cond, made_at=t.flip(0)), expected)


def test_building_a_run_writes_nothing(tmp_path):
    """The output folder appears with the first iteration."""
    build("--output-dir", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@torch.no_grad()
def test_the_anchor_aware_fake_score_learns_to_use_its_anchor(tmp_path):
    """After two iterations its output depends on the anchor's time. The student has none."""
    flags = ["--anchor-aware-fake", "--iterations", 2, "--output-dir", tmp_path / "out"]
    run = build(*flags)
    with torch.enable_grad():
        run.train()
    x, t, cond = inputs(run)
    near, far = (run.fake_score.model(x, t, cond, torch.full((4,), a)) for a in (0.5, 1.0))
    assert not torch.equal(near, far)
    student = load_file(tmp_path / "out/student/diffusion_pytorch_model.safetensors")
    assert not any("anchor" in name for name in student)


def student_gradients(run, others_in_between):
    """The student's gradients by name, if asked with teacher and fake score run before backward."""
    x, t, cond = inputs(run)
    v = run.student.model(x, t, cond)
    if others_in_between:
        with torch.no_grad():
            for role in (run.teacher, run.fake_score.model, run.teacher):
                role(x, t, cond)
    v.square().mean().backward()
    assert all(p.grad is None for p in run.fake_score.params.values())
    gradients = {name: p.grad for name, p in run.student.params.items()}
    run.student.optimizer.zero_grad()
    return gradients


def gradients_and_calls(trained, flag):
    """Gradients without and with other roles in between, and how often a block was called."""
    folder, flags = trained
    run = build("--output-dir", folder, "--resume", flag, *flags)
    calls = []
    block = run.student.model.transformer.transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    alone = student_gradients(run, others_in_between=False)
    n = len(calls)
    return alone, student_gradients(run, others_in_between=True), n, len(calls) - n


def test_gradients_survive_checkpointing_and_other_roles(trained):
    """Forward, other roles, backward gives the gradients of forward and backward alone.

    With LoRA the roles share their frozen weights, and nothing else.
    """
    expected, other, kept, kept_others = gradients_and_calls(trained, "--no-gradient-checkpointing")
    idle = [name for name, g in expected.items() if g is None or not g.any()]
    assert len(expected) > 60
    # SD3 drops the output of its last text stream.
    assert all("blocks.3.attn.add_q_proj" in name for name in idle), idle
    again, again_other, twice, twice_others = gradients_and_calls(
        trained, "--gradient-checkpointing"
    )
    # A block is called twice where activations are recomputed.
    assert (kept, kept_others, twice, twice_others) == (1, 1, 2, 2)
    for found in (other, again, again_other):
        for name, g in expected.items():
            torch.testing.assert_close(found[name], g, rtol=0, atol=0)


# --- LoRA. ---


@torch.no_grad()
def test_lora_leaves_the_base_alone(lora, pipe):
    """After training, with the adapters off, the network is the teacher to the bit."""
    run = build("--output-dir", lora, "--resume", "--lora-rank", 4)
    x, t, cond = inputs(run)
    student, fake, teacher = (
        role(x, t, cond) for role in (run.student.model, run.fake_score.model, run.teacher)
    )
    assert torch.equal(teacher, cdm.Model(pipe.transformer, run.family)(x, t, cond))
    assert not torch.equal(student, teacher)
    assert not torch.equal(fake, teacher)
    assert not torch.equal(student, fake)


@pytest.mark.parametrize("file", ["student", "fake_score", "ema"])
def test_lora_checkpoints_hold_adapters_alone(file, lora):
    """The frozen network is not saved again and again."""
    names = load_file(shard(lora / "checkpoint_000006" / file))
    assert all("lora_" in name for name in names)


def test_lora_trains_with_the_authors_scale():
    """Rank 4 trains with alpha 8."""
    run = build("--lora-rank", 4)
    configs = run.student.model.transformer.peft_config.values()
    assert {(config.r, config.lora_alpha) for config in configs} == {(4, 8)}


def test_lora_export_has_the_rank(lora):
    """Each exported matrix A has as many rows as --lora-rank says."""
    (file,) = (lora / "student").glob("*.safetensors")
    sizes = {len(x) for name, x in load_file(file).items() if "lora_A" in name}
    assert sizes == {4}
