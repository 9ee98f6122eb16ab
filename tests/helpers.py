"""What the tests of the program share: the demo teacher, runs, processes and comparisons.

A run is a call of `cdm.main([...])`. It is a real process where the process is the point: signals,
kill -9, torchrun, a copy of cdm.py in another folder.
"""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

import cdm

ROOT = Path(__file__).parents[1]
TEACHER = str(ROOT / "tests" / "emoji_sd3")
PROMPT_FILE = f"{TEACHER}/prompts.txt"
PROMPTS = Path(PROMPT_FILE).read_text().splitlines()
DATA = ["--teacher", TEACHER, "--prompts", PROMPT_FILE]
# Learning rates at which six iterations change pictures that have 256 levels of a colour. They
# warm up over more updates than a test has, so that a lost count of updates shows.
SMALL = [
    *"--batch-size 4 --alpha 1 --max-schedule-steps 4 --iterations 6 --save-every 1000".split(),
    *"--sample-every 0 --student-lr 3e-3 --fake-lr 3e-3 --warmup 10".split(),
]
KINDS = {"full": [], "lora": "--lora-rank 4 --student-lr 1e-1".split()}
NEVER = 100_000  # iterations, for a run that only a signal ends


# --- Runs in this process. ---


def run(*flags):
    """`python cdm.py *flags` in this process. main() sets signal handlers. They are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        cdm.main([str(flag) for flag in flags])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def small_run(folder, *flags):
    """The folder of a short run with the demo teacher."""
    run(*DATA, *SMALL, "--output-dir", folder, *flags)
    return folder


def watch(monkeypatch, look):
    """Let look(call) see the arguments of each cdm_iteration, by name, before it happens."""
    iteration = cdm.cdm_iteration
    signature = inspect.signature(iteration)

    def watched(*args, **options):
        look(SimpleNamespace(**signature.bind(*args, **options).arguments))
        return iteration(*args, **options)

    monkeypatch.setattr(cdm, "cdm_iteration", watched)


def load_family(*flags):
    """The demo teacher, as cdm.py loads it."""
    flags = [*DATA, "--output-dir", "/nowhere", *map(str, flags)]
    return cdm.load_family(cdm.parse_args(flags))


def check_mistake(capfd, folder, flags, *words):
    """A mistake has exit code 2, prints one sentence with these words, and writes nothing."""
    before = snapshot(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*flags)
    out, err = capfd.readouterr()
    assert end.value.code == 2
    assert snapshot(folder) == before
    # argparse prints the usage first.
    sentence = err.splitlines()[-1]
    assert sentence.startswith("cdm.py: ") and out == "", err
    for word in words:
        assert word in sentence, (word, sentence)


# --- Real processes. ---


def process(*command, out=subprocess.PIPE, err=subprocess.PIPE):
    """A process of this Python, which sees no GPU and sums in one thread, as this one does."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=out, stderr=err)


def torchrun(*flags):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return process(*launcher, "cdm.py", *flags)


def finish(popen, seconds=240):
    """Exit code, stdout and stderr of a process, which is not waited for forever."""
    try:
        out, err = popen.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        popen.kill()
        raise
    return popen.returncode, out, err


def wait_for(condition, popen, seconds=120):
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


# --- What a run left. ---


def snapshot(folder):
    """Everything in a folder: name -> bytes, None for a folder."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


def checkpoints(folder):
    """The names of a run's checkpoints, sorted."""
    return sorted(path.name for path in Path(folder).glob("checkpoint*"))


def log(folder):
    """The lines of log.jsonl, without the speed."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.pop("samples_per_second") > 0
    return lines


def tensors(checkpoint):
    """All tensors of a checkpoint by name, whatever number of processes saved them."""
    found = {}
    for name, item in dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items():
        found[name] = torch.zeros(item.size, dtype=item.properties.dtype)
    dcp.load(found, checkpoint_id=checkpoint)
    return found


def assert_same_run(folder, expected):
    """The newest checkpoint, the exported student and the log are the same to the bit."""
    assert log(folder) == log(expected)
    assert checkpoints(folder)[-1] == checkpoints(expected)[-1]
    found, wanted = (tensors(path / checkpoints(path)[-1]) for path in (folder, expected))
    assert found.keys() == wanted.keys()
    assert len(found) > 100
    for name, x in wanted.items():
        assert torch.equal(found[name], x), name
    students = [snapshot(path / "student") for path in (folder, expected)]
    for files in students:
        files.pop("README.md")  # it names its own folder
    assert students[0] == students[1]


def assert_same_figures(found, expected):
    """Two logs agree up to the order of float32 sums."""
    # That order makes a difference of 1e-7. AdamW's first steps, nearly lr x sign(gradient),
    # enlarge it where a gradient is nearly zero. 1e-3 is far above that.
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (ours["iteration"], name)


# --- Pictures. ---

QUARTERS = [1.0, 0.75, 0.5, 0.25]  # diffusers' sigmas, which its scheduler shifts


def sample_noise(family, i=0, seed=0):
    """The noise of the sample grid's i-th picture."""
    gen = cdm.generator(seed, "sample", i)
    return torch.randn(1, *family.shape, generator=gen)


def grid(folder, k, rows, count, side):
    """The pictures of samples/step_NNNNNN.png, rows of them, at the size of the teacher's own."""
    image = Image.open(folder / "samples" / f"step_{k:06d}.png")
    width = image.width // count
    height = image.height // rows
    found = []
    for y in range(rows):
        bottom = (y + 1) * height  # a label is above each picture
        boxes = [(x * width, bottom - width, (x + 1) * width, bottom) for x in range(count)]
        found.append([image.resize((side, side), Image.Resampling.BOX, box) for box in boxes])
    return found


def readme_picture(folder, noise):
    """The picture that student/README.md's own code draws, in float32 and from this noise."""
    readme = (folder / "student" / "README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if line.startswith("    ") or not line.strip()]
    code = inspect.cleandoc("\n".join(lines))
    for old, new in {
        "torch.bfloat16": "torch.float32",
        "num_inference_steps": "latents=noise, num_inference_steps",
        "image.png": f"{folder}.png",
    }.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    exec(code, {"noise": noise})
    return Image.open(f"{folder}.png")


def levels(a, b):
    """The largest difference of two pictures' colours, of 256 levels."""
    a, b = (torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8).int() for x in (a, b))
    return int((a - b).abs().max())


def pipeline_picture(pipe, prompt, noise, side, output_type="pil", **options):
    """What diffusers draws without guidance, or its latents."""
    (found,) = pipe(
        prompt,
        height=side,
        width=side,
        latents=noise,
        output_type=output_type,
        **{"guidance_scale": 1.0, **options},
    ).images
    return found
