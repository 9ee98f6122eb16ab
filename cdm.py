"""CDM in one file: Continuous-Time Distribution Matching for few-step diffusion distillation (arXiv:2605.06376).

Distils a flow-matching text-to-image model (SD3-Medium) into a 4-step generator, from prompts alone: no images, no GAN,
no reward. Sections: 1. the algorithm, torch only, for any model; 2. SD3 through diffusers; 3. running.

    python cdm.py --teacher stabilityai/stable-diffusion-3-medium      # one GPU; --lora-rank 64 for a smaller one
    torchrun --standalone --nproc_per_node=8 cdm.py --teacher ...      # many GPUs: FSDP2
    python cdm.py --generate "a red fox" --student runs/cdm/student --teacher ... --sample-steps 4 --seed 0

Notation. t = 0 is data and t = 1 is noise; c is the prompt, (/) the empty prompt, sg[] stops the gradient.

    x_t = (1 - t) x_0 + t noise     v(x_t, t, c), a velocity, estimates noise - x_0     D = x_t - t v, clean estimate
    student     v_theta, D_theta    few-step generator, trained on every R-th iteration, starts as the teacher
    teacher     v_real, D_real      real score, never trained
    fake_score  v_phi, D_fake       trained on every iteration, starts as the teacher, follows the student's outputs
    ema         theta_bar           the student's moving average: what is sampled from and exported
    anchor      x_{t_i}, t_i        a point of the student's own trajectory, one for each sample
    tau                             time at which a clean estimate is noised again, to be looked at by D_real and D_fake

From the paper to the code (Eqs. 1, 3-4 and 7 have numbers here; all else is cited by section and symbol):

    clean estimate D                Eq. 1        clean_estimate
    dynamic continuous schedule     sec. 3.2     sample_schedule       N ~ U{1..N_max}, random inner times
    backward simulation             sec. 3.2     backward_simulation   the student's ODE, no gradient, to the anchor
    pseudo-target, weight w         sec. 3.1     pseudo_target_loss, dmd_weight
    L_CA, CFG augmentation          Eqs. 3-4     ca_loss               tau ~ U(0, t_i)
    L_DM, distribution matching     Eqs. 3-4     dm_loss               tau ~ U(0, 1]
    off-trajectory point x_{t'}     Eq. 7        euler_step, in cdm_iteration
    L_CDM                           sec. 3.3     dm_loss at the off-trajectory estimate
    fake score, pull to student     L_fake       fake_score_loss, average_into
    one iteration                                cdm_iteration         put a finger on every arrow here

Not in the paper: --anchor-aware-fake, off by default. README says what is left out on purpose.
"""

from __future__ import annotations

import argparse, contextlib, copy, itertools, json, math, os, re, resource, shutil, signal, sys, time, warnings, zlib
from collections import namedtuple
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F

# ======================================================================================================================
# 1. The algorithm. It knows nothing of SD3, files or flags. A model is any callable model(x_t, t, cond) -> v with
#    x_t, v: (B, ...), t: (B,) in [0, 1], cond: a tuple of tensors with first axis B. So are shapes below unless said.

def _like(t, x):  # times (B,) or a scalar, viewed so that they multiply x
    return t.reshape(-1, *[1] * (x.ndim - 1))

def _rows(cond, rows):
    return tuple(c[rows] for c in cond)

def clean_estimate(x_t, t, v):
    """D(x_t, t, c) = x_t - t v: the data point that the velocity points to.  (Eq. 1)"""
    return x_t - _like(t, x_t) * v

def add_noise(x0, t, noise):
    """x_t = (1 - t) x0 + t noise: the straight path from data (t = 0) to noise (t = 1)."""
    return (1 - _like(t, x0)) * x0 + _like(t, x0) * noise

def euler_step(x_t, t, s, v):
    """x_s = x_t + (s - t) v: along the velocity from time t to time s, down or up. With s = t' this is Eq. 7."""
    return x_t + _like(s - t, x_t) * v

def shift_times(t, shift):
    """t <- shift t / (1 + (shift - 1) t), as the teacher's scheduler does. SD3 has shift 3: 0.75 becomes 0.9."""
    return shift * t / (1 + (shift - 1) * t)

def uniform_times(steps, shift=1.0):
    """The sampling grid, (steps,): 1, 1 - 1/steps, ..., shifted. With 4 and shift 3, as released: 1, 0.9, 0.75, 0.5."""
    return shift_times(1 - torch.arange(steps) / steps, shift)

# ------------------------------------------------------------------ dynamic schedule and backward simulation (sec. 3.2)
def sample_schedule(max_steps, low, high, shift=1.0, stratified=False, generator=None):
    """Draws N ~ U{1..max_steps} and times 1 = t_1 > t_2 > ... > t_N > 0, (N,) on the CPU.  (sec. 3.2)

    Inner times are U[low, high], independent or, if stratified, one in each of N - 1 equal bins of that range (the
    authors' later advice); then all are shifted.
    """
    n = int(torch.randint(1, max_steps + 1, (), generator=generator))
    u = torch.rand(n - 1, generator=generator)
    if stratified:
        u = (torch.arange(n - 1) + u) / max(n - 1, 1)
    inner = (low + (high - low) * u).sort(descending=True).values
    return shift_times(torch.cat([torch.ones(1), inner]), shift)

# A point of the student's own trajectory for each sample: x_t, its time t, and the student's velocity v there.
Anchor = namedtuple("Anchor", "x_t t v")

@torch.no_grad()
def backward_simulation(student, noise, schedule, index, cond, calls=0):
    """Integrates the student's ODE from pure noise, each sample to its own anchor and no further.  (sec. 3.2)

    noise: x at t_1 = 1; schedule: (N,) descending times; index: (B,) integers in [0, N), the anchors; both best on the
    CPU, where looking at them costs no device synchronisation. Returns Anchor(x_t, t, v) at t = schedule[index].
    Exactly sum(index + 1) evaluations of a sample: step i evaluates those with index >= i.
    calls: how often to call the student at least. Under FSDP all ranks must call equally often, so a rank whose samples
    are done goes on with one-sample calls and drops their result.
    """
    order = index.argsort(descending=True)  # the samples still under way are then always the first n
    back = order.argsort().to(noise.device, non_blocking=True)
    order = order.to(noise.device, non_blocking=True)
    times, x, v, cond = schedule.to(noise, non_blocking=True), noise[order], torch.zeros_like(noise), _rows(cond, order)
    for i in range(max(int(index.max()) + 1, calls)):
        n, onward = int((index >= i).sum()), int((index > i).sum())
        t, s = times[min(i, len(times) - 1)], times[min(i + 1, len(times) - 1)]
        first = slice(max(n, 1))
        v[:n] = student(x[first], t.expand(len(x[first])), _rows(cond, first))[:n]
        x[:onward] = euler_step(x[:onward], t, s, v[:onward])
    return Anchor(x[back], schedule[index].to(noise, non_blocking=True), v[back])

