"""A user's mistake: one sentence, exit code 2, and nothing is written."""

import pytest
from helpers import DATA, SMALL
from results import check_mistake

import cdm

# Flags, and words of the sentence.
WRONG = [
    ("--batch-size 0", "--batch-size"),
    ("--iterations 0", "--iterations"),
    ("--iterations many", "--iterations"),
    ("--max-schedule-steps 0", "--max-schedule-steps"),
    ("--student-every 0", "--student-every"),
    ("--save-every 0", "--save-every"),
    ("--sample-count 0", "--sample-count"),
    ("--lora-rank -1", "--lora-rank"),
    ("--alpha -1", "--alpha"),
    ("--fake-lr nan", "--fake-lr"),
    ("--cdm-weight inf", "--cdm-weight"),
    ("--schedule sometimes", "--schedule"),
    ("--cdm-point nowhere", "--cdm-point"),
    ("--weights float16", "--weights"),
    ("--iter 5", "--iter"),
    ("--resolution 12", "--resolution"),
    ("--prompts nowhere.txt", "nowhere.txt"),
    ("--prompts empty.txt", "empty.txt"),
    ("--teacher nowhere", "nowhere"),
    ("--resume", "--resume"),
]


@pytest.mark.parametrize("flags, word", WRONG, ids=[flags for flags, _ in WRONG])
def test_wrong_flags(flags, word, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n\n")
    check_mistake(capfd, tmp_path, [*DATA, *SMALL, "--output-dir", "out", *flags.split()], word)


def test_a_run_is_not_started_over_another(full, tmp_path, capfd):
    """Nor over somebody's files. The sentence offers --resume."""
    (tmp_path / "thesis.txt").write_text("years of work")
    for folder in (full, tmp_path):
        flags = [*DATA, *SMALL, "--output-dir", folder]
        check_mistake(capfd, folder, flags, "--output-dir", "--resume")
    check_mistake(capfd, folder, [*flags, "--resume"], "--resume", "no checkpoint")


def test_the_batch_is_a_multiple_of_the_processes(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(cdm, "WORLD", 3)
    flags = [*DATA, *SMALL, "--output-dir", tmp_path / "out"]
    check_mistake(capfd, tmp_path, flags, "--batch-size", "3 processes")
