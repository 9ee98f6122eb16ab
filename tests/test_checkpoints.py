"""Checkpoints after damage, two runs in one folder, and runs that are not finite."""

import json
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import (
    LIVELY,
    LORA,
    ONE_SAVE,
    TEACHER,
    build,
    cdm_main,
    check_mistake,
    check_sentence,
    checkpoints,
    finish,
    finished,
    log,
    process,
    results,
    saying,
    scale_weights,
    shard,
    snapshot,
    state,
)


@pytest.fixture
def run(lora, tmp_path):
    """A copy of a LoRA run of six iterations, with checkpoints at 4 and 6."""
    return Path(shutil.copytree(lora, tmp_path / "run"))


def resumed(run):
    """The flags that continue it."""
    return [*LORA["lora"], "--output-dir", run, "--resume"]


# --- Checkpoints. ---


def test_a_backup_of_a_checkpoint_is_left_alone(run):
    """`cp -r checkpoint_000004 checkpoint_backup`: neither resumed from nor pruned."""
    names = ["checkpoint_backup", "checkpoint_000004 (copy)", "checkpoint_000009_old"]
    for name in names:
        shutil.copytree(run / "checkpoint_000004", run / name)
    before = [snapshot(run / name) for name in names]
    assert cdm_main(*LIVELY, *resumed(run), "--iterations", 8) == 0
    assert checkpoints(run) == sorted([*names, "checkpoint_000006", "checkpoint_000008"])
    assert [snapshot(run / name) for name in names] == before


def test_checkpoints_are_sorted_as_numbers(run):
    """A million is newer than 999,999."""
    (run / "checkpoint_000004").rename(run / "checkpoint_999999")
    (run / "checkpoint_000006").rename(run / "checkpoint_1000000")
    assert build(*resumed(run)).k == 6


DAMAGE = [("state.json", "cut"), ("state.json", "gone")]
DAMAGE += [(shard(name), "cut") for name in ("ema", "fake_score")]
DAMAGE += [(shard("ema"), how) for how in ("empty", "longer", "zeros")]
DAMAGE += [(shard("student_exp_avg"), "gone")]


