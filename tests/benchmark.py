"""The cost of an iteration: seconds, memory, network evaluations, FLOPs; beside it, the released algorithm's counts.

    python tests/benchmark.py                    # tests/digits_sd3 on the CPU, about a minute
    python tests/benchmark.py --full-size        # SD3-Medium's transformer, random weights, nothing downloaded; one GPU
    python tests/benchmark.py --full-size        # the same without a GPU: FLOPs and memory, computed and not measured

Prints tables and writes --output. It times the program itself: `cdm.Run.build` makes the networks, `cdm.cdm_iteration`
runs, and the functions that mark the borders of its stages are wrapped. Beside it, with the same draws, runs
`released_iteration`: cdm's own losses with the evaluation counts of the authors' release, taken from a reading of their
code. Their code itself was never run. Not a test: pytest does not collect it.

FLOPs: a multiplication and an addition are two; those of matrix products, convolutions and attention, as
torch.utils.flop_counter has them (attention's backward is five products, one of them a recomputation); those of the
optimiser, of text encoding and of gradient checkpointing's recomputation are not counted. MFU: these, each second, over
--peak-tflops. 1 GB = 10^9 bytes.
"""

import argparse, contextlib, copy, json, math, os, resource, statistics, sys, tempfile, time, warnings, weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

import cdm

warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor|Already found a `peft_config`")
DIGITS = ROOT / "tests" / "digits_sd3"
# transformer/config.json of stabilityai/stable-diffusion-3-medium-diffusers, 2,028,328,000 parameters; its text has 77
# tokens from CLIP and 256 from T5.
SD3_MEDIUM = dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
                  num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
                  pooled_projection_dim=2048, pos_embed_max_size=192)
TOKENS = 333
STAGES = ("text encoding", "backward simulation", "fake-score updates", "student update", "EMA")

# --------------------------------------------------------------------------- the released algorithm, by its evaluations

@torch.no_grad()
def released_simulation(student, noise, schedule, index, cond):
    """Backward simulation as released: every sample to the schedule's end, then the anchors are picked."""
    x, times, path = noise, torch.cat([schedule, torch.zeros(1)]).to(noise), []
    for t, s in zip(times[:-1], times[1:]):
        v = student(x, t.expand(len(x)), cond)
        path.append((x, v))
        x = cdm.euler_step(x, t, s, v)
    xs, vs = (torch.stack([path[i][which][b] for b, i in enumerate(index.tolist())]) for which in (0, 1))
    return cdm.Anchor(xs, schedule[index].to(noise), vs)

def released_iteration(k, batches, teacher, student, fake_score, ema, cfg):
    """cdm.cdm_iteration as we read the released code: full rollouts, a student evaluation for each loss."""
    share, points = 1 / len(batches), []
    def student_estimate(x_t, t, cond):
        return cdm.clean_estimate(x_t, t, student.role(x_t, t, cond))

    for cond, _, d in batches:
        points.append(released_simulation(student.role, d.noise["start"], d.schedule, d.index, cond))
    for (cond, _, d), anchor in zip(batches, points):
        x0 = cdm.clean_estimate(*anchor)
        (share * cdm.fake_score_loss(fake_score.role, x0, cond, d.tau["fake"], d.noise["fake"])).backward()
    fake_score.step()
    cdm.average_into(fake_score.params, student.params, cfg.fake_pull)
    if k % cfg.student_every:
        return
    for (cond, uncond, d), anchor in zip(batches, points):
        x0_hat = student_estimate(anchor.x_t, anchor.t, cond)
        (share * cdm.ca_loss(x0_hat, teacher, cond, uncond, d.tau["ca"], d.noise["ca"], cfg.guidance)).backward()
        x0_hat = student_estimate(anchor.x_t, anchor.t, cond)
        (share * cdm.dm_loss(x0_hat, teacher, fake_score.role, cond, d.tau["dm"], d.noise["dm"])).backward()
        x0_hat = student_estimate(cdm.euler_step(anchor.x_t, anchor.t, d.t_off, anchor.v), d.t_off, cond)
        (share * cdm.dm_loss(x0_hat, teacher, fake_score.role, cond, d.tau["cdm"], d.noise["cdm"])).backward()
    n = student.updates
    student.step()
    cdm.average_into(ema, student.params, min((1 + n) / (10 + n), cfg.ema_decay))

