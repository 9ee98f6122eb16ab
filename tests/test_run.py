"""The run: output folder, checkpoints, resume, signals, divergence, log, samples."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    LIVELY,
    ONE_SAVE,
    ROOT,
    SIGNALS,
    TEACHER,
    cdm_main,
    check_mistake,
    check_sentence,
    checkpoints,
    files_limited_to,
    finished,
    log,
    results,
    saying,
    scale_weights,
    shard,
    snapshot,
    state,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import cdm

# --- The output folder. ---


def test_a_run_is_not_started_over_another(whole, capfd):
    """--output-dir with a run: the sentence offers --resume."""
    flags = [*LIVELY, "--output-dir", whole]
    assert "--resume" in check_mistake(capfd, whole, flags, str(whole))


@pytest.mark.parametrize("place", [".", "thesis.txt", "thesis.txt/out"])
def test_output_dir_in_use(place, tmp_path, capfd):
    """Nor over a folder with somebody's files, nor over a file."""
    (tmp_path / "thesis.txt").write_text("years of work")
    place = tmp_path / place
    check_mistake(capfd, tmp_path, [*LIVELY, "--output-dir", place], str(place))


@pytest.mark.parametrize("files", [[], ["thesis.txt"]])
def test_resume_without_a_run(files, tmp_path, capfd):
    """`--resume` in a folder that is empty, or holds other things, does not start a run there."""
    for name in files:
        (tmp_path / name).write_text("years of work")
    flags = [*LIVELY, "--resume", "--output-dir", tmp_path]
    check_mistake(capfd, tmp_path, flags, "--resume", str(tmp_path))


OTHER_RUNS = [
    *("--seed 1", "--batch-size 16", "--resolution 16", "--lora-rank 4", "--prompts other.txt"),
    *("--teacher other", "--micro-batch-size 2", "--student-every 3", "--anchor-aware-fake"),
    *("--no-t5", "--weights bfloat16", "--alpha 2", "--warmup 5", "--max-schedule-steps 5"),
]


@pytest.mark.parametrize("flags", OTHER_RUNS)
def test_resume_of_another_run(flags, whole, tmp_path, monkeypatch, capfd):
    """A run of seed 0 resumed with `--seed 1` would be neither the one nor the other."""
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text("an animal\n")
    scale_weights(Path(shutil.copytree(TEACHER, "other")), 1.05)
    name = flags.split()[0]
    flags = [*LIVELY, "--output-dir", whole, "--resume", *flags.split()]
    check_mistake(capfd, whole, flags, "--resume", name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "other.txt"]


def test_resume_of_a_lora_run_as_a_full_one(lora, capfd):
    """Adapters and full weights are different runs."""
    check_mistake(capfd, lora, [*LIVELY, "--output-dir", lora, "--resume"], "--lora-rank")


def test_resume_with_fewer_iterations(whole, capfd):
    """A run at iteration 6 cannot end at 5."""
    flags = [*LIVELY, "--output-dir", whole, "--resume", "--iterations", 5]
    check_mistake(capfd, whole, flags, "--iterations")


# --- Checkpoints. ---


RESUMED = ["", "--lora-rank 4", "--anchor-aware-fake"]
RESUMED.append("--no-gradient-checkpointing --micro-batch-size 2")
MADE = {"": "whole", "--lora-rank 4": "lora"}  # the fixtures with these flags


@pytest.mark.parametrize("flags", RESUMED)
def test_resume_bit_for_bit(flags, request, tmp_path):
    """3 iterations and then 3 more are 6: the same checkpoint and student/, the same log."""
    if flags in MADE:
        straight = request.getfixturevalue(MADE[flags])
    else:
        straight = finished(tmp_path / "straight", *ONE_SAVE, *flags.split())
    parts = finished(tmp_path / "parts", "--iterations", 3, *ONE_SAVE, *flags.split())
    assert results(parts) != results(straight)
    finished(parts, "--resume", *ONE_SAVE, *flags.split())
    assert results(parts) == results(straight)


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_checkpoints_are_the_newest_two(kind, request):
    """Of the checkpoints at 2, 4 and 6 the latter two are left."""
    folder = request.getfixturevalue(kind)
    assert checkpoints(folder) == ["checkpoint_000004", "checkpoint_000006"]


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_tensors_are_in_safetensors(kind, request):
    """A run leaves no file of another kind than these."""
    paths = request.getfixturevalue(kind).rglob("*")
    suffixes = {path.suffix for path in paths if path.is_file()}
    assert suffixes <= {"", ".safetensors", ".json", ".jsonl", ".md", ".png"}, suffixes


