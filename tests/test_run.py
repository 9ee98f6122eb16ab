"""The run: output folder, checkpoints, resume, signals, divergence, log, samples."""

import json
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import (
    LIVELY,
    ROOT,
    TEACHER,
    cdm_main,
    check_mistake,
    check_sentence,
    finish,
    finished,
    freeze_when,
    kill_9,
    log,
    logged,
    process,
    results,
    shard,
    snapshot,
)
from PIL import Image
from safetensors.torch import load_file, save_file


def test_output_dir_in_use(whole, tmp_path, capfd):
    """A run is never started over another one, nor over a folder with somebody's files, nor
    over a file.
    """
    assert "--resume" in check_mistake(capfd, whole, [*LIVELY, "--output-dir", whole], str(whole))
    (tmp_path / "thesis.txt").write_text("years of work")
    for place in (tmp_path, tmp_path / "thesis.txt", tmp_path / "thesis.txt" / "out"):
        check_mistake(capfd, tmp_path, [*LIVELY, "--output-dir", place], str(place))


def test_resume_without_a_run(tmp_path, capfd):
    """`--resume` in a folder that is empty, or holds other things, does not start a run there."""
    check_mistake(
        capfd, tmp_path, [*LIVELY, "--resume", "--output-dir", tmp_path], "--resume", str(tmp_path)
    )
    (tmp_path / "thesis.txt").write_text("years of work")
    check_mistake(
        capfd, tmp_path, [*LIVELY, "--resume", "--output-dir", tmp_path], "--resume", str(tmp_path)
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--seed 1",
        "--batch-size 16",
        "--resolution 4",
        "--lora-rank 4",
        "--prompts other.txt",
        "--teacher other",
        "--micro-batch-size 2",
        "--student-every 3",
        "--anchor-aware-fake",
        "--no-t5",
    ],
)
def test_resume_of_another_run(flags, whole, tmp_path, monkeypatch, capfd):
    """A run of seed 0 resumed with `--seed 1` would be neither the one nor the other: the
    sentence names both values.
    """
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text("a handwritten digit one\n")
    shutil.copytree(TEACHER, "other")
    name = flags.split()[0].removeprefix("--")
    check_mistake(
        capfd, whole, [*LIVELY, "--output-dir", whole, "--resume", *flags.split()], "--resume", name
    )
    assert sorted(os.listdir(tmp_path)) == ["other", "other.txt"]


def test_resume_of_a_full_run_as_lora_and_the_reverse(whole, lora, capfd):
    """Adapters and full weights are different runs."""
    check_mistake(
        capfd, whole, [*LIVELY, "--output-dir", whole, "--resume", "--lora-rank", 4], "lora-rank"
    )
    check_mistake(capfd, lora, [*LIVELY, "--output-dir", lora, "--resume"], "lora-rank")


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--lora-rank 4",
        "--anchor-aware-fake",
        "--no-gradient-checkpointing --micro-batch-size 2",
    ],
)
def test_resume_bit_for_bit(flags, request, work, tmp_path):
    """3 iterations and then 3 more are 6 iterations: the same bytes in checkpoint and student/,
    the same log.
    """
    flags = flags.split()
    if not flags or "--lora-rank" in flags:
        straight = request.getfixturevalue("lora" if flags else "whole")
    else:
        straight = finished(tmp_path / "straight", "--iterations", 6, *flags)
    parts = finished(tmp_path / "parts", "--iterations", 3, *flags)
    assert results(parts) != results(straight)
    finished(parts, "--iterations", 6, "--resume", *flags)
    assert results(parts) == results(straight)
    assert (
        cdm_main(*LIVELY, "--output-dir", parts, "--iterations", 5, "--resume", *flags) == 2
    )  # it is past that
    assert results(parts) == results(straight)
    assert [line["iteration"] for line in log(parts)] == [2, 4, 6]


def test_checkpoints_are_the_newest_two_and_hold_no_pickle(whole, lora):
    """Of the checkpoints at 2, 4 and 6 the latter two are left; all tensors are in safetensors."""
    for folder in (whole, lora):
        assert sorted(p.name for p in folder.glob("checkpoint*")) == [
            "checkpoint_000004",
            "checkpoint_000006",
        ]
        suffixes = {p.suffix for p in folder.rglob("*") if p.is_file()}
        assert suffixes <= {"", ".safetensors", ".json", ".jsonl", ".md", ".png"}, suffixes
    source = (ROOT / "cdm.py").read_text()
    assert "pickle" not in source
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", source))