def expected_evaluations(cfg, released):
    """Evaluations of a sample in a student update, by (role, with gradient), averaged over the draws."""
    n, r = cfg.max_schedule_steps, cfg.student_every
    return {("student", False): r * ((n + 1) / 2 if released else (n + 3) / 4), ("fake_score", True): r,
            ("student", True): 3 if released else 2, ("teacher", False): 4, ("fake_score", False): 2}

# -------------------------------------------------------------------------------------------------- networks to measure

def stand_in(args, config, shape, tokens, device):
    """A cdm.Run on a transformer with random weights: no pipeline, no files; its conditions are random embeddings."""
    import diffusers
    with torch.device(device):
        net = diffusers.SD3Transformer2DModel.from_config(config).requires_grad_(False).eval()
    net = net.to(torch.bfloat16) if args.lora_rank else net  # as cdm.SD3 does on a GPU
    def embeddings(n):
        return (torch.randn(n, tokens, net.config.joint_attention_dim, device=device, dtype=torch.bfloat16),
                torch.randn(n, net.config.pooled_projection_dim, device=device, dtype=torch.bfloat16))
    run = cdm.Run.__new__(cdm.Run)
    run.args, run.device, run.rank, run.world, run.prompts, run.k = args, device, 0, 1, [""], 0
    run.batch = args.batch_size = args.batch_size or 16
    args.micro_batch_size = args.micro_batch_size or math.gcd(run.batch, 4)
    cdm.require(run.batch % args.micro_batch_size == 0, f"--batch-size {run.batch} must be a multiple of "
                f"--micro-batch-size {args.micro_batch_size}.")
    run.sd3 = SimpleNamespace(transformer=net, dtype=torch.bfloat16, device=device, shift=3.0, timesteps=1000,
                              shape=shape, pipe=SimpleNamespace(), encode=lambda prompts: embeddings(len(prompts)),
                              uncond=embeddings)
    run.build()
    return run

def settings(flags, *more):
    """The program's settings from this command's flags, checked by the program."""
    words = ["--device", flags.device]
    for name in ("batch_size", "micro_batch_size", "lora_rank", "max_schedule_steps"):
        if getattr(flags, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(flags, name))]
    words += ["--no-gradient-checkpointing"] * flags.no_gradient_checkpointing + ["--compile"] * flags.compile
    return cdm.parse_args([*words, *more])

# ------------------------------------------------------------------------------------------------------------ measuring

