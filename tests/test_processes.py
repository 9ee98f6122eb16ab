"""What needs real processes: torchrun, signals, kill -9, a closed pipe, a copy of cdm.py alone."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM

import pytest
from helpers import DATA, KINDS, ROOT, SMALL, small_run
from results import assert_same_figures, assert_same_run, checkpoints, log

ENDLESS = [*DATA, *SMALL, "--iterations", 10**6]


def process(*command, out=subprocess.PIPE, err=subprocess.PIPE):
    """A process of this Python, which sums in one thread, as this one does."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=out, stderr=err)


def finish(popen):
    """Exit code and stderr of a process, which is not waited for forever."""
    try:
        err = popen.communicate(timeout=240)[1]
    except subprocess.TimeoutExpired:
        popen.kill()
        raise
    return popen.returncode, err


def freeze_when(popen, condition):
    """Stop a process (SIGSTOP) at a moment when the condition holds. It may be writing a file."""
    end = time.time() + 120
    while time.time() < end and popen.poll() is None:
        time.sleep(0.0005)
        if not condition():
            continue
        popen.send_signal(SIGSTOP)
        os.waitid(os.P_PID, popen.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if condition():
            return
        popen.send_signal(SIGCONT)
    popen.kill()
    pytest.fail(f"the moment did not come: {finish(popen)}")


def freeze_after_the_first_log_line(popen, folder):
    file = folder / "log.jsonl"
    freeze_when(popen, lambda: file.exists() and file.stat().st_size > 0)


# --- Jobs: each is a run in other processes, and returns exit code and stderr. ---


def torchrun(*flags):
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 cdm.py".split()
    return finish(process(*launcher, *DATA, *SMALL, *flags))


def begun_by_two(folder):
    """Four iterations of full fine-tuning in two processes, with a grid after the third."""
    grids = ["--sample-every", 3, "--sample-count", 1]
    return torchrun("--iterations", 4, *grids, "--output-dir", folder)


def ended_by_two(folder):
    """The last iterations of a LoRA run, in two processes."""
    return torchrun(*KINDS["lora"], "--resume", "--output-dir", folder)


def terminated(folder):
    """SIGTERM right after the first line of the log. It runs a copy of cdm.py, which is alone."""
    folder.with_suffix(".alone").mkdir()
    copy = shutil.copy(ROOT / "cdm.py", folder.with_suffix(".alone"))
    popen = process(copy, *ENDLESS, "--output-dir", folder)
    freeze_after_the_first_log_line(popen, folder)
    popen.send_signal(SIGTERM)
    popen.send_signal(SIGCONT)
    return finish(popen)


def piped(folder):
    """`2>&1 | tee log`, and Ctrl-C, which ends tee, too: nobody reads the pipe any more."""
    read, write = os.pipe()
    popen = process("cdm.py", *ENDLESS, "--output-dir", folder, out=write, err=write)
    os.close(write)
    freeze_after_the_first_log_line(popen, folder)
    os.close(read)
    popen.send_signal(SIGINT)
    popen.send_signal(SIGCONT)
    return finish(popen)


def terminated_twice(folder):
    """SIGTERM in a long iteration, and again each second until the process ends."""
    popen = process("cdm.py", *ENDLESS, "--batch-size", 512, "--output-dir", folder)
    freeze_when(popen, (folder / "samples").exists)
    popen.send_signal(SIGCONT)
    while popen.poll() is None:
        popen.send_signal(SIGTERM)
        time.sleep(1)
    return finish(popen)


def killed(folder):
    """kill -9 while a checkpoint is half written beside a whole one."""
    popen = process("cdm.py", *ENDLESS, "--save-every", 1, "--output-dir", folder)
    freeze_when(popen, lambda: (folder / "unfinished").exists() and checkpoints(folder))
    popen.kill()
    return finish(popen)


@pytest.fixture(scope="module")
def ended(work, lora):
    """{name of a job: its folder, exit code and stderr}. Two jobs run at a time, for two cores."""
    half = shutil.copytree(lora, work / "ended_by_two")
    shutil.rmtree(half / "checkpoint_000006")
    jobs = [begun_by_two, ended_by_two, terminated, piped, terminated_twice, killed]
    with ThreadPoolExecutor(2) as pool:
        futures = {job.__name__: pool.submit(job, work / job.__name__) for job in jobs}
    return {name: (work / name, *future.result()) for name, future in futures.items()}


# --- Two processes: FSDP2 on this CPU. ---


def test_two_processes_are_one_run_and_one_goes_on(ended, full):
    """Two processes with 2 samples each log the figures of one with 4, which then continues.

    Each has saved its half. The EMA's weights, which draw grids, have not stayed on any rank.
    """
    folder, code, err = ended["begun_by_two"]
    assert code == 0, err[-3000:]
    assert_same_figures(log(folder), log(full)[:2])
    sizes = [file.stat().st_size for file in folder.glob("checkpoint_000004/*.distcp")]
    whole = (full / "checkpoint_000004" / "__0_0.distcp").stat().st_size
    assert len(sizes) == 2
    assert all(0.4 * whole < size < 0.6 * whole for size in sizes)
    small_run(folder, "--resume")
    assert_same_figures(log(folder), log(full))


def test_two_processes_go_on_from_one(ended, lora):
    """With the figures of the uninterrupted run. Here with a LoRA."""
    folder, code, err = ended["ended_by_two"]
    assert code == 0, err[-3000:]
    assert log(folder)[:2] == log(lora)[:2]
    assert_same_figures(log(folder), log(lora))
    assert (folder / "student" / "README.md").exists()


# --- Runs that end early. ---


def test_sigterm_saves_and_exports_and_the_run_goes_on(ended, full):
    """A copy of cdm.py that is alone in its folder ends with exit code 0, checkpoint and student.

    --resume then gives the bits of the uninterrupted run.
    """
    folder, code, err = ended["terminated"]
    assert code == 0 and "Traceback" not in err, err
    (checkpoint,) = checkpoints(folder)
    assert checkpoint < "checkpoint_000006"
    assert (folder / "student" / "README.md").exists()
    small_run(folder, "--resume")
    assert_same_run(folder, full)


def test_ctrl_c_with_a_closed_pipe_saves_and_exports(ended):
    folder, _, _ = ended["piped"]
    (checkpoint,) = checkpoints(folder)
    assert checkpoint < "checkpoint_000006"
    assert (folder / "student" / "README.md").exists()


def test_a_second_signal_ends_the_run(ended):
    """At once, by the signal's own way, with nothing saved."""
    folder, code, _ = ended["terminated_twice"]
    assert code == -SIGTERM
    assert checkpoints(folder) == []


def test_kill_9_in_the_middle_of_a_save(ended, full):
    """--resume ends with the bits of the uninterrupted run, and nothing half written."""
    folder, code, _ = ended["killed"]
    assert code == -SIGKILL
    (folder / "unfinished" / "__1_0.distcp").touch()  # as if of a second process
    small_run(folder, "--resume")
    assert_same_run(folder, full)
    assert not (folder / "unfinished").exists()
    assert not list(folder.rglob("__1_0.distcp"))