@torch.no_grad()
def sample(model, noise, times, cond):
    """Few-step generation: Euler from noise along `times`, (N,) descending from 1, then to 0. Returns x0."""
    x, times = noise, torch.cat([times, torch.zeros(1)]).to(noise)
    for t, s in zip(times[:-1], times[1:]):
        x = euler_step(x, t, s, model(x, t.expand(len(x)), cond))
    return x

# ---------------------------------------------------------------------------- the losses (sec. 3.1, Eqs. 3-4; sec. 3.3)
def dmd_weight(d_real, x0_hat, floor=0.1):
    """Per-sample weight w = 1 / max(mean |D_real - x0_hat|, floor), (B,); the mean is over all entries of a sample."""
    return 1 / (d_real - x0_hat).abs().flatten(1).mean(1).clamp(min=floor)

def pseudo_target_loss(x0_hat, delta, w, log=None):
    """What all losses share: regression of x0_hat on the pseudo-target sg[x0_hat + w delta], a gradient along -w delta.

    x0_hat: with gradient; delta: the direction; w: (B,). Returns a scalar. Convention, as released: no 1/2, mean over
    all entries, so dL/dx0_hat = -2 w delta / x0_hat.numel(), where the paper's 1/2 ||.||^2 has -w delta. Adam does not
    see the difference; clipping does, and the released limit of 1.0 belongs to this one. log: a dict for figures.
    """
    step = (_like(w, delta) * delta).detach()
    loss = F.mse_loss(x0_hat, x0_hat.detach() + step)
    if log is not None:
        log.update(step=step, w=w.mean())
    return loss

def ca_loss(x0_hat, teacher, cond, uncond, tau, noise, scale, log=None):
    """L_CA, CFG augmentation: delta = scale [D_real(z, tau, c) - D_real(z, tau, (/))].  (sec. 3.1, Eqs. 3-4)

    x0_hat: the student's clean estimate at its anchor; tau: (B,), drawn below the anchor's own time; noise: fresh;
    scale: the guidance alpha; uncond: the empty prompt's condition. Two teacher evaluations. Returns a scalar.
    """
    with torch.no_grad():
        z = add_noise(x0_hat, tau, noise)
        d_cond = clean_estimate(z, tau, teacher(z, tau, cond))
        d_uncond = clean_estimate(z, tau, teacher(z, tau, uncond))
        w = dmd_weight(d_cond, x0_hat)  # of the conditional estimate, not of the guided one
    return pseudo_target_loss(x0_hat, scale * (d_cond - d_uncond), w, log)

def dm_loss(x0_hat, teacher, fake_score, cond, tau, noise, log=None):
    """L_DM, distribution matching: delta = D_real(z, tau, c) - D_fake(z, tau, c).  (sec. 3.1, Eqs. 3-4)

    L_CDM (sec. 3.3) is this very function at the off-trajectory estimate. By Tweedie's formula delta is
    tau^2 / (1 - tau) (s_real - s_fake), the DMD direction. tau: (B,); noise: fresh. Returns a scalar.
    """
    with torch.no_grad():
        z = add_noise(x0_hat, tau, noise)
        d_real = clean_estimate(z, tau, teacher(z, tau, cond))
        d_fake = clean_estimate(z, tau, fake_score(z, tau, cond))
        w = dmd_weight(d_real, x0_hat)
    return pseudo_target_loss(x0_hat, d_real - d_fake, w, log)

def fake_score_loss(fake_score, x0, cond, tau, noise):
    """L_fake = || v_phi(z, tau, c) - (noise - x0) ||^2, mean over entries: flow matching on the student's x0."""
    x0 = x0.detach()
    return F.mse_loss(fake_score(add_noise(x0, tau, noise), tau, cond), noise - x0)

# -------------------------------------------------------------------------------------------------------- one iteration
def flag(default, text, low=None, **more):
    """A dataclass field that is a command-line flag too: default, help, least value, and more for argparse."""
    return field(default=default, metadata={"low": low, "argparse": {"default": default, "help": text, **more}})

@dataclass
class CDM:
    """The method's settings. The defaults are the released SD3-Medium configuration."""
    ca_weight: float = flag(1.0, "weight of L_CA, CFG augmentation", low=0)
    dm_weight: float = flag(1.0, "weight of L_DM, distribution matching", low=0)
    cdm_weight: float = flag(1.0, "weight of L_CDM, continuous-time matching", low=0)
    guidance: float = flag(7.0, "alpha in L_CA; L_CA + L_DM aim at the teacher's CFG at scale 1 + alpha", low=0)
    schedule: str = flag("dynamic", "backward simulation's times: drawn anew in each iteration, or DMD2's fixed "
                                    "1, .75, .5, .25 (before the shift)", choices=("dynamic", "fixed"))
    max_schedule_steps: int = flag(28, "N_max, the most steps of a dynamic schedule", low=1)
    time_low: float = flag(0.25, "inner times are U[time-low, time-high] before the shift")
    time_high: float = flag(0.95, "see --time-low")
    stratified: bool = flag(False, "draw the inner times one per equal bin, the authors' later advice")
    cdm_point: str = flag("euler", "where L_CDM looks: off the trajectory by Eq. 7; on it, at the anchor (t' = t_i); "
                                   "at a Gaussian re-noising to t'", choices=("euler", "anchor", "renoise"))
    tau_min: float = flag(0.02, "every drawn tau and t' is clamped to [tau-min, tau-max]")
    tau_max: float = flag(0.98, "see --tau-min")
    student_every: int = flag(2, "R, fake-score updates per student update", low=1)
    student_lr: float = flag(1e-5, "AdamW learning rate of the student", low=0)
    fake_lr: float = flag(5e-6, "AdamW learning rate of the fake score", low=0)
    warmup: int = flag(100, "updates of linear learning-rate warm-up, of each network", low=0)
    weight_decay: float = flag(1e-4, "AdamW weight decay", low=0)
    clip: float = flag(1.0, "gradient norm limit", low=1e-9)
    ema_decay: float = flag(0.999, "student EMA, warmed up as min((1 + n) / (10 + n), ema-decay)", low=0)
    fake_pull: float = flag(0.999, "beta of the fake score's pull to the student; 1 switches it off", low=0)
    anchor_aware_fake: bool = flag(False, "NOT IN THE PAPER: tell the fake score the time its input comes from")
    anchor_lr: float = flag(1e-3, "NOT IN THE PAPER: learning rate of the layer that tells it", low=0)

