"""The command line: mistakes, prompts, teachers, defaults and --help.

A mistake is answered with one sentence and exit code 2, and nothing is written.
"""

import contextlib
import http.server
import io
import re
import threading
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from helpers import LIVELY, SMALL, build, cdm_main, check_mistake, check_sentence, finish, process

import cdm

# --- Wrong flags. ---

# Flags, and a word of the sentence.
WRONG = [
    ("--batch-size -1", "--batch-size"),
    ("--micro-batch-size -1", "--micro-batch-size"),
    ("--micro-batch-size 3", "multiple of 3"),
    ("--max-schedule-steps 0", "--max-schedule-steps"),
    ("--student-every 0", "--student-every"),
    ("--iterations 0", "--iterations"),
    ("--iterations -3", "--iterations"),
    ("--iterations many", "--iterations"),
    ("--iterations 2.5", "--iterations"),
    ("--save-every 0", "--save-every"),
    ("--sample-count 0", "--sample-count"),
    ("--sample-steps 0", "--sample-steps"),
    ("--sample-steps 51", "1 to 50"),
    ("--lora-rank -1", "--lora-rank"),
    ("--resolution -1", "--resolution"),
    ("--resolution 9", "--resolution 9"),
    ("--resolution 4096", "--resolution 4096"),
    ("--time-low 0.5 --time-high 0.5", "--time-low"),
    ("--time-low 0.9 --time-high 0.1", "--time-low"),
    ("--time-low nan", "--time-low"),
    ("--time-high 1.5", "--time-high"),
    ("--tau-min 0.9 --tau-max 0.1", "--tau-min"),
    ("--ca-weight -1", "--ca-weight"),
    ("--dm-weight nan", "--dm-weight"),
    ("--cdm-weight inf", "--cdm-weight"),
    ("--ca-weight 0 --dm-weight 0 --cdm-weight 0", "--cdm-weight"),
    ("--alpha -1", "--alpha"),
    ("--student-lr nan", "--student-lr"),
    ("--clip 0", "--clip"),
    ("--ema-decay 1.5", "--ema-decay"),
    ("--offload-ema --lora-rank 4", "--offload-ema"),
    ("--offload-ema --generate cat", "--offload-ema"),
    ("--fake-pull 2", "--fake-pull"),
    ("--schedule sometimes", "--schedule"),
    ("--cdm-point nowhere", "--cdm-point"),
    ("--device tpu", "--device"),
    ("--no-such-flag", "--no-such-flag"),
    ("--iter 5", "--iter"),
    ("--prompts nowhere.txt", "nowhere.txt"),
    ("--prompts .", "--prompts"),
    ("--teacher nowhere/at/all", "nowhere/at/all"),
    ("--resume", "--resume"),
    ("--student runs/cdm/student", "--generate"),
    ("--times 1 0.5", "--generate"),
    ("--generate cat", "--student"),
    ("--generate cat --student nowhere", "--student"),
    ("--generate cat --student .", "has no student"),
    ("--generate cat --student . --times 1 0.5 0.75", "--times"),
    ("--generate cat --student . --times 0.9 0.5", "--times"),
    ("--generate cat --student . --times 1 0", "--times"),
    ("--generate cat --student . --times 0", "--times"),
    ("--generate cat --student . --times 1 nan", "--times"),
    ("--generate cat --student . --times 1 half", "--times"),
    ("--generate cat --student . --times 1 1", "--times"),
    ("--sample-steps 4 0", "--sample-steps"),
    ("--weights float16", "--weights"),
    ("--export-every -1", "--export-every"),
    (f"--seed {2**70}", "--seed"),
    ("--max-schedule-steps 99999999999999999999", "--max-schedule-steps"),
    ("--student-lr 1e30", "--student-lr"),
    ("--output-dir out\udce9", "UTF-8"),
    ("--generate caf\udce9 --student .", "UTF-8"),
]


