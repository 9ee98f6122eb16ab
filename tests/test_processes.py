"""Several processes: torchrun and FSDP2 on this CPU."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from helpers import (
    LIVELY,
    SMALL,
    assert_same_figures,
    cdm_main,
    finish,
    freeze_when,
    log,
    logged,
    shard,
    snapshot,
    torchrun,
)


@pytest.mark.parametrize("kind", ["whole", pytest.param("lora", marks=pytest.mark.slow)])
def test_two_processes_are_one_run(kind, request, tmp_path):
    """Two processes with 4 samples each log the figures of one process with 8.

    What two saved at iteration 4 one continues, and what one saved two continue, with the
    figures of the uninterrupted run. Each rank saves its half; all else, rank 0.
    """
    one, flags = request.getfixturevalue(kind), ["--lora-rank", "4"] if kind == "lora" else []
    two, half = tmp_path / "two", shutil.copytree(one, tmp_path / "half")
    shutil.rmtree(half / "checkpoint_000006")
    shutil.rmtree(half / "student")
    # Samples in between: the averaged weights that they swap in must not stay on any rank.
    flags = [*LIVELY, *flags, "--sample-every", "3", "--sample-count", "1", "--output-dir"]
    for popen in [
        torchrun(*flags, two, "--iterations", 4),
        torchrun(*flags, half, "--iterations", 6, "--resume"),
    ]:
        code, out, err = finish(popen, 240)
        assert code == 0, "\n".join(line for line in err.splitlines() if line.startswith("[rank"))
    assert_same_figures(log(two), log(one)[:2])
    assert log(half)[:2] == log(one)[:2]
    assert_same_figures(log(half), log(one))
    assert cdm_main(*flags, two, "--iterations", 6, "--resume") == 0
    assert_same_figures(log(two), log(one))
    files = {name for name in snapshot(one) if "samples" not in name}
    adamw = [
        f"{role}_{key}"
        for role in ("student", "fake_score")
        for key in ("exp_avg", "exp_avg_sq", "step")
    ]
    second = {
        shard(f"checkpoint_{{}}/{file}", 2) for file in ("ema", "student", "fake_score", *adamw)
    }
    assert {name for name in snapshot(two) if "samples" not in name} == files | {
        name.format("000004") for name in second
    }
    assert {name for name in snapshot(half) if "samples" not in name} == files | {
        name.format("000006") for name in second
    }
    sizes = [os.path.getsize(shard(two / "checkpoint_000004" / "student", rank)) for rank in (1, 2)]
    whole = os.path.getsize(shard(one / "checkpoint_000004" / "student", 1))
    assert all(0.4 * whole < size < 0.6 * whole for size in sizes)


def test_a_batch_that_two_processes_cannot_share(tmp_path):
    """`--batch-size 3` on two processes: one sentence, a non-zero exit, no waiting for the
    other rank.
    """
    code, out, err = finish(
        torchrun(*SMALL, "--batch-size", "3", "--output-dir", tmp_path / "out"), 60
    )
    sentences = [line for line in err.splitlines() if line.startswith("cdm.py: ")]
    assert (
        code != 0
        and len(sentences) == 1
        and "--batch-size 3 must be a multiple of 2:" in sentences[0]
    ), err
    assert not (tmp_path / "out").exists()


def test_a_rank_that_dies_ends_the_run(tmp_path):
    """kill -9 of one of two processes in the middle of training: the launcher ends with an
    error, and does not hang.
    """
    launcher = torchrun(
        *LIVELY, "--iterations", 100000, "--save-every", 100000, "--output-dir", tmp_path / "out"
    )
    freeze_when(launcher, lambda: logged(tmp_path / "out"))
    launcher.send_signal(signal.SIGCONT)
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    code, _, err = finish(launcher, 60)
    assert code not in (0, -signal.SIGKILL) and "SIGKILL" in err
    assert (
        not list((tmp_path / "out").glob("checkpoint_*"))
        and not (tmp_path / "out" / "student").exists()
    )