# All the randomness of one iteration, so that the iteration itself is a plain function. schedule: (N,) times, one for
# all samples; index: (B,) anchor indices, shared by the fake score and all losses; both on the CPU. t_off: (B,) t',
# where L_CDM looks; tau: (B,) re-noising times of "ca", "dm", "cdm", "fake"; noise: (B, ...) normal: "start" is x at
# t = 1, the others re-noise; calls: least number of student calls in backward simulation.
Draw = namedtuple("Draw", "schedule index t_off tau noise calls")

def generator(*key, device="cpu"):
    """A torch.Generator that is a function of its key, such as (seed, iteration): resuming needs no saved state."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))

def draw_iteration(cfg, seed, k, batch, shape, shift=1.0, rows=slice(None), device="cpu", ranks=1):
    """The Draw of iteration k, a function of (seed, k): rows `rows` of a global batch of samples of the given shape."""
    cpu, gen = generator(seed, k, "schedule"), generator(seed, k, "noise", device=device)
    schedule = uniform_times(4, shift)
    if cfg.schedule == "dynamic":
        schedule = sample_schedule(cfg.max_schedule_steps, cfg.time_low, cfg.time_high, shift, cfg.stratified, cpu)
    everyone = torch.randint(len(schedule), (batch,), generator=cpu)
    index, u = everyone[rows], 1 - torch.rand(5, batch, generator=gen, device=device)[:, rows]  # u on (0, 1]
    t_i = schedule[index].to(device, non_blocking=True)
    u[1] *= t_i  # L_CA alone: tau ~ U(0, t_i), bounded by the anchor's own time
    u = u.clamp(cfg.tau_min, cfg.tau_max)
    names = ("start", "ca", "dm", "cdm", "fake") + (("off",) if cfg.cdm_point == "renoise" else ())
    noise = {name: torch.randn(batch, *shape, generator=gen, device=device)[rows].clone() for name in names}
    t_off = t_i if cfg.cdm_point == "anchor" else u[0]
    calls = int(everyone.max()) + 1 if ranks > 1 else 0  # ranks must call equally often, see backward_simulation
    return Draw(schedule, index, t_off, dict(zip(names[1:5], u[1:])), noise, calls)

class Learner:
    """A network in training. role: its model; groups: [(parameters by name, learning rate)]. AdamW, warm-up, clip."""
    def __init__(self, role, groups, cfg):
        self.role, self.cfg, self.updates = role, cfg, 0
        self.params = {name: p for params, _ in groups for name, p in params.items()}
        groups = [dict(params=list(params.values()), base_lr=lr) for params, lr in groups]
        self.optimizer = torch.optim.AdamW(groups, 0.0, (0.9, 0.999), 1e-8, cfg.weight_decay, fused=True)
        for p in self.params.values():  # as AdamW would at its first step, so that a resumed run can fill it
            self.optimizer.state[p] = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p]["step"] = torch.zeros((), device=p.device)
    def step(self):
        """Clips, updates and frees the gradients. Returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), self.cfg.clip)
        self.updates += 1
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * min(1.0, self.updates / max(self.cfg.warmup, 1))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # student and fake score never hold gradients at the same time
        return norm

@torch.no_grad()
def average_into(params, others, decay):
    """p <- decay p + (1 - decay) other, in place, for the parameters that `others` names."""
    for name, other in others.items():
        params[name].lerp_(other, 1 - decay)

def cdm_iteration(k, batches, teacher, student, fake_score, ema, cfg):
    """Iteration k = 1, 2, ...: simulate, update the fake score, and every R-th time the student and its EMA too.

    batches: micro-batches [(cond, uncond, Draw)] whose gradients accumulate; teacher: a model; student, fake_score:
    Learners; ema: the student's averaged parameters by name. Returns figures for the log, scalar tensors by name.
    """
    stats, share = {}, 1 / len(batches)
    def record(name, value):
        stats[name] = stats.get(name, 0) + share * value.detach()
        return value
    def student_estimate(x_t, t, cond):  # D_theta
        return clean_estimate(x_t, t, student.role(x_t, t, cond))
    def fake_from(t):  # the fake score; not in the paper: told the time t from which the clean estimate came
        return partial(fake_score.role, anchor_t=t) if cfg.anchor_aware_fake else fake_score.role

    # Backward simulation (sec. 3.2): each sample to its anchor on the student's own trajectory, without gradient.
    points = []
    for cond, _, d in batches:
        anchor = backward_simulation(student.role, d.noise["start"], d.schedule, d.index, cond, d.calls)
        x0 = clean_estimate(*anchor)  # Eq. 1 with the recorded velocity: no further evaluation
        # Off-trajectory point (sec. 3.3, Eq. 7), along the recorded velocity to a time t' that ignores the schedule.
        x_off = euler_step(anchor.x_t, anchor.t, d.t_off, anchor.v)
        if cfg.cdm_point == "renoise":  # the paper's ablation of Eq. 7
            x_off = add_noise(x0, d.t_off, d.noise["off"])
        points.append((anchor, x0, x_off))

    # Fake score, every iteration: flow matching on the student's clean estimates.
    for (cond, _, d), (anchor, x0, x_off) in zip(batches, points):
        t_from, half = anchor.t.clone(), slice(k % 2, None, 2)
        if cfg.anchor_aware_fake and cfg.cdm_weight and len(x0[half]):  # not in the paper: L_CDM will ask about t' too
            with torch.no_grad():
                x0[half], t_from[half] = student_estimate(x_off[half], d.t_off[half], _rows(cond, half)), d.t_off[half]
        loss = fake_score_loss(fake_from(t_from), x0, cond, d.tau["fake"], d.noise["fake"])
        (share * record("loss_fake", loss)).backward()
    stats["grad_norm_fake"] = fake_score.step()
    average_into(fake_score.params, student.params, cfg.fake_pull)  # phi <- beta phi + (1 - beta) theta
    if k % cfg.student_every:
        return stats

    # Student, every R-th iteration: L_CA + L_DM at the anchor, from one student evaluation; L_CDM off the trajectory.
    for (cond, uncond, d), (anchor, _, x_off) in zip(batches, points):
        if cfg.ca_weight or cfg.dm_weight:
            x0_hat, loss, ca, dm = student_estimate(anchor.x_t, anchor.t, cond), 0, {}, {}
            if cfg.ca_weight:
                ca_args = teacher, cond, uncond, d.tau["ca"], d.noise["ca"], cfg.guidance, ca
                loss += cfg.ca_weight * record("loss_ca", ca_loss(x0_hat, *ca_args))
                record("w_ca", ca["w"])
            if cfg.dm_weight:
                dm_args = teacher, fake_from(anchor.t), cond, d.tau["dm"], d.noise["dm"], dm
                loss += cfg.dm_weight * record("loss_dm", dm_loss(x0_hat, *dm_args))
                record("w_dm", dm["w"])
            (share * loss).backward()  # now, so that only one graph is in memory at a time
            if ca and dm:
                record("cos_ca_dm", F.cosine_similarity(ca["step"].flatten(1), dm["step"].flatten(1)).mean())
        if cfg.cdm_weight:
            x0_hat, cdm = student_estimate(x_off, d.t_off, cond), {}
            cdm_args = teacher, fake_from(d.t_off), cond, d.tau["cdm"], d.noise["cdm"], cdm
            loss = cfg.cdm_weight * record("loss_cdm", dm_loss(x0_hat, *cdm_args))
            record("w_cdm", cdm["w"])
            (share * loss).backward()
    n = student.updates
    stats["grad_norm_student"] = student.step()
    average_into(ema, student.params, min((1 + n) / (10 + n), cfg.ema_decay))  # theta_bar
    return stats

