"""The cost of an iteration: seconds, memory, network evaluations, FLOPs.

    python tests/experiments/benchmark.py               # tests/digits_sd3, CPU, about a minute
    python tests/experiments/benchmark.py --full-size   # SD3-Medium with random weights

With --full-size nothing is downloaded. On a GPU it measures. Without a GPU it computes FLOPs and
memory from shapes alone, for full fine-tuning and for LoRA, and measures nothing.

It times the program itself. `cdm.Run.build` makes the networks, `cdm.cdm_iteration` runs, and the
functions at the borders of its stages are wrapped. Beside it, with the same draws, runs
`released_iteration`: cdm's own losses with the evaluation counts of the authors' release. The
counts come from a reading of their code, which was never run. It prints tables and writes --output.
Not a test: pytest does not collect it.

FLOPs: a multiplication and an addition are two. Counted are matrix products, convolutions and
attention, as torch.utils.flop_counter has them (attention's backward is five products, one of them
a recomputation). Not counted are the optimiser, text encoding and the recomputation of gradient
checkpointing. MFU is these FLOPs in each second, over --peak-tflops. 1 GB = 10^9 bytes.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

import cdm

warnings.filterwarnings(
    "ignore", "Accessing the data pointer of FakeTensor|Already found a `peft_config`"
)
DIGITS = Path(__file__).resolve().parents[1] / "digits_sd3"
# transformer/config.json of stabilityai/stable-diffusion-3-medium-diffusers.
SD3_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
TOKENS = 77 + 256  # of text: CLIP's and T5's
STAGES = (
    "text encoding",
    "backward simulation",
    "fake-score updates",
    "student update",
    "EMA",
)
WARM_UP = 2  # student updates before the measured ones
GB = 1e9

# --- 1. The released algorithm, by its evaluations. ---


@torch.no_grad()
def released_simulation(student, noise, schedule, index, cond):
    """Backward simulation as released: every sample to the schedule's end, then anchors are picked.

    Arguments and result are those of cdm.backward_simulation.
    """
    x = noise
    times = torch.cat([schedule, torch.zeros(1)]).to(noise)
    xs = []
    vs = []
    for t, s in zip(times[:-1], times[1:], strict=True):
        v = student(x, t.expand(len(x)), cond)
        xs.append(x)
        vs.append(v)
        x = cdm.euler_step(x, t, s, v)
    rows = torch.arange(len(noise))
    return cdm.Anchor(
        torch.stack(xs)[index, rows], schedule[index].to(noise), torch.stack(vs)[index, rows]
    )


def released_iteration(k, batches, teacher, student, fake_score, ema, cfg):
    """cdm.cdm_iteration as we read the released code.

    Backward simulation goes to the end, and each loss has a student evaluation of its own.
    """
    scale = 1 / len(batches)
    fake = fake_score.role

    def student_estimate(x_t, t, cond):
        return cdm.clean_estimate(x_t, t, student.role(x_t, t, cond))

    anchors = []
    for cond, _, d in batches:
        start = d.noise["start"]
        anchors.append(released_simulation(student.role, start, d.schedule, d.index, cond))
    for (cond, _, d), anchor in zip(batches, anchors, strict=True):
        x0 = cdm.clean_estimate(anchor.x_t, anchor.t, anchor.v)
        loss = cdm.fake_score_loss(fake, x0, cond, d.tau["fake"], d.noise["fake"])
        (scale * loss).backward()
    fake_score.step()
    cdm.average_into(fake_score.params, student.params, cfg.fake_pull)
    if k % cfg.student_every:
        return

    for (cond, uncond, d), anchor in zip(batches, anchors, strict=True):
        x0_hat = student_estimate(anchor.x_t, anchor.t, cond)
        ca = cdm.ca_loss(x0_hat, teacher, cond, uncond, d.tau["ca"], d.noise["ca"], cfg.alpha)
        (scale * ca.value).backward()
        x0_hat = student_estimate(anchor.x_t, anchor.t, cond)
        dm = cdm.dm_loss(x0_hat, teacher, fake, cond, d.tau["dm"], d.noise["dm"])
        (scale * dm.value).backward()
        x_off = cdm.euler_step(anchor.x_t, anchor.t, d.t_off, anchor.v)
        x0_hat = student_estimate(x_off, d.t_off, cond)
        off = cdm.dm_loss(x0_hat, teacher, fake, cond, d.tau["cdm"], d.noise["cdm"])
        (scale * off.value).backward()
    n = student.updates
    student.step()
    cdm.average_into(ema, student.params, min((1 + n) / (10 + n), cfg.ema_decay))


ITERATIONS = {"this": cdm.cdm_iteration, "released": released_iteration}


def expected_evaluations(cfg, kind):
    """A sample's evaluations in a student update, averaged over the draws.

    By (role, with gradient). With N ~ U{1..N_max}, N averages (N_max + 1) / 2, and the anchor's
    index + 1 averages (N_max + 3) / 4.
    """
    r = cfg.student_every
    steps = (cfg.max_schedule_steps + 3) / 4
    student = 2
    if kind == "released":
        steps = (cfg.max_schedule_steps + 1) / 2
        student = 3
    return {
        ("student", False): r * steps,
        ("fake_score", True): r,
        ("student", True): student,
        ("teacher", False): 4,
        ("fake_score", False): 2,
    }


# --- 2. The networks. ---


class RandomSD3(cdm.SD3):
    """SD3 with random weights, from no files. Its conditions are random embeddings."""

    def __init__(self, net, shape, tokens, device):
        self.name = "random weights"
        self.transformer = net
        self.shape = shape
        self.length = tokens
        self.device = device
        self.dtype = torch.bfloat16
        self.shift = 3.0
        self.timesteps = 1000
        self.pipe = SimpleNamespace()
        self.empty = self.encode([""])

    def encode(self, prompts):
        n = len(prompts)
        config = self.transformer.config
        options = {"device": self.device, "dtype": self.dtype}
        text = torch.randn(n, self.length, config.joint_attention_dim, **options)
        return text, torch.randn(n, config.pooled_projection_dim, **options)


def stand_in(args, config, shape, tokens, device):
    """A cdm.Run on RandomSD3, with no prompts and no files."""
    import diffusers

    with torch.device(device):
        net = diffusers.SD3Transformer2DModel.from_config(config).requires_grad_(False).eval()
    if args.lora_rank:
        net = net.to(torch.bfloat16)  # as cdm.Pipeline loads it on a GPU
    run = cdm.Run.__new__(cdm.Run)
    run.args = args
    run.device = device
    run.rank = 0
    run.world = 1
    run.prompts = [""]
    run.batch = args.batch_size = args.batch_size or 16
    args.micro_batch_size = args.micro_batch_size or math.gcd(run.batch, 4)
    n = args.micro_batch_size
    fits = run.batch % n == 0
    cdm.require(fits, f"--batch-size {run.batch} must be a multiple of --micro-batch-size {n}.")
    run.family = RandomSD3(net, shape, tokens, device)
    if args.lora_rank:
        run.build(*run.lora_networks())
    else:
        run.build(*run.full_networks())
    return run


def settings(flags, **more):
    """The program's settings from this command's flags, checked by the program."""
    values = {"device": flags.device}
    for name in ("batch_size", "micro_batch_size", "lora_rank", "max_schedule_steps"):
        if getattr(flags, name) is not None:
            values[name] = getattr(flags, name)
    words = []
    for name, value in (values | more).items():
        words += ["--" + name.replace("_", "-"), str(value)]
    if flags.no_gradient_checkpointing:
        words.append("--no-gradient-checkpointing")
    if flags.compile:
        words.append("--compile")
    return cdm.parse_args(words)


# --- 3. Memory, by arithmetic. ---

ENCODERS = {  # parameters of SD3-Medium's frozen parts
    "CLIP-L": 123_650_304,
    "OpenCLIP-G": 694_659_840,
    "T5-XXL encoder": 4_762_310_656,
    "VAE": 83_819_683,
}
ENCODERS_TERM = "text encoders and VAE, bf16"
BF16 = 2  # bytes
FLOAT32 = 4
# Activations of the block whose backward pass is running: bytes for each token and channel. Found
# by --full-size, which checks them.
BLOCK_FULL = 68
BLOCK_LORA = 84


def memory_terms(rank, pixels, samples=1):
    """{what: bytes} of training SD3-Medium on one GPU with gradient checkpointing.

    rank: LoRA's, or 0; samples: of a micro-batch. Their sum is the peak, which is in the student
    update if the text encoders stay on the GPU.
    """
    import diffusers

    with torch.device("meta"):
        net = diffusers.SD3Transformer2DModel.from_config(SD3_MEDIUM)
    parameters = net.num_parameters()
    positions = net.pos_embed.pos_embed.numel()
    trained = parameters
    if rank:
        names = tuple("." + target for target in cdm.SD3.lora_targets)
        layers = [module for name, module in net.named_modules() if name.endswith(names)]
        trained = sum(rank * (layer.in_features + layer.out_features) for layer in layers)

    tokens = TOKENS + (pixels // 16) ** 2
    stream = samples * tokens * net.inner_dim  # entries of a block's input
    block = BLOCK_LORA * stream
    cast = 0  # autocast's copy; LoRA's base is in bf16 already
    if not rank:
        block = BLOCK_FULL * stream
        cast = BF16 * parameters // net.config.num_layers
    return {
        "teacher (LoRA: the base of all roles), bf16": BF16 * parameters,
        "student and fake score, float32": 2 * FLOAT32 * trained,
        "their AdamW moments, float32": 2 * 2 * FLOAT32 * trained,
        "student EMA, float32": FLOAT32 * trained,
        "position embeddings of all networks": (BF16 if rank else 3 * FLOAT32) * positions,
        "gradients, of one network at a time, float32": FLOAT32 * trained,
        "activations: the blocks' inputs, bf16": BF16 * stream * net.config.num_layers,
        "activations: the block in work": block,
        "weights of the block in work, bf16": cast,
        ENCODERS_TERM: BF16 * sum(ENCODERS.values()),
    }


# --- 4. Measuring. ---


class Meter:
    """A stopwatch with laps: what happened since the last lap goes to a stage.

    That is the time, the peak of memory and the network evaluations. live: a LiveBytes, or None.
    """

    def __init__(self, run, live=None):
        self.run = run
        self.live = live
        self.stages = {}
        self.kept = 0  # bytes that a forward pass leaves behind, at the most
        self.names = {
            run.teacher: "teacher",
            run.student.role: "student",
            run.fake_score.role: "fake_score",
        }
        self.restart()

    def restart(self):
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        if self.live:
            self.live.peak = self.live.now
        self.evaluations = Counter()
        self.since = time.perf_counter()

    def lap(self, stage):
        peak = 0
        if self.live:
            peak = self.live.peak
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        row = self.stages.setdefault(
            stage, {"seconds": 0.0, "peak_bytes": 0, "evaluations": Counter()}
        )
        row["seconds"] += time.perf_counter() - self.since
        row["peak_bytes"] = max(row["peak_bytes"], peak)
        row["evaluations"].update(self.evaluations)
        self.restart()

    @contextlib.contextmanager
    def watch(self):
        """Within it, functions at the stages' borders take laps, and a Role's calls are counted."""
        call = cdm.Role.__call__
        average = cdm.average_into

        def counted(role, x_t, *rest, **more):
            self.evaluations[self.names[role], torch.is_grad_enabled()] += len(x_t)
            if not self.live:
                return call(role, x_t, *rest, **more)
            before = self.live.now
            v = call(role, x_t, *rest, **more)
            self.kept = max(self.kept, self.live.now - before)
            return v

        def averaged(params, *rest):
            if params is self.run.ema:
                self.lap("student update")
                average(params, *rest)
                self.lap("EMA")
            else:
                average(params, *rest)
                self.lap("fake-score updates")

        def simulated(simulate):
            def with_a_lap(*rest):
                anchor = simulate(*rest)
                self.lap("backward simulation")
                return anchor

            return with_a_lap

        here = sys.modules[__name__]
        with (
            patch.object(cdm.Role, "__call__", counted),
            patch.object(cdm, "average_into", averaged),
            patch.object(cdm, "backward_simulation", simulated(cdm.backward_simulation)),
            patch.object(here, "released_simulation", simulated(released_simulation)),
        ):
            yield self


def student_update(run, iterate, first):
    """Run the R iterations from `first` on, the last with a student update. Returns the stages."""
    with Meter(run).watch() as meter:
        for k in range(first, first + run.args.student_every):
            batches = run.micro_batches(k)
            meter.lap("text encoding")
            iterate(k, batches, run.teacher, run.student, run.fake_score, run.ema, run.args)
    return meter.stages


def check_anchors(run):
    """Both backward simulations give the same anchors. Returns their largest difference.

    The noise has deviation 1. On a GPU, bf16 kernels differ with the number of samples.
    """
    limit = 0.5 if run.device.type == "cuda" else 1e-4
    worst = 0
    for cond, _, d in run.micro_batches(1):
        inputs = (run.student.role, d.noise["start"], d.schedule, d.index, cond)
        a = cdm.backward_simulation(*inputs)
        b = released_simulation(*inputs)
        for name in ("x_t", "t", "v"):
            difference = (getattr(a, name) - getattr(b, name)).abs().max()
            worst = max(worst, float(difference))
    assert worst < limit, f"the two backward simulations differ by {worst}"
    return worst


def summary(run, kind, updates, flops):
    """Of one algorithm's student updates [{stage: row}]: {stage: means and maxima}, and "whole"."""
    table = {}
    total = Counter()
    for stage in STAGES:
        rows = [stages[stage] for stages in updates]
        count = Counter()
        for row in rows:
            count.update(row["evaluations"])
        count = {key: x / len(updates) / run.batch for key, x in count.items()}  # of a sample
        total.update(count)
        table[stage] = {
            "seconds": statistics.mean(row["seconds"] for row in rows),
            "peak_bytes": max(row["peak_bytes"] for row in rows),
            "evaluations": count,
            "flops": run.batch * sum(x * flops[key] for key, x in count.items()),
        }
    seconds = [sum(row["seconds"] for row in stages.values()) for stages in updates]
    expected = expected_evaluations(run.args, kind)
    # Few updates draw few schedules: scale backward simulation to the average over all draws.
    simulation = table["backward simulation"]
    more = expected["student", False] / simulation["evaluations"]["student", False] - 1
    whole = {
        "seconds": statistics.mean(seconds),
        "seconds_stdev": statistics.stdev(seconds) if len(seconds) > 1 else 0.0,
        "seconds_at_expected": statistics.mean(seconds) + more * simulation["seconds"],
        "peak_bytes": max(row["peak_bytes"] for row in table.values()),
        "evaluations": dict(total),
        "expected_evaluations": expected,
        "flops": sum(row["flops"] for row in table.values()),
    }
    return table | {"whole": whole}


