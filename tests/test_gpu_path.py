"""The GPU path without a GPU: bf16, no waiting, offload, compile."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, LORA, ONE_SAVE, assert_same_figures, build, finished, inputs, log, results
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cdm

META = torch.device("meta")
OFFLOAD = ["--offload-text-encoders", "--offload-ema"]


@pytest.fixture
def like_a_gpu(whole, lora, monkeypatch):
    """On this CPU, the autocast to bf16 and the teacher in bf16 that GPUs get.

    The runs `whole` and `lora` are made before that, in float32.
    """
    autocast = torch.autocast
    load = cdm.Family.__init__

    def load_as_on_a_gpu(family, *args):
        load(family, *args)
        family.dtype = torch.bfloat16

    def always(device, dtype, enabled, **more):
        return autocast(device, dtype, **more)

    monkeypatch.setattr(torch, "autocast", always)
    monkeypatch.setattr(cdm.Family, "__init__", load_as_on_a_gpu)


@pytest.mark.parametrize("kind", LORA)
@torch.no_grad()
def test_bf16_roles_start_as_the_teacher(kind, like_a_gpu):
    """Student, fake score and a teacher in bf16 give the same output to the last bit."""
    run = build(*LORA[kind])
    types = {p.dtype for p in run.teacher.transformer.parameters()}
    assert (torch.bfloat16 in types) == (kind == "whole")
    v, *others = [
        role(*inputs(run)) for role in (run.teacher, run.student.model, run.fake_score.model)
    ]
    assert all(torch.equal(v, other) for other in others)


# LoRA's L_DM and L_CDM begin at 0 and are smaller than the rounding.
LARGE = {"lora": ["loss_fake", "loss_ca", "grad_norm_fake", "grad_norm_student"]}
LARGE["whole"] = [*LARGE["lora"], "loss_dm", "loss_cdm"]


# LoRA's B starts at 0, where AdamW's first steps enlarge the rounding. Only its first line is near.
COMPARED = {"whole": 3, "lora": 1}  # lines of the log, one for each student update


@pytest.mark.parametrize("kind", LORA)
def test_bf16_trains_as_float32_up_to_rounding(kind, like_a_gpu, request, tmp_path):
    """Six iterations log other figures, but near ones. All that is saved stays float32."""
    exact = log(request.getfixturevalue(kind))
    folder = finished(tmp_path / "bf16", *ONE_SAVE, *LORA[kind])
    compared = COMPARED[kind]
    for a, b in zip(exact[:compared], log(folder)[:compared], strict=True):
        for name in LARGE[kind]:
            assert a[name] != b[name]
            assert b[name] == pytest.approx(a[name], rel=0.05), name
    for file in folder.rglob("*.safetensors"):
        assert {x.dtype for x in load_file(file).values()} == {torch.float32}


class GPU(TorchDispatchMode):
    """Device "meta" plays a GPU: its tensors have no values, so what would wait for one raises."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default and args[0].device != result.device:
            assert kwargs["non_blocking"], "the CPU waits for a copy"
            return result
        tensors = [x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
        devices = {x.device for x in tensors if x.dim()}
        assert len(devices) <= 1, f"{function} on two devices"
        return result


CONFIG = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
CONFIG |= {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16}
CONFIG |= {"caption_projection_dim": 16, "pooled_projection_dim": 16}


def run_on(meta, args):
    """A Run whose networks and conditions are on this device. Nothing is loaded."""
    from diffusers import SD3Transformer2DModel

    def cond(n):
        return torch.randn(n, 10, 16, device=meta), torch.randn(n, 16, device=meta)

    run = cdm.Run.__new__(cdm.Run)
    vars(run).update(args=args, device=meta, rank=0, world=1, prompts=[""], batch=4)
    run.family = cdm.SD3.__new__(cdm.SD3)
    with meta:
        transformer = SD3Transformer2DModel.from_config(CONFIG).requires_grad_(False)
    vars(run.family).update(transformer=transformer, pipe=SimpleNamespace(), dtype=torch.float32)
    vars(run.family).update(shape=(4, 8, 8), shift=3.0, time_scale=1000, empty=cond(1), uncond=cond)
    run.family.encode = lambda prompts: cond(len(prompts))
    with meta:
        run.build()
    return run


@pytest.fixture
def gpu(monkeypatch):
    """On device "meta" everything works but AdamW's step, one fused kernel on a GPU.

    A function: flags -> the settings of small iterations.
    """
    real = cdm.generator
    adamw = torch.optim.AdamW
    monkeypatch.setattr(cdm, "generator", lambda *key, device=None: real(*key))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "AdamW", lambda *x, fused, **more: adamw(*x, **more))
    monkeypatch.setattr(adamw, "step", lambda self: None)
    sizes = "--batch-size 4 --micro-batch-size 2 --max-schedule-steps 4".split()
    return lambda *flags: cdm.parse_args([*sizes, *flags])


@pytest.mark.parametrize("flags", ["", "--lora-rank 4 --anchor-aware-fake --cdm-point renoise"])
def test_an_iteration_never_waits_for_the_gpu(flags, gpu):
    """Two iterations look at no value of a GPU tensor, wait for no copy, and mix no devices.

    Left out: text encoding, the log's figures, AdamW's step, and what --offload-ema adds.
    """
    args = gpu(*flags.split())
    run = run_on(META, args)
    roles = run.teacher, run.student, run.fake_score, run.ema
    with GPU():
        for k in (1, 2):
            stats = cdm.cdm_iteration(k, list(run.micro_batches(k)), *roles, args)
        assert len(stats) == 9
        assert all(x.device == META for x in stats.values())


def test_the_pretended_gpu_notices_who_waits():
    """What looks at a value, or waits for a copy, raises in the test above."""
    loss = torch.ones(2, device="meta")
    for wait in (loss[0].item, loss.cpu, lambda: torch.ones(2).to("meta"), loss.nonzero):
        with GPU(), pytest.raises((AssertionError, KeyError, NotImplementedError, RuntimeError)):
            wait()


class Host(TorchDispatchMode):
    """A copy from "meta" to the CPU has no values to bring. It brings zeros."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") == CPU:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        return function(*args, **kwargs)


def test_an_offloaded_ema_averages_on_the_cpu(gpu):
    """With --offload-ema it is built and averaged on the CPU, from weights that stay on the GPU."""
    args = gpu("--offload-ema")
    with Host():
        run = run_on(META, args)
        roles = run.teacher, run.student, run.fake_score, run.ema
        cdm.cdm_iteration(2, run.micro_batches(2), *roles, args)
    assert {(p.device, p.dtype) for p in run.ema.values()} == {(CPU, torch.float32)}
    assert {(p.device, p.dtype) for p in run.student.params.values()} == {(META, torch.float32)}
    for n, p in run.ema.items():
        assert p.shape == run.student.params[n].shape


def test_offloading_changes_nothing(whole, tmp_path):
    """The same bytes as without --offload-text-encoders and --offload-ema."""
    samples = ["--sample-every", 3, "--sample-count", 1]
    folder = finished(tmp_path / "run", *samples, *ONE_SAVE, *OFFLOAD)
    assert results(folder) == results(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LORA)
def test_compiled_blocks_train_as_eager_ones(kind, request, tmp_path):
    """With `--compile` six iterations log the figures of the eager run."""
    folder = finished(tmp_path / "run", "--compile", *LORA[kind])
    assert_same_figures(log(folder), log(request.getfixturevalue(kind)))