# ======================================================================================================================
# 2. SD3: loading, prompts to conditions, a transformer as a model, images. What diffusers does well is left to it.

# The released LoRA targets: attention projections and feed-forward layers of the image and of the text stream.
LORA_TARGETS = [f"attn.{n}" for n in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()]
LORA_TARGETS += ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]

class Mistake(Exception):
    """Something the user can mend, in one sentence: what is wrong and what to do. main() prints it and exits with 2."""

def require(condition, sentence):
    if not condition:
        raise Mistake(sentence)

def resolve_teacher(name):
    """A folder or hub id -> one that `StableDiffusion3Pipeline.from_pretrained` loads. Raises Mistake if it is none."""
    index = Path(name) / "model_index.json"
    if not os.path.isdir(name):
        from huggingface_hub import hf_hub_download
        name += "-diffusers" * (name == "stabilityai/stable-diffusion-3-medium")  # has single-file checkpoints only
        reasons = {"GatedRepoError": "is gated", "RepositoryNotFoundError": "is unknown, or private",
                   "HFValidationError": "is neither a folder nor a hub id",
                   "RemoteEntryNotFoundError": "is not in diffusers layout: it has no model_index.json"}
        try:
            index = hf_hub_download(name, "model_index.json")
        except Exception as e:
            reason = reasons.get(type(e).__name__, "is no folder here and cannot be reached on the hub or in its cache")
            raise Mistake(f"--teacher {name} {reason}: check it, accept its licence at https://huggingface.co/{name} "
                          "and log in with `hf auth login`, or give a pipeline folder.")
    try:
        kind = json.loads(Path(index).read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = "nothing"
    require(kind == "StableDiffusion3Pipeline",
            f"--teacher {name} is no SD3 pipeline: its model_index.json names {kind}; give a StableDiffusion3Pipeline.")
    return name

class AnchorTime(torch.nn.Module):
    """NOT IN THE PAPER, --anchor-aware-fake: sin/cos features of a time, (B,) -> (B, width), zero at first."""
    def __init__(self, width, features=64):
        super().__init__()
        self.register_buffer("frequency", torch.logspace(0, 2, features), persistent=False)
        self.linear = torch.nn.Linear(2 * features, width)
        torch.nn.init.zeros_(self.linear.weight), torch.nn.init.zeros_(self.linear.bias)
    def forward(self, t):
        angle = t[:, None] * self.frequency
        return self.linear(torch.cat([angle.sin(), angle.cos()], 1))

class Role:
    """An SD3 transformer as a model(x_t, t, cond) -> v: x_t, v (B, C, h, w) float32; cond: text and pooled embeddings.

    adapter: of the one transformer that LoRA's roles share; "" is the bare base, None no LoRA. anchor_time: AnchorTime.
    """
    def __init__(self, transformer, timesteps, adapter=None, anchor_time=None):
        self.transformer, self.timesteps, self.adapter, self.anchor_time = transformer, timesteps, adapter, anchor_time
    def activate(self, *_):
        net = self.transformer
        if self.adapter is None or getattr(net, "active_role", None) == self.adapter:
            return
        net.active_role = self.adapter
        net.set_adapter(self.adapter or "student"), (net.enable_adapters if self.adapter else net.disable_adapters)()
        for name, p in net.named_parameters():
            p.requires_grad_("lora_" in name)  # set_adapter froze the other adapter, whose backward may be yet to come
    def __call__(self, x_t, t, cond, anchor_t=None):
        self.activate()
        embeds, pooled = cond
        # No autocast cache: a forward pass uses each weight once, and the cache would keep a bf16 copy of them all.
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=x_t.device.type == "cuda", cache_enabled=False):
            if anchor_t is not None:
                pooled = pooled + self.anchor_time(anchor_t).to(pooled.dtype)
            v = self.transformer(hidden_states=x_t, timestep=self.timesteps * t, encoder_hidden_states=embeds,
                                 pooled_projections=pooled, return_dict=False)[0].float()
        if v.requires_grad and self.adapter:
            v.register_hook(self.activate)  # backward, and recomputation in it, run under the forward pass's adapter
        return v

class SD3:
    """A frozen StableDiffusion3Pipeline as the algorithm needs it: conditions, latent shape, shift, images."""
    def __init__(self, args, device, student=None):  # student: a folder that replaces the transformer, for --generate
        loud = "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"  # about packages that nobody misses
        os.environ.update(dict.fromkeys(loud, "error") | os.environ)
        import diffusers, transformers
        diffusers.utils.logging.disable_progress_bar(), transformers.utils.logging.disable_progress_bar()
        self.device, self.dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        self.name = resolve_teacher(args.teacher)
        lora = student and Path(student, "pytorch_lora_weights.safetensors").exists()
        where, subfolder = (student, None) if student and not lora else (self.name, "transformer")
        dtype = self.dtype if student or args.lora_rank else torch.float32  # full fine-tuning starts from float32
        without = dict(text_encoder_3=None) if args.no_t5 else {}  # its tokenizer stays, for the sequence length
        try:
            net = diffusers.SD3Transformer2DModel.from_pretrained(where, subfolder=subfolder, dtype=dtype)
            self.pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
                self.name, transformer=net.to(device), dtype=self.dtype, **without)
            self.pipe.load_lora_weights(student) if lora else None
        except (OSError, ValueError, KeyError, RuntimeError) as e:
            raise Mistake(f"{where} cannot be loaded as an SD3 model: {' '.join(str(e).split())[:300]}")
        self.encoders = [m for name, m in self.pipe.components.items() if m and name.startswith("text_encoder")]
        for m in (*self.encoders, self.pipe.vae, net):
            m.requires_grad_(False).eval().to("cpu" if args.offload_text_encoders and m in self.encoders else device)
        scale, config, scheduler = self.pipe.vae_scale_factor, net.config, self.pipe.scheduler.config
        self.transformer, self.shift, self.timesteps = net, scheduler.shift, scheduler.num_train_timesteps
        self.resolution, patch = args.resolution or config.sample_size * scale, config.patch_size * scale
        largest = config.pos_embed_max_size * patch
        require(self.resolution % patch == 0 and self.resolution <= largest,
                f"--resolution {self.resolution} does not fit {self.name}: give a multiple of {patch} up to {largest}.")
        self.shape = (config.in_channels, self.resolution // scale, self.resolution // scale)
        self.tokens = min(256, getattr(self.pipe.tokenizer_3, "model_max_length", 256))
        self.empty = self.encode([""])
    @torch.no_grad()
    def encode(self, prompts):
        """Prompts -> cond: text embeddings (B, tokens, width), pooled embeddings (B, pooled)."""
        weights = [(p, p.data) for module in self.encoders for p in module.parameters()]
        for module in self.encoders:
            module.to(self.device)
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, None, self.device, do_classifier_free_guidance=False, max_sequence_length=self.tokens)
        for p, data in weights:
            p.data = data  # if they rest on the CPU, back to the copies there: nothing is sent
        return embeds, pooled
    def uncond(self, n):
        """The empty prompt's cond for n samples. It is encoded once."""
        return tuple(c.expand(n, *c.shape[1:]) for c in self.empty)
    def guided(self, model, scale):
        """The model under classifier-free guidance, v(empty) + scale [v(c) - v(empty)]. Two evaluations."""
        def guided_model(x_t, t, cond):
            v = model(x_t, t, self.uncond(len(x_t)))
            return v + scale * (model(x_t, t, cond) - v)
        return guided_model
    @torch.no_grad()
    def images(self, model, noise, times, prompts):
        """One PIL image a prompt, one at a time to bound the memory. noise: (1, C, h, w) each, on the CPU."""
        vae, images, cond = self.pipe.vae, [], self.encode(prompts)
        for i, z in enumerate(noise):
            x0 = sample(model, z.to(self.device), times, _rows(cond, slice(i, i + 1)))
            x = vae.decode((x0 / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)).sample.float()
            images += self.pipe.image_processor.postprocess(x, output_type="pil")
        return images

