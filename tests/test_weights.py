"""--weights bfloat16: what is in that type, and that all else works as in float32."""

import shutil

import pytest
import torch
from helpers import LIVELY, build, cdm_main, finish, finished, log, results, torchrun
from safetensors.torch import load_file
from torch.testing import assert_close

import cdm

BF16 = ["--weights", "bfloat16", "--iterations", 4]


@pytest.fixture(scope="module")
def half(work):
    """Four iterations with bf16 weights. Tests do not change it."""
    return finished(work / "half", *BF16)


def types(folder):
    """The types of all tensors in the safetensors files of a folder."""
    return {x.dtype for file in folder.rglob("*.safetensors") for x in load_file(file).values()}


@pytest.mark.parametrize("file", ["student", "fake_score"])
def test_what_is_trained_is_bf16(file, half):
    """Parameters of both networks are bf16."""
    assert types(half / "checkpoint_000004" / file) == {torch.bfloat16}


def test_the_average_is_exact():
    """The EMA is float32: steps of 1 - 0.999 would round away in bf16."""
    run = build(*BF16)
    (before,) = {x.dtype for x in run.ema.values()}
    assert before == torch.float32
    name, p = next(iter(run.student.params.items()))
    assert torch.equal(run.ema[name], p.float())
    moved = 2 * p.detach()
    cdm.average_into(run.ema, {name: moved}, 0.999)
    assert_close(run.ema[name], p.float() * 1.001, rtol=1e-6, atol=0)


@pytest.mark.parametrize("role", ["student", "fake_score"])
@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_moments_are_bf16(role, moment, half):
    """So are both of AdamW's moments."""
    assert types(half / "checkpoint_000004" / f"{role}_{moment}") == {torch.bfloat16}


def test_the_student_is_bf16(half):
    """The exported student has the type that it was trained in."""
    assert types(half / "student") == {torch.bfloat16}


def test_resume_bit_for_bit(half, tmp_path):
    """The last two of four iterations come again from the checkpoint of the second."""
    again = shutil.copytree(half, tmp_path / "again")
    shutil.rmtree(again / "checkpoint_000004")
    shutil.rmtree(again / "student")
    finished(again, *BF16, "--resume")
    assert results(again) == results(half)


def test_lora_adapters_stay_float32():
    """With LoRA the frozen network alone is in bf16."""
    run = build(*BF16, "--lora-rank", 4)
    assert {p.dtype for p in run.student.params.values()} == {torch.float32}
    frozen = run.teacher.transformer.transformer_blocks[0].attn.to_q.weight
    assert frozen.dtype == torch.bfloat16
    for role in (run.student.model, run.fake_score.model, run.ema_model):
        assert role.transformer.transformer_blocks[0].attn.to_q.base_layer.weight is frozen


@pytest.mark.parametrize("flags", [[], ["--lora-rank", 4], BF16], ids=["full", "lora", "bf16"])
def test_student_fake_score_and_average_start_alike(flags):
    """So the pull and the average mix parameters that mean the same."""
    run = build(*flags)
    assert run.student.params.keys() == run.fake_score.params.keys() == run.ema.keys()
    for name, p in run.student.params.items():
        assert torch.equal(p, run.fake_score.params[name])
        assert torch.equal(p.float(), run.ema[name])


def test_resume_with_another_type_is_refused(half, capfd):
    """The type is part of the run's identity."""
    flags = [*LIVELY, "--iterations", 6, "--output-dir", half, "--resume"]
    assert cdm_main(*flags) == 2
    assert "--weights is float32" in capfd.readouterr().err


@pytest.mark.slow
def test_two_processes_are_one_run(half, tmp_path):
    """Two processes log what one does, up to bf16's rounding: 3 decimal digits, then AdamW."""
    flags = [*LIVELY, *BF16, "--output-dir", tmp_path / "two"]
    code, _, err = finish(torchrun(*flags), 240)
    assert code == 0, err
    for two, one in zip(log(tmp_path / "two"), log(half), strict=True):
        for name in ("loss_fake", "loss_ca"):
            assert two[name] == pytest.approx(one[name], rel=0.05), name