@pytest.mark.parametrize("name, how", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(name, how, run, capfd):
    """The one before is taken, and said, without a traceback."""
    damage(run / "checkpoint_000006" / name, how)
    assert build(*resumed(run)).k == 4
    said = capfd.readouterr()
    assert "checkpoint_000006 is damaged" in said.out
    assert "Traceback" not in said.err


def test_a_shard_of_another_process_that_is_gone(run, capfd):
    """torch would load what is there. state.json names all files."""
    file = run / "checkpoint_000006" / "state.json"
    saved = state(file.parent)
    gone = shard("student", rank=2)
    assert shard("student") in saved["files"]
    file.write_text(json.dumps(saved | {"files": [*saved["files"], gone]}))
    assert build(*resumed(run)).k == 4
    assert gone in capfd.readouterr().out


def damage(file, how):
    """Cut a file off in the middle, remove it, or do worse."""
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "longer":
        file.write_bytes(content + b"junk" * 9)
    elif how == "zeros":
        file.write_bytes(bytes(len(content)))


def test_a_damaged_checkpoint_costs_no_bytes(run, lora):
    """From the one before, the run ends as if nothing had happened."""
    damage(run / "checkpoint_000006" / shard("student"), "cut")
    assert cdm_main(*LIVELY, *resumed(run)) == 0
    assert results(run) == results(lora)


def test_no_checkpoint_can_be_read(run, capfd):
    """Then the run is not begun anew over what is left."""
    for name in checkpoints(run):
        damage(run / name / "state.json", "cut")
    before = snapshot(run)
    sentence = saying(capfd, 2, *resumed(run))
    check_sentence("", sentence + "\n", "--resume", str(run))
    assert snapshot(run) == before


def test_damaged_checkpoints_do_not_count_as_kept(run):
    """Two with higher numbers, which nobody can read, cost none that the run writes."""
    for number in (98, 99):
        broken = shutil.copytree(run / "checkpoint_000006", run / f"checkpoint_0000{number}")
        damage(broken / "state.json", "empty")
    assert cdm_main(*LIVELY, *resumed(run), "--iterations", 10) == 0
    assert checkpoints(run)[:2] == ["checkpoint_000008", "checkpoint_000010"]


def test_checkpoints_that_are_gone(run, capfd):
    """A run that has a student is not begun anew by --resume."""
    for name in checkpoints(run):
        shutil.rmtree(run / name)
    check_mistake(capfd, run, [*LIVELY, *resumed(run)], "--resume", "no checkpoint")


def test_a_run_without_a_checkpoint_begins_anew(run, capfd):
    """Killed before it saved anything, it has a log and no more. That is said."""
    for path in [*run.glob("checkpoint_*"), run / "student"]:
        shutil.rmtree(path)
    assert cdm_main(*LIVELY, *resumed(run), "--iterations", 2) == 0
    assert "from the beginning" in capfd.readouterr().out
    assert [line["iteration"] for line in log(run)] == [2]


def test_a_log_that_is_gone(run, lora):
    """Each checkpoint has its own."""
    (run / "log.jsonl").unlink()
    shutil.rmtree(run / "student")
    assert cdm_main(*LIVELY, *resumed(run)) == 0
    assert results(run) == results(lora)


def test_a_teacher_that_moved(run, lora, tmp_path):
    """The teacher's weights must be the same, not its path."""
    teacher = shutil.copytree(TEACHER, tmp_path / "moved")
    shutil.rmtree(run / "student")
    assert cdm_main(*LIVELY, *resumed(run), "--teacher", teacher) == 0
    assert results(run) == results(lora)


def test_a_teacher_that_changed(tmp_path, capfd):
    """The same path with other weights would be another run."""
    teacher = shutil.copytree(TEACHER, tmp_path / "teacher")
    run = finished(tmp_path / "run", "--teacher", teacher, "--iterations", 2)
    scale_weights(teacher, 1.001)
    flags = [*LIVELY, "--teacher", teacher, "--output-dir", run, "--resume"]
    check_mistake(capfd, run, flags, "--teacher is")


LOG_DAMAGE = {"NUL": b"\0" * 40 + b"\n", "half": b'{"iteration": 6, "loss'}
LOG_SURPRISES = {"garbage": b"\xff\xfe\x00\n", "number": b"12\n", "empty": b"{}\n"}
LOG_LINES = [pytest.param(line, id=name) for name, line in LOG_DAMAGE.items()]
LOG_LINES += [pytest.param(x, id=name) for name, x in LOG_SURPRISES.items()]


@pytest.mark.parametrize("line", LOG_LINES)
def test_a_damaged_line_of_the_log_is_dropped(line, run, lora, capfd):
    """What a power cut left in log.jsonl does not stop --resume: the log is the checkpoint's."""
    with open(run / "log.jsonl", "ab") as file:
        file.write(line)
    assert cdm_main(*LIVELY, *resumed(run)) == 0
    assert log(run) == log(lora)
    assert "later lines of the log are dropped" in capfd.readouterr().out


def test_other_threads_are_said(run, capfd):
    """Sums in another order differ by rounding."""
    file = run / "checkpoint_000006" / "state.json"
    saved = state(file.parent)
    saved["settings"]["threads"] = 7
    file.write_text(json.dumps(saved))
    build(*resumed(run))
    assert "threads is 1, and was 7" in capfd.readouterr().out


# --- Two runs in one folder. ---


def test_a_second_run_in_the_folder_is_refused(run, capfd):
    """While another process holds the lock, two `--resume` do not mix."""
    flags = [*LIVELY, *resumed(run), "--iterations", 8]
    with FileLock(run / "lock"):
        check_mistake(capfd, run, flags, "another process", str(run))


def test_a_killed_process_frees_its_lock(run):
    """kill -9 leaves the lock's file, which locks nobody out."""
    script = (
        "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire()\n"
        "print(flush=True); time.sleep(99)"
    )
    popen = process("-c", script, run / "lock")
    popen.stdout.readline()
    assert cdm_main(*LIVELY, *resumed(run)) == 2
    popen.kill()
    finish(popen)
    shutil.rmtree(run / "student")
    assert cdm_main(*LIVELY, *resumed(run)) == 0


# --- Not finite: each case has its own sentence. A teacher's is in test_real_cases.py. ---


def test_not_finite_before_the_first_checkpoint(tmp_path, capfd):
    """There is nothing to resume: start again with lower learning rates."""
    flags = ["--fake-lr", 1e17, *ONE_SAVE, "--output-dir", tmp_path / "out"]
    sentence = saying(capfd, 2, *flags)
    assert "start again with lower learning rates" in sentence
    assert "checkpoint" not in sentence


def test_not_finite_after_a_checkpoint(run, capfd):
    """The sentence offers --resume with lower learning rates, and that works."""
    flags = [*resumed(run), "--iterations", 8, *ONE_SAVE]
    sentence = saying(capfd, 2, *flags, "--fake-lr", 1e17)
    for word in ("--resume", "--student-lr", "--fake-lr"):
        assert word in sentence
    assert cdm_main(*LIVELY, *flags, "--student-lr", 1e-5, "--fake-lr", 1e-6) == 0
    assert log(run)[-1]["iteration"] == 8


def test_not_finite_right_after_a_checkpoint(run, capfd):
    """The newest checkpoint holds weights as large as 1e17: the sentence says to leave it out."""
    flags = [*resumed(run), "--save-every", 1]
    assert cdm_main(*LIVELY, *flags, "--student-lr", 1e17, "--iterations", 8) == 0
    flags += ["--student-lr", 1e-6, "--iterations", 10]
    sentence = saying(capfd, 2, *flags)
    assert "without checkpoint_000008" in sentence
    shutil.rmtree(run / "checkpoint_000008")
    assert cdm_main(*LIVELY, *flags) == 0