# ======================================================================================================================
# 3. Running: settings, prompts, files, the loop, the command line.

@dataclass
class Settings(CDM):
    """Everything else that the command line sets."""
    teacher: str = flag("stabilityai/stable-diffusion-3-medium", "hub id or folder of a StableDiffusion3Pipeline")
    prompts: str = flag(None, "UTF-8 text file, one prompt a line; default: composed from built-in lists")
    output_dir: str = flag(None, "everything is written here; default: runs/cdm, with --generate runs/images")
    iterations: int = flag(4000, "outer iterations, that is fake-score updates", low=1)
    batch_size: int = flag(None, "samples per update over all GPUs; default: 16 on each, as released", low=1)
    micro_batch_size: int = flag(None, "samples per forward pass, the rest accumulates; default: <= 4 on a GPU", low=1)
    resolution: int = flag(None, "pixels, square; default: the teacher's own", low=1)
    seed: int = flag(0, "seed of the run, or of --generate", low=0)
    resume: bool = flag(False, "continue the run in --output-dir; bit for bit on CPU")
    device: str = flag("auto", "where to run", choices=("auto", "cuda", "cpu"))
    lora_rank: int = flag(0, "train LoRA of this rank (released: 64), alpha twice that; 0: full fine-tuning", low=0)
    no_t5: bool = flag(False, "leave out the T5 text encoder, 9.5 GB in bf16; then --generate without it too")
    offload_text_encoders: bool = flag(False, "text encoders wait on the CPU, and go to the GPU once in each iteration")
    gradient_checkpointing: bool = flag(True, "recompute activations in backward")
    compile: bool = flag(False, "torch.compile the transformer's repeated block, once for each kind of use")
    save_every: int = flag(500, "iterations between checkpoints, of which the newest two are kept", low=1)
    sample_every: int = flag(500, "iterations between sample grids; 0: none", low=0)
    sample_count: int = flag(8, "images in a row of the sample grid", low=1)
    generate: list = flag(None, "write an image for each prompt instead of training", nargs="+", metavar="PROMPT")
    student: str = flag(None, "--generate: the folder of the distilled student")
    sample_steps: int = flag(4, "--generate: 1 to 50 steps on the grid 1, 1 - 1/steps, ... (shifted)", low=1)
    times: str = flag(None, "--generate: explicit times instead, as they are, such as 1,0.9,0.75,0.5")

def parse_args(argv=None):
    """Settings from the command line, a flag for each field. Raises Mistake for what cannot work; writes nothing."""
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: require(False, f"{message}; --help lists the flags.")
    for f in fields(Settings):
        switch = argparse.BooleanOptionalAction if f.default else "store_true"
        kind = {"action": switch} if f.type == "bool" else {"type": {"int": int, "float": float}.get(f.type, str)}
        parser.add_argument(f"--{f.name.replace('_', '-')}", **kind, **f.metadata["argparse"])
    args = Settings(**vars(parser.parse_args(argv)))
    args.output_dir = args.output_dir or ("runs/images" if args.generate else "runs/cdm")
    for f in fields(Settings):
        low, value = f.metadata["low"], getattr(args, f.name)
        require(low is None or value is None or low <= value < math.inf,
                f"--{f.name.replace('_', '-')} is {value}: give {low} or more.")
    require(args.ca_weight or args.dm_weight or args.cdm_weight, "--ca-weight, --dm-weight, --cdm-weight: all 0.")
    require(args.ema_decay <= 1 and args.fake_pull <= 1, "--ema-decay and --fake-pull must be from 0 to 1.")
    require(0 < args.time_low < args.time_high < 1 and 0 < args.tau_min < args.tau_max < 1,
            "--time-low must be below --time-high, and --tau-min below --tau-max, all between 0 and 1.")
    require(args.generate or not (args.student or args.times), "--student and --times go with --generate PROMPT.")
    require(args.sample_steps <= 50, f"--sample-steps is {args.sample_steps}: give 1 to 50.")
    require(args.device != "cuda" or torch.cuda.is_available(), "there is no CUDA device: use --device cpu.")
    if args.times:
        times = [float(t) if re.fullmatch(r"\d*\.?\d+", t.strip()) else 0 for t in args.times.split(",")]
        require(times[:1] == [1] and all(0 < s < t for t, s in zip(times, times[1:])),
                f"--times {args.times}: give times that fall from 1, pure noise, and stay above 0: 1,0.9,0.75,0.5.")
        args.times = times
    return args