class Meter:
    """A stopwatch with laps: the time, peak memory and network evaluations since the last lap go to a stage."""

    def __init__(self, run, live=None):
        self.run, self.live, self.stages, self.kept = run, live, {}, 0
        self.names = {run.teacher: "teacher", run.student.role: "student", run.fake_score.role: "fake_score"}
        self.restart()

    def restart(self):
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        if self.live:
            self.live.peak = self.live.now
        self.evaluations, self.since = Counter(), time.perf_counter()

    def lap(self, stage):
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - self.since, self.live.peak if self.live else 0
        peak = torch.cuda.max_memory_allocated() if self.run.device.type == "cuda" else peak
        row = self.stages.setdefault(stage, {"seconds": 0.0, "peak_bytes": 0, "evaluations": Counter()})
        row["seconds"] += seconds
        row["peak_bytes"] = max(row["peak_bytes"], peak)
        row["evaluations"].update(self.evaluations)
        self.restart()

    @contextlib.contextmanager
    def watch(self):
        """Within it, the functions at the stages' borders take laps, and calls of a cdm.Role are counted."""
        call, average = cdm.Role.__call__, cdm.average_into
        def counted(role, x_t, *rest, **more):
            self.evaluations[self.names[role], torch.is_grad_enabled()] += len(x_t)
            before = self.live.now if self.live else 0
            v = call(role, x_t, *rest, **more)
            self.kept = max(self.kept, self.live.now - before if self.live else 0)
            return v
        def averaged(params, *rest):
            of_ema = params is self.run.ema
            self.lap("student update") if of_ema else None
            average(params, *rest)
            self.lap("EMA" if of_ema else "fake-score updates")
        def simulated(simulate):
            return lambda *rest: (simulate(*rest), self.lap("backward simulation"))[0]
        with (patch.object(cdm.Role, "__call__", counted), patch.object(cdm, "average_into", averaged),
              patch.object(cdm, "backward_simulation", simulated(cdm.backward_simulation)),
              patch.dict(globals(), released_simulation=simulated(released_simulation))):
            yield self

def student_update(run, iterate, first):
    """Runs R iterations from `first` on, which end with a student update. Returns its stages."""
    with Meter(run).watch() as meter:
        for k in range(first, first + run.args.student_every):
            batches = list(run.micro_batches(k))
            meter.lap("text encoding")
            iterate(k, batches, run.teacher, run.student, run.fake_score, run.ema, run.args)
    return meter.stages

def check_anchors(run):
    """Both backward simulations give the same anchors. Returns their largest difference; noise has deviation 1."""
    worst, limit = 0, 0.5 if run.device.type == "cuda" else 1e-4  # bf16 kernels differ with the number of samples
    for cond, _, d in run.micro_batches(1):
        of = run.student.role, d.noise["start"], d.schedule, d.index, cond
        pairs = zip(cdm.backward_simulation(*of), released_simulation(*of))
        worst = max([worst] + [float((a - b).abs().max()) for a, b in pairs])
    assert worst < limit, f"the two backward simulations differ by {worst}"
    return worst

def measure(run, flops, updates, warm_up):
    """Both algorithms in turn, with the same draws: {algorithm: {stage: means over student updates; peaks: maxima}}."""
    r, kinds, seen = run.args.student_every, {"this": cdm.cdm_iteration, "released": released_iteration}, {}
    for u in tqdm(range(warm_up + updates), desc="student updates", leave=False):
        for kind, iterate in kinds.items():
            stages = student_update(run, iterate, 1 + u * r)
            seen.setdefault(kind, []).append(stages) if u >= warm_up else None
    result = {}
    for kind, those in seen.items():
        whole = [sum(row["seconds"] for row in stages.values()) for stages in those]
        table = result[kind] = {}
        for stage in STAGES:
            rows = [stages[stage] for stages in those]
            count = sum((row["evaluations"] for row in rows), Counter())
            count = {key: x / updates / run.batch for key, x in count.items()}  # of a sample, in a student update
            table[stage] = {"seconds": statistics.mean(row["seconds"] for row in rows), "evaluations": count,
                            "peak_bytes": max(row["peak_bytes"] for row in rows),
                            "flops": run.batch * sum(x * flops[key] for key, x in count.items())}
        rows, total = list(table.values()), Counter()
        for row in rows:
            total.update(row["evaluations"])
        table["whole"] = {"seconds": statistics.mean(whole), "evaluations": dict(total),
                          "seconds_stdev": statistics.stdev(whole) if updates > 1 else 0.0,
                          "peak_bytes": max(row["peak_bytes"] for row in rows),
                          "flops": sum(row["flops"] for row in rows)}
        expected = expected_evaluations(run.args, kind == "released")
        simulation = table["backward simulation"]
        more = expected["student", False] / simulation["evaluations"]["student", False] - 1
        table["whole"] |= {"expected_evaluations": expected,
                           "seconds_at_expected": table["whole"]["seconds"] + more * simulation["seconds"]}
    return result

