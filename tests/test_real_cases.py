"""What people really give to the program: teachers, schedulers and prompts of public reports.

Runs and students are in test_real_runs.py. Wrong flags and encodings, hub ids and folders that are
no pipeline are in test_command_line.py.
"""

import json
import os
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from helpers import (
    PROMPTS,
    QUARTERS,
    SMALL,
    TEACHER,
    check_mistake,
    finish,
    finished,
    load_family,
    process,
    saying,
)
from safetensors.torch import load_file, save_file

import cdm


def edit(file, **changes):
    """Change values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file):
    """Cut a file off in the middle."""
    os.truncate(file, file.stat().st_size // 2)


@pytest.fixture
def teacher(tmp_path):
    """A copy of the teacher's folder, to be changed."""
    return Path(shutil.copytree(TEACHER, tmp_path / "teacher"))


@pytest.fixture
def refuse_teacher(teacher, capfd):
    """A check that the changed teacher is refused in a sentence with its name and these words."""

    def refuse(*words, flags=()):
        flags = [*SMALL, "--teacher", teacher, "--output-dir", teacher / "out", *flags]
        return check_mistake(capfd, teacher, flags, str(teacher), *words)

    return refuse


# --- Teachers that are not whole. ---


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_a_teacher_without_a_tokenizer(part, teacher, refuse_teacher):
    """To its text encoder all prompts would be the same. The sentence says which it is."""
    shutil.rmtree(teacher / part)
    sentence = refuse_teacher()
    encoder = part.replace("tokenizer", "text_encoder")
    assert re.search(rf"\b({part}|{encoder})\b", sentence), sentence


TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "*"]


@pytest.mark.parametrize("files", TOKENIZER_FILES)
@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_a_tokenizer_that_is_not_complete(part, files, teacher, refuse_teacher):
    """Without its vocabulary all prompts are alike, without its config it has no length."""
    for file in (teacher / part).glob(files):
        file.unlink()
    refuse_teacher(f"files of {part}")


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_an_encoder_to_which_all_prompts_are_alike(part, teacher, refuse_teacher):
    """Such as one whose weights are zeros."""
    file = teacher / part / "model.safetensors"
    zeros = {name: torch.zeros_like(x) for name, x in load_file(file).items()}
    save_file(zeros, file, metadata={"format": "pt"})
    refuse_teacher(f"{part} in")


def test_a_config_that_fails_in_the_rehearsal(teacher, refuse_teacher):
    """What only decoding shows is found before the first iteration."""
    edit(teacher / "vae" / "config.json", scaling_factor=None)
    refuse_teacher("cannot draw")


CUT = ["text_encoder/model.safetensors", "text_encoder_3/model.safetensors"]
CUT += [
    "vae/diffusion_pytorch_model.safetensors",
    "transformer/diffusion_pytorch_model.safetensors",
]
CUT += ["tokenizer_3/tokenizer.json", "scheduler/scheduler_config.json", "model_index.json"]


@pytest.mark.parametrize("name", CUT)
def test_a_teacher_with_a_file_cut_off(name, teacher, refuse_teacher):
    """An interrupted download is one sentence with the teacher's name."""
    cut(teacher / name)
    refuse_teacher("cannot be loaded")