def read_prompts(path=None):
    """The prompts of a UTF-8 file, one a line, without blanks and duplicates. Without a file: 2,268 composed ones."""
    if path is None:
        lists = ("a photograph/an oil painting/a watercolor/a pencil drawing/a 3D render/a woodcut",
                 "a red fox/a fisherman/a glass teapot/a barn owl/a bowl of ramen/an astronaut/a robot/a dancer/a lute",
                 "in a forest/in a greenhouse/on a rocky coast/in a city at night/by a lake/in a cave/on a snowy ridge",
                 "soft morning light/golden hour/dramatic side lighting/neon glow/overcast daylight/candlelight")
        prompts = ["{} of {} {}, {}".format(*w) for w in itertools.product(*(x.split("/") for x in lists))]
        return [prompts[i] for i in torch.randperm(len(prompts), generator=generator("prompts"))]
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise Mistake(f"--prompts {path} cannot be read as UTF-8 text ({e}): give a text file, one prompt a line.")
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    require(prompts, f"--prompts {path} holds no prompt: write one a line.")
    return prompts

def preflight(args, free, world=1):
    """Memory arithmetic, from config.json files alone, against a GPU's free GiB before any weight is loaded.
    Returns a line to print. Raises Mistake with the flags that would fit, or the size of card that even they need."""
    from diffusers import SD3Transformer2DModel as Transformer
    from transformers import AutoConfig, AutoModelForTextEncoding, PretrainedConfig
    name, read = resolve_teacher(args.teacher), PretrainedConfig.get_config_dict  # {} for an encoder that it lacks
    configs = [read(name, subfolder=f"text_encoder{n}")[0] for n in ("", "_2", "_3")[:2 if args.no_t5 else 3]]
    with torch.device("meta"):
        net = Transformer.from_config(Transformer.load_config(name, subfolder="transformer"))
        text = [AutoModelForTextEncoding.from_config(AutoConfig.for_model(**c)) for c in configs if c]
    rank_1 = sum(m.in_features + m.out_features for n, m in net.named_modules() if n.endswith(tuple(LORA_TARGETS)))
    side = (args.resolution or 8 * net.config.sample_size) // (8 * net.config.patch_size)
    # Bytes a token and channel: what a block keeps for backward, and the one in work (tests/benchmark.py --full-size).
    blocks = net.config.num_layers * (2 if args.gradient_checkpointing else 55) + 90
    def gib(micro, rank, offload):
        n, encoders = net.num_parameters(), 2 * sum(m.num_parameters() for m in text)
        trained = (rank * rank_1 or n) / world
        # A role's gradient, activations; without checkpointing backward also keeps autocast's bf16 weights.
        update = (4 if args.gradient_checkpointing else 6) * trained + micro * (side**2 + 333) * net.inner_dim * blocks
        held = 2 * n / world + 28 * trained  # the teacher; student and fake score with AdamW; EMA. 2 GiB for all else.
        while_sharding = ((2 if rank else 10) * n + encoders * (not offload)) * (world > 1)
        return 2 + max(held + (max if offload else sum)((encoders, update)), while_sharding) / 2**30
    micro, rank, _ = of = args.micro_batch_size, args.lora_rank, args.offload_text_encoders
    have = f"training needs about {gib(*of):.0f} GiB of GPU memory, {free:.0f} are free"
    one, offload, lora, t5 = " --micro-batch-size 1", " --offload-text-encoders", " --lora-rank 64", ", or try --no-t5"
    for flags, *levers in (("", *of), (offload, micro, rank, True), (offload + one, 1, rank, True),
                           (offload + lora, micro, 64, True), (offload + lora + one, 1, 64, True)):
        if gib(*levers) <= free:
            require(not flags, f"{have}: add{flags}, which needs about {gib(*levers):.0f}.")
            return have
    raise Mistake(f"{have}, and even{flags} needs {gib(*levers):.0f}: take such a card{'' if args.no_t5 else t5}.")

def shard(module, device):
    """FSDP2: shards a network over all ranks, in place, block by block; on CUDA bf16 compute, float32 reduction."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    half = torch.bfloat16 if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)  # a bf16 timestep is off by up to 2
    for part in (*getattr(module, "transformer_blocks", ()), module):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)  # the root too: see swap_ema

def full(x):
    """A sharded tensor gathered from all ranks; any other as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x

@contextlib.contextmanager
def replacing(path, rank=0, wait=lambda: None):
    """A folder that appears at `path` whole or not at all: filled under another name, flushed to disk, renamed."""
    tmp = path.with_suffix(".tmp")
    for old in path.parent.glob("*.tmp") if rank == 0 else ():  # of a save that was killed
        shutil.rmtree(old, ignore_errors=True)
    wait()  # all ranks fill it
    tmp.mkdir(parents=True, exist_ok=True)
    yield tmp
    wait()
    if rank == 0:
        os.sync(), shutil.rmtree(path, ignore_errors=True), tmp.rename(path)

def draw_grid(rows, path):
    """Writes one PNG from rows of (label, PIL images), each image 96 to 512 pixels a side."""
    from PIL import Image, ImageDraw
    side = min(max(rows[0][1][0].width, 96), 512)
    canvas = Image.new("RGB", ((side + 4) * len(rows[0][1]) - 4, (side + 20) * len(rows)), "white")
    for y, (label, images) in enumerate(rows):
        ImageDraw.Draw(canvas).text((2, y * (side + 20) + 2), label, fill="black", font_size=13)
        for x, image in enumerate(images):  # BOX: enlarged pixels stay squares
            canvas.paste(image.resize((side, side), Image.Resampling.BOX), (x * (side + 4), y * (side + 20) + 20))
    canvas.save(path)