# --------------------------------------------------------- computing: the same code on tensors without values or memory

class LiveBytes(TorchDispatchMode):
    """Sums the bytes of all storages that are alive: `now`, and at the most `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def freed(self, key, size):
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for x in filter(torch.is_tensor, torch.utils._pytree.tree_leaves(result)):
            storage = x.untyped_storage()
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

@contextlib.contextmanager
def no_values():
    """Tensors have shapes and dtypes only, those of a GPU: bf16 under autocast, layer norms in float32."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    autocast, layer_norm = torch.autocast, torch.nn.functional.layer_norm
    with (patch.object(torch, "autocast", lambda *_, **__: autocast("cpu", torch.bfloat16, cache_enabled=False)),
          patch.object(torch.nn.functional, "layer_norm", lambda x, *rest: layer_norm(x.float(), *rest)),
          patch.object(torch.utils, "swap_tensors", lambda p, q: setattr(p, "data", q.data)),  # Module.to needs it
          FakeTensorMode(allow_non_fake_inputs=True)):
        yield

def micro_batch(run, n, shape):
    """(cond, uncond, Draw) for n samples without values; backward simulation is then one call, see `estimate`."""
    names = "start", "ca", "dm", "cdm", "fake"
    noise, tau = {x: torch.randn(n, *shape) for x in names}, {x: torch.rand(n) for x in names[1:]}
    draw = cdm.Draw(None, None, torch.rand(n), tau, noise, 0)
    return run.sd3.encode([""] * n), run.sd3.uncond(n), draw

def count_flops(run, shape):
    """FLOPs of a sample's evaluation by (role, with gradient), and under "recomputed" what checkpointing adds."""
    aten, (cond, _, d), student = torch.ops.aten, micro_batch(run, 1, shape), run.student.role
    more = {aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
            aten._scaled_dot_product_flash_attention_for_cpu_backward:
                lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)}  # torch's table lacks these two
    def count(role, grad):
        with FlopCounterMode(display=False, custom_mapping=more) as counter, torch.set_grad_enabled(grad):
            v = role(d.noise["start"], d.t_off, cond)
            v.sum().backward() if grad else None
        return counter.get_total_flops()
    flops = {("teacher", False): count(run.teacher, False), ("student", False): count(student, False)}
    student.transformer.disable_gradient_checkpointing()
    flops["student", True] = count(student, True)
    student.transformer.enable_gradient_checkpointing()
    flops["recomputed"] = count(student, True) - flops["student", True]
    student.transformer.disable_gradient_checkpointing() if not run.args.gradient_checkpointing else None
    run.student.optimizer.zero_grad(set_to_none=True)
    return flops | {("fake_score", grad): flops["student", grad] for grad in (False, True)}

def peak_memory(run, shape, live):
    """Bytes for micro-batches of n samples: each stage's peak (stage, n); what a forward pass keeps, ("kept", n)."""
    result = {}
    for n in (1, 2):
        batches = [micro_batch(run, n, shape) for _ in range(2)]  # the second finds the first one's gradients in memory
        with Meter(run, live).watch() as meter:
            cdm.cdm_iteration(2, batches, run.teacher, run.student, run.fake_score, run.ema, run.args)
        result |= {(stage, n): row["peak_bytes"] for stage, row in meter.stages.items()} | {("kept", n): meter.kept}
        del batches
    return result

