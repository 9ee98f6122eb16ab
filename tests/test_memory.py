"""The memory table: the benchmark's arithmetic equals the bytes of all tensors that a run holds.

`held` knows nothing of the arithmetic. It walks from the run's roles, Learners and EMA through
every attribute and container, and adds up the storages of the tensors that it meets.
"""

import sys
from pathlib import Path

import pytest
import torch
from helpers import CPU, build

import cdm

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import benchmark

TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 6,
}
WAYS = {"float32": ("float32", 0), "bfloat16": ("bfloat16", 0), "lora": ("bfloat16", 4)}


def held(*roots):
    """The bytes of every storage that can be reached from some objects, gradients included."""
    storages = {}
    met = set()
    todo = list(roots)
    while todo:
        x = todo.pop()
        if id(x) in met:
            continue
        met.add(id(x))
        if isinstance(x, torch.Tensor):
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            todo.append(x.grad)
        elif isinstance(x, dict):
            todo += [*x.keys(), *x.values()]
        elif isinstance(x, (list, tuple, set)):
            todo += x
        elif isinstance(x, (torch.nn.Module, torch.optim.Optimizer, cdm.Model, cdm.Learner)):
            todo += vars(x).values()
    storages.pop(0, None)  # tensors without entries
    return sum(storages.values())


def state(run):
    return held(run.teacher, run.student, run.fake_score, run.ema_model)


def check(run, terms):
    """Before a pass, after a backward pass of either network, and after its step."""
    tensors = len(run.student.params) + len(run.fake_score.params)
    gradients = terms.pop("gradients, of one network at a time")
    always = sum(terms.values()) + 4 * tensors  # AdamW's counters of steps
    assert state(run) == always
    x_t = torch.randn(2, *run.family.shape)
    cond = run.family.encode(["", ""])
    for learner in (run.fake_score, run.student):
        learner.model(x_t, torch.rand(2), cond).square().mean().backward()
        assert all(p.grad is not None for p in learner.params.values())
        assert state(run) == always + gradients
        learner.step()
        assert state(run) == always


def iterate(run):
    """An iteration with a student update."""
    roles = (run.teacher, run.student, run.fake_score)
    cdm.cdm_iteration(2, run.micro_batches(2), *roles, run.ema, run.args)


@pytest.mark.parametrize("way", WAYS)
def test_the_terms_are_the_bytes_that_a_run_on_a_gpu_would_hold(way):
    weights, rank = WAYS[way]
    flags = benchmark.parse("--batch-size 2 --micro-batch-size 1 --max-schedule-steps 2".split())
    args = benchmark.settings(flags, weights, rank)
    run = benchmark.stand_in(args, TINY, (4, 8, 8), 5, CPU)
    net = benchmark.empty_network("SD3Transformer2DModel", TINY)
    check(run, benchmark.state_terms(net, weights, rank))
    before = state(run)
    iterate(run)
    assert state(run) == before  # nothing piles up


@pytest.mark.parametrize("rank", [0, 4])
def test_the_program_itself_holds_them_with_bfloat16_weights_from_files(rank):
    run = build("--weights", "bfloat16", "--lora-rank", rank)
    net = benchmark.empty_network("SD3Transformer2DModel", run.family.transformer.config)
    check(run, benchmark.state_terms(net, "bfloat16", rank))


def test_the_sums_that_readme_shows():
    found = {}
    for way in benchmark.WAYS:
        terms = benchmark.memory_terms(way, 1024)
        found[way] = round(sum(list(terms.values())[:5]) / benchmark.GB, 1)
    assert found == {"full float32": 69.0, "full bfloat16": 40.6, "LoRA 64": 6.7}
    net = benchmark.empty_network("LongCatImageTransformer2DModel", benchmark.LONGCAT_IMAGE)
    assert round(net.num_parameters() / 1e9, 2) == 6.27