class Run:
    """One training run: the three roles, the EMA, the prompts; log, samples, checkpoints, export in --output-dir."""
    def __init__(self, args, device, rank=0, world=1):
        self.args, self.device, self.rank, self.world = args, device, rank, world
        self.k, self.stop, self.reference, self.folder = 0, False, [], Path(args.output_dir)
        self.log = self.folder / "log.jsonl"
        require(args.resume or not self.folder.exists() or self.folder.is_dir() and not any(self.folder.iterdir()),
                f"--output-dir {self.folder} is in use, or a file: add --resume to continue a run, or choose another.")
        require(self.log.exists() or not args.resume, f"--resume: there is no run in {self.folder}; start it without.")
        try:
            args.compile and torch.compile(torch.sin)(torch.zeros(2, device=device))
        except Exception as e:
            raise Mistake(f"--compile cannot work here, leave it out or mend this: {' '.join(str(e).split())[:200]}")
        n = args.batch_size = args.batch_size or 16 * world
        self.batch, least = n // world, world * (args.micro_batch_size or 1)
        require(n % least == 0, f"--batch-size {n} must be a multiple of {least}: processes times --micro-batch-size.")
        args.micro_batch_size = args.micro_batch_size or math.gcd(self.batch, 4 * (device.type == "cuda"))
        if device.type == "cuda" and rank == 0:
            print("cdm.py:", preflight(args, torch.cuda.mem_get_info(device)[0] / 2**30, world))
        warnings.filterwarnings("ignore", r"Already found a `peft_config`|torch.distributed is disabled|barrier\(\)")
        self.prompts, self.sd3 = read_prompts(args.prompts), SD3(args, device)
        args.resolution, args.prompts = self.sd3.resolution, args.prompts or "built-in lists"
        self.build()
        self.resume() if args.resume else None
    def build(self):
        """Teacher, student and fake score as roles, the latter two as Learners; the student's EMA."""
        args, net, trained, r = self.args, self.sd3.transformer, ("student", "fake_score"), self.args.lora_rank
        nets = dict.fromkeys(("teacher", *trained), net)
        if r:  # three roles on one frozen base
            from peft import LoraConfig
            torch.manual_seed(args.seed)  # the one draw from the global generator
            for name in trained:
                net.add_adapter(LoraConfig(r=r, lora_alpha=2 * r, target_modules=LORA_TARGETS), name)
            for p in (p for name, p in net.named_parameters() if "lora_" in name):
                p.data = p.data.float()
        else:  # three networks, of which the frozen one needs no float32, but the same position embedding
            nets |= {"teacher": copy.deepcopy(net).to(self.sd3.dtype), "fake_score": copy.deepcopy(net)}
            nets["teacher"].pos_embed.pos_embed = net.pos_embed.pos_embed.clone()
            nets["student"].requires_grad_(True), nets["fake_score"].requires_grad_(True)
        self.sd3.pipe.transformer = nets["teacher"]
        anchor_time = AnchorTime(net.config.pooled_projection_dim).to(self.device) if args.anchor_aware_fake else None
        if args.compile:  # the repeated block alone, which takes less time than the whole network
            torch._dynamo.config.recompile_limit = 64  # roles, with and without gradient, shrinking batches
            for block in (b for module in dict.fromkeys(nets.values()) for b in module.transformer_blocks):
                block.compile()
        for module in filter(None, dict.fromkeys((*nets.values(), anchor_time))) if self.world > 1 else ():
            shard(module, self.device)
        roles, params = {}, {}
        for name, module in nets.items():
            module.enable_gradient_checkpointing() if args.gradient_checkpointing and name in trained else None
            adapter = None if not r else name if name in trained else ""
            roles[name] = Role(module, self.sd3.timesteps, adapter, anchor_time if name == "fake_score" else None)
            params[name] = {n.replace(f".{name}.", "."): p for n, p in module.named_parameters()
                            if not r or f".{name}." in n}
        told = {f"anchor_time.{n}": p for n, p in anchor_time.named_parameters()} if anchor_time else {}
        groups = [(params["fake_score"], args.fake_lr)] + [(told, args.anchor_lr)] * bool(told)
        self.teacher, self.fake_score = roles["teacher"], Learner(roles["fake_score"], groups, args)
        self.student = Learner(roles["student"], [(params["student"], args.student_lr)], args)
        self.ema = {n: p.detach().clone() for n, p in self.student.params.items()}
    def micro_batches(self, k):
        """Iteration k's (cond, uncond, Draw) for this rank's rows of the global batch, in micro-batches."""
        args, sd3, n, first = self.args, self.sd3, self.args.micro_batch_size, self.rank * self.batch
        chosen = torch.randint(len(self.prompts), (args.batch_size,), generator=generator(args.seed, k, "prompts"))
        cond = sd3.encode([self.prompts[j] for j in chosen[first:first + self.batch]])
        for i in range(0, self.batch, n):
            rows = slice(first + i, first + i + n)
            of = args.seed, k, args.batch_size, sd3.shape, sd3.shift, rows, self.device, self.world
            yield _rows(cond, slice(i, i + n)), sd3.uncond(n), draw_iteration(args, *of)
    def train(self):
        """The loop: iterate, log, sample, save; at the end, or after a signal, export."""
        from tqdm import tqdm
        args = self.args
        if self.rank == 0:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True), self.log.touch()
            lines = self.log.read_text().splitlines(True)  # resumed: those after the checkpoint will come again
            lines = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= self.k]
            self.log.write_text("".join(lines))
            print(f"cdm.py: {self.sd3.name}, {args.resolution} pixels, shift {self.sd3.shift:g}; {len(self.prompts)} "
                  f"prompts from {args.prompts}; {args.batch_size} an update, on {self.world} x {self.device.type}")
        bar = tqdm(range(self.k + 1, args.iterations + 1), initial=self.k, total=args.iterations, disable=self.rank > 0)
        for k in bar:
            begun, batches = time.perf_counter(), list(self.micro_batches(k))
            stats = cdm_iteration(k, batches, self.teacher, self.student, self.fake_score, self.ema, args)
            stats["stop"] = torch.tensor(float(self.stop))
            values = torch.stack([full(x).float().to(self.device) for x in stats.values()])
            torch.distributed.all_reduce(values) if self.world > 1 else None
            values = dict(zip(stats, (values / self.world).tolist()))  # here alone the loop waits for results
            stop, bad = values.pop("stop") > 0, ", ".join(name for name, x in values.items() if not math.isfinite(x))
            require(not bad, f"{bad} not finite at iteration {k}; the last checkpoint stays: try lower learning rates.")
            self.k, seconds = k, time.perf_counter() - begun
            bar.set_postfix({n[5:]: f"{x:.3g}" for n, x in values.items() if n.startswith("loss_")})
            if k % args.student_every == 0 and self.rank == 0:
                peak = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                values |= {"N": len(batches[0][2].schedule), "seconds": seconds, "peak_gib": peak / 2**30}
                with open(self.log, "a") as f:
                    f.write(json.dumps({"iteration": k} | values) + "\n")
            last = stop or k == args.iterations
            if k % args.save_every == 0 or last:
                self.save()  # before the samples: after a signal there may be little time
            if args.sample_every and (k % args.sample_every == 0 or last):
                self.draw_samples()
            if stop:
                break
        self.export()
    @torch.no_grad()
    def swap_ema(self):
        """Exchanges the student's weights and their average, in place; a sharded network must hold no gathered copy."""
        for name, p in self.student.params.items():
            average = self.ema[name].clone()
            self.ema[name].copy_(p), p.copy_(average)
    def draw_samples(self):
        """samples/step_NNNNNN.png: the EMA student's images under the teacher's, for fixed prompts and noise."""
        args, sd3, few, n = self.args, self.sd3, uniform_times(4, self.sd3.shift), range(self.args.sample_count)
        prompts = [self.prompts[i % len(self.prompts)] for i in n]
        noise = [torch.randn(1, *sd3.shape, generator=generator(args.seed, "sample", i)) for i in n]
        if not self.reference:  # drawn once
            sd3.pipe.scheduler.set_timesteps(28)
            many, scale = sd3.pipe.scheduler.sigmas[:-1].cpu(), 1 + args.guidance * (args.ca_weight > 0)
            guided = sd3.guided(self.teacher, scale)
            self.reference = [(f"teacher, 28 steps, guidance {scale:g}", sd3.images(guided, noise, many, prompts)),
                              ("teacher, 4 steps, no guidance", sd3.images(self.teacher, noise, few, prompts))]
        self.swap_ema()
        student = f"student, 4 steps, iteration {self.k}", sd3.images(self.student.role, noise, few, prompts)
        self.swap_ema()
        path = self.folder / "samples" / f"step_{self.k:06d}.png"
        draw_grid([*self.reference, student], path) if self.rank == 0 else None
    def state(self):
        """Every tensor that training changes, by file and name. All else is a function of the settings and k."""
        files = {"ema": self.ema}
        for file, learner in (("student", self.student), ("fake_score", self.fake_score)):
            files[file], state = learner.params, learner.optimizer.state
            for key in ("exp_avg", "exp_avg_sq", "step"):  # AdamW's; a file each, for saving holds one in memory twice
                files[f"{file}_{key}"] = {name: state[p][key] for name, p in learner.params.items()}
        return files
    def identity(self):
        """What must be the same in a run and its continuation."""
        names = [f.name for f in fields(CDM)] + ["batch_size", "resolution", "seed", "lora_rank", "no_t5"]
        prompts = f"{len(self.prompts)} prompts of checksum {zlib.crc32(chr(10).join(self.prompts).encode()):08x}"
        same = {"prompts": prompts} | {n: getattr(self.args, n) for n in names}
        return same | {"teacher": os.path.realpath(self.sd3.name) if os.path.isdir(self.sd3.name) else self.sd3.name}
    def save(self):
        """checkpoint_NNNNNN: safetensors by torch's distributed checkpoint, each rank its shards, so that any number of
        processes can go on; state.json. A kill at any moment leaves a whole one; two are kept."""
        wait = torch.distributed.barrier if self.world > 1 else lambda: None
        with replacing(self.folder / f"checkpoint_{self.k:06d}", self.rank, wait) as folder:
            for file, tensors in self.state().items():
                dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(folder / file, save_distributed=True))
            if not self.rank:
                state = dict(iteration=self.k, settings=self.identity())
                (folder / "state.json").write_text(json.dumps(state, indent=1))
        for old in sorted(self.folder.glob("checkpoint_??????"))[:-2] if not self.rank else ():
            shutil.rmtree(old)
    def resume(self):
        """Loads the newest checkpoint, if there is one yet. Raises Mistake if the run was made with other settings."""
        for newest in sorted(self.folder.glob("checkpoint_??????"))[-1:]:
            was = json.loads((newest / "state.json").read_text())
            for name, now in self.identity().items():
                old = was["settings"].get(name)
                require(now == old, f"--resume: --{name.replace('_', '-')} is {now}, but the run was made with {old}.")
            self.k = was["iteration"]
            require(self.k <= self.args.iterations, f"--resume: the run is at {self.k}: give more --iterations.")
            self.fake_score.updates, self.student.updates = self.k, self.k // self.args.student_every
            for file, tensors in self.state().items():
                dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(newest / file))
    def export(self):
        """student/: the EMA student as diffusers loads it, a transformer folder or a LoRA file, and a README."""
        net = self.student.role.transformer
        weights = {n: y.cpu() for n, x in self.ema.items() for y in [full(x)] if self.rank == 0}
        if self.rank:
            return
        with replacing(self.folder / "student") as folder:
            if self.args.lora_rank:  # with its settings, or it would load with alpha = rank
                lora = {k: sorted(x) if type(x) is set else x for k, x in net.peft_config["student"].to_dict().items()}
                type(self.sd3.pipe).save_lora_weights(folder, weights, transformer_lora_adapter_metadata=lora)
                without, load = "", f'pipe.load_lora_weights("{self.folder}/student")'
            else:
                model = type(net).from_config(net.config)
                model.load_state_dict(weights | dict(net.named_buffers()))
                model.save_pretrained(folder)
                load = f'SD3Transformer2DModel.from_pretrained("{self.folder}/student", dtype=torch.bfloat16)'
                without, load = "transformer=None, ", f"pipe.transformer = {load}"
            without += "text_encoder_3=None, " if self.args.no_t5 else ""
            (folder / "README.md").write_text(f"""# A 4-step student of {self.sd3.name}

Distilled with CDM (Continuous-Time Distribution Matching, arXiv:2605.06376): {self.student.updates} updates, EMA.

```python
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained("{self.sd3.name}", {without}dtype=torch.bfloat16)
{load}
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipe({self.prompts[0]!r}, num_inference_steps=4, sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=1.0,
             height={self.sd3.resolution}, width={self.sd3.resolution}, max_sequence_length={self.sd3.tokens}).images[0]
image.save("image.png")
```
""", encoding="utf-8")
        print(f"cdm.py: {self.folder}/student is the student of iteration {self.k}; --resume goes on.")