def compute(args, config, shapes, tokens, memory=True):
    """{shape: FLOPs and, if asked, bytes}. Blocks are alike but for the last: two small networks tell of a deep one."""
    def one_call(student, noise, *rest):  # of backward simulation, whose schedule has no values either
        t = torch.rand(len(noise))
        return cdm.Anchor(noise, t, student(noise, t, rest[2]).detach())
    args, depth, found = copy.copy(args), config["num_layers"], []
    args.compile = False
    depths = (2, 4) if depth > 4 else (depth,)
    for layers in depths:
        with no_values(), LiveBytes() as live, patch.object(cdm, "backward_simulation", torch.no_grad()(one_call)):
            run = stand_in(args, config | {"num_layers": layers}, None, tokens, torch.device("cpu"))
            for learner in (run.fake_score, run.student) if memory else ():  # AdamW makes its moments in its first step
                for p in learner.params.values():
                    p.grad = torch.zeros_like(p)
                learner.step()
            fixed = {"persistent": live.now, "gradients": sum(p.nbytes for p in run.student.params.values())}
            found.append({})
            for shape in shapes:
                numbers = (fixed | peak_memory(run, shape, live) if memory else {}) | count_flops(run, shape)
                found[-1] |= {(shape, key): x for key, x in numbers.items()}
    small, large = found[0], found[-1]
    more = (depth - depths[0]) // (depths[-1] - depths[0] or 1)
    deep = {key: x + (large[key] - x) * more for key, x in small.items()}
    return {shape: {key: x for (of, key), x in deep.items() if of == shape} for shape in shapes}

# ------------------------------------------------------------------------------------------------------------ reporting

def unit(flops):
    size, name = (1e12, "T") if flops > 1e12 else (1e9, "G") if flops > 1e9 else (1e6, "M")
    return f"{flops / size:.3f} {name}"

def print_measured(run, result, flops, flags, where):
    cfg, a, b = run.args, result["this"], result["released"]
    how = f"LoRA of rank {cfg.lora_rank}" if cfg.lora_rank else "full fine-tuning"
    how += f", gradient checkpointing {'on' if cfg.gradient_checkpointing else 'off'}" + ", compiled" * flags.compile
    print(f"""
Measured: {where}; {how};
{run.batch} samples in micro-batches of {cfg.micro_batch_size}, N_max {cfg.max_schedule_steps}. Means over \
{flags.iterations // cfg.student_every} student update(s), each of R = {cfg.student_every} iterations, after
{WARM_UP} for warming up; peaks are maxima. 'released': the released code's evaluation counts, from a reading of it;
our code ran them, with the same draws{"; random embeddings stand in for text encoding" * flags.full_size}.

{"one student update":21}|{"this code":^40}|{"released":^40}| released
{"":21}{2 * f"|{'s':>8}{'peak GB':>9}{'evaluations':>12}{'FLOP/s':>10} "}|/ this, s""")
    for stage in (*STAGES, "whole"):
        line = f"{stage:21}"
        for row in (a[stage], b[stage]):
            count, s, peak = sum(row["evaluations"].values()), row["seconds"], row["peak_bytes"] / 1e9
            line += f"|{s:8.3f}{f'{peak:.2f}' if peak else '-':>9}{f'{count:.2f}' if count else '-':>12}"
            line += f"{unit(row['flops'] / s) if count else '-':>10} "
        print(line + f"|{b[stage]['seconds'] / max(a[stage]['seconds'], 1e-9):9.2f}")
    print(f"\n{'evaluations of a sample':26}{'this code':>10}{'expected*':>10}{'released':>10}{'expected*':>10}"
          f"{'FLOP':>10}")
    keys, a, b = list(a["whole"]["expected_evaluations"]), a["whole"], b["whole"]
    for key in (*keys, None):
        counts = [w[x] for w in (a, b) for x in ("evaluations", "expected_evaluations")]
        name = f"{key[0]}, {'with' if key[1] else 'no'} gradient" if key else "sum"
        print(f"{name:26}" + "".join(f"{x[key] if key else sum(x.values()):10.2f}" for x in counts)
              + f"{unit(flops[key]) if key else '':>10}")
    share = [sum(a[x].values()) / sum(b[x].values()) for x in ("evaluations", "expected_evaluations")]
    print(f"""* over all draws. Checkpointing recomputes {unit(flops["recomputed"])}FLOP in a pass with gradient.

This code / released: evaluations {share[0]:.3f} (expected {share[1]:.3f}), FLOPs {a["flops"] / b["flops"]:.3f}, time \
{a["seconds"] / b["seconds"]:.3f}: {a["seconds"]:.3f} +- {a["seconds_stdev"]:.3f} s and {b["seconds"]:.3f} +- \
{b["seconds_stdev"]:.3f} s
(standard deviation); with backward simulation scaled to the expected counts {a["seconds_at_expected"]:.3f} s and \
{b["seconds_at_expected"]:.3f} s, {a["seconds_at_expected"] / b["seconds_at_expected"]:.3f}.""")
    if run.device.type == "cuda":
        mfu = [f"{100 * x['flops'] / x['seconds'] / flags.peak_tflops / 1e12:.1f} %" for x in (a, b)]
        print(f"MFU against {flags.peak_tflops:g} TFLOP/s: this code {mfu[0]}, released {mfu[1]}.")

