"""What all tests share: where to find the modules, runs that several tests look at, --slow.

Processes that take long begin with the session, one after the other. So a second core has work
while the tests of this process use the first.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

# Before anything imports diffusers or transformers.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["DIFFUSERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from helpers import finished, kill_twice, load_pipe, run_toy_quickly, send_signals, two_processes

STARTED = time.time()
# Runs are compared bit for bit with runs of other processes: all sum in the same order.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; needs --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs --slow"))


def pytest_terminal_summary(terminalreporter):
    seconds = time.time() - STARTED
    terminalreporter.write_line(f"the suite took {seconds:.0f} s on {os.cpu_count()} cores")


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder for the runs that several tests look at."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def whole(work):
    """Six uninterrupted iterations, with samples. Tests do not change it."""
    return finished(work / "whole", "--sample-every", 3, "--sample-count", 2)


@pytest.fixture(scope="session")
def lora(work):
    """Six uninterrupted iterations of LoRA. Tests do not change it."""
    return finished(work / "lora", "--lora-rank", 4)


@pytest.fixture(scope="session", autouse=True)
def early(request, work):
    """Futures by the name of the fixture that waits for them, of those that some test asks for."""
    asked = set().union(*(item.fixturenames for item in request.session.items))
    jobs = {}
    if "runs" in asked:
        jobs["runs"] = partial(two_processes, work, request.getfixturevalue("whole"))
    if "interrupted" in asked:
        jobs["interrupted"] = partial(send_signals, work)
    if "killed" in asked:
        jobs["killed"] = partial(kill_twice, work / "killed")
    if "quick_run" in asked:
        jobs["quick_run"] = partial(run_toy_quickly, work / "toy")
    with ThreadPoolExecutor(1) as pool:
        yield {name: pool.submit(job) for name, job in jobs.items()}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def pipe():
    """The undistilled teacher, as diffusers loads it."""
    return load_pipe()