def test_no_pickle_is_loaded():
    """cdm.py opens no file that can run code."""
    source = (ROOT / "cdm.py").read_text()
    assert "pickle" not in source
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", source))


@pytest.fixture
def killed(early):
    """The folder of a run that got kill -9 twice, the second time in the middle of a save."""
    return early["killed"].result()


def test_kill_9_before_the_first_checkpoint_and_in_the_middle_of_a_save(killed, whole):
    """It ends with the bytes of the uninterrupted run, and nothing half written."""
    assert cdm_main(*LIVELY, "--output-dir", killed, "--resume") == 0
    assert results(killed) == results(whole)
    assert not list(killed.rglob("*.tmp"))


def test_half_a_checkpoint_is_removed(whole, tmp_path):
    """A save that was killed left it, at an iteration that does not come again."""
    folder = shutil.copytree(whole, tmp_path / "run")
    half = shutil.copytree(folder / "checkpoint_000004", folder / "checkpoint_000003.tmp")
    assert cdm_main(*LIVELY, "--output-dir", folder, "--resume") == 0
    assert not half.exists()
    assert checkpoints(folder) == checkpoints(whole)


def test_a_disk_that_is_full_in_the_middle_of_a_save(whole, tmp_path, capfd):
    """No file may grow beyond 1 MB: one sentence. With room again, the run goes on."""
    folder = shutil.copytree(whole, tmp_path / "run")
    flags = ["--iterations", 8, "--resume", "--output-dir", folder]
    with files_limited_to(10**6):
        sentence = saying(capfd, 2, *flags)
    check_sentence("", sentence + "\n", "File too large", "space left on the disk")
    saved = ["checkpoint_000004", "checkpoint_000006"]
    assert [name for name in checkpoints(folder) if not name.endswith(".tmp")] == saved
    assert cdm_main(*LIVELY, *flags) == 0
    assert checkpoints(folder) == ["checkpoint_000006", "checkpoint_000008"]


# --- Signals. ---


