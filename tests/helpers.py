"""What the tests of the program share: the demo teacher, runs, processes and comparisons.

A run is a call of `cdm.main([...])`, which returns the exit code. It is a real process where the
process is the point: signals, kill -9, torchrun, a terminal's stderr.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cdm

ROOT = Path(__file__).parents[1]
TEACHER = str(ROOT / "tests" / "emoji_sd3")
PROMPT_FILE = f"{TEACHER}/prompts.txt"
PROMPTS = Path(PROMPT_FILE).read_text().splitlines()
SIDE = 32  # pixels of the teacher's pictures
CPU = torch.device("cpu")
ENVIRONMENT = dict(os.environ)  # what no test has changed
SMALL = [
    *("--teacher", TEACHER, "--prompts", PROMPT_FILE, "--device", "cpu"),
    *"--batch-size 4 --alpha 1 --max-schedule-steps 4".split(),
    *"--iterations 6 --save-every 2 --sample-every 0".split(),
]
# Learning rates at which six iterations change pictures that have 256 levels of a colour.
LIVELY = [*SMALL, *"--student-lr 3e-4 --fake-lr 3e-4 --warmup 0 --ema-decay 0.5".split()]
LORA = {"whole": [], "lora": ["--lora-rank", "4"]}  # what a fixture's name adds to LIVELY
SOME_SAMPLES = ["--sample-every", "3", "--sample-count", "1"]
SIGNALS = [signal.SIGTERM, signal.SIGINT]
NEVER = 100_000  # iterations, for a run that only a signal ends
ONE_SAVE = ["--save-every", NEVER]  # at the end


# --- Running. ---


def cdm_main(*flags):
    """The exit code of `python cdm.py *flags`, run in this process.

    main() sets signal handlers. They are put back.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        return cdm.main([str(flag) for flag in flags])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def finished(folder, *flags):
    """The folder of a run that reached its end."""
    assert cdm_main(*LIVELY, "--output-dir", folder, *flags) == 0
    return folder


def saying(capfd, code, *flags):
    """The last line of stderr of a run, which ends with this exit code and no traceback."""
    capfd.readouterr()
    assert cdm_main(*LIVELY, *flags) == code
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


def build(*flags):
    """A Run in this process, before its first iteration. It writes nothing until train()."""
    run = cdm.Run(cdm.parse_args([*LIVELY, *map(str, flags)]), CPU)
    if run.args.resume:
        run.resume()
    return run


def load_family(*flags):
    """The demo teacher, as cdm.py loads it."""
    return cdm.load_family(cdm.parse_args([*SMALL, *map(str, flags)]), CPU)


def inputs(run, n=4):
    """x_t, t and cond for n samples, always the same."""
    gen = torch.Generator().manual_seed(1)
    x_t = torch.randn(n, *run.family.shape, generator=gen)
    t = torch.rand(n, generator=gen)
    return x_t, t, run.family.encode(PROMPTS[:n])


# --- Real processes. ---


def process(*command, stderr=subprocess.PIPE, **env):
    """A process of this Python, which sees no GPU and sums in one thread, as this one does."""
    env = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    command = [sys.executable, *map(str, command)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=pipe, stderr=stderr)


def torchrun(*flags):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return process(*launcher, "cdm.py", *flags)


def finish(popen, seconds=120):
    """Exit code, stdout and stderr of a process, which is not waited for forever."""
    try:
        out, err = popen.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        popen.kill()
        raise
    return popen.returncode, out, err


def wait_for(condition, popen, seconds=90):
    """Wait until a condition holds, while the process runs."""
    end = time.time() + seconds
    while time.time() < end and popen.poll() is None:
        if condition():
            return
        time.sleep(0.0005)
    popen.kill()
    pytest.fail(f"the moment did not come: {finish(popen)}")


def freeze_when(popen, condition):
    """Stop a process (SIGSTOP) at a moment when the condition holds. It may be writing a file."""

    def frozen():
        if not condition():
            return False
        popen.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, popen.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if condition():
            return True
        popen.send_signal(signal.SIGCONT)
        return False

    wait_for(frozen, popen)


