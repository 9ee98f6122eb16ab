"""The run: what an iteration gets, resume, checkpoints, log, grids, students along the way."""

import ast
import json
import os
import re
import shlex
import shutil

import pytest
import torch
from helpers import (
    DATA,
    KINDS,
    PROMPTS,
    ROOT,
    SMALL,
    assert_same_figures,
    assert_same_run,
    check_mistake,
    checkpoints,
    grid,
    load_family,
    log,
    readme_picture,
    run,
    sample_noise,
    small_run,
    snapshot,
    tensors,
    watch,
)

import cdm


def test_readmes_first_command_runs(tmp_path, monkeypatch):
    """As it stands in README.md, but for its length and its folder."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    command = re.search(r"python cdm.py (--teacher tests/emoji_sd3 .*)", text)[1]
    assert " --output-dir runs/emoji " in command
    shorter = ["--iterations", 2, "--batch-size", 4, "--sample-count", 1, "--sample-every", 2]
    run(*shlex.split(command), *shorter, "--output-dir", tmp_path / "run")
    assert [line["iteration"] for line in log(tmp_path / "run")] == [2]
    assert (tmp_path / "run" / "samples" / "step_000002.png").exists()


def test_an_iteration_gets_its_prompts_and_draws(tmp_path, monkeypatch):
    """The Draw of (seed, k) at the teacher's shift, prompts drawn anew, one empty prompt."""
    calls = []
    watch(monkeypatch, calls.append)
    flags = ["--iterations", 6, "--micro-batch-size", 3, "--seed", 5, "--time-low", 0.3]
    small_run(tmp_path / "run", *flags)
    family = load_family()
    texts = list(family.encode(PROMPTS)[0])
    chosen = []
    for k, call in enumerate(calls, 1):
        assert (call.k, call.micro_batch, call.cfg.time_low) == (k, 3, 0.3)
        want = cdm.draw_iteration(call.cfg, 5, k, 4, family.shape, 3.0)
        for name, x in vars(want).items():
            found = getattr(call.draw, name)
            if isinstance(x, dict):
                assert all(torch.equal(found[key], x[key]) for key in x)
            else:
                assert torch.equal(found, x)
        assert all(map(torch.equal, call.uncond, family.uncond))
        chosen.append([])
        for row in call.cond[0]:
            distances = torch.stack([(row - text).abs().max() for text in texts])
            assert distances.min() < 1e-5
            chosen[-1].append(int(distances.argmin()))
    assert len(calls) == 6
    assert len(set(map(tuple, chosen))) == 6
    assert set(sum(chosen, [])) == set(range(len(PROMPTS)))


# --- Resume. ---


@pytest.mark.parametrize("kind", KINDS)
def test_resume_bit_for_bit(kind, request, tmp_path):
    """3 iterations and then 3 more are 6: the same checkpoint and student/, the same log.

    The straight run drew grids between, for which its student has the EMA's weights.
    """
    parts = small_run(tmp_path / "parts", "--iterations", 3, *KINDS[kind])
    small_run(parts, "--resume", *KINDS[kind])
    assert_same_run(parts, request.getfixturevalue(kind))