NAN = ["transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]
NAN += ["text_encoder/model", "text_encoder_3/model"]


@pytest.mark.parametrize("name", NAN)
def test_a_teacher_with_nan(name, teacher, refuse_teacher):
    """One value is enough, also of a token that the first prompt lacks. No rate is blamed."""
    file = teacher / f"{name}.safetensors"
    weights = load_file(file)
    bad = sorted(weights)[0]
    weights[bad].view(-1)[-1] = torch.nan
    save_file(weights, file, {"format": "pt"})
    sentence = refuse_teacher("not finite", bad.split(".")[-2])
    assert "learning rate" not in sentence


def test_a_vae_whose_config_makes_nan(teacher, refuse_teacher):
    """The rehearsal looks at pixels, not at latents alone."""
    edit(teacher / "vae" / "config.json", shift_factor=1e39)
    refuse_teacher("not finite")


def drop_a_weight(file):
    """Remove one tensor from a file, and return its name."""
    weights = load_file(file)
    name = sorted(weights)[3]
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    return name


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_a_network_that_lacks_a_weight(part, teacher, capfd):
    """The sentence has the weight's name."""
    name = drop_a_weight(teacher / part / "diffusion_pytorch_model.safetensors")
    config = json.loads((teacher / part / "config.json").read_text())
    sentence = saying(capfd, 2, "--teacher", teacher, "--output-dir", teacher / "out")
    assert re.fullmatch(rf"cdm\.py: .*{config['_class_name']}.*{name}.*", sentence)


def test_a_text_encoder_that_lacks_a_weight(teacher):
    """transformers makes a random one. Its report is shown, with the weight's name.

    In a process of its own: transformers writes to the stderr that it met when it was imported.
    """
    name = drop_a_weight(teacher / "text_encoder" / "model.safetensors")
    flags = [*SMALL, "--teacher", teacher, "--iterations", 1, "--output-dir", teacher / "out"]
    code, _, err = finish(process("cdm.py", *flags))
    assert code == 0, err
    assert re.search(rf"{name}.*MISSING", err)


def leave_out(teacher, *parts):
    """Make a pipeline's folder as diffusers saves it without these parts: null in its index."""
    edit(teacher / "model_index.json", **dict.fromkeys(parts, [None, None]))
    for part in parts:
        shutil.rmtree(teacher / part)


T5 = ["text_encoder_3", "text_encoder_3 tokenizer_3"]


@pytest.mark.parametrize("flags", [[], ["--no-t5"]])
@pytest.mark.parametrize("parts", T5)
def test_a_teacher_saved_without_t5(parts, flags, teacher):
    """It loads, with T5's tokenizer or without, with --no-t5 or without. T5's tokens are zeros."""
    leave_out(teacher, *parts.split())
    text, _ = load_family("--teacher", teacher, *flags).encode(PROMPTS)
    assert text[:, :4].any()
    assert not text[:, 4:].any()


def test_a_teacher_whose_t5_was_deleted(teacher, refuse_teacher):
    """The sentence names the missing part."""
    shutil.rmtree(teacher / "text_encoder_3")
    refuse_teacher("text_encoder_3")


def test_no_t5_needs_no_t5(teacher):
    """--no-t5 loads a teacher whose text_encoder_3/ was never downloaded."""
    shutil.rmtree(teacher / "text_encoder_3")
    assert load_family("--teacher", teacher, "--no-t5").pipe.text_encoder_3 is None


def rename(folder, variant):
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(f".{variant}.safetensors"))


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_teacher_with_one_variant_alone(variant, teacher):
    """It loads, with the same weights."""
    rename(teacher, variant)
    found = load_family("--teacher", teacher).transformer.state_dict()
    for name, x in load_family().transformer.state_dict().items():
        assert torch.equal(found[name], x)


def test_vae_without_a_shift(teacher):
    """shift_factor null is 0."""
    pictures = []
    for shift in (0.0, None):
        edit(teacher / "vae" / "config.json", shift_factor=shift)
        family = load_family("--teacher", teacher)
        noise = torch.zeros(1, *family.shape)
        model = cdm.Model(family.transformer, family)
        pictures += family.images(model, [noise], torch.ones(1), family.encode(PROMPTS[:1]))
    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_transformer_without_a_size(teacher, refuse_teacher):
    """sample_size null: the sentence asks for --resolution."""
    edit(teacher / "transformer" / "config.json", sample_size=None)
    refuse_teacher("give --resolution")


def test_transformer_without_a_size_but_a_resolution(teacher):
    """With --resolution it loads."""
    edit(teacher / "transformer" / "config.json", sample_size=None)
    assert load_family("--teacher", teacher, "--resolution", 32).resolution == 32


