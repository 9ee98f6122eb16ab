"""The cost of an iteration: seconds, network evaluations, FLOPs and memory.

    python tests/experiments/benchmark.py               # tests/emoji_sd3, CPU, about a minute
    python tests/experiments/benchmark.py --full-size   # SD3-Medium with random weights

With --full-size nothing is downloaded. On a GPU it measures. Without a GPU it computes FLOPs and
memory from shapes alone, for full fine-tuning with both types of weights and for LoRA. It measures
nothing then, and takes minutes all the same.

What is measured is the program itself: `cdm.Run.build` makes the networks, `cdm.cdm_iteration`
runs, and the functions at the borders of its stages are wrapped. Beside it, with the same draws,
runs `released_iteration`: cdm's own losses with the evaluation counts of the authors' release. The
counts come from a reading of their code, which was never run. Not a test: pytest does not collect
it, but tests/test_memory.py counts the bytes of `state_terms` in real networks.

    1. The released algorithm, by its evaluations.     4. Measuring.
    2. The networks.                                   5. Computing, without values.
    3. Memory, by arithmetic.                          6. Tables.   7. The command line.

FLOPs: a multiplication and an addition are two. Counted are matrix products, convolutions and
attention, as torch.utils.flop_counter has them (attention's backward is five products, one of them
a recomputation). Not counted are the optimiser, text encoding and the recomputation of gradient
checkpointing. 1 GB = 10^9 bytes.
"""

import argparse
import contextlib
import copy
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

warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
EMOJI = Path(__file__).resolve().parents[1] / "emoji_sd3"
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
VAE = {  # of its vae/config.json, what AutoencoderKL has otherwise
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
# The numbers of blocks are second-hand. With them and diffusers' other defaults the transformer has
# 6.27 x 10^9 parameters, as it is said to have.
LONGCAT_IMAGE = {"num_layers": 10, "num_single_layers": 20}
STAGES = ("text encoding", "backward simulation", "fake-score updates", "student update", "EMA")
WARM_UP = 2  # student updates before the measured ones
GB = 1e9
WAYS = {  # of training: --weights and --lora-rank
    "full float32": ("float32", 0),
    "full bfloat16": ("bfloat16", 0),
    "LoRA 64": ("bfloat16", 64),
}

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
    fake = fake_score.model

    def student_estimate(x_t, t, cond):
        return cdm.clean_estimate(x_t, t, student.model(x_t, t, cond))

    anchors = []
    for cond, _, d in batches:
        start = d.noise["start"]
        anchors.append(released_simulation(student.model, start, d.schedule, d.index, cond))
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
        ca, _ = cdm.ca_loss(x0_hat, teacher, cond, uncond, d.tau["ca"], d.noise["ca"], cfg.alpha)
        (scale * ca).backward()
        x0_hat = student_estimate(anchor.x_t, anchor.t, cond)
        dm, _ = cdm.dm_loss(x0_hat, teacher, fake, cond, d.tau["dm"], d.noise["dm"])
        (scale * dm).backward()
        x_off = cdm.euler_step(anchor.x_t, anchor.t, d.t_off, anchor.v)
        x0_hat = student_estimate(x_off, d.t_off, cond)
        off, _ = cdm.dm_loss(x0_hat, teacher, fake, cond, d.tau["cdm"], d.noise["cdm"])
        (scale * off).backward()
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
        self.time_scale = 1000  # the scale of the network's time
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
    net = net.to(getattr(torch, args.weights))  # as cdm.Family loads it
    run = cdm.Run.__new__(cdm.Run)
    run.args = args
    run.device = device
    run.rank = 0
    run.world = 1
    run.prompts = [""]
    run.batch = args.batch_size = args.batch_size or 16
    args.micro_batch_size = args.micro_batch_size or math.gcd(run.batch, 4)
    assert run.batch % args.micro_batch_size == 0, (
        "--batch-size must be a multiple of --micro-batch-size"
    )
    run.family = RandomSD3(net, shape, tokens, device)
    run.build()
    return run


def settings(flags, weights, rank):
    """The program's settings from this command's flags, checked by the program."""
    words = ["--device", flags.device, "--weights", weights, "--lora-rank", str(rank)]
    for name in ("batch_size", "micro_batch_size", "max_schedule_steps"):
        if getattr(flags, name) is not None:
            words += ["--" + name.replace("_", "-"), str(getattr(flags, name))]
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
# Qwen2.5-VL as others report it, without the layer that computes logits, which cdm.py leaves out.
LONGCAT_ENCODERS = {"Qwen2.5-VL": 8.3e9 - 152_064 * 3_584, "VAE": 83_819_683}
ENCODERS_TERM = "text encoders and VAE, bf16"
POSITIONS_TERM = "position embeddings of all networks"
CAST_TERM = "weights of the block in work, bf16"
ACTIVATIONS = ("activations: the blocks' inputs, bf16", "activations: the block in work")
BF16 = 2  # bytes
FLOAT32 = 4
# Activations of the block whose backward pass is running: bytes for each token and channel. Found
# by --full-size, which checks them.
BLOCK = {"full float32": 68, "full bfloat16": 68, "LoRA 64": 84}


def empty_network(kind, config):
    """A network of diffusers without memory for its weights."""
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, kind).from_config(config)