def test_kill_9_before_the_first_checkpoint_and_in_the_middle_of_a_save(whole, tmp_path):
    """A run killed at its first log line, resumed, killed while checkpoint_000003.tmp or so is
    half written, and resumed once more ends with the same bytes as the uninterrupted run, and
    nothing half written is left.
    """
    folder = tmp_path / "run"
    flags = [*LIVELY, "--iterations", "6", "--output-dir", folder]
    first = process("cdm.py", *flags, "--save-every", "100")
    freeze_when(first, lambda: logged(folder))
    assert not list(folder.glob("checkpoint*"))
    kill_9(first)

    def saving():  # a second or later checkpoint, so that there is one to lose
        names = [p.name for p in folder.glob("checkpoint*")]
        return any(name.endswith(".tmp") for name in names) and any(
            not name.endswith(".tmp") for name in names
        )

    second = process("cdm.py", *flags, "--save-every", "1", "--resume")
    freeze_when(second, saving)
    kill_9(second)
    assert saving()
    assert not (folder / "student").exists()
    assert cdm_main(*flags, "--resume") == 0
    assert results(folder) == results(whole)
    assert not list(folder.rglob("*.tmp"))


def test_a_disk_that_is_full_in_the_middle_of_a_save(whole, tmp_path):
    """No file may grow beyond 1 MB: one sentence, no traceback; with room again, the run goes
    on from where it was.
    """
    folder = shutil.copytree(whole, tmp_path / "run")
    limit = (
        "import resource, sys, cdm\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "sys.exit(cdm.main())"
    )
    code, _, err = finish(
        process("-c", limit, *LIVELY, "--iterations", 8, "--resume", "--output-dir", folder)
    )
    assert code == 2 and "Traceback" not in err, err
    check_sentence("", err.splitlines(True)[-1], "File too large", "space left on the disk")
    assert sorted(p.name for p in folder.glob("checkpoint_??????")) == [
        "checkpoint_000004",
        "checkpoint_000006",
    ]
    assert cdm_main(*LIVELY, "--iterations", 8, "--resume", "--output-dir", folder) == 0
    assert not list(folder.glob("*.tmp")) and (folder / "checkpoint_000008").exists()


def test_sigterm_and_sigint(whole, tmp_path):
    """kill PID and Ctrl-C: exit code 0, a checkpoint of the last finished iteration, a student,
    a run that goes on.
    """

    def interrupted(number):
        folder = tmp_path / number.name
        popen = process(
            "cdm.py",
            *LIVELY,
            "--iterations",
            100000,
            "--save-every",
            100000,
            "--output-dir",
            folder,
        )
        freeze_when(popen, lambda: logged(folder))
        popen.send_signal(number)
        popen.send_signal(signal.SIGCONT)
        return folder, finish(popen)

    with ThreadPoolExecutor() as threads:
        runs = list(threads.map(interrupted, (signal.SIGTERM, signal.SIGINT)))
    for folder, (code, _, err) in runs:
        assert code == 0 and "Traceback" not in err, err
        (checkpoint,) = folder.glob("checkpoint_*")
        k = json.loads((checkpoint / "state.json").read_text())["iteration"]
        assert 2 <= k < 6 and checkpoint.name == f"checkpoint_{k:06d}"
        assert log(folder)[-1]["iteration"] == k - k % 2
        assert (folder / "student" / "diffusion_pytorch_model.safetensors").exists()
        assert cdm_main(*LIVELY, "--output-dir", folder, "--resume") == 0
        assert results(folder) == results(whole)


@pytest.mark.parametrize(
    "flags, loss",
    [("--fake-lr 1e30", "loss_fake"), ("--student-lr 1e30 --dm-weight 0 --ca-weight 0", "loss_")],
)
def test_divergence(flags, loss, tmp_path, capfd):
    """A learning rate of 1e30 is too high.

    The sentence says which loss and iteration, and no checkpoint holds a NaN.
    """
    code = cdm_main(
        *LIVELY,
        "--save-every",
        "1",
        "--iterations",
        "50",
        "--output-dir",
        tmp_path / "out",
        *flags.split(),
    )
    sentence = capfd.readouterr().err.splitlines()[-1]
    found = re.match(rf"cdm\.py: .*{loss}.* iteration (\d+)", sentence)
    assert code == 2 and found, sentence
    checkpoints = sorted((tmp_path / "out").glob("checkpoint_*"))
    assert checkpoints[-1].name == f"checkpoint_{int(found[1]) - 1:06d}"
    for file in (tmp_path / "out").rglob("*.safetensors"):
        assert all(x.isfinite().all() for x in load_file(file).values()), file
    assert not (tmp_path / "out" / "student").exists()


