"""Several processes: torchrun and FSDP2 on this CPU."""

import os
import signal
from pathlib import Path

import pytest
from helpers import (
    LIVELY,
    LORA,
    NEVER,
    ONE_SAVE,
    SMALL,
    SOME_SAMPLES,
    assert_same_figures,
    cdm_main,
    checkpoints,
    finish,
    freeze_when,
    log,
    logged,
    shard,
    snapshot,
    torchrun,
    two_processes,
)

KINDS = ["whole", pytest.param("lora", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=KINDS)
def runs(request, early, work):
    """One process's run, one that two processes began, one that two ended. Tests do not change it.

    The first of two processes is continued by one. Its log before that comes last.
    """
    kind = request.param
    one = request.getfixturevalue(kind)
    begun, ended = early["runs"].result() if kind == "whole" else two_processes(work, one, kind)
    first = log(begun)
    # Samples in between: the averaged weights draw them, and must not change on any rank.
    flags = [*LIVELY, *LORA[kind], *SOME_SAMPLES, "--output-dir", begun]
    assert cdm_main(*flags, "--resume") == 0
    return one, begun, ended, first


def test_two_processes_are_one_run(runs):
    """Two processes with 2 samples each log the figures of one process with 4."""
    one, _, _, first = runs
    assert_same_figures(first, log(one)[:2])


def test_one_process_goes_on_from_two(runs):
    """What two saved, one continues with the figures of the uninterrupted run."""
    one, begun, _, _ = runs
    assert_same_figures(log(begun), log(one))


def test_two_processes_go_on_from_one(runs):
    """What one saved, two continue."""
    one, _, ended, _ = runs
    assert log(ended)[:2] == log(one)[:2]
    assert_same_figures(log(ended), log(one))


def files_of(folder):
    """The names of a run's files, without its samples."""
    return {name for name in snapshot(folder) if "samples" not in name}


def test_rank_1_saves_its_shards_and_nothing_else(runs):
    """Each rank saves its own shards; all else, rank 0."""
    one, begun, ended, _ = runs
    roles = ("student", "fake_score")
    adamw = [f"{role}_{key}" for role in roles for key in ("exp_avg", "exp_avg_sq", "step")]

    def second(checkpoint):
        return {shard(f"{checkpoint}/{name}", 2) for name in ("ema", *roles, *adamw)}

    assert files_of(begun) == files_of(one) | second("checkpoint_000004")
    assert files_of(ended) == files_of(one) | second("checkpoint_000006")


def test_each_rank_saves_half(runs):
    """The two shards of a checkpoint are of nearly the same size."""
    one, begun, _, _ = runs
    whole = os.path.getsize(shard(one / "checkpoint_000004" / "student", 1))
    for rank in (1, 2):
        size = os.path.getsize(shard(begun / "checkpoint_000004" / "student", rank))
        assert 0.4 * whole < size < 0.6 * whole


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share(tmp_path):
    """`--batch-size 3` on two processes: one sentence, no waiting for the other rank."""
    flags = [*SMALL, "--batch-size", "3", "--output-dir", tmp_path / "out"]
    code, _, err = finish(torchrun(*flags), 60)
    sentences = [line for line in err.splitlines() if line.startswith("cdm.py: ")]
    assert code != 0
    assert len(sentences) == 1, err
    assert "--batch-size 3 must be a multiple of 2:" in sentences[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run(tmp_path):
    """kill -9 of one of two processes: the launcher ends with an error, and does not hang."""
    out = tmp_path / "out"
    endless = ["--iterations", NEVER, *ONE_SAVE]
    launcher = torchrun(*LIVELY, *endless, "--output-dir", out)
    freeze_when(launcher, lambda: logged(out))
    launcher.send_signal(signal.SIGCONT)
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    code, _, err = finish(launcher, 60)
    assert code not in (0, -signal.SIGKILL)
    assert "SIGKILL" in err
    assert checkpoints(out) == []
    assert not (out / "student").exists()
