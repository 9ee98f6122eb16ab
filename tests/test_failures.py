"""What ends a run from outside: the GPU, its memory, one process of several, Ctrl-C in a save.

No GPU is here, so what torch raises on one is raised by a test.
"""

import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import SMALL, TEACHER, build, cdm_main, check_mistake, check_sentence

import cdm

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
BUSY = torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy or unavailable")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OUT_OF_MEMORY, OSError(28, "No space")])
def test_a_checkpoint_fails_with_the_error_itself(error, tmp_path):
    """torch's distributed checkpoint wraps an error of a writer. main() must know which it is."""

    class Writer(dcp.HuggingFaceStorageWriter):
        def write_data(self, plan, planner):
            raise error

    with pytest.raises(type(error)) as found, cdm.own_errors():
        dcp.save({"x": torch.zeros(1)}, storage_writer=Writer(tmp_path))
    assert found.value is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OUT_OF_MEMORY, BUSY])
def test_a_failing_gpu_damages_no_checkpoint(error, lora, monkeypatch):
    """--resume must not take an older checkpoint because the GPU is full, or after Ctrl-C."""
    run = build("--lora-rank", 4, "--output-dir", lora, "--resume")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(dcp, "load", fail)
    with pytest.raises(type(error)):
        run.resume()


FAILURES = {  # flags, error and words of the sentence
    "training": ("", OUT_OF_MEMORY, ["out of memory", "--micro-batch-size 1", "--lora-rank 64"]),
    "drawing": ("--generate cat", OUT_OF_MEMORY, ["out of memory", "--no-t5"]),
    "a busy GPU": ("", BUSY, ["busy or unavailable", "nvidia-smi"]),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failing_gpu_is_not_blamed_on_files(kind, whole, monkeypatch, tmp_path, capfd):
    """Raised while the teacher is loaded, it reaches main() as it is."""
    flags, error, words = FAILURES[kind]

    def fail(*_):
        raise error

    monkeypatch.setattr(cdm.Family, "__init__", fail)
    flags = [*SMALL, *flags.split(), "--output-dir", tmp_path / "out"]
    if "--generate" in flags:
        flags += ["--student", whole]
    sentence = check_mistake(capfd, tmp_path, flags, *words)
    assert TEACHER not in sentence
    for other in {"--micro-batch-size 1", "--no-t5", "nvidia-smi"}.difference(words):
        assert other not in sentence


def test_a_process_that_fails_alone_says_so(monkeypatch, tmp_path, capfd):
    """Under torchrun, the second process on a machine cannot read its copy of the teacher."""
    teacher = shutil.copytree(TEACHER, tmp_path / "teacher")
    (teacher / "vae" / "config.json").write_text("{")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    flags = [*SMALL, "--output-dir", tmp_path / "out", "--teacher", teacher]
    check_mistake(capfd, tmp_path, flags, str(teacher), "vae")


def test_what_all_processes_find_is_said_once(monkeypatch, tmp_path, capfd):
    """A wrong flag under torchrun: the first process of each machine prints the sentence."""
    said = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert cdm_main(*SMALL, "--iterations", 0, "--output-dir", tmp_path / "out") == 2
        said.append(capfd.readouterr().err)
    check_sentence("", said[0], "--iterations")
    assert said[1] == ""


@pytest.mark.parametrize("every, drawn", [(3, "ema_model"), (0, "teacher")])
def test_the_rehearsal_needs_the_memory_of_a_grid(every, drawn, tmp_path):
    """With --offload-ema the EMA comes to the GPU for grids. If there are any, so it does here."""
    run = build("--offload-ema", "--sample-every", every, "--output-dir", tmp_path / "none")
    calls = {"ema_model": 0, "teacher": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        getattr(run, name).transformer.register_forward_hook(hook)

    for name in calls:
        count(name)
    run.rehearse()
    assert calls == {"ema_model": 0, "teacher": 0} | {drawn: 2}
