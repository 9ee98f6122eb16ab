"""The GPU path without a GPU: bf16, no waiting, offload, compile."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same_figures, build, finished, inputs, log, results
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cdm


@pytest.mark.parametrize("kind, flags", [("whole", []), ("lora", ["--lora-rank", 4])])
def test_bf16_as_on_a_gpu(kind, flags, request, tmp_path, monkeypatch):
    """With the autocast to bf16 and the teacher in bf16 that GPUs get, the student starts
    exactly as the teacher, and six iterations go as in float32, up to rounding; what is
    trained, averaged, saved and exported stays float32.
    """
    exact = log(request.getfixturevalue(kind))
    autocast = torch.autocast
    load = cdm.Pipeline.__init__

    def load_as_on_a_gpu(sd3, *args):
        load(sd3, *args)
        sd3.dtype = torch.bfloat16

    monkeypatch.setattr(
        torch, "autocast", lambda device, dtype, enabled, **more: autocast(device, dtype, **more)
    )
    monkeypatch.setattr(cdm.Pipeline, "__init__", load_as_on_a_gpu)
    run = build(*flags)
    roles = (run.teacher, run.student.role, run.fake_score.role)
    assert flags or {p.dtype for p in run.teacher.transformer.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        v, *others = [role(*inputs(run)) for role in roles]
    assert all(torch.equal(v, other) for other in others)
    rounded = log(finished(tmp_path / "bf16", *flags))
    small = (
        () if flags else ("loss_dm", "loss_cdm")
    )  # LoRA's begin at 0 and are smaller than the rounding
    for name in ("loss_fake", "loss_ca", *small, "grad_norm_fake", "grad_norm_student"):
        for a, b in zip(exact, rounded, strict=True):
            assert a[name] != b[name] and abs(a[name] - b[name]) < 0.05 * a[name], (
                name,
                a[name],
                b[name],
            )
    for file in tmp_path.glob("bf16/**/*.safetensors"):
        assert {x.dtype for x in load_file(file).values()} == {torch.float32}


class GPU(TorchDispatchMode):
    """Device "meta" plays a GPU: its tensors have no values, so what would wait for one raises."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default and args[0].device != result.device:
            assert kwargs["non_blocking"], "the CPU waits for a copy"
        else:
            tensors = [
                x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x) and x.dim()
            ]
            assert len({x.device for x in tensors}) <= 1, f"{function} on two devices"
        return result


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("flags", ["", "--lora-rank 4 --anchor-aware-fake --cdm-point renoise"])
def test_an_iteration_never_waits_for_the_gpu(flags, monkeypatch):
    """No value of a GPU tensor is looked at in two iterations, no copy is waited for, no
    operation has its tensors on two devices; the loop waits once an iteration, for the log's
    figures. Left out: text encoding, and AdamW's step, which is one fused kernel on a GPU.
    """
    real = cdm.generator
    adamw = torch.optim.AdamW
    meta = torch.device("meta")
    monkeypatch.setattr(cdm, "generator", lambda *key, device=None: real(*key))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "AdamW", lambda *x, fused, **more: adamw(*x, **more))
    monkeypatch.setattr(adamw, "step", lambda self: None)
    config = dict(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )
    args = cdm.parse_args(["--batch-size", "4", "--micro-batch-size", "2", *flags.split()])

    def cond(n):
        return torch.randn(n, 10, 16, device=meta), torch.randn(n, 16, device=meta)

    with meta:
        from diffusers import SD3Transformer2DModel

        run = cdm.Run.__new__(cdm.Run)
        run.__dict__ |= dict(args=args, device=meta, rank=0, world=1, prompts=[""], batch=4)
        run.family = cdm.SD3.__new__(cdm.SD3)
        run.family.__dict__ |= dict(
            transformer=SD3Transformer2DModel.from_config(config).requires_grad_(False),
            pipe=SimpleNamespace(),
            dtype=torch.float32,
            shape=(4, 8, 8),
            shift=3.0,
            timesteps=1000,
            empty=cond(1),
            encode=lambda prompts: cond(len(prompts)),
            uncond=cond,
        )
        run.build(*(run.lora_networks() if args.lora_rank else run.full_networks()))
    with GPU():
        for k in (1, 2):
            stats = cdm.cdm_iteration(
                k,
                list(run.micro_batches(k)),
                run.teacher,
                run.student,
                run.fake_score,
                run.ema,
                args,
            )
        assert len(stats) == 10 and all(x.device == meta for x in stats.values())
        for wait in (
            stats["loss_dm"].item,
            stats["loss_dm"].cpu,
            lambda: torch.ones(2).to(meta),
            run.ema.popitem()[1].nonzero,
        ):
            with pytest.raises((AssertionError, KeyError, NotImplementedError, RuntimeError)):
                wait()


def test_offloaded_text_encoders_change_nothing(whole, tmp_path):
    folder = finished(
        tmp_path / "run",
        "--iterations",
        6,
        "--sample-every",
        3,
        "--sample-count",
        2,
        "--offload-text-encoders",
    )
    assert results(folder) == results(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_compiled_blocks_train_as_eager_ones(kind, request, tmp_path):
    """Six iterations with `--compile` log the figures of the eager run; roles, gradients and
    batch sizes share the block.
    """
    folder = tmp_path / "run"
    finished(
        folder, "--iterations", 6, "--compile", *(["--lora-rank", 4] if kind == "lora" else [])
    )
    assert_same_figures(log(folder), log(request.getfixturevalue(kind)))