def test_resume_drops_later_lines_of_the_log(full, tmp_path):
    """A run that was killed after its last checkpoint has logged more than it saved."""
    folder = shutil.copytree(full, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint_000006")
    assert log(folder)[-1]["iteration"] == 6
    small_run(folder, "--resume")
    assert_same_run(folder, full)


def test_memory_flags_change_nothing(full, tmp_path):
    """The same bits with text encoders offloaded, activations kept and the EMA on the CPU."""
    memory = ["--offload-text-encoders", "--no-gradient-checkpointing", "--ema-device", "cpu"]
    assert_same_run(small_run(tmp_path / "run", *memory), full)


def test_micro_batches_change_the_order_of_sums_alone(full, tmp_path):
    """Of 3 and 1 samples instead of 4."""
    folder = small_run(tmp_path / "run", "--micro-batch-size", 3)
    assert_same_figures(log(folder), log(full))


def resume(folder, *flags):
    """What `--resume` does first: compare the settings. It ends here if they differ."""
    flags = [*DATA, *SMALL, "--output-dir", folder, "--resume", *flags]
    return cdm.resume({}, cdm.parse_args(list(map(str, flags))))


# All of the method's settings are compared in the same way. These are the others.
OTHERS = "--seed 1, --batch-size 8, --resolution 16, --lora-rank 4, --weights bfloat16, --no-t5"
OTHERS += ", --teacher other, --prompts other.txt, --alpha 2, --schedule fixed, --warmup 5"


@pytest.mark.parametrize("flags", OTHERS.split(", "))
def test_resume_of_another_run_is_refused(flags, full, capfd):
    """A run of seed 0 resumed with `--seed 1` would be neither the one nor the other."""
    with pytest.raises(SystemExit) as end:
        resume(full, *flags.split())
    assert end.value.code == 2
    assert f"cdm.py: --resume: {flags.split()[0]} is " in capfd.readouterr().err


@pytest.mark.parametrize("change", ["unknown", "missing"])
def test_a_checkpoint_of_another_version_is_named_so(change, full, tmp_path, capfd):
    """It has a setting that is unknown here, or lacks one. It is not compared as if equal."""
    folder = shutil.copytree(full, tmp_path / "run")
    file = folder / "checkpoint_000006" / "run.json"
    settings = json.loads(file.read_text())
    if change == "unknown":
        settings["anchor_lr"] = 0.1
    else:
        del settings["clip"]
    file.write_text(json.dumps(settings))
    name = {"unknown": "anchor_lr", "missing": "clip"}[change]
    flags = [*DATA, *SMALL, "--output-dir", folder, "--resume"]
    check_mistake(capfd, folder, flags, "checkpoint_000006", "another version", name)


# --- Checkpoints. ---


def test_checkpoints_are_the_newest_two(trained):
    """Of those at 2, 4 and 6."""
    assert checkpoints(trained[0]) == ["checkpoint_000004", "checkpoint_000006"]


def test_a_checkpoint_that_cannot_be_removed_stays(tmp_path, monkeypatch, capfd):
    """As on a network file system. The run says so and goes on."""

    def refuse(*_, **__):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(os, "rmdir", refuse)
    folder = small_run(tmp_path / "run", "--iterations", 3, "--save-every", 1)
    assert checkpoints(folder)[-2:] == ["checkpoint_000002", "checkpoint_000003"]
    assert "checkpoint_000001" in capfd.readouterr().err
    assert (folder / "student" / "config.json").exists()


def test_values_that_are_not_finite_end_the_run(tmp_path, capfd):
    """A learning rate of 1e17: the loss and the iteration are said, and nothing of it is saved."""
    folder = tmp_path / "run"
    flags = [*DATA, *SMALL, "--save-every", 1, "--fake-lr", 1e17, "--output-dir", folder]
    with pytest.raises(SystemExit) as end:
        run(*flags)
    assert end.value.code == 2
    sentence = capfd.readouterr().err.rpartition("cdm.py: ")[2]
    (last,) = checkpoints(folder)
    assert last == "checkpoint_000001"
    assert "iteration 2" in sentence and "loss_fake" in sentence
    assert all(x.isfinite().all() for x in tensors(folder / last).values())
    assert not (folder / "student").exists()


# --- The log, grids and students. ---


def test_log(full):
    """Six iterations with R = 2: lines for 2, 4 and 6, each with every figure."""
    lines = log(full)
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    names = "loss_ca loss_dm loss_cdm loss_fake grad_norm_student grad_norm_fake N"
    names = {"iteration", "w_ca", "w_dm", "w_cdm", *names.split()}
    for line in lines:
        assert set(line) == names
        assert line["N"] in (1, 2, 3, 4)
        # The floor of 0.1 bounds w by 10.
        assert all(0 < line[name] <= 10 for name in ("w_ca", "w_dm", "w_cdm"))


def test_grids(full):
    """After 0, 3 and 6 iterations. The teacher's rows stay, the student's start as the teacher's.

    Rows: teacher at 28 steps; teacher, student at 4 steps; teacher, student at 1. Two columns.
    """
    names = [path.name for path in sorted((full / "samples").iterdir())]
    assert names == ["step_000000.png", "step_000003.png", "step_000006.png"]
    pictures = {}
    for k in (0, 3, 6):
        rows = grid(full, k, rows=5, count=2, side=32)
        pictures[k] = [[image.tobytes() for image in row] for row in rows]
    for k in (3, 6):
        for row in (0, 1, 3):
            assert pictures[k][row] == pictures[0][row]
        for row in (2, 4):
            assert pictures[k][row] != pictures[k - 3][row]
    assert pictures[0][2] == pictures[0][1]
    assert pictures[0][4] == pictures[0][3]


def test_students_along_the_way(tmp_path):
    """--export-every 2 keeps them all, each like student/ after as many iterations."""
    flags = ["--iterations", 4, "--export-every", 2]
    folder = small_run(tmp_path / "run", *flags)
    two, four = sorted((folder / "students").iterdir())
    assert (two.name, four.name) == ("step_000002", "step_000004")
    weights = "diffusion_pytorch_model.safetensors"
    assert snapshot(four)[weights] == snapshot(folder / "student")[weights]
    assert snapshot(two)[weights] != snapshot(four)[weights]


def test_another_size_and_a_prompt_with_quotes(tmp_path):
    """student/README.md draws at the size that was trained, and its code holds any prompt."""
    prompt = 'a "quoted" cat, it\'s \\ and {braces}'
    (tmp_path / "prompts.txt").write_text(prompt + "\n", encoding="utf-8")
    flags = ["--prompts", tmp_path / "prompts.txt", "--resolution", 16, "--iterations", 1]
    folder = small_run(tmp_path / "run", *flags)
    noise = sample_noise(load_family("--resolution", 16))
    assert readme_picture(folder, noise).size == (16, 16)
    assert json.loads((folder / "checkpoint_000001" / "run.json").read_text())["resolution"] == 16
    code = (folder / "student" / "README.md").read_text(encoding="utf-8")
    call = next(line.strip() for line in code.splitlines() if "sigmas=times" in line)
    assert prompt in [node.value for node in ast.walk(ast.parse(call)) if hasattr(node, "value")]


ABLATIONS = {
    "--schedule fixed --cdm-weight 0": {"N": 4, "loss_cdm": None},
    "--cdm-point renoise --ca-weight 0 --stratified --student-every 1 --no-t5": {},
}


@pytest.mark.parametrize("flags", ABLATIONS)
def test_ablations_run(flags, tmp_path):
    folder = small_run(tmp_path / "run", "--iterations", 2, *flags.split())
    line = log(folder)[-1]
    for name, value in ABLATIONS[flags].items():
        assert line.get(name) == value
    assert len(log(folder)) == 1 + ("--student-every" in flags)


# --- Prompts and defaults. ---


def test_prompts_from_a_file(tmp_path, monkeypatch):
    """A byte order mark, blank lines, blanks, CRLF and duplicates are tolerated."""
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffein Fuchs\r\n\r\n  日本の狐 \n\nein Fuchs\nun café".encode())
    asked = []
    encode = cdm.Family.encode
    monkeypatch.setattr(
        cdm.Family,
        "encode",
        lambda family, prompts: asked.append(prompts) or encode(family, prompts),
    )
    flags = ["--prompts", file, "--iterations", 1, "--sample-count", 4]
    small_run(tmp_path / "run", *flags)
    assert ["ein Fuchs", "日本の狐", "un café", "ein Fuchs"] in asked


RUN_DEFAULTS = {
    "teacher": "stabilityai/stable-diffusion-3-medium",
    "iterations": 4000,
    "batch_size": 16,
    "resolution": 0,
    "lora_rank": 0,
    "weights": "float32",
    "no_t5": False,
    "sample_steps": [4],
    "gradient_checkpointing": True,
}


def test_the_defaults_of_a_run_are_the_authors(monkeypatch, tmp_path):
    """Here, on a CPU, of one process with 16 samples. The prompts are 2,016 of our own."""
    monkeypatch.chdir(tmp_path)
    args = cdm.parse_args([])
    for name, value in RUN_DEFAULTS.items():
        assert getattr(args, name) == value
    for name, value in vars(cdm.CDMConfig()).items():
        assert getattr(args, name) == value
    prompts = open(args.prompts, encoding="utf-8").read().splitlines()
    assert len(set(prompts)) == len(prompts) == 2016
