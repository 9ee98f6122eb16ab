"""What the tests of the program share: the demo teacher, and runs in this process."""

import inspect
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

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


def run(*flags):
    """`python cdm.py *flags` in this process. main() sets signal handlers. They are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with mock.patch.object(sys, "argv", ["cdm.py"]):  # argparse names it
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