def print_computed(rows):
    print(f"""
COMPUTED, NOT MEASURED: no GPU here. The program's own iteration ran on SD3-Medium's shapes, without values or memory,
with bf16 autocast as on a GPU. GB; peaks: all that is alive at once, for a micro-batch of 1 (+ each further sample).
Left out: CUDA context, kernels' workspace, fragmentation (about 1 GB); text encoders and VAE (11.3 GB).

{"":22}{"always":>7}{"gradients":>10}{"simulation":>17}{"fake-score update":>19}{"student update":>17}\
{"forward keeps":>17}""")
    for (rank, pixels), x in rows.items():
        line = f"{f'LoRA {rank}' if rank else 'full':>8}, {pixels:4} pixels{x['persistent'] / 1e9:8.2f}"
        line += f"{x['gradients'] / 1e9:9.2f} "
        for stage, width in zip((*STAGES[1:4], "kept"), (17, 19, 17, 17)):
            one, two = x[stage, 1] / 1e9, x[stage, 2] / 1e9
            line += f"{f'{one:.2f} (+{two - one:.2f})':>{width}}"
        print(line)
    print(f"\n{'FLOP of a sample':22}{'teacher':>12}{'student':>12}{'student, with gradient':>26}"
          f"{'recomputed, not useful':>26}")
    for (rank, pixels), x in rows.items():
        cells = [unit(x[key]) for key in (("teacher", False), ("student", False), ("student", True), "recomputed")]
        print(f"{f'LoRA {rank}' if rank else 'full':>8}, {pixels:4} pixels" + "{:>12}{:>12}{:>26}{:>26}".format(*cells))

WARM_UP = 2  # student updates before the measured ones

def readable(x):
    """For JSON: keys that are tuples become strings."""
    if not isinstance(x, dict):
        return x
    return {key if type(key) is str else ", ".join(map(str, key)): readable(value) for key, value in x.items()}

def parse(argv):
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: cdm.require(False, f"{message}; --help lists the flags.")
    add, number = parser.add_argument, dict(type=int)
    add("--full-size", action="store_true", help="SD3-Medium's transformer with random weights, not tests/digits_sd3")
    add("--batch-size", **number, default=16, help="samples of an update")
    add("--micro-batch-size", **number, help="samples of a forward pass; the program's default")
    add("--resolution", **number, choices=(512, 1024), help="pixels, with --full-size, 1024 if not given")
    add("--lora-rank", **number, default=0, help="0: full fine-tuning; where memory is computed, both, LoRA of 64")
    add("--compile", action="store_true", help="the program's flag")
    add("--no-gradient-checkpointing", action="store_true", help="the program's flag")
    add("--iterations", **number, help="measured iterations, an even number: 20, or 8 with --full-size")
    add("--max-schedule-steps", **number, default=28, help="N_max")
    add("--device", choices=("cpu", "cuda"), help="the CPU, or with --full-size a GPU if there is one")
    add("--output", default="runs/benchmark.json", help="JSON is written here")
    add("--peak-tflops", type=float, default=989, help="of the GPU; 989: H100 and H200, dense bf16")
    flags = parser.parse_args(argv)
    flags.device = flags.device or ("cuda" if flags.full_size and torch.cuda.is_available() else "cpu")
    flags.iterations = (8 if flags.full_size else 20) if flags.iterations is None else flags.iterations
    cdm.require(flags.iterations > 0 and flags.iterations % 2 == 0,
                f"--iterations is {flags.iterations}: give an even number.")
    cdm.require(flags.full_size or not flags.resolution, "--resolution needs --full-size.")
    cdm.require(flags.peak_tflops > 0, f"--peak-tflops is {flags.peak_tflops}: give more than 0.")
    return flags

