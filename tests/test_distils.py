"""Does it distil? Blends are what is neither one member of the group asked for nor another."""

import re
import sys

import pytest
from helpers import ROOT, finish, process

sys.path.insert(0, str(ROOT / "tests" / "experiments"))
import emoji

STEPS = [1, 2, 4, 6, 8]


def blends(pipe, transformer, steps, per_group=100, guidance=1.0):
    """Share of blends among samples of all five prompts, always from the same noise."""
    times = emoji.shifted_times(steps)
    images, asked = emoji.sample(pipe, transformer, times, per_group, guidance)
    shares = emoji.measure(images, asked)["blends"]
    return sum(shares) / len(shares)


def test_the_shipped_teacher_is_what_its_readme_says(pipe):
    """28 steps under guidance 2: at most 5% of 20 samples a group are blends."""
    assert blends(pipe, pipe.transformer, 28, per_group=20, guidance=2.0) <= 0.05


def first_command():
    """The flags of README's first command."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"python cdm.py (--teacher tests/emoji_sd3 .*)", text)[1].split()


@pytest.mark.slow
def test_readmes_first_command_distils(pipe, tmp_path):
    """Its student has fewer blends than the undistilled teacher, at every number of steps."""
    from diffusers import SD3Transformer2DModel

    flags = first_command()
    assert flags[flags.index("--iterations") + 1] == "300"
    flags += ["--device", "cpu", "--output-dir", tmp_path / "out"]
    code, _, err = finish(process("cdm.py", *flags), 1800)
    assert code == 0, err
    student = SD3Transformer2DModel.from_pretrained(tmp_path / "out" / "student")
    before = [blends(pipe, pipe.transformer, n) for n in STEPS]
    after = [blends(pipe, student, n) for n in STEPS]
    for n, teacher, distilled in zip(STEPS, before, after, strict=True):
        print(f"{n} steps: teacher {teacher:.0%}, student {distilled:.0%} blends")
        assert distilled < teacher, n
