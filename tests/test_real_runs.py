"""What people really do with runs and students: the cases of public reports.

Teachers and prompts are in test_real_cases.py. Folders in use, other micro-batches, SIGTERM, full
disks during a save and divergence are in test_run.py. Damaged checkpoints, locks and values that
are not finite are in test_checkpoints.py.
"""

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from helpers import (
    LIVELY,
    LORA,
    NEVER,
    ONE_SAVE,
    PROMPTS,
    ROOT,
    TEACHER,
    cdm_main,
    check_mistake,
    check_sentence,
    checkpoints,
    files_limited_to,
    finished,
    logged,
    results,
    saying,
    shard,
    state,
    wait_for,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cdm

LORA_FILE = "pytorch_lora_weights.safetensors"


def draw(folder, student, *prompts, flags=()):
    """The pictures that --generate has written into a folder, oldest first."""
    flags = ["--teacher", TEACHER, "--device", "cpu", "--output-dir", folder, *flags]
    assert cdm_main(*flags, "--student", student, "--generate", *prompts) == 0
    return sorted(folder.glob("*.png"), key=lambda path: path.stat().st_mtime_ns)


def picture(folder, student):
    """The only picture that --generate writes into a new folder."""
    (file,) = draw(folder, student, PROMPTS[0])
    return Image.open(file)


# --- The disk, the terminal, the environment. ---


@pytest.mark.parametrize("kind", LORA)
def test_a_disk_that_is_full_during_the_export(kind, request, tmp_path, capfd):
    """One sentence about the disk. With room again, --resume exports."""
    made = request.getfixturevalue(kind)
    run = Path(shutil.copytree(made, tmp_path / "run"))
    shutil.rmtree(run / "student")
    flags = [*LORA[kind], "--output-dir", run, "--resume"]
    with files_limited_to(10_000):
        sentence = saying(capfd, 2, *flags)
    check_sentence("", sentence + "\n", "space left on the disk")
    assert not (run / "student").exists()
    assert cdm_main(*LIVELY, *flags) == 0
    assert results(run) == results(made)


def test_a_closed_terminal_saves_as_sigterm_does(tmp_path, whole):
    """SIGHUP, with nobody left to read what is printed: a checkpoint, a student, --resume works."""
    out = tmp_path / "out"
    master, slave = pty.openpty()
    flags = [*LIVELY, "--iterations", NEVER, *ONE_SAVE, "--output-dir", out]
    command = [sys.executable, "cdm.py", *map(str, flags)]

    def own_the_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    streams = {"stdin": slave, "stdout": slave, "stderr": slave}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    popen = subprocess.Popen(
        command, cwd=ROOT, env=env, start_new_session=True, preexec_fn=own_the_terminal, **streams
    )
    os.close(slave)
    wait_for(lambda: logged(out), popen)
    os.close(master)
    assert popen.wait(120) == 0
    (name,) = checkpoints(out)
    assert state(out / name)["iteration"] >= 2
    assert (out / "student" / "config.json").exists()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_an_empty_variable_is_as_if_unset(name, monkeypatch, tmp_path, capfd):
    """Some schedulers of clusters leave `WORLD_SIZE=` in the environment."""
    monkeypatch.setenv(name, "")
    flags = [*LIVELY, "--output-dir", tmp_path / "out", "--iterations", 0]
    check_mistake(capfd, tmp_path, flags, "--iterations")


PATHS = {"output_dir": "--output-dir=~/x", "teacher": "--teacher=~/x", "prompts": "--prompts=~/x"}
PATHS["student"] = "--student=~/x --generate cat"


@pytest.mark.parametrize("name", PATHS)
def test_a_tilde_is_the_home_folder(name, monkeypatch, tmp_path):
    """A shell does not expand `--output-dir=~/x`, cdm.py does."""
    monkeypatch.setenv("HOME", str(tmp_path))
    args = cdm.parse_args(PATHS[name].split())
    assert getattr(args, name) == f"{tmp_path}/x"


# --- The exported student. ---


@pytest.mark.parametrize("kind", LORA)
def test_others_can_read_a_run(kind, request):
    """On a shared file system: checkpoints and student/ have the mode of any new file."""
    folder = request.getfixturevalue(kind)
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o644}


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_a_student_is_drawn_at_the_size_it_was_trained_at(kind, tmp_path):
    """--generate without --resolution draws 16 pixels after a run at 16."""
    run = finished(tmp_path / "run", "--iterations", 1, "--resolution", 16, *LORA[kind])
    assert picture(tmp_path / "out", run).size == (16, 16)


def test_the_exported_config_has_the_trained_size(tmp_path):
    """So other programs draw at that size too."""
    run = finished(tmp_path / "run", "--iterations", 1, "--resolution", 16)
    assert json.loads((run / "student" / "config.json").read_text())["sample_size"] == 4