def test_a_cached_sharded_teacher_without_a_network(teacher, tmp_path):
    """A hub id whose files are in the cache loads with HF_HUB_OFFLINE=1."""
    model = diffusers.SD3Transformer2DModel.from_pretrained(teacher / "transformer")
    shutil.rmtree(teacher / "transformer")
    model.save_pretrained(teacher / "transformer", max_shard_size="3MB")
    assert len(list((teacher / "transformer").glob("*.safetensors"))) > 1
    repository = tmp_path / "home" / "hub" / "models--them--small"
    shutil.copytree(teacher, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    script = "import cdm, torch; args = cdm.parse_args(['--teacher', 'them/small'])\n"
    script += "print(cdm.load_family(args, torch.device('cpu')).resolution)"
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    code, out, err = finish(process("-c", script, **env))
    assert (code, out) == (0, "32\n"), err


# --- Schedulers. ---

SCHEDULERS = {
    "accepted": [{"shift": 1.0}, {"shift": 6.0}, {"use_dynamic_shifting": True}],
    "refused": [
        *({"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}),
        *({"shift_terminal": 0.02}, {"invert_sigmas": True}),
        {"use_dynamic_shifting": True, "use_karras_sigmas": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    ],
}


@pytest.mark.parametrize("options", SCHEDULERS["accepted"], ids=str)
def test_our_times_are_the_schedulers(options, teacher):
    """Few steps and the grid's 28 are at the times that the pipeline's call makes of the sigmas."""
    edit(teacher / "scheduler" / "scheduler_config.json", **options)
    family = load_family("--teacher", teacher)
    call = {"guidance_scale": 1.0, "output_type": "latent", "max_sequence_length": 4}
    call |= {"height": family.resolution, "width": family.resolution}
    for sigmas in (QUARTERS, [1 - i / 28 for i in range(28)]):
        family.pipe(PROMPTS[0], sigmas=sigmas, **call)
        theirs = family.pipe.scheduler.sigmas[:-1].clone()
        torch.testing.assert_close(cdm.uniform_times(len(sigmas), family.shift), theirs)


@pytest.mark.parametrize("options", SCHEDULERS["refused"], ids=str)
def test_schedulers_that_do_more_than_shift(options, teacher, refuse_teacher):
    """They would train and sample at other times than diffusers."""
    edit(teacher / "scheduler" / "scheduler_config.json", **options)
    refuse_teacher("scheduler")


def test_a_scheduler_of_another_kind(teacher, refuse_teacher):
    """DPM-Solver with flow sigmas has a flow_shift and no shift."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    scheduler.save_pretrained(teacher / "scheduler")
    kind = ["diffusers", "DPMSolverMultistepScheduler"]
    edit(teacher / "model_index.json", scheduler=kind)
    refuse_teacher("scheduler", "FlowMatchEulerDiscreteScheduler")


# --- Prompts. ---

NOT_PLAIN = {
    "p.csv": b"id,prompt\n1,a cat\n",
    "p.tsv": b"id\tprompt\n1\ta cat\n",
    "p.json": b'["a cat",\n"a dog"]\n',
    "p.jsonl": b'{"prompt": "a cat"}\n',
    "json.txt": b'{"prompts": ["a cat"]}\n',
    "list.txt": b'[\n"a cat",\n"a dog"\n]\n',
    "html.txt": b"<!DOCTYPE html>\n<html>\n",
    "pointer.txt": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "utf-16.txt": "a cat\na dog\n".encode("utf-16-le"),
    "utf-16-be.txt": "a cat\na dog\n".encode("utf-16-be"),
    "utf-32.txt": "a cat\na dog\n".encode("utf-32-le"),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_prompts_that_are_not_plain_text(name, tmp_path, capfd):
    """A table's header, JSON's brackets and UTF-16's NULs are no prompts."""
    file = tmp_path / name
    file.write_bytes(NOT_PLAIN[name])
    flags = [*SMALL, "--prompts", file, "--output-dir", tmp_path / "out"]
    check_mistake(capfd, tmp_path, flags, str(file), "give")


PLAIN = {
    "U+2028": ("a\u2028b\nc\n", ["a\u2028b", "c"]),
    "U+0085": ("a\x85b\nc\n", ["a\x85b", "c"]),
    "form feed": ("a\fb\nc\n", ["a\fb", "c"]),
    "vertical tab": ("a\vb\nc\n", ["a\vb", "c"]),
    "separator": ("a\x1cb\nc\n", ["a\x1cb", "c"]),
    "old Mac": ("a b\rc\r", ["a b", "c"]),
    "mark on a later line": ("a\n\ufeffb\n", ["a", "b"]),
    "no newline at the end": ("a\nb", ["a", "b"]),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_prompts_end_where_lines_end(kind, tmp_path):
    """Other separators stay inside a prompt. Byte-order marks are dropped, wherever they are."""
    text, prompts = PLAIN[kind]
    (tmp_path / "p.txt").write_bytes(text.encode())
    assert cdm.read_prompts(tmp_path / "p.txt") == prompts


def test_prompts_that_an_encoder_cuts(tmp_path, capfd):
    """How many are longer than CLIP and T5 read is said once, at the start."""
    (tmp_path / "p.txt").write_text("a face\na face with a very large hat\na plant\n")
    finished(tmp_path / "out", "--prompts", tmp_path / "p.txt", "--iterations", 2)
    out = capfd.readouterr().out
    said = re.findall(r"(tokenizer\w*) cuts 1 of 3 prompts at 4 tokens", out)
    assert said == ["tokenizer", "tokenizer_2", "tokenizer_3"]


def test_prompts_that_fit_are_not_mentioned(tmp_path, capfd):
    """All five of the teacher's prompts are short enough."""
    finished(tmp_path / "out", "--iterations", 1)
    assert " cuts " not in capfd.readouterr().out