def estimate(flags):
    """What a machine without a GPU can say of --full-size: {(LoRA rank, pixels): FLOPs and bytes}."""
    rows, shapes = {}, {(16, pixels // 8, pixels // 8): pixels for pixels in (1024, 512)}
    for rank in tqdm((0, flags.lora_rank or 64), desc="computing", leave=False):
        numbers = compute(settings(flags, "--lora-rank", str(rank)), SD3_MEDIUM, shapes, TOKENS)
        rows |= {(rank, shapes[shape]): x for shape, x in numbers.items()}
    return rows

def run_and_measure(flags, folder):
    """Builds the networks, runs, prints. Returns what JSON gets."""
    args, device = settings(flags), torch.device(flags.device)
    where = torch.cuda.get_device_name() if flags.device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    if flags.full_size:
        pixels = flags.resolution or 1024
        config, tokens, shape = SD3_MEDIUM, TOKENS, (16, pixels // 8, pixels // 8)
        run, what = stand_in(args, config, shape, tokens, device), f"SD3-Medium, random weights, {pixels} pixels"
    else:
        args.teacher, args.prompts, args.output_dir = str(DIGITS), str(DIGITS / "prompts.txt"), folder
        run, what = cdm.Run(args, device), "tests/digits_sd3"
        config, tokens, shape = dict(run.sd3.transformer.config), run.sd3.empty[0].shape[1], run.sd3.shape
    flops, difference = compute(args, config, [shape], tokens, memory=False)[shape], check_anchors(run)
    result = measure(run, flops, flags.iterations // args.student_every, WARM_UP)
    print_measured(run, result, flops, flags, f"{what}, {where}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"Both backward simulations gave the same anchors, to {difference:.1e}."
          + f" Peak of the process: {peak / 1e9:.2f} GB; stages' peaks need a GPU." * (flags.device == "cpu"))
    return {"where": f"{what}, {where}", "anchors_differ_by": difference, "process_peak_bytes": peak,
            "measured": readable(result), "flops": readable(flops)}

def main(argv=None):
    """Returns the exit code: 0, or 2 after one sentence about a mistake."""
    try:
        flags = parse(argv)
        if flags.full_size and flags.device == "cpu":
            rows = estimate(flags)
            print_computed(rows)
            report = {"computed, not measured": readable(rows)}
        else:
            with tempfile.TemporaryDirectory() as folder:
                report = run_and_measure(flags, folder)
        report |= {"torch": torch.__version__, "flags": vars(flags)}
        Path(flags.output).parent.mkdir(parents=True, exist_ok=True)
        Path(flags.output).write_text(json.dumps(report, indent=1) + "\n")
        print(f"-> {flags.output}")
        return 0
    except cdm.Mistake as e:
        sentence = str(e)
    except OSError as e:
        sentence = f"{e}: check the path."
    except torch.OutOfMemoryError:
        sentence = "the GPU is out of memory: try --micro-batch-size 1, --resolution 512 or --lora-rank 64."
    print(f"benchmark.py: {sentence}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