def test_a_lora_has_no_data_in_its_header(lora):
    """What stands in the header only is lost in other programs."""
    with safe_open(lora / "student" / LORA_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_loras_scale_is_in_its_weights(lora):
    """Trained with alpha = 2 x rank, read with alpha = rank: lora_B is twice the EMA's."""
    ema = load_file(lora / "checkpoint_000006" / shard("ema"))
    for name, x in load_file(lora / "student" / LORA_FILE).items():
        factor = 2 if "lora_B" in name else 1
        assert torch.equal(x, factor * ema[name.removeprefix("transformer.")])


def test_a_lora_draws_the_same_without_its_header(lora, tmp_path):
    """The same picture, also after another program has saved the file."""
    (tmp_path / "bare").mkdir()
    save_file(load_file(lora / "student" / LORA_FILE), tmp_path / "bare" / LORA_FILE)
    expected = picture(tmp_path / "out", lora)
    assert picture(tmp_path / "again", tmp_path / "bare").tobytes() == expected.tobytes()


def kohya(weights):
    """The same weights under kohya's names."""
    names = {
        name: name.removeprefix("transformer.").replace("lora_A", "lora_down") for name in weights
    }
    return {"lora_unet_" + names[name].replace(".", "_"): x for name, x in weights.items()}


WRONG_LORAS = {
    "kohya": kohya,
    "one more": lambda weights: weights | {"transformer.extra.lora_A.weight": torch.ones(4, 4)},
    "one less": lambda weights: dict(list(weights.items())[1:]),
    "no LoRA": lambda weights: {"x": torch.ones(2)},
    "other shapes": lambda weights: {name: x.repeat(2, 2) for name, x in weights.items()},
}


@pytest.mark.parametrize("kind", WRONG_LORAS)
def test_a_lora_that_does_not_fit_is_refused(kind, lora, tmp_path, capfd):
    """Else --generate would draw the undistilled teacher."""
    student = tmp_path / "student"
    student.mkdir()
    weights = load_file(lora / "student" / LORA_FILE)
    save_file(WRONG_LORAS[kind](weights), student / LORA_FILE)
    flags = ["--teacher", TEACHER, "--student", student, "--generate", "cat", "--device", "cpu"]
    check_mistake(capfd, tmp_path, [*flags, "--output-dir", tmp_path / "out"], str(student))


def test_lora_trains_both_attentions_of_sd35(tmp_path):
    """SD3.5's attn2 is among the targets, and such a student can be drawn with."""
    import diffusers

    teacher = Path(shutil.copytree(TEACHER, tmp_path / "teacher"))
    config = json.loads((teacher / "transformer" / "config.json").read_text())
    config |= {"dual_attention_layers": [0, 1], "qk_norm": "rms_norm"}
    torch.manual_seed(0)
    net = diffusers.SD3Transformer2DModel.from_config(config)
    net.save_pretrained(teacher / "transformer")
    flags = ["--teacher", teacher]
    run = finished(tmp_path / "run", "--iterations", 1, "--lora-rank", 4, *flags)
    layers = {".".join(name.split(".")[1:5]) for name in load_file(run / "student" / LORA_FILE)}
    for layer in ("to_q", "to_k", "to_v", "to_out"):
        assert f"transformer_blocks.0.attn2.{layer}" in layers
    assert len(draw(tmp_path / "out", run, "a face", flags=flags)) == 1


# --- --generate. ---


def test_two_students_draw_two_pictures(whole, lora, tmp_path):
    """The same prompt, seed and folder: the first picture stays."""
    (first,) = draw(tmp_path, whole, PROMPTS[0])
    before = first.read_bytes()
    assert [first] == draw(tmp_path, lora, PROMPTS[0])[:1]
    assert len(draw(tmp_path, lora, PROMPTS[0])) == 3
    assert first.read_bytes() == before


def test_prompts_that_are_longer_than_file_names(whole, tmp_path):
    """80 Chinese characters are 240 bytes. The prompt after them is drawn too."""
    files = draw(tmp_path, whole, "日本の狐" * 20, "日本の狐" * 20 + "二", "/../" * 100, "?")
    assert len(files) == 4
    assert max(len(os.fsencode(file.name)) for file in files) < 200


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"resolution": "large", "no_t5": false}'])
def test_a_student_whose_notes_are_damaged(content, lora, tmp_path, capfd):
    """cdm.json says the student's resolution. The sentence names the file."""
    student = shutil.copytree(lora / "student", tmp_path / "student")
    (student / "cdm.json").write_text(content)
    flags = ["--teacher", TEACHER, "--student", student, "--generate", "a face"]
    check_mistake(capfd, tmp_path, [*flags, "--output-dir", tmp_path / "out"], "cdm.json")