def generate(args, device):
    """--generate: writes one PNG for each prompt into --output-dir and prints its name."""
    require(os.path.isdir(args.student or ""), f"--generate: --student {args.student} is no folder: give .../student.")
    sd3 = SD3(args, device, args.student)
    times = torch.tensor(args.times) if args.times else uniform_times(args.sample_steps, sd3.shift)
    noise = torch.randn(1, *sd3.shape, generator=torch.Generator().manual_seed(args.seed))
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(args.generate):
        name, steps = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:80], args.times or [args.sample_steps]
        path = Path(args.output_dir, f"{i:02d}_{name}_seed{args.seed}_steps{'-'.join(map(str, steps))}.png")
        sd3.images(Role(sd3.transformer, sd3.timesteps), [noise], times, [prompt])[0].save(path)
        print(path)

def main(argv=None):
    """Returns the exit code: 0, or 2 after one sentence about a mistake."""
    world, rank, local = (int(os.environ.get(name, 0)) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    try:
        args = parse_args(argv)
        cuda = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if args.generate:
            return generate(args, device) or 0
        if world > 1:
            torch.cuda.set_device(device) if cuda else None
            backend = "nccl" if cuda else "gloo"
            require(torch.distributed.is_backend_available(backend), f"torch has no {backend}: run a single process.")
            torch.distributed.init_process_group(backend)
        run = Run(args, device, rank, max(world, 1))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(run, "stop", True))  # train() saves and ends after its iteration
        run.train()
        torch.distributed.destroy_process_group() if world > 1 else None
        return 0
    except Mistake as e:
        sentence = str(e) if local == 0 else ""  # all ranks make it, and one on each machine says so
    except (OSError, dcp.CheckpointException) as e:
        e = next(iter(e.failures.values()))[0] if isinstance(e, dcp.CheckpointException) else e
        sentence = f"{e}: check the path, its permissions and the space left on the disk."
    except torch.OutOfMemoryError:
        sentence = "the GPU is out of memory: try --micro-batch-size 1, --offload-text-encoders or --lora-rank 64."
    print(f"cdm.py: {sentence}\n" if sentence else "", end="", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