def measure(run, flops, updates):
    """Both algorithms in turn, with the same draws: {algorithm: summary}."""
    seen = {kind: [] for kind in ITERATIONS}
    for u in tqdm(range(WARM_UP + updates), desc="student updates", leave=False):
        for kind, iterate in ITERATIONS.items():
            stages = student_update(run, iterate, 1 + u * run.args.student_every)
            if u >= WARM_UP:
                seen[kind].append(stages)
    return {kind: summary(run, kind, rows, flops) for kind, rows in seen.items()}


# --- 5. Computing: the same code on tensors without values. ---


class LiveBytes(TorchDispatchMode):
    """Sums the bytes of all storages that are alive: `now`, and at the most `peak`."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.seen = set()

    def freed(self, key, size):
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for x in torch.utils._pytree.tree_leaves(result):
            if not torch.is_tensor(x):
                continue
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self.seen:
                self.seen.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, key, storage.nbytes())
        return result


@contextlib.contextmanager
def no_values():
    """Tensors have shapes and dtypes only, those of a GPU: bf16 autocast, float32 layer norms."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    autocast = torch.autocast
    layer_norm = torch.nn.functional.layer_norm

    def as_on_a_gpu(*_, **__):
        return autocast("cpu", torch.bfloat16, cache_enabled=False)

    def in_float32(x, *rest):
        return layer_norm(x.float(), *rest)

    def swap(p, q):  # Module.to calls it
        p.data = q.data

    with (
        patch.object(torch, "autocast", as_on_a_gpu),
        patch.object(torch.nn.functional, "layer_norm", in_float32),
        patch.object(torch.utils, "swap_tensors", swap),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


@torch.no_grad()
def one_call(student, noise, schedule, index, cond):
    """Backward simulation without values: its calls are alike, and one of them stands for all."""
    t = torch.rand(len(noise))
    return cdm.Anchor(noise, t, student(noise, t, cond))


def micro_batch(run, n, shape):
    """(cond, uncond, Draw) for n samples without values."""
    names = ("ca", "dm", "cdm", "fake")
    tau = {name: torch.rand(n) for name in names}
    noise = {name: torch.randn(n, *shape) for name in ("start", *names)}
    draw = cdm.Draw(schedule=None, index=None, t_off=torch.rand(n), tau=tau, noise=noise)
    return run.family.encode([""] * n), run.family.uncond(n), draw


def count_flops(run, shape):
    """FLOPs of a sample's evaluation, by (role, with gradient).

    Under "recomputed" is what gradient checkpointing adds.
    """
    aten = torch.ops.aten
    cond, _, d = micro_batch(run, 1, shape)
    student = run.student.role

    def attention(q, k, v, *_, **__):
        return sdpa_flop_count(q, k, v)

    def attention_backward(grad, q, k, v, *_, **__):
        return sdpa_backward_flop_count(grad, q, k, v)

    missing = {  # in torch's own table
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }

    def count(role, grad):
        counter = FlopCounterMode(display=False, custom_mapping=missing)
        with counter, torch.set_grad_enabled(grad):
            v = role(d.noise["start"], d.t_off, cond)
            if grad:
                v.sum().backward()
        return counter.get_total_flops()

    flops = {
        ("teacher", False): count(run.teacher, False),
        ("student", False): count(student, False),
    }
    student.transformer.disable_gradient_checkpointing()
    flops["student", True] = count(student, True)
    student.transformer.enable_gradient_checkpointing()
    flops["recomputed"] = count(student, True) - flops["student", True]
    if not run.args.gradient_checkpointing:
        student.transformer.disable_gradient_checkpointing()
    run.student.optimizer.zero_grad(set_to_none=True)
    for grad in (False, True):
        flops["fake_score", grad] = flops["student", grad]
    return flops


def peak_memory(run, shape, live):
    """Bytes for micro-batches of n = 1 and 2 samples.

    By (stage, n), the stage's peak; by ("kept", n), what a forward pass keeps.
    """
    result = {}
    for n in (1, 2):
        # The second micro-batch finds the first one's gradients in memory.
        batches = [micro_batch(run, n, shape) for _ in range(2)]
        with Meter(run, live).watch() as meter:
            cdm.cdm_iteration(
                2, batches, run.teacher, run.student, run.fake_score, run.ema, run.args
            )
        for stage, row in meter.stages.items():
            result[stage, n] = row["peak_bytes"]
        result["kept", n] = meter.kept
        del batches
    return result


def compute_at(layers, args, config, shapes, tokens, memory):
    """{(shape, key): number} for a transformer of so many layers."""
    with no_values(), LiveBytes() as live, patch.object(cdm, "backward_simulation", one_call):
        config = config | {"num_layers": layers}
        run = stand_in(args, config, None, tokens, torch.device("cpu"))
        always = live.now
        gradients = sum(p.nbytes for p in run.student.params.values())
        found = {}
        for shape in shapes:
            numbers = count_flops(run, shape)
            if memory:
                numbers |= {"always": always, "gradients": gradients}
                numbers |= peak_memory(run, shape, live)
            found |= {(shape, key): x for key, x in numbers.items()}
    return found


def compute(args, config, shapes, tokens, memory=True):
    """{shape: FLOPs and, if asked, bytes}.

    Blocks are alike, but for the last: two small networks say all about a deep one.
    """
    args = copy.copy(args)
    args.compile = False
    depth = config["num_layers"]
    if depth <= 4:
        found = compute_at(depth, args, config, shapes, tokens, memory)
    else:
        two = compute_at(2, args, config, shapes, tokens, memory)
        four = compute_at(4, args, config, shapes, tokens, memory)
        found = {key: x + (four[key] - x) * (depth - 2) // 2 for key, x in two.items()}
    result = {shape: {} for shape in shapes}
    for (shape, key), x in found.items():
        result[shape][key] = x
    return result


# --- 6. Reporting. ---


def unit(flops):
    for size, name in ((1e12, "T"), (1e9, "G")):
        if flops > size:
            return f"{flops / size:.3f} {name}"
    return f"{flops / 1e6:.3f} M"


def way(rank):
    """How the student is trained, in words."""
    return f"LoRA of rank {rank}" if rank else "full fine-tuning"


def print_stages(result):
    """A line a stage: seconds, peak, evaluations of a sample and FLOP/s of both algorithms."""
    columns = f"|{'s':>8}{'peak GB':>9}{'evaluations':>12}{'FLOP/s':>10} "
    print(f"{'one student update':21}|{'this code':^40}|{'released':^40}| released")
    print(f"{'':21}{columns}{columns}|/ this, s")
    for stage in (*STAGES, "whole"):
        line = f"{stage:21}"
        for kind in ITERATIONS:
            row = result[kind][stage]
            count = sum(row["evaluations"].values())
            peak = f"{row['peak_bytes'] / GB:.2f}" if row["peak_bytes"] else "-"
            evaluations = f"{count:.2f}" if count else "-"
            rate = unit(row["flops"] / row["seconds"]) if count else "-"
            line += f"|{row['seconds']:8.3f}{peak:>9}{evaluations:>12}{rate:>10} "
        this = result["this"][stage]["seconds"]
        ratio = result["released"][stage]["seconds"] / max(this, 1e-9)
        print(f"{line}|{ratio:9.2f}")


def print_evaluations(this, released, flops):
    """A line for each (role, with gradient): evaluations as counted and as expected, FLOPs."""
    print(f"{'evaluations of a sample':26}", end="")
    for heading in ("this code", "expected*", "released", "expected*", "FLOP"):
        print(f"{heading:>10}", end="")
    print()
    counts = []
    for whole in (this, released):
        counts += [whole["evaluations"], whole["expected_evaluations"]]
    for role, grad in this["expected_evaluations"]:
        name = f"{role}, {'with' if grad else 'no'} gradient"
        cells = "".join(f"{count[role, grad]:10.2f}" for count in counts)
        print(f"{name:26}{cells}{unit(flops[role, grad]):>10}")
    cells = "".join(f"{sum(count.values()):10.2f}" for count in counts)
    print(f"{'sum':26}{cells}")
    print("* over all draws.")


def print_measured(run, result, flops, flags, where):
    cfg = run.args
    this = result["this"]["whole"]
    released = result["released"]["whole"]
    updates = flags.iterations // cfg.student_every
    details = [where, way(cfg.lora_rank)]
    details.append(f"gradient checkpointing {'on' if cfg.gradient_checkpointing else 'off'}")
    if flags.compile:
        details.append("compiled")
    if flags.full_size:
        details.append("random embeddings stand in for text encoding")
    print()
    print("Measured: " + "; ".join(details) + ".")
    print(f"{run.batch} samples in micro-batches of {cfg.micro_batch_size}.")
    print(f"N_max {cfg.max_schedule_steps}, R = {cfg.student_every}.")
    print(f"Means over {updates} student update(s), after {WARM_UP} for warming up.")
    print("Peaks are maxima. 'released': the released code's evaluation counts, from a reading of")
    print("it. Our code ran them, with the same draws.")
    print()
    print_stages(result)
    print()
    print_evaluations(this, released, flops)
    print(f"Checkpointing recomputes {unit(flops['recomputed'])}FLOP in a pass with gradient.")

    print()
    print("this code / released:")
    a = sum(this["evaluations"].values()) / sum(released["evaluations"].values())
    b = sum(this["expected_evaluations"].values()) / sum(released["expected_evaluations"].values())
    print(f"    evaluations {a:.3f} (expected {b:.3f})")
    print(f"    FLOPs       {this['flops'] / released['flops']:.3f}")
    for key, note in (
        ("seconds", "mean ± standard deviation"),
        ("seconds_at_expected", "with backward simulation scaled to the expected counts"),
    ):
        cells = [f"{whole[key]:.3f}" for whole in (this, released)]
        if key == "seconds":
            cells = [
                f"{whole[key]:.3f} ± {whole['seconds_stdev']:.3f}" for whole in (this, released)
            ]
        ratio = this[key] / released[key]
        print(f"    time        {ratio:.3f}: {cells[0]} s and {cells[1]} s, {note}")
    if run.device.type == "cuda":
        shares = []
        for whole in (this, released):
            rate = whole["flops"] / whole["seconds"] / 1e12
            shares.append(f"{100 * rate / flags.peak_tflops:.1f}%")
        print(f"    MFU         {shares[0]} and {shares[1]} of {flags.peak_tflops:g} TFLOP/s")


def print_computed(rows):
    """What `estimate` found, with the sums of `memory_terms` beside it."""
    print()
    print("COMPUTED, NOT MEASURED: there is no GPU here. The program's own iteration ran on")
    print("SD3-Medium's shapes, without values, under bf16 autocast as on a GPU. GB. Peaks are all")
    print(
        "that is alive at once, for a micro-batch of 1 (+ each further sample). Left out: the CUDA"
    )
    print("context, kernels' workspace, fragmentation; text encoders and VAE.")
    print()
    print(f"{'':22}{'always':>7}{'gradients':>10}", end="")
    for heading in ("simulation", "fake-score update", "student update", "forward keeps"):
        print(f"{heading:>19}", end="")
    print()
    for (rank, pixels), x in rows.items():
        name = f"LoRA {rank}" if rank else "full"
        line = f"{name:>8}, {pixels:4} pixels"
        line += f"{x['always'] / GB:8.2f}{x['gradients'] / GB:9.2f} "
        for stage in (*STAGES[1:4], "kept"):
            one = x[stage, 1] / GB
            two = x[stage, 2] / GB
            cell = f"{one:.2f} (+{two - one:.2f})"
            line += f"{cell:>19}"
        print(line)

    print()
    print(f"{'FLOP of a sample':22}{'teacher':>12}{'student':>12}", end="")
    print(f"{'student, with gradient':>26}{'recomputed, not useful':>26}")
    for (rank, pixels), x in rows.items():
        name = f"LoRA {rank}" if rank else "full"
        cells = [unit(x["teacher", False]), unit(x["student", False])]
        line = f"{name:>8}, {pixels:4} pixels{cells[0]:>12}{cells[1]:>12}"
        print(f"{line}{unit(x['student', True]):>26}{unit(x['recomputed']):>26}")


def print_terms(rows):
    """The terms of memory_terms, one a line, and their check against the bytes that are alive."""
    keys = [key for key in rows if key[1] == 1024]
    columns = [memory_terms(*key) for key in keys]
    print()
    print(f"{'the same peak by arithmetic, 1024 pixels, GB':46}", end="")
    print("".join(f"{way(rank):>20}" for rank, _ in keys))
    for name in columns[0]:
        print(f"{name:46}" + "".join(f"{terms[name] / GB:20.2f}" for terms in columns))
    sums = [sum(terms.values()) for terms in columns]
    print(f"{'sum':46}" + "".join(f"{total / GB:20.2f}" for total in sums))
    cells = ""
    for key, terms, total in zip(keys, columns, sums, strict=True):
        encoders = terms[ENCODERS_TERM]
        share = (total - encoders) / rows[key]["student update", 1]
        assert abs(share - 1) < 0.02, f"{way(key[0])}: arithmetic gives {share:.3f} of the peak"
        cells += f"{share:20.3f}"
    print(f"{'sum without encoders / student update above':46}{cells}")


def readable(x):
    """For JSON: keys that are tuples become strings."""
    if not isinstance(x, dict):
        return x
    result = {}
    for key, value in x.items():
        if isinstance(key, tuple):
            key = ", ".join(map(str, key))
        result[key] = readable(value)
    return result


# --- 7. The command line. ---


def parse(argv):
    parser = argparse.ArgumentParser(
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    def error(message):
        raise cdm.Mistake(f"{message}; --help lists the flags.")

    parser.error = error
    add = parser.add_argument
    add("--full-size", action="store_true", help="SD3-Medium with random weights, not the digits")
    add("--batch-size", type=int, default=16, help="samples of an update")
    add("--micro-batch-size", type=int, help="samples of a forward pass; the program's default")
    add("--resolution", type=int, choices=(512, 1024), help="with --full-size; else 1024")
    add("--lora-rank", type=int, default=0, help="0: full fine-tuning; without a GPU both are done")
    add("--compile", action="store_true", help="the program's flag")
    add("--no-gradient-checkpointing", action="store_true", help="the program's flag")
    add("--iterations", type=int, help="measured, an even number: 20, or 8 with --full-size")
    add("--max-schedule-steps", type=int, default=28, help="N_max")
    add(
        "--device",
        choices=("cpu", "cuda"),
        help="the CPU, or with --full-size a GPU if it is there",
    )
    add("--output", default="runs/benchmark.json", help="JSON is written here")
    add("--peak-tflops", type=float, default=989, help="of the GPU; 989: H100, H200, dense bf16")
    flags = parser.parse_args(argv)
    if not flags.device:
        gpu = flags.full_size and torch.cuda.is_available()
        flags.device = "cuda" if gpu else "cpu"
    if flags.iterations is None:
        flags.iterations = 8 if flags.full_size else 20
    even = flags.iterations > 0 and flags.iterations % 2 == 0
    cdm.require(even, f"--iterations is {flags.iterations}: give an even number.")
    cdm.require(flags.full_size or not flags.resolution, "--resolution needs --full-size.")
    cdm.require(flags.peak_tflops > 0, f"--peak-tflops is {flags.peak_tflops}: give more than 0.")
    return flags


def latents(pixels):
    """SD3's latent shape."""
    return 16, pixels // 8, pixels // 8


def estimate(flags):
    """--full-size without a GPU: {(LoRA rank, pixels): FLOPs and bytes}."""
    rows = {}
    shapes = [latents(1024), latents(512)]
    for rank in tqdm((0, flags.lora_rank or 64), desc="computing", leave=False):
        numbers = compute(settings(flags, lora_rank=rank), SD3_MEDIUM, shapes, TOKENS)
        for shape, x in numbers.items():
            rows[rank, 8 * shape[1]] = x
    return rows


def process_peak():
    """The most memory that this process had, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def run_and_measure(flags, folder):
    """Build the networks, run, print. Returns what JSON gets."""
    args = settings(flags)
    device = torch.device(flags.device)
    where = f"CPU, {torch.get_num_threads()} thread(s)"
    if flags.device == "cuda":
        where = torch.cuda.get_device_name()
    if flags.full_size:
        pixels = flags.resolution or 1024
        config = SD3_MEDIUM
        tokens = TOKENS
        shape = latents(pixels)
        run = stand_in(args, config, shape, tokens, device)
        where = f"SD3-Medium, random weights, {pixels} pixels, {where}"
    else:
        args.teacher = str(DIGITS)
        args.prompts = str(DIGITS / "prompts.txt")
        args.output_dir = folder
        run = cdm.Run(args, device)
        config = dict(run.family.transformer.config)
        tokens = run.family.empty[0].shape[1]
        shape = run.family.shape
        where = f"tests/digits_sd3, {where}"
    flops = compute(args, config, [shape], tokens, memory=False)[shape]
    difference = check_anchors(run)
    result = measure(run, flops, flags.iterations // args.student_every)
    print_measured(run, result, flops, flags, where)
    print()
    print(f"Both backward simulations gave the same anchors, to {difference:.1e}.")
    peak = process_peak()
    if flags.device == "cpu":
        print(f"Peak of the process: {peak / GB:.2f} GB. The stages' peaks need a GPU.")
    return {
        "where": where,
        "anchors_differ_by": difference,
        "process_peak_bytes": peak,
        "measured": readable(result),
        "flops": readable(flops),
    }


def main(argv=None):
    """Returns the exit code: 0, or 2 after one sentence about a mistake."""
    try:
        flags = parse(argv)
        if flags.full_size and flags.device == "cpu":
            rows = estimate(flags)
            print_computed(rows)
            if not flags.no_gradient_checkpointing:
                print_terms(rows)
            report = {"computed, not measured": readable(rows)}
        else:
            with tempfile.TemporaryDirectory() as folder:
                report = run_and_measure(flags, folder)
        report |= {"torch": torch.__version__, "flags": vars(flags)}
        output = Path(flags.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"-> {output}")
        return 0
    except cdm.Mistake as mistake:
        sentence = str(mistake)
    except OSError as error:
        sentence = f"{error}: check the path."
    except torch.OutOfMemoryError:
        sentence = "the GPU is out of memory: --micro-batch-size 1 or --lora-rank 64 needs less."
    print(f"benchmark.py: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