def state_terms(net, weights, rank):
    """{what: bytes} of what training keeps between two forward passes, on one GPU.

    net: a transformer of the teacher's shapes, without adapters; weights, rank: the program's
    --weights and --lora-rank. Left out are AdamW's counters of steps, 4 bytes a tensor.
    """
    trained = net.num_parameters()
    size = BF16 if weights == "bfloat16" else FLOAT32
    positions = sum(buffer.numel() for buffer in net.buffers())
    buffers = (3 * size + FLOAT32) * positions
    if rank:
        names = tuple("." + target for target in cdm.Family.lora_targets)
        layers = [module for name, module in net.named_modules() if name.endswith(names)]
        trained = sum(rank * (layer.in_features + layer.out_features) for layer in layers)
        size = FLOAT32  # of the adapters, with either --weights
        buffers = BF16 * positions  # one network plays all roles
    return {
        "teacher (LoRA: the base of all roles), bf16": BF16 * net.num_parameters(),
        "student and fake score": 2 * size * trained,
        "their AdamW moments": 2 * 2 * size * trained,
        "student EMA, float32": FLOAT32 * trained,
        "gradients, of one network at a time": size * trained,
        POSITIONS_TERM: buffers,
    }


def memory_terms(way, pixels):
    """{what: bytes} of training SD3-Medium on one GPU with gradient checkpointing.

    For a micro-batch of 1. The sum is the peak of a student update if the text encoders stay on the
    GPU. With bfloat16 weights the computed peak is 0.2 GB higher.
    """
    weights, rank = WAYS[way]
    net = empty_network("SD3Transformer2DModel", SD3_MEDIUM)
    layers = net.config.num_layers
    stream = (TOKENS + (pixels // 16) ** 2) * net.inner_dim  # entries of a block's input
    cast = 0  # autocast's copy of weights that are not in bf16 already
    if way == "full float32":
        cast = BF16 * net.num_parameters() // layers
    inputs, work = ACTIVATIONS
    return state_terms(net, weights, rank) | {
        inputs: BF16 * stream * layers,
        work: BLOCK[way] * stream,
        CAST_TERM: cast,
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
        self.names = {
            run.teacher: "teacher",
            run.student.model: "student",
            run.fake_score.model: "fake_score",
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
        """Within it, functions at the stages' borders take laps, and Models' calls are counted."""
        call = cdm.Model.__call__
        average = cdm.average_into

        def counted(role, x_t, *rest, **more):
            self.evaluations[self.names[role], torch.is_grad_enabled()] += len(x_t)
            return call(role, x_t, *rest, **more)

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
                if self.evaluations:  # of an earlier micro-batch
                    self.lap("fake-score updates")
                anchor = simulate(*rest)
                self.lap("backward simulation")
                return anchor

            return with_a_lap

        here = sys.modules[__name__]
        with (
            patch.object(cdm.Model, "__call__", counted),
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

    The noise has deviation 1. Kernels of bf16 differ with the number of samples.
    """
    limit = 0.5 if run.family.dtype == torch.bfloat16 else 1e-4
    worst = 0
    for cond, _, d in run.micro_batches(1):
        inputs = (run.student.model, d.noise["start"], d.schedule, d.index, cond)
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
    student = run.student.model

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
    """{(stage, n): the stage's peak in bytes}, for micro-batches of n = 1 and 2 samples."""
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
        del batches
    return result


def compute_at(layers, args, config, shape, tokens, memory):
    """{key: number} for a transformer of so many layers."""
    with no_values(), LiveBytes() as live, patch.object(cdm, "backward_simulation", one_call):
        config = config | {"num_layers": layers}
        run = stand_in(args, config, shape, tokens, torch.device("cpu"))
        always = live.now
        found = count_flops(run, shape)
        if memory:
            found |= {"always": always} | peak_memory(run, shape, live)
    return found


def compute(args, config, shape, tokens, memory=True):
    """{(role, with gradient) or "recomputed": FLOPs of a sample} and, if asked, bytes.

    Blocks are alike, but for the last: two small networks say all about a deep one.
    """
    args = copy.copy(args)
    args.compile = False
    depth = config["num_layers"]
    if depth <= 4:
        return compute_at(depth, args, config, shape, tokens, memory)
    two = compute_at(2, args, config, shape, tokens, memory)
    three = compute_at(3, args, config, shape, tokens, memory)
    return {key: x + (three[key] - x) * (depth - 2) for key, x in two.items()}


@torch.no_grad()
def decoding_memory(pixels):
    """The peak in bytes while SD3-Medium's VAE decodes one image in bf16, without its weights."""
    import diffusers

    with no_values(), LiveBytes() as live:
        vae = diffusers.AutoencoderKL(**VAE).bfloat16()
        live.peak = live.now
        before = live.now
        vae.decode(torch.empty(1, *latents(pixels), dtype=torch.bfloat16)).sample.float()
    return live.peak - before


# --- 6. Tables. ---


def unit(flops):
    for size, name in ((1e12, "T"), (1e9, "G")):
        if flops > size:
            return f"{flops / size:.3f} {name}"
    return f"{flops / 1e6:.3f} M"


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
    training = f"LoRA {cfg.lora_rank}" if cfg.lora_rank else f"full {cfg.weights}"
    details = [where, training]
    details.append(f"gradient checkpointing {'on' if cfg.gradient_checkpointing else 'off'}")
    if flags.compile:
        details.append("compiled")
    if flags.full_size:
        details.append("random embeddings stand in for text encoding")
    print()
    print("Measured: " + "; ".join(details) + ".")
    print(f"{run.batch} samples in micro-batches of {cfg.micro_batch_size}.")
    print(f"N_max {cfg.max_schedule_steps}, R = {cfg.student_every}.")
    print(f"Means over {flags.updates} student update(s), after {WARM_UP} for warming up.")
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
    cells = []
    for whole in (this, released):
        cells.append(f"{whole['seconds']:.3f} ± {whole['seconds_stdev']:.3f} s")
    print(f"    time        {this['seconds'] / released['seconds']:.3f}: {' and '.join(cells)}")
    ratio = this["seconds_at_expected"] / released["seconds_at_expected"]
    print(f"    time*       {ratio:.3f}")
    print("* with backward simulation scaled to the expected evaluations.")


def print_computed(rows, pixels, cfg):
    """What `estimate` found, by way of training."""
    print()
    print("COMPUTED, NOT MEASURED: there is no GPU here. The program's own iteration ran on")
    print(
        f"SD3-Medium's shapes at {pixels} pixels, without values, under bf16 autocast as on a GPU."
    )
    print(
        "GB. Peaks are all that is alive at once, for a micro-batch of 1 (+ each further sample)."
    )
    print("Left out: the CUDA context, kernels' workspace, fragmentation; text encoders and VAE.")
    print()
    print(f"{'':14}{'always':>7}", end="")
    print("".join(f"{stage:>21}" for stage in STAGES[1:4]))
    for way, x in rows.items():
        line = f"{way:14}{x['always'] / GB:7.2f}"
        for stage in STAGES[1:4]:
            one = x[stage, 1] / GB
            two = x[stage, 2] / GB
            cell = f"{one:.2f} (+{two - one:.2f})"
            line += f"{cell:>21}"
        print(line)

    print()
    headings = f"{'teacher':>10}{'student':>10}{'with gradient':>15}{'recomputed':>12}"
    print(f"{'FLOP':14}{headings}{'update: this':>14}{'released':>12}{'ratio':>8}")
    for way, x in rows.items():
        totals = []
        for kind in ITERATIONS:
            counts = expected_evaluations(cfg, kind)
            totals.append(sum(count * x[key] for key, count in counts.items()))
        line = f"{way:14}{unit(x['teacher', False]):>10}{unit(x['student', False]):>10}"
        line += f"{unit(x['student', True]):>15}{unit(x['recomputed']):>12}"
        line += f"{unit(totals[0]):>14}{unit(totals[1]):>12}{totals[0] / totals[1]:8.3f}"
        print(line)
    print(
        "Of a sample, in one pass, or in one student update. There the passes are the expected ones"
    )
    print("of this code and of the released code; recomputation is left out.")


def print_row(name, numbers, digits=2):
    print(f"{name:46}" + "".join(f"{x:16.{digits}f}" for x in numbers))


def print_terms(rows, pixels):
    """The terms of memory_terms, one a line, and their check against the bytes that are alive."""
    columns = {way: memory_terms(way, pixels) for way in rows}
    print()
    heading = f"the same peak by arithmetic, {pixels} pixels, GB"
    print(f"{heading:46}" + "".join(f"{way:>16}" for way in columns))
    for name in columns["LoRA 64"]:
        print_row(name, [terms[name] / GB for terms in columns.values()])
    sums = {way: sum(terms.values()) for way, terms in columns.items()}
    print_row("sum", [total / GB for total in sums.values()])
    shares = []
    for way, total in sums.items():
        shares.append((total - columns[way][ENCODERS_TERM]) / rows[way]["student update", 1])
    print_row("sum without encoders / student update above", shares, 3)
    for way, share in zip(columns, shares, strict=True):
        assert abs(share - 1) < 0.005, f"{way}: arithmetic gives {share:.3f} of the peak"


def print_offloaded(pixels):
    """Where memory peaks if text encoders and EMA are on the GPU only while they are used."""
    terms = memory_terms("full bfloat16", pixels)
    names = list(terms)
    ema = terms["student EMA, float32"]
    kept = sum(terms[name] for name in names[:3]) + terms[POSITIONS_TERM] + BF16 * ENCODERS["VAE"]
    update = kept + terms["gradients, of one network at a time"]
    update += sum(terms[name] for name in ACTIVATIONS)
    print()
    print("full bfloat16, --offload-text-encoders, without and with --offload-ema, GB")
    moments = {
        "while T5 encodes": (kept + BF16 * ENCODERS["T5-XXL encoder"], 0),
        "student update": (update, 0),
        "while an image is decoded": (kept + decoding_memory(pixels), ema),
    }
    for moment, (needed, offloaded) in moments.items():
        print_row(moment, [(needed + ema) / GB, (needed + offloaded) / GB], 1)


def print_readme_tables():
    """The table of README for SD3-Medium, and the part of it that parameter counts give."""
    columns = [memory_terms(way, 1024) for way in WAYS]
    groups = {
        "networks, AdamW, EMA, gradients": list(columns[0])[:5],
        "text encoders and VAE": [ENCODERS_TERM],
        "position embeddings, a block's weights in bf16": [POSITIONS_TERM, CAST_TERM],
        "activations for each sample at 1024x1024": ACTIVATIONS,
    }
    print()
    print(f"{'SD3-Medium, GB':46}" + "".join(f"{way:>16}" for way in WAYS))
    for title, names in groups.items():
        print_row(title, [sum(terms[name] for name in names) / GB for terms in columns], 1)

    net = empty_network("LongCatImageTransformer2DModel", LONGCAT_IMAGE)
    columns = [state_terms(net, *way) for way in WAYS.values()]
    encoders = BF16 * sum(LONGCAT_ENCODERS.values()) / GB
    adapter = columns[-1]["student EMA, float32"] // FLOAT32
    print()
    print(f"{'LongCat-Image, GB':46}" + "".join(f"{way:>16}" for way in WAYS))
    print_row("networks, AdamW, EMA, gradients", [sum(x.values()) / GB for x in columns], 1)
    print_row("text encoder and VAE", [encoders] * len(WAYS), 1)
    print(f"From counts alone: {net.num_parameters():,} parameters, LoRA {adapter:,} a role.")
    print("Second-hand: the numbers of blocks, and the text encoder's 8.3e9 parameters.")


# --- 7. The command line. ---


def parse(argv):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=formatter)
    add = parser.add_argument
    add("--full-size", action="store_true", help="SD3-Medium with random weights, not the emoji")
    add("--batch-size", type=int, default=16, help="samples of an update")
    add("--micro-batch-size", type=int, help="samples of a forward pass; the program's default")
    add("--resolution", type=int, choices=(512, 1024), help="with --full-size; else 1024")
    add("--lora-rank", type=int, default=0, help="0: full fine-tuning; with a GPU or the emoji")
    add("--weights", choices=("float32", "bfloat16"), default="float32", help="as --lora-rank")
    add("--compile", action="store_true", help="the program's flag")
    add("--no-gradient-checkpointing", action="store_true", help="the program's flag")
    add("--updates", type=int, default=10, help="measured student updates")
    add("--max-schedule-steps", type=int, default=28, help="N_max")
    add("--device", choices=("cpu", "cuda"), help="else a GPU with --full-size if it is there")
    flags = parser.parse_args(argv)
    if not flags.device:
        gpu = flags.full_size and torch.cuda.is_available()
        flags.device = "cuda" if gpu else "cpu"
    return flags


def latents(pixels):
    """SD3's latent shape."""
    return 16, pixels // 8, pixels // 8


def estimate(flags):
    """--full-size without a GPU: compute all WAYS of training, and print."""
    pixels = flags.resolution or 1024
    rows = {}
    for name, way in tqdm(WAYS.items(), desc="computing", leave=False):
        args = settings(flags, *way)
        rows[name] = compute(args, SD3_MEDIUM, latents(pixels), TOKENS)
    print_computed(rows, pixels, args)
    if not flags.no_gradient_checkpointing:
        print_terms(rows, pixels)
        print_offloaded(pixels)
    print_readme_tables()


def run_and_measure(flags, folder):
    """Build the networks, run, print."""
    args = settings(flags, flags.weights, flags.lora_rank)
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
        args.teacher = str(EMOJI)
        args.prompts = str(EMOJI / "prompts.txt")
        args.output_dir = folder
        run = cdm.Run(args, device)
        config = dict(run.family.transformer.config)
        tokens = run.family.empty[0].shape[1]
        shape = run.family.shape
        where = f"tests/emoji_sd3, {where}"
    flops = compute(args, config, shape, tokens, memory=False)
    difference = check_anchors(run)
    result = measure(run, flops, flags.updates)
    print_measured(run, result, flops, flags, where)
    print()
    print(f"Both backward simulations gave the same anchors, to {difference:.1e}.")
    if flags.device == "cpu":
        print("The stages' peaks of memory need a GPU.")


def main(argv=None):
    flags = parse(argv)
    if flags.full_size and flags.device == "cpu":
        estimate(flags)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run_and_measure(flags, folder)


if __name__ == "__main__":
    main()
