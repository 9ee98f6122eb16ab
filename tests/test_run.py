"""The run: what an iteration gets, resume, checkpoints, log, grids, students along the way."""

import json
import os
import re
import shlex
import shutil

import pytest
import torch
from helpers import DATA, PROMPTS, ROOT, SMALL, load_family, run, small_run, watch
from pictures import grid, readme_picture, sample_noise
from reference import differences
from results import assert_same_figures, assert_same_run, check_mistake, checkpoints, log, tensors

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


@pytest.fixture
def asked(monkeypatch):
    """The prompts of each call of encode()."""
    lists = []
    encode = cdm.Family.encode

    def watched(family, prompts):
        lists.append(prompts)
        return encode(family, prompts)

    monkeypatch.setattr(cdm.Family, "encode", watched)
    return lists


def test_an_iteration_gets_its_prompts_and_draws(asked, tmp_path, monkeypatch):
    """The Draw of (seed, k) at the teacher's shift, prompts drawn anew, one empty prompt."""
    calls = []
    watch(monkeypatch, calls.append)
    flags = ["--micro-batch-size", 3, "--seed", 5, "--time-low", 0.3, "--fake-lr", 2e-3]
    small_run(tmp_path / "run", *flags)
    prompts = [x for x in asked if len(x) == 4]
    assert len(set(map(tuple, prompts))) == 6
    assert set(sum(prompts, [])) == set(PROMPTS)
    family = load_family()
    for k, call in enumerate(calls, 1):
        assert (call.k, call.micro_batch, call.cfg.time_low) == (k, 3, 0.3)
        assert (call.student.lr, call.fake_score.lr) == (3e-3, 2e-3)
        want = cdm.draw_iteration(call.cfg, 5, k, 4, family.shape, 3.0)
        assert differences(call.draw, want) == set()
        assert all(map(torch.equal, call.cond, family.encode(prompts[k - 1])))
        assert all(map(torch.equal, call.uncond, family.uncond))


# --- Resume. ---


def test_resume_bit_for_bit(trained, tmp_path):
    """The last two of six iterations come again from the checkpoint of the fourth.

    The log's later line is dropped. The straight run drew grids with the EMA's weights, this does
    not.
    """
    expected, flags = trained
    folder = shutil.copytree(expected, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint_000006")
    small_run(folder, "--resume", *flags)
    assert_same_run(folder, expected)


def test_resume_before_the_first_student_update_and_with_memory_flags(full, tmp_path):
    """There is no log yet. Offloaded text encoders, kept activations and the EMA on the CPU change
    no bit.
    """
    folder = small_run(tmp_path / "run", "--iterations", 1)
    memory = ["--offload-text-encoders", "--no-gradient-checkpointing", "--ema-device", "cpu"]
    small_run(folder, "--resume", *memory)
    assert_same_run(folder, full)


def test_micro_batches_change_the_order_of_sums_alone(full, tmp_path):
    """Of 3 and 1 samples instead of 4."""
    folder = small_run(tmp_path / "run", "--micro-batch-size", 3)
    assert_same_figures(log(folder), log(full))


# All of the method's settings are compared in the same way as three of them. The rest are others.
OTHERS = "--alpha 2, --schedule fixed, --warmup 5, --teacher other, --prompts other.txt, --no-t5"
OTHERS += ", --seed 1, --batch-size 8, --resolution 16, --lora-rank 4, --weights bfloat16"


def read_checkpoint(folder, flags):
    """What --resume does first: it compares settings, and reads the newest checkpoint."""
    resumed = [*DATA, *SMALL, "--output-dir", str(folder), "--resume", *flags.split()]
    return cdm.resume({}, cdm.parse_args(resumed))


def test_resume_takes_the_newest_checkpoint(full):
    assert read_checkpoint(full, "") == 6


@pytest.mark.parametrize("flags", OTHERS.split(", "))
def test_resume_of_another_run_is_refused(flags, full, capfd):
    """A run of seed 0 resumed with `--seed 1` would be neither the one nor the other."""
    with pytest.raises(SystemExit) as end:
        read_checkpoint(full, flags)
    assert end.value.code == 2
    assert f"cdm.py: --resume: {flags.split()[0]} is " in capfd.readouterr().err


@pytest.mark.parametrize("name", ["anchor_lr", "clip"])
def test_a_checkpoint_of_another_version_is_named_so(name, full, tmp_path, capfd):
    """It has a setting that is unknown here, or lacks one. It is not compared as if equal."""
    folder = shutil.copytree(full, tmp_path / "run")
    file = folder / "checkpoint_000006" / "run.json"
    settings = json.loads(file.read_text())
    if name in settings:
        del settings[name]
    else:
        settings[name] = 0.1
    file.write_text(json.dumps(settings))
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
    start, *later = [grid(full, k, rows=5, count=2, side=32) for k in (0, 3, 6)]
    assert (start[2], start[4]) == (start[1], start[3])
    for before, rows in zip([start, *later], later, strict=False):
        for y in (0, 1, 3):
            assert rows[y] == start[y]
        for y in (2, 4):
            assert rows[y] != before[y]


def test_students_along_the_way(tmp_path):
    """--export-every 2 keeps them all, each like student/ after as many iterations."""
    folder = small_run(tmp_path / "run", "--iterations", 4, "--export-every", 2)
    paths = sorted((folder / "students").iterdir())
    assert [path.name for path in paths] == ["step_000002", "step_000004"]
    file = "diffusion_pytorch_model.safetensors"
    two, four, last = ((path / file).read_bytes() for path in (*paths, folder / "student"))
    assert two != four == last


def test_a_file_of_prompts_and_another_size(asked, tmp_path):
    """A byte order mark, blank lines, blanks, CRLF and duplicates are tolerated.

    student/README.md draws at the size that was trained. Its code holds any prompt.
    """
    prompts = ['a "quoted" cat, it\'s \\ and {braces}', "日本の狐"]
    text = "\ufeff{0}\r\n\r\n  {1} \n\n{0}\n".format(*prompts)
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    flags = ["--prompts", tmp_path / "prompts.txt", "--resolution", 16, "--iterations", 1]
    folder = small_run(tmp_path / "run", *flags, "--sample-count", 3)
    assert [*prompts, prompts[0]] in asked
    noise = sample_noise(load_family("--resolution", 16))
    assert readme_picture(folder, noise).size == (16, 16)


def test_ablations_by_flags(tmp_path):
    """They run together: L_CDM is not logged, the fixed schedule has 4 times, R is 1."""
    flags = "--schedule fixed --cdm-weight 0 --cdm-point renoise --student-every 1 --no-t5"
    folder = small_run(tmp_path / "run", "--iterations", 2, *flags.split())
    lines = log(folder)
    assert [line["iteration"] for line in lines] == [1, 2]
    assert all(line["N"] == 4 and "loss_cdm" not in line for line in lines)


RUN_DEFAULTS = {"teacher": "stabilityai/stable-diffusion-3-medium", "iterations": 4000}
RUN_DEFAULTS |= {"batch_size": 16, "resolution": 0, "lora_rank": 0, "weights": "float32"}
RUN_DEFAULTS |= {"no_t5": False, "sample_steps": [4], "gradient_checkpointing": True}


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