@pytest.mark.parametrize("flags, word", WRONG, ids=[flags for flags, _ in WRONG])
def test_wrong_flags(flags, word, tmp_path, monkeypatch, capfd):
    """`python cdm.py --iterations 0` prints "cdm.py: --iterations is 0: give 1 to 1e18."."""
    monkeypatch.chdir(tmp_path)
    check_mistake(capfd, tmp_path, [*SMALL, "--output-dir", "out", *flags.split()], word)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(tmp_path, capfd):
    """`--device cuda` on a laptop is a mistake, not a slow run on the CPU."""
    flags = [*SMALL, "--output-dir", tmp_path / "out", "--device", "cuda"]
    check_mistake(capfd, tmp_path, flags, "CUDA")


@pytest.mark.slow
def test_compile_without_a_compiler(tmp_path):
    """Without a C++ compiler, --compile is a mistake."""
    env = {"PATH": str(tmp_path), "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = process("cdm.py", *SMALL, "--compile", "--output-dir", tmp_path / "out", **env)
    code, out, err = finish(run)
    assert code == 2
    check_sentence(out, err, "--compile")
    assert not (tmp_path / "out").exists()


# --- Prompts. ---

NOT_PROMPTS = {
    "empty": (b"", "no prompt"),
    "blank lines": (b"\n  \n\n", "no prompt"),
    "byte order mark": (b"\xef\xbb\xbf\n", "no prompt"),
    "latin-1": ("un café\n".encode("latin-1"), "UTF-8"),
    "utf-16": ("a cat".encode("utf-16"), "UTF-8"),
}


@pytest.mark.parametrize("kind", NOT_PROMPTS)
def test_wrong_prompts_file(kind, tmp_path, capfd):
    """A file without prompts, or in another encoding than UTF-8, is named in the sentence."""
    content, word = NOT_PROMPTS[kind]
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    flags = [*SMALL, "--prompts", file, "--output-dir", tmp_path / "out"]
    check_mistake(capfd, tmp_path, flags, str(file), word)


def test_prompts_from_a_file(tmp_path):
    """A byte order mark, blank lines, blanks, CRLF and duplicates are tolerated."""
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffein Fuchs\r\n\r\n  日本の狐 \n\nein Fuchs\nun café".encode())
    assert cdm.read_prompts(file) == ["ein Fuchs", "日本の狐", "un café"]


def test_built_in_prompts():
    """Thousands of different sentences."""
    prompts = cdm.read_prompts(cdm.parse_args([]).prompts)
    assert len(prompts) == len(set(prompts)) >= 2000
    for prompt in prompts:
        assert prompt == prompt.strip()
        assert len(prompt.split()) > 3


def test_built_in_prompts_are_announced(tmp_path, capfd):
    """Without --prompts a run uses those of assets/prompts.txt, and says so."""
    flags = list(LIVELY)
    at = flags.index("--prompts")
    del flags[at : at + 2]
    assert cdm_main(*flags, "--iterations", 1, "--output-dir", tmp_path / "out") == 0
    assert "2016 prompts of " in capfd.readouterr().out


# --- Teachers on disk. ---

INDEX = {
    "empty": None,
    "broken": "{",
    "list": "[]",
    "nameless": "{}",
    "binary": "\udcff",
    "other": '{"_class_name": "FluxPipeline"}',
}


@pytest.mark.parametrize("kind", INDEX)
def test_a_folder_that_is_no_sd3_pipeline(kind, tmp_path, capfd):
    """A model_index.json that is absent, broken, Flux's, or SD3's without weights."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    if INDEX[kind] is not None:
        file = folder / "model_index.json"
        file.write_text(INDEX[kind], encoding="utf-8", errors="surrogateescape")
    flags = [*SMALL, "--teacher", folder, "--output-dir", tmp_path / "out"]
    check_mistake(capfd, tmp_path, flags, str(folder), "StableDiffusion3Pipeline")


def test_a_folder_without_weights(tmp_path, capfd):
    """A model_index.json alone: the sentence names the first folder that is not there."""
    index = '{"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "x"]}'
    (tmp_path / "model_index.json").write_text(index)
    check_mistake(capfd, tmp_path, [*SMALL, "--teacher", tmp_path], str(tmp_path), "transformer/")


def test_a_file_as_teacher(tmp_path, capfd):
    """SD3's single-file checkpoint, such as sd3_medium.safetensors, is not a pipeline folder."""
    file = tmp_path / "sd3_medium.safetensors"
    file.write_bytes(b"weights")
    flags = [*SMALL, "--teacher", file, "--output-dir", tmp_path / "out"]
    check_mistake(capfd, tmp_path, flags, str(file))


@pytest.mark.parametrize("path", ["./nowhere", "../nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_mistyped_path_as_teacher(path, tmp_path, monkeypatch, capfd):
    """What cannot be a hub id is answered as a path, without a web page or a log-in."""
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--teacher", path, "--output-dir", "out"]
    sentence = check_mistake(capfd, tmp_path, flags, f"--teacher {path} ", "folder")
    assert "http" not in sentence
    assert "hf auth login" not in sentence


def test_several_processes_offload_no_ema(monkeypatch, tmp_path, capfd):
    """--offload-ema under torchrun would do nothing: a mistake."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = [*SMALL, "--offload-ema", "--output-dir", tmp_path / "out"]
    check_mistake(capfd, tmp_path, flags, "--offload-ema", "one GPU")


def test_one_of_two_processes_alone(monkeypatch, tmp_path, capfd):
    """WORLD_SIZE=2, as some clusters set it, without the other variables of torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    flags = [*SMALL, "--output-dir", tmp_path / "out"]
    check_mistake(capfd, tmp_path, flags, "torchrun", "WORLD_SIZE")


# --- Teachers on the hub: huggingface_hub against a server on this machine. ---

SIBLING = "stabilityai/stable-diffusion-3-medium-diffusers"
# A repository: the hub's answer, and words of the sentence.
HUB = {
    "stabilityai/stable-diffusion-3-medium": (401, "GatedRepo", "gated repo"),
    "them/asked": (403, "GatedRepo", "gated repo"),
    "them/typo": (404, "RepoNotFound", "Repository Not Found"),
    "them/secret": (401, "RepoNotFound", "Repository Not Found"),
    "them/files": (404, "EntryNotFound", "Entry Not Found"),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as huggingface.co does."""

    asked = []

    def do_HEAD(self):
        self.asked.append(self.path)
        name = "/".join(self.path.split("/")[1:3]).removesuffix("-diffusers")
        # The client has errands of its own, which fail.
        code, error, _ = HUB.get(name, (404, "RepoNotFound", ""))
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub(work):
    """What a process said about each of HUB's repositories, in turn."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(work / "hub"),
        "HF_TOKEN": "hf_none",
    }
    script = (
        "import cdm, sys\n"
        "for name in sys.argv[2:]:\n"
        "    print(cdm.main(['--teacher', name, '--output-dir', sys.argv[1]]))\n"
    )
    code, out, err = finish(process("-c", script, work / "nothing", *HUB, **env))
    server.shutdown()
    assert code == 0, err
    sentences = [line for line in err.splitlines(keepends=True) if line.startswith("cdm.py: ")]
    assert not (work / "nothing").exists()
    return SimpleNamespace(out=out, err=err, said=dict(zip(HUB, sentences, strict=True)))


@pytest.mark.parametrize("name", HUB)
def test_hub_ids(name, hub):
    """A gated, unknown or empty repository: the reason, its page and the command to log in."""
    page = "https://huggingface.co/" + name
    words = [HUB[name][2], page, "`hf auth login`"]
    check_sentence("", hub.said[name], name, *words)


def test_hub_ids_are_mistakes(hub):
    """Each has exit code 2 and prints its sentence and nothing else."""
    assert hub.out == "2\n" * len(HUB)
    assert hub.err == "".join(hub.said.values())


def test_the_single_file_repository_stands_for_its_sibling(hub):
    """The id that people know holds no pipeline: its -diffusers sibling is looked up."""
    sentence = hub.said[SIBLING.removesuffix("-diffusers")]
    assert f"https://huggingface.co/{SIBLING} " in sentence
    assert any(path.startswith(f"/{SIBLING}/") for path in Hub.asked)
    assert not any("3-medium/" in path for path in Hub.asked)


def test_the_hub_cannot_be_reached(tmp_path):
    """The default teacher without a network and without a cache."""
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_none"}
    code, out, err = finish(process("cdm.py", "--output-dir", tmp_path / "out", **env))
    assert code == 2
    words = [SIBLING, f"https://huggingface.co/{SIBLING} ", "`hf auth login`", "cache"]
    check_sentence(out, err, *words)
    assert not (tmp_path / "out").exists()


# --- Defaults and --help. ---

# The authors' SD3-Medium configuration.
RELEASED = {
    "ca_weight": 1,
    "dm_weight": 1,
    "cdm_weight": 1,
    "alpha": 7,
    "schedule": "dynamic",
    "max_schedule_steps": 28,
    "time_low": 0.25,
    "time_high": 0.95,
    "stratified": False,
    "cdm_point": "euler",
    "tau_min": 0.02,
    "tau_max": 0.98,
    "student_every": 2,
    "student_lr": 1e-5,
    "fake_lr": 5e-6,
    "warmup": 100,
    "weight_decay": 1e-4,
    "clip": 1,
    "ema_decay": 0.999,
    "fake_pull": 0.999,
    "anchor_aware_fake": False,
    "iterations": 4000,
    "lora_rank": 0,
    "gradient_checkpointing": True,
    "no_t5": False,
    "teacher": "stabilityai/stable-diffusion-3-medium",
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_defaults_are_the_released_configuration(name):
    """Without flags, a run has the authors' numbers."""
    assert getattr(cdm.parse_args([]), name) == RELEASED[name]


def test_zero_stands_for_the_default_size(tmp_path):
    """16 samples for each process, on a CPU in one micro-batch, at the teacher's resolution."""
    zeros = "--batch-size 0 --micro-batch-size 0 --resolution 0".split()
    run = build("--output-dir", tmp_path / "none", *zeros)
    assert (run.args.batch_size, run.args.micro_batch_size) == (16, 16)
    assert run.family.resolution == 32


@pytest.fixture(scope="module")
def help_groups():
    """{title of a group in --help: [its flags]}."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        cdm.main(["--help"])
    assert end.value.code == 0
    groups = {}
    for title, text in re.findall(r"^(\S[^\n]*):\n((?:  [^\n]*\n|\n)+)", out.getvalue(), re.M):
        flags = re.findall(r"^  (?:-h, )?--([\w-]+)", text, re.M)
        if flags:
            groups[title] = flags
    return groups


# How a title begins: some flags of the group.
GROUPS = {
    "the run": "teacher prompts output-dir iterations batch-size seed resume lora-rank",
    "The method": "ca-weight dm-weight cdm-weight alpha schedule cdm-point student-lr fake-pull",
    "memory and speed": "micro-batch-size gradient-checkpointing offload-ema compile",
    "sampling": "generate student sample-steps times",
    "NOT IN THE PAPER": "anchor-aware-fake anchor-lr",
}


@pytest.mark.parametrize("title", GROUPS)
def test_help_has_groups(title, help_groups):
    """--help lists each flag under the title where a reader looks for it."""
    (flags,) = [flags for name, flags in help_groups.items() if name.startswith(title)]
    assert set(GROUPS[title].split()) <= set(flags)


def test_help_names_every_flag_once(help_groups):
    """Each field of Settings is a flag, in one group."""
    flags = [flag for group in help_groups.values() for flag in group]
    names = [field.name.replace("_", "-") for field in fields(cdm.Settings)]
    assert sorted(flags) == sorted(["help", *names])