def test_loss_that_is_not_finite_leaves_the_last_checkpoint(whole, tmp_path, capfd):
    """A student whose weights became NaN: the run stops in iteration 7 and checkpoints 4 and 6,
    student/ and log stay.
    """
    folder = shutil.copytree(whole, tmp_path / "run")
    file = shard(folder / "checkpoint_000006" / "student", 1)
    weights = load_file(file)
    weights["proj_out.weight"][0, 0] = torch.nan
    save_file(weights, file)
    before = snapshot(folder)
    assert (
        cdm_main(*LIVELY, "--output-dir", folder, "--iterations", 10, "--save-every", 1, "--resume")
        == 2
    )
    assert re.search(
        r"^cdm\.py: loss_fake.* iteration 7\b", capfd.readouterr().err.splitlines()[-1]
    )
    assert snapshot(folder) == before

    shutil.rmtree(folder / "checkpoint_000006")  # the user's way out
    assert cdm_main(*LIVELY, "--output-dir", folder, "--iterations", 6, "--resume") == 0
    assert results(folder) == results(whole)


def test_log(whole):
    """Six iterations with R = 2: lines for 2, 4 and 6, each with every figure the project
    promises.
    """
    lines = log(whole)
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    names = {
        "loss_ca",
        "loss_dm",
        "loss_cdm",
        "loss_fake",
        "grad_norm_student",
        "grad_norm_fake",
        "w_ca",
        "w_dm",
        "w_cdm",
        "cos_ca_dm",
        "N",
    }
    for line in lines:
        assert names | {"iteration"} == set(line)
        assert 1 <= line["N"] <= 4 and -1 <= line["cos_ca_dm"] <= 1
        assert all(
            0 < line[name] <= 10 for name in ("w_ca", "w_dm", "w_cdm")
        )  # the floor of 0.1 bounds w by 10


def test_samples(whole):
    """--sample-every 3 --sample-count 2: grids after 3 and 6, two pictures wide and three high
    (teacher at 28 steps with CFG, teacher at 4, student at 4), whose teacher rows are the same
    and whose student row is not.
    """
    files = sorted((whole / "samples").iterdir())
    assert [file.name for file in files] == ["step_000003.png", "step_000006.png"]
    three, six = (Image.open(file) for file in files)
    assert three.size == six.size == (2 * 96 + 4, 3 * (96 + 20))
    teacher, student = (0, 0, 196, 232), (0, 252, 196, 348)
    assert three.crop(teacher).tobytes() == six.crop(teacher).tobytes()
    assert three.crop(student).tobytes() != six.crop(student).tobytes()


ABLATIONS = [
    "--ca-weight 0",
    "--dm-weight 0",
    "--cdm-weight 0",
    "--ca-weight 0 --dm-weight 0",
    "--schedule fixed",
    "--schedule fixed --cdm-weight 0",
    "--cdm-point anchor",
    "--cdm-point renoise",
    "--stratified",
    "--no-t5",
    "--student-every 1",
    "--micro-batch-size 2",
    "--fake-pull 1",
    "--anchor-aware-fake --cdm-weight 0",
]


@pytest.mark.parametrize("flags", ABLATIONS)
def test_ablations(flags, tmp_path):
    """The rows of the paper's ablation tables that are flags; one student update each.

    A loss of weight 0 is not in the log.
    """
    finished(tmp_path / "out", "--iterations", 2, *flags.split())
    line = log(tmp_path / "out")[-1]
    for name in ("ca", "dm", "cdm"):
        assert (
            (f"loss_{name}" in line) == (f"w_{name}" in line) == (f"--{name}-weight 0" not in flags)
        )
    assert ("cos_ca_dm" in line) == ("--ca-weight 0" not in flags and "--dm-weight 0" not in flags)
    if "fixed" in flags:
        assert line["N"] == 4
    assert (tmp_path / "out" / "student" / "config.json").exists()
