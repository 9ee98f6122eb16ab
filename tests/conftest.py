"""What all tests share: paths, one thread, no GPU, no network, and two runs."""

import os
import sys
from pathlib import Path

# Before anything imports torch, diffusers or transformers.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["DIFFUSERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from helpers import KINDS, small_run

# Runs are compared bit for bit with runs of other processes: all sum in the same order.
torch.set_num_threads(1)


def pytest_configure(config):
    # dcp says so at every save and load of a single process.
    config.addinivalue_line("filterwarnings", "ignore:torch.distributed is disabled")


GRIDS = "--save-every 2 --sample-every 3 --sample-count 2 --sample-steps 4 1".split()


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder for the runs that several tests look at."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def full(work):
    """Six uninterrupted iterations, with grids and checkpoints. Tests do not change it."""
    return small_run(work / "full", *GRIDS)


@pytest.fixture(scope="session")
def lora(work):
    """The same with a LoRA."""
    return small_run(work / "lora", *GRIDS, *KINDS["lora"])


@pytest.fixture(params=KINDS)
def trained(request):
    """A run of each kind, full and LoRA, and the flags that make it."""
    return request.getfixturevalue(request.param), KINDS[request.param]