@contextlib.contextmanager
def files_limited_to(size):
    """No file that this process writes may grow beyond `size` bytes: a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def scale_weights(teacher, factor):
    """Make another teacher of a folder: the same files, with other weights of the transformer."""
    file = teacher / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = {name: factor * x for name, x in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


def kill_9(popen):
    popen.kill()
    assert finish(popen)[0] == -signal.SIGKILL


def logged(folder):
    """Whether a run has written the first line of its log."""
    file = folder / "log.jsonl"
    return file.exists() and file.stat().st_size > 0


# --- Long jobs of other processes. conftest.py starts them early. ---


def two_processes(work, one, kind="whole"):
    """A run that two processes began and one that two ended, beside `one`, which is not changed.

    Two save at iteration 4 of the first; `one` saved at 4 and two go on. Returns the folders.
    """
    begun = work / f"begun_{kind}"
    ended = shutil.copytree(one, work / f"ended_{kind}")
    shutil.rmtree(ended / "checkpoint_000006")
    shutil.rmtree(ended / "student")
    flags = [*LIVELY, *LORA[kind], *SOME_SAMPLES, "--output-dir"]
    both = torchrun(*flags, begun, "--iterations", 4), torchrun(*flags, ended, "--resume")
    for popen in both:
        code, _, err = finish(popen, 240)
        assert code == 0, err[-3000:]
    return begun, ended


def send_signals(work):
    """{signal: folder, exit code and stderr of a run that got it after its first log line}.

    The runs begin as a shell begins a background job of a script: with SIGINT ignored.
    """
    script = "import cdm, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    script += "; sys.exit(cdm.main(sys.argv[1:]))"

    def interrupt(number):
        folder = work / number.name
        endless = ["--iterations", NEVER, *ONE_SAVE]
        popen = process("-c", script, *LIVELY, *endless, "--output-dir", folder)
        freeze_when(popen, lambda: logged(folder))
        popen.send_signal(number)
        popen.send_signal(signal.SIGCONT)
        code, _, err = finish(popen)
        return folder, code, err

    with ThreadPoolExecutor() as threads:
        return dict(zip(SIGNALS, threads.map(interrupt, SIGNALS), strict=True))


def kill_twice(folder):
    """A run that got kill -9 at its first log line, and again while a checkpoint was half written
    beside a whole one. Returns the folder.
    """
    flags = [*LIVELY, "--output-dir", folder]
    first = process("cdm.py", *flags, "--save-every", "100")
    freeze_when(first, lambda: logged(folder))
    assert checkpoints(folder) == []
    kill_9(first)

    def saving():
        half = [name.endswith(".tmp") for name in checkpoints(folder)]
        return any(half) and not all(half)

    second = process("cdm.py", *flags, "--save-every", "1", "--resume")
    freeze_when(second, saving)
    kill_9(second)
    assert saving()
    assert not (folder / "student").exists()
    return folder


def run_toy_quickly(folder):
    """A quick run of toy_2d.py. Returns the folder and what it printed."""
    code, out, err = finish(
        process("toy_2d.py", "--quick", "--seed", 3, "--output-dir", folder), 300
    )
    assert code == 0, err
    return folder, out


# --- What a run left. ---


def snapshot(folder):
    """Everything in a folder: name -> bytes, None for a folder."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


def log(folder):
    """The lines of log.jsonl, without the time that they took."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.pop("seconds") > 0
    return lines


def state(checkpoint):
    """A checkpoint's state.json."""
    return json.loads((checkpoint / "state.json").read_text())


def results(folder):
    """What must not depend on how often a run was stopped: checkpoint, exported student, log."""
    last = max(Path(folder).glob("checkpoint_*"))
    files = {**snapshot(last), **snapshot(Path(folder) / "student")}
    assert any(name.startswith("student_exp_avg") for name in files), "compares nothing"
    files.pop("README.md")  # it names its own folder
    files["log.jsonl"] = log(last)
    files["state.json"] = state(last)
    files["state.json"].pop("command")  # so does this
    for name, content in files.items():
        if name.endswith(".safetensors"):  # the header's keys are written in random order
            size = int.from_bytes(content[:8], "little")
            files[name] = json.loads(content[8 : 8 + size]), content[8 + size :]
    return {"last": last.name, "log": log(folder), **files}


def checkpoints(folder):
    """The names of a run's checkpoints, sorted."""
    return sorted(path.name for path in Path(folder).glob("checkpoint*"))


def shard(folder, rank=1):
    """The file that one rank writes into a checkpoint for one dict of tensors."""
    return f"{folder}/shard-{rank:05d}-model-00001-of-00001.safetensors"


def assert_same_figures(found, expected):
    """Two logs agree up to the order of float32 sums."""
    # That order makes a difference of 1e-7. AdamW's first steps, nearly lr x sign(gradient),
    # enlarge it where a gradient is nearly zero. 1e-3 is far above that.
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (ours["iteration"], name)


def check_sentence(out, err, *words):
    """stderr is one sentence with these words, and stdout is empty."""
    assert re.fullmatch(r"cdm\.py: [^\n]+\n", err), err
    assert out == ""
    assert len(err) < 600
    assert "Traceback" not in err
    for word in words:
        assert word in err, (word, err)


def check_mistake(capfd, folder, flags, *words):
    """A mistake has exit code 2, prints one sentence and leaves `folder` as it was."""
    before = snapshot(folder)
    capfd.readouterr()
    code = cdm_main(*flags)
    out, err = capfd.readouterr()
    assert code == 2
    check_sentence(out, err, *words)
    assert snapshot(folder) == before
    return err


# --- The same networks in diffusers. ---

QUARTERS = [1.0, 0.75, 0.5, 0.25]  # diffusers' sigmas; its scheduler shifts them to 1, .9, .75, .5


def load_pipe(**parts):
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(TEACHER, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_student(folder):
    """The pipeline with the transformer of a student/ folder."""
    from diffusers import SD3Transformer2DModel

    return load_pipe(transformer=SD3Transformer2DModel.from_pretrained(folder))


def pipeline_images(pipe, prompt, sigmas, **options):
    """The student as its README calls it, in float32 on the CPU, from the noise of seed 0."""
    return pipe(
        prompt,
        height=SIDE,
        width=SIDE,
        guidance_scale=1.0,
        num_inference_steps=len(sigmas),
        sigmas=sigmas,
        max_sequence_length=pipe.tokenizer_3.model_max_length,
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images
