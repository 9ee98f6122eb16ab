"""What a run left: files, checkpoints, log, student. And what a mistake leaves: nothing."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import run


def snapshot(folder):
    """Everything in a folder: name -> bytes, None for a folder."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


def check_mistake(capfd, folder, flags, *words):
    """A mistake has exit code 2, prints one sentence with these words, and writes nothing."""
    before = snapshot(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*flags)
    out, err = capfd.readouterr()
    assert end.value.code == 2
    assert snapshot(folder) == before
    sentence = err.splitlines()[-1]  # argparse prints the usage first
    assert sentence.startswith("cdm.py: ") and out == "", err
    for word in words:
        assert word in sentence, (word, sentence)


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