@pytest.fixture(scope="module")
def interrupted(early):
    """{signal: folder, exit code and stderr of a run that got it after its first log line}."""
    return early["interrupted"].result()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_exports(number, interrupted):
    """kill PID and Ctrl-C: exit code 0, a checkpoint of the last finished iteration, a student."""
    folder, code, err = interrupted[number]
    assert code == 0, err
    assert "Traceback" not in err
    (checkpoint,) = folder.glob("checkpoint_*")
    k = state(checkpoint)["iteration"]
    assert 2 <= k < 6
    assert checkpoint.name == f"checkpoint_{k:06d}"
    assert log(folder)[-1]["iteration"] == k - k % 2
    assert (folder / "student" / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_goes_on_after_a_signal(number, interrupted, whole):
    """--resume then gives the bytes of the uninterrupted run."""
    folder = interrupted[number][0]
    assert cdm_main(*LIVELY, "--output-dir", folder, "--resume") == 0
    assert results(folder) == results(whole)


# --- Divergence. ---

DIVERGE = [
    ("--fake-lr 1e17", "loss_fake"),
    ("--student-lr 1e17 --dm-weight 0 --ca-weight 0", "loss_"),
]


@pytest.mark.parametrize("flags, loss", DIVERGE)
def test_divergence(flags, loss, tmp_path, capfd):
    """With a learning rate of 1e17 the sentence says which loss and iteration. No NaN is saved."""
    out = tmp_path / "out"
    flags = f"--save-every 1 --iterations 50 {flags} --output-dir".split()
    sentence = saying(capfd, 2, *flags, out)
    found = re.match(rf"cdm\.py: .*{loss}.* iteration (\d+)", sentence)
    assert found, sentence
    assert checkpoints(out)[-1] == f"checkpoint_{int(found[1]) - 1:06d}"
    for file in out.rglob("*.safetensors"):
        assert all(x.isfinite().all() for x in load_file(file).values()), file
    assert not (out / "student").exists()


def test_loss_that_is_not_finite_leaves_the_last_checkpoint(whole, tmp_path, capfd):
    """A student whose weights became NaN: the run stops in iteration 7, and all files stay.

    Without the damaged checkpoint it goes on from the one before.
    """
    folder = shutil.copytree(whole, tmp_path / "run")
    file = shard(folder / "checkpoint_000006" / "student", 1)
    weights = load_file(file)
    weights["proj_out.weight"][0, 0] = torch.nan
    save_file(weights, file)
    before = snapshot(folder)
    flags = ["--output-dir", folder, "--resume"]
    sentence = saying(capfd, 2, *flags, "--iterations", 10, "--save-every", 1)
    assert re.search(r"^cdm\.py: loss_fake.* iteration 7\b", sentence)
    assert snapshot(folder) == before

    shutil.rmtree(folder / "checkpoint_000006")
    assert cdm_main(*LIVELY, *flags) == 0
    assert results(folder) == results(whole)


# --- Log and samples. ---


def test_log(whole):
    """Six iterations with R = 2: lines for 2, 4 and 6, each with every figure."""
    lines = log(whole)
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    names = "loss_ca loss_dm loss_cdm loss_fake grad_norm_student grad_norm_fake N"
    names = {"iteration", "w_ca", "w_dm", "w_cdm", *names.split()}
    for line in lines:
        assert set(line) == names
        assert 1 <= line["N"] <= 4
        # The floor of 0.1 bounds w by 10.
        assert all(0 < line[name] <= 10 for name in ("w_ca", "w_dm", "w_cdm"))


def test_samples(whole):
    """--sample-every 3 --sample-count 2: grids after 3 and 6, whose teacher rows are the same.

    They are two pictures wide and three high: teacher at 28 steps, teacher at 4, student at 4.
    """
    files = sorted((whole / "samples").iterdir())
    assert [file.name for file in files] == ["step_000003.png", "step_000006.png"]
    three, six = (Image.open(file) for file in files)
    assert three.size == six.size == (2 * 96 + 4, 3 * (96 + 20))
    teacher, student = (0, 0, 196, 232), (0, 252, 196, 348)
    assert three.crop(teacher).tobytes() == six.crop(teacher).tobytes()
    assert three.crop(student).tobytes() != six.crop(student).tobytes()


# --- The rows of the paper's ablation tables that are flags. ---

ABLATIONS = [
    *("--ca-weight 0", "--dm-weight 0", "--cdm-weight 0", "--ca-weight 0 --dm-weight 0"),
    *("--schedule fixed", "--schedule fixed --cdm-weight 0", "--cdm-point anchor"),
    *("--cdm-point renoise", "--stratified", "--no-t5", "--student-every 1"),
    *("--micro-batch-size 2", "--fake-pull 1", "--anchor-aware-fake --cdm-weight 0"),
]


@pytest.mark.parametrize("flags", ABLATIONS)
def test_ablations(flags, tmp_path, monkeypatch):
    """Each runs, and exports. A loss of weight 0 is not in the log. No checkpoint, to save time."""
    monkeypatch.setattr(cdm.Run, "save", lambda run: None)
    finished(tmp_path / "out", "--iterations", 2, *flags.split())
    line = log(tmp_path / "out")[-1]
    losses = {name for name in ("ca", "dm", "cdm") if f"--{name}-weight 0" not in flags}
    assert {name for name in ("ca", "dm", "cdm") if f"loss_{name}" in line} == losses
    assert {name for name in ("ca", "dm", "cdm") if f"w_{name}" in line} == losses
    if "fixed" in flags:
        assert line["N"] == 4
    assert (tmp_path / "out" / "student" / "config.json").exists()


def test_students_along_the_way(tmp_path, capfd):
    """--export-every keeps them all, loadable like student/. Their size is said at the start."""
    folder = finished(tmp_path / "run", *ONE_SAVE, "--export-every", 3)
    assert "2 students of 0.007 GB" in capfd.readouterr().out
    names = sorted(path.name for path in (folder / "students").iterdir())
    assert names == ["step_000003", "step_000006"]
    last = load_file(folder / "students" / "step_000006" / "diffusion_pytorch_model.safetensors")
    final = load_file(folder / "student" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(last[name], final[name]) for name in final)


def test_what_a_killed_export_left_is_no_obstacle(tmp_path):
    """A kill between its renames leaves the old student aside. The next export replaces it."""
    folder = finished(tmp_path / "run", *ONE_SAVE, "--iterations", 2)
    for end in ("old", "tmp"):
        shutil.copytree(folder / "student", folder / f"student.{end}")
    finished(folder, *ONE_SAVE, "--iterations", 4, "--resume")
    assert {path.name for path in folder.glob("student*")} == {"student"}
    assert "after 2 updates" in (folder / "student" / "README.md").read_text(encoding="utf-8")


def test_sample_grids_have_a_pair_of_rows_for_each_number_of_steps(tmp_path):
    """The guided teacher's row, then teacher and student for each of --sample-steps."""
    flags = [*ONE_SAVE, "--iterations", 2, "--sample-every", 2, "--sample-count", 2]
    folder = finished(tmp_path / "run", *flags, "--sample-steps", 2, 1)
    (grid,) = (folder / "samples").iterdir()
    assert Image.open(grid).size == (2 * 100 - 4, 5 * 116)
