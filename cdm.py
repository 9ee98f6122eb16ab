"""CDM, Continuous-Time Distribution Matching (arXiv:2605.06376), to be read beside the paper.

CDM distils a flow-matching text-to-image model into a generator that needs 4 steps. It learns from
prompts alone: no images, no GAN, no reward. Teachers: SD3-Medium and LongCat-Image.

    python cdm.py --teacher stabilityai/stable-diffusion-3-medium       # one GPU of 80 GB
    python cdm.py --teacher ... --lora-rank 64                          # one smaller GPU
    torchrun --standalone --nproc_per_node=8 cdm.py --teacher ...       # many GPUs, FSDP2
    python cdm.py --teacher ... --student runs/cdm --generate "a red fox"

Section 1 is the algorithm. It uses torch alone and works for any model.
Section 2 connects it to the two model families of diffusers.
Section 3 runs it. The docstring of Run says why a resumed run is exact.

Notation: t = 0 is data, t = 1 is noise, c is the prompt, uncond the empty one, sg[] stops the
gradient.

    x_t = (1 - t) x_0 + t noise     a point on the straight path from data to noise
    v(x_t, t, c)                    a network's velocity, an estimate of noise - x_0
    D(x_t, t, c) = x_t - t v        a network's clean estimate, x0_hat
    student     v_theta, D_theta    the few-step generator; trained in every R-th iteration
    teacher     v_real, D_real      the pretrained model; never trained
    fake_score  v_phi, D_fake       trained in every iteration on the student's own clean estimates
    ema         theta_bar           the student's moving average: what is sampled and exported
    anchor      x_{t_i}, t_i        a point of the student's own trajectory, one for each sample
    tau                             the time to which a clean estimate is noised again

From the paper to the code, by equation, section or symbol:

    clean estimate D                Eq. 1       clean_estimate
    dynamic continuous schedule     sec. 3.2    sample_schedule
    backward simulation             sec. 3.2    backward_simulation
    pseudo-target, weight w         w           pseudo_target_loss, dmd_weight
    L_CA, CFG augmentation          Eqs. 3-4    ca_loss
    L_DM, distribution matching     Eqs. 3-4    dm_loss
    anchors, every tau, t' and noise            draw_iteration: tau["ca"] ~ U(0, t_i), t' ~ U(0, 1]
    off-trajectory point x_{t'}     Eq. 7       euler_step, called in cdm_iteration
    L_CDM                           sec. 3.3    dm_loss at the off-trajectory point
    fake score, on student's x0     L_fake      fake_score_loss
    its pull to the student, EMA    beta        average_into
    one iteration                               cdm_iteration

Not in the paper: --anchor-aware-fake, off by default. README says what is left out on purpose.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
import zlib
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

# ==================================================================================================
# 1. The algorithm.
#
# A model is any callable model(x_t, t, cond) -> v. Shapes, here and below:
#     x_t, v  (B, ...) latents      t  (B,) times in [0, 1]      cond  a tuple of (B, ...) tensors
# ==================================================================================================


def per_sample(t, x):
    """Reshape t, (B,) or (), so that it broadcasts against x, (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def take(cond, rows):
    """The given rows of a condition: a slice or indices."""
    return tuple(c[rows] for c in cond)


def clean_estimate(x_t, t, v):
    """D(x_t, t, c) = x_t - t v: the end at t = 0 of the straight path through x_t.  (Eq. 1)"""
    return x_t - per_sample(t, x_t) * v


def add_noise(x0, t, noise):
    """x_t = (1 - t) x_0 + t noise."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def euler_step(x_t, t, s, v):
    """x_s = x_t + (s - t) v: from time t to time s, down or up. With s = t' this is Eq. 7."""
    return x_t + per_sample(s - t, x_t) * v


def shift_times(t, shift):
    """t <- shift t / (1 + (shift - 1) t). SD3's shift is 3: 0.75 becomes 0.9."""
    return shift * t / (1 + (shift - 1) * t)


def uniform_times(steps, shift=1.0):
    """The sampling grid 1, 1 - 1/steps, ..., shifted: 1, 0.9, 0.75, 0.5 for 4 steps and shift 3.

    Returns (steps,) times on the CPU.
    """
    return shift_times(1 - torch.arange(steps) / steps, shift)


# --- Dynamic continuous schedule and backward simulation (sec. 3.2). ---


def sample_schedule(max_steps, low, high, shift=1.0, stratified=False, generator=None):
    """Draw N ~ U{1..max_steps} and times 1 = t_1 > t_2 > ... > t_N > 0.  (sec. 3.2)

    The inner times are U[low, high], then all times are shifted. Stratified draws one inner time in
    each of N - 1 equal bins (the authors' later advice). Returns (N,) times on the CPU.
    """
    n = int(torch.randint(1, max_steps + 1, (), generator=generator))
    u = torch.rand(n - 1, generator=generator)
    if stratified and n > 1:
        u = (torch.arange(n - 1) + u) / (n - 1)
    inner = (low + (high - low) * u).sort(descending=True).values
    return shift_times(torch.cat([torch.ones(1), inner]), shift)


@dataclass
class Anchor:
    """A point of the student's own trajectory for each sample of the batch."""

    x_t: torch.Tensor  # (B, ...)
    t: torch.Tensor  # (B,), the anchor's time t_i
    v: torch.Tensor  # (B, ...), the student's velocity there, without gradient


@torch.no_grad()
def backward_simulation(student, noise, schedule, index, cond):
    """Integrate the student's ODE from pure noise, each sample to its own anchor.  (sec. 3.2)

    noise: (B, ...), x at t_1 = 1; schedule: (N,) descending times; index: (B,) anchor indices i in
    [0, N), on the CPU like the schedule, so that reading them does not wait for the GPU.
    Step i evaluates only samples whose anchor is not yet passed: sum(index + 1) evaluations in all.
    """
    x = noise.clone()
    v = torch.zeros_like(noise)
    times = schedule.to(noise, non_blocking=True)
    for i in range(int(index.max()) + 1):
        # A sample past its anchor is in no more rows, and keeps the anchor's x and v.
        rows = (index >= i).nonzero()[:, 0].to(noise.device, non_blocking=True)
        if i > 0:
            x[rows] = euler_step(x[rows], times[i - 1], times[i], v[rows])
        v[rows] = student(x[rows], times[i].expand(len(rows)), take(cond, rows))
    return Anchor(x, schedule[index].to(noise, non_blocking=True), v)


@torch.no_grad()
def sample(model, noise, times, cond):
    """Few-step generation: Euler steps along `times`, (N,) descending from 1, then to 0.

    noise: (B, ...). Returns x0, (B, ...).
    """
    x = noise
    times = torch.cat([times, torch.zeros(1)]).to(noise)
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = euler_step(x, t, s, model(x, t.expand(len(x)), cond))
    return x


# --- The losses: the student's (Eqs. 3-4; sec. 3.3) and the fake score's. ---
#
# The student's losses are pseudo-target regressions. x0_hat carries the student's gradient and is
# pulled towards sg[x0_hat + w delta]. ca_loss and dm_loss return the loss, a scalar, and w, (B,).
# To add a loss, write a function here, give it a weight in CDM and in check(), a name in
# draw_iteration's `tau`, and a call in cdm_iteration.
#
# Convention, as in the authors' code: no 1/2 and a mean over all entries, so that
# dL/dx0_hat = -2 w delta / x0_hat.numel(), where the paper's 1/2 ||.||^2 has -w delta.
# Adam does not see the difference. Gradient clipping does: its limit of 1.0 is for this convention.


def dmd_weight(d_real, x0_hat, floor=0.1):
    """w = 1 / max(mean |D_real - x0_hat|, floor), (B,); the mean is over a sample's entries."""
    distance = (d_real - x0_hat).abs().flatten(1).mean(1)
    return 1 / distance.clamp(min=floor)


def pseudo_target_loss(x0_hat, delta, w):
    """|| x0_hat - sg[x0_hat + w delta] ||^2. x0_hat: (B, ...) with gradient; w: (B,)."""
    target = x0_hat + per_sample(w, delta) * delta
    return F.mse_loss(x0_hat, target.detach())


def ca_loss(x0_hat, teacher, cond, uncond, tau, noise, alpha):
    """L_CA, CFG augmentation: delta = alpha [D_real(z, c) - D_real(z, uncond)].  (Eqs. 3-4)

    x0_hat: the student's clean estimate at its anchor; tau: (B,), bounded by the anchor's time;
    noise: fresh; uncond: the empty prompt's condition.
    """
    with torch.no_grad():
        z = add_noise(x0_hat, tau, noise)
        d_cond = clean_estimate(z, tau, teacher(z, tau, cond))
        d_uncond = clean_estimate(z, tau, teacher(z, tau, uncond))
        w = dmd_weight(d_cond, x0_hat)  # of the conditional estimate, not of the guided one
    return pseudo_target_loss(x0_hat, alpha * (d_cond - d_uncond), w), w


def dm_loss(x0_hat, teacher, fake_score, cond, tau, noise):
    """L_DM, distribution matching: delta = D_real(z, c) - D_fake(z, c).  (Eqs. 3-4)

    L_CDM (sec. 3.3) is this function with x0_hat from the off-trajectory point. By Tweedie's
    formula delta is tau^2 / (1 - tau) (s_real - s_fake), the DMD direction. tau: (B,) times; noise:
    fresh.
    """
    with torch.no_grad():
        z = add_noise(x0_hat, tau, noise)
        d_real = clean_estimate(z, tau, teacher(z, tau, cond))
        d_fake = clean_estimate(z, tau, fake_score(z, tau, cond))
        w = dmd_weight(d_real, x0_hat)
    return pseudo_target_loss(x0_hat, d_real - d_fake, w), w


def fake_score_loss(fake_score, x0, cond, tau, noise):
    """L_fake = || v_phi(z, tau, c) - (noise - x0) ||^2: flow matching on the student's x0."""
    x0 = x0.detach()
    z = add_noise(x0, tau, noise)
    return F.mse_loss(fake_score(z, tau, cond), noise - x0)


# --- The settings and the randomness of one iteration. ---
#
# The comment beside a field is its flag's help, and each class is a group of flags in --help.


@dataclass
class AnchorAware:
    """NOT IN THE PAPER: a fake score that knows where its clean estimate was made."""

    anchor_aware_fake: bool = False  # the fake score sees the time at which an estimate was made
    anchor_lr: float = 1e-3  # learning rate of the layer that embeds this time


@dataclass
class CDM(AnchorAware):
    """The method. Defaults are as the authors published them; what the paper ran is not known.

    They are for SD3-Medium and, by our reading of the authors' code, for bf16 weights.
    """

    ca_weight: float = 1.0  # weight of L_CA, CFG augmentation
    dm_weight: float = 1.0  # weight of L_DM, distribution matching
    cdm_weight: float = 1.0  # weight of L_CDM, continuous-time matching
    alpha: float = 7.0  # guidance in L_CA; roughly the teacher's CFG of scale 1 + alpha
    schedule: Literal["dynamic", "fixed"] = "dynamic"  # fixed: DMD2's 1, 0.75, 0.5, 0.25, shifted
    max_schedule_steps: int = 28  # N_max, the most steps of a dynamic schedule
    time_low: float = 0.25  # inner times are U[time_low, time_high] before the shift
    time_high: float = 0.95  # upper end of the inner times
    stratified: bool = False  # draw one inner time in each of N - 1 equal bins
    cdm_point: Literal["euler", "anchor", "renoise"] = "euler"  # where L_CDM looks; euler: Eq. 7
    tau_min: float = 0.02  # every drawn tau and t' is clamped to [tau_min, tau_max]
    tau_max: float = 0.98  # upper end of every tau and t'
    student_every: int = 2  # R, fake-score updates for each student update
    student_lr: float = 1e-5  # AdamW learning rate of the student
    fake_lr: float = 5e-6  # AdamW learning rate of the fake score
    warmup: int = 100  # updates of linear learning-rate warm-up, of each network
    weight_decay: float = 1e-4  # AdamW weight decay
    clip: float = 1.0  # largest gradient norm
    ema_decay: float = 0.999  # of the student's EMA; at most (1 + n) / (10 + n) after n updates
    fake_pull: float = 0.999  # beta, in phi <- beta phi + (1 - beta) theta; 1: no pull


@dataclass
class Draw:
    """All the randomness of one iteration, so that the iteration itself is a plain function."""

    schedule: torch.Tensor  # (N,) descending times, the same for all samples; on the CPU
    index: torch.Tensor  # (B,) anchor index i, shared by the fake score and all losses; on the CPU
    t_off: torch.Tensor  # (B,) t', where L_CDM looks
    tau: dict  # (B,) for each of "ca", "dm", "cdm", "fake": the time of its re-noising
    noise: dict  # (B, ...) for the same names, and for "start": x at t = 1


def generator(*key, device="cpu"):
    """A torch.Generator that depends on its key alone, such as (seed, iteration, name)."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


def draw_iteration(cfg, seed, k, batch, shape, shift=1.0, rows=slice(None), device="cpu"):
    """The Draw of iteration k = 1, 2, ... for a part of the batch.

    batch: samples over all processes; shape: of one sample; shift: of the schedule's times; rows:
    the part. A sample's draws do not depend on how the batch is divided. Each loss has generators
    of its own, so a new loss changes no other draw.
    """
    gen = generator(seed, k, "schedule")
    if cfg.schedule == "dynamic":
        schedule = sample_schedule(
            cfg.max_schedule_steps, cfg.time_low, cfg.time_high, shift, cfg.stratified, gen
        )
    else:
        schedule = uniform_times(4, shift)
    index = torch.randint(len(schedule), (batch,), generator=gen)[rows]
    t_i = schedule[index].to(device, non_blocking=True)

    def uniform(name):
        gen = generator(seed, k, "time", name, device=device)
        return 1 - torch.rand(batch, generator=gen, device=device)[rows]  # on (0, 1]

    def normal(name):
        gen = generator(seed, k, "noise", name, device=device)
        # Cloned, because a view would keep the whole batch's memory.
        return torch.randn(batch, *shape, generator=gen, device=device)[rows].clone()

    tau = {
        "ca": uniform("ca") * t_i,  # tau ~ U(0, t_i): bounded by the anchor's own time
        "dm": uniform("dm"),  # tau ~ U(0, 1]
        "cdm": uniform("cdm"),
        "fake": uniform("fake"),
    }
    # A small time_low allows t_i below tau_min. There the clamp lifts L_CA's tau above t_i.
    tau = {name: t.clamp(cfg.tau_min, cfg.tau_max) for name, t in tau.items()}
    noise = {name: normal(name) for name in ("start", *tau)}

    if cfg.cdm_point == "anchor":  # the paper's ablation: L_CDM stays on the trajectory
        t_off = t_i
    else:  # t' ~ U(0, 1], whatever the schedule
        t_off = uniform("off").clamp(cfg.tau_min, cfg.tau_max)
    if cfg.cdm_point == "renoise":
        noise["off"] = normal("off")
    return Draw(schedule, index, t_off, tau, noise)


# --- One iteration. ---


class Learner:
    """A network in training: AdamW, linear warm-up, gradient clipping.

    groups: [(parameters by name, learning rate)], of the model.
    """

    def __init__(self, model, groups, cfg):
        self.model = model
        self.cfg = cfg
        self.updates = 0
        self.params = {}
        param_groups = []
        for params, lr in groups:
            self.params |= params
            param_groups.append({"params": list(params.values()), "base_lr": lr})
        # step() sets the learning rates.
        self.optimizer = torch.optim.AdamW(param_groups, weight_decay=cfg.weight_decay, fused=True)
        # AdamW's state exists before its first step, so that a resumed run has tensors to fill.
        for p in self.params.values():
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def step(self):
        """Clip, update and free the gradients. Returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), self.cfg.clip)
        self.updates += 1
        warm = min(1.0, self.updates / max(self.cfg.warmup, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = warm * group["base_lr"]
        self.optimizer.step()
        # This frees them: student and fake score never hold gradients at the same time.
        self.optimizer.zero_grad()
        return norm


@torch.no_grad()
def average_into(params, others, decay):
    """p <- decay p + (1 - decay) other, in place, for each name in `others`."""
    for name, other in others.items():
        p = params[name]
        p.lerp_(other.to(p.device, p.dtype), 1 - decay)


@torch.no_grad()
def make_missing_calls(model, anchor, cond, draw):
    """FSDP gathers weights in every call, so all processes must make the same number of calls.

    Backward simulation makes as many as this process's latest anchor needs. The calls here fill up
    to the schedule's length, for one sample each, and nobody looks at their results.
    """
    for _ in range(int(draw.index.max()) + 1, len(draw.schedule)):
        model(anchor.x_t[:1], anchor.t[:1], take(cond, slice(1)))


def cdm_iteration(k, batches, teacher, student, fake_score, ema, cfg):
    """Iteration k = 1, 2, ...: simulate, update the fake score, and every R-th time the student.

    batches: micro-batches [(cond, uncond, Draw)], whose gradients accumulate; teacher: a model;
    student, fake_score: Learners; ema: the student's averaged parameters by name.
    Returns scalar tensors by name, for the log.
    """
    scale = 1 / len(batches)
    stats = {}

    def record(**values):
        for name, value in values.items():
            stats[name] = stats.get(name, 0) + scale * value.detach()

    def student_estimate(x_t, t, cond):  # D_theta
        return clean_estimate(x_t, t, student.model(x_t, t, cond))

    def fake_score_for(made_at):
        """The fake score. NOT IN THE PAPER: an anchor-aware one is told when x0 was made."""
        if cfg.anchor_aware_fake:
            return partial(fake_score.model, made_at=made_at)
        return fake_score.model

    points = []
    for cond, _, d in batches:
        # Backward simulation (sec. 3.2): each sample to its anchor, without gradient.
        anchor = backward_simulation(student.model, d.noise["start"], d.schedule, d.index, cond)
        if torch.distributed.is_initialized():
            make_missing_calls(student.model, anchor, cond, d)

        # Eq. 1 with the recorded velocity: the clean estimate needs no further evaluation.
        x0 = clean_estimate(anchor.x_t, anchor.t, anchor.v)
        # Off-trajectory point (sec. 3.3, Eq. 7): along the recorded velocity to any time t'.
        x_off = euler_step(anchor.x_t, anchor.t, d.t_off, anchor.v)
        if cfg.cdm_point == "renoise":  # the paper's ablation of Eq. 7
            x_off = add_noise(x0, d.t_off, d.noise["off"])
        points.append((anchor, x_off))

        # Fake score, in every iteration: flow matching on the student's clean estimates.
        made_at = anchor.t
        if cfg.anchor_aware_fake and cfg.cdm_weight:
            # NOT IN THE PAPER: L_CDM evaluates this fake score at t', so it must learn there, too.
            # In every other iteration the even rows, in the others the odd rows, are replaced by
            # the estimate that the student makes at t'.
            rows = slice(k % 2, None, 2)
            if len(x0[rows]):  # none in a micro-batch of 1, every other time
                with torch.no_grad():
                    x0[rows] = student_estimate(x_off[rows], d.t_off[rows], take(cond, rows))
                made_at = anchor.t.clone()
                made_at[rows] = d.t_off[rows]
        loss = fake_score_loss(fake_score_for(made_at), x0, cond, d.tau["fake"], d.noise["fake"])
        record(loss_fake=loss)
        (scale * loss).backward()
    stats["grad_norm_fake"] = fake_score.step()
    # phi is pulled to theta. In bf16 most of this pull is lost to rounding. By our reading the
    # published code has the same effect.
    average_into(fake_score.params, student.params, cfg.fake_pull)
    if k % cfg.student_every != 0:
        return stats

    # Student, in every R-th iteration: L = L_CA + L_DM + L_CDM.
    for (cond, uncond, d), (anchor, x_off) in zip(batches, points, strict=True):
        tau, noise = d.tau, d.noise
        # L_CA and L_DM at the anchor, from one evaluation of the student.
        if cfg.ca_weight or cfg.dm_weight:
            x0_hat = student_estimate(anchor.x_t, anchor.t, cond)
            loss = 0
            if cfg.ca_weight:
                ca, w = ca_loss(x0_hat, teacher, cond, uncond, tau["ca"], noise["ca"], cfg.alpha)
                loss = loss + cfg.ca_weight * ca
                record(loss_ca=ca, w_ca=w.mean())
            if cfg.dm_weight:
                fake = fake_score_for(anchor.t)
                dm, w = dm_loss(x0_hat, teacher, fake, cond, tau["dm"], noise["dm"])
                loss = loss + cfg.dm_weight * dm
                record(loss_dm=dm, w_dm=w.mean())
            (scale * loss).backward()  # now, so that only one graph is in memory at a time

        # L_CDM at the off-trajectory point, from a second evaluation.
        if cfg.cdm_weight:
            x0_hat = student_estimate(x_off, d.t_off, cond)
            fake = fake_score_for(d.t_off)
            cdm, w = dm_loss(x0_hat, teacher, fake, cond, tau["cdm"], noise["cdm"])
            (scale * cfg.cdm_weight * cdm).backward()
            record(loss_cdm=cdm, w_cdm=w.mean())
    decay = min((1 + student.updates) / (10 + student.updates), cfg.ema_decay)
    stats["grad_norm_student"] = student.step()
    average_into(ema, student.params, decay)  # theta_bar
    return stats


# ==================================================================================================
# 2. Model families: a diffusers pipeline as the algorithm needs it. A new family is a class beside
#    SD3 and LongCatImage, named in FAMILIES. It has absent, max_tokens, encode, velocity and
#    call_options, which SD3 documents, and lora_targets if Family's do not fit.
# ==================================================================================================

ASSETS = Path(__file__).parent / "assets"  # the default prompts, the exported student's README
LORA_FILE = "pytorch_lora_weights.safetensors"
GPU_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)  # no file is to blame


class Mistake(Exception):
    """What the user can correct, in one sentence. main() prints it and exits with code 2."""

    of_one_process = False  # under torchrun, whether the others may not have met it


def require(condition, sentence):
    if not condition:
        raise Mistake(sentence)


def one_line(error):
    """An exception's message on one line; of a long one, its start and its end."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) < 300 else f"{text[:120]} ... {text[-180:]}"


@contextlib.contextmanager
def explained(what, advice):
    """Turn every failure inside into one sentence: what failed, the reason, and advice."""
    try:
        yield
    except (Mistake, *GPU_ERRORS):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        mistake = Mistake(f"{what}: {reason}: {advice}.")
        mistake.of_one_process = True
        raise mistake from None


class AnchorTime(torch.nn.Module):
    """NOT IN THE PAPER: a zero-initialised layer of sin/cos features of t (B,) -> (B, width)."""

    def __init__(self, width, features=64):
        super().__init__()
        frequency = torch.logspace(0, 2, features)  # 1 to 100, for t in [0, 1]
        self.register_buffer("frequency", frequency, persistent=False)
        self.linear = torch.nn.Linear(2 * features, width)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, t):
        angle = t[:, None] * self.frequency
        return self.linear(torch.cat([angle.sin(), angle.cos()], 1))


class Model:
    """A family's transformer as a model(x_t, t, cond) -> v. Latents: (B, C, h, w), float32."""

    def __init__(self, transformer, family):
        self.transformer = transformer
        self.family = family
        self.anchor_time = None  # an AnchorTime, for the anchor-aware fake score

    def __call__(self, x_t, t, cond, made_at=None):
        bf16 = self.family.dtype == torch.bfloat16
        # No autocast cache: it would keep a bf16 copy of every float32 weight that trains.
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            if made_at is not None:
                *rest, last = cond  # SD3's pooled embedding (B, width), LongCat-Image's text
                embedded = self.anchor_time(made_at).to(last.dtype)
                if last.ndim == 3:  # (B, tokens, width): the same for all tokens
                    embedded = embedded[:, None]
                cond = (*rest, last + embedded)
            return self.family.velocity(self.transformer, x_t, t, cond).float()

    def parameters(self):
        """What is trained or averaged, by name: all parameters, or those of a LoRA alone."""
        named = self.transformer.named_parameters()
        # peft's adapter is called "default".
        return {name.replace(".default.", "."): p for name, p in named if p.requires_grad}


class Family:
    """What the families share: loading, conditions, latent shape, time shift, decoding.

    folder: the teacher's files; absent: parts not to load, {name: None}; student: for sampling, a
    folder whose network or LoRA replaces the teacher's. Raises Mistake if it cannot be loaded.
    """

    # The authors' for SD3: attention and feed-forward, of image and text. In LongCat-Image's single
    # blocks they find attention alone.
    lora_targets = (
        "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj "
        "attn.add_v_proj attn.to_add_out ff.net.0.proj ff.net.2 ff_context.net.0.proj "
        "ff_context.net.2 "
        "attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0"  # SD3.5's second attention
    ).split()

    def __init__(self, name, folder, absent, args, device, student=None):
        from diffusers import DiffusionPipeline

        self.name = name
        self.absent = absent
        self.device = device
        weights = getattr(torch, args.weights)  # of the transformer; all else is bf16 on a GPU
        self.dtype = torch.bfloat16 if device.type == "cuda" else weights
        variant = None
        stems = [file.stem for file in Path(folder, "transformer").glob("*.safetensors")]
        if stems and all("." in stem for stem in stems):  # such as model.fp16-00001-of-00002
            variant = stems[0].split(".")[1].split("-")[0]
        self.transformer = self.load_transformer(folder, variant, weights, args, student)
        self.pipe = DiffusionPipeline.from_pretrained(
            folder, dtype=self.dtype, variant=variant, transformer=self.transformer, **absent
        )
        self.tokenizers = {}  # of the text encoders that are there
        for key, part in self.pipe.components.items():
            if isinstance(part, torch.nn.Module):
                self.check_weights(part)
                part.requires_grad_(False).eval()
                if key.startswith("text_encoder"):
                    self.prepare_encoder(key, part, args.offload_text_encoders, folder)
                else:
                    part.to(device)
        self.resolution, self.shape = self.latent_shape(args.resolution)
        self.time_scale = self.pipe.scheduler.config.num_train_timesteps
        self.shift = self.time_shift()
        self.empty = self.encode([""])

    def load_transformer(self, folder, variant, weights, args, student):
        """The teacher's network, or a student's."""
        from diffusers import AutoModel

        is_lora = student and Path(student, LORA_FILE).exists()
        if student and not is_lora:
            return AutoModel.from_pretrained(str(student), dtype=weights)
        options = {"subfolder": "transformer", "variant": variant, "dtype": weights}
        config = json.loads(Path(folder, "transformer", "config.json").read_text())
        if config.get("sample_size", 1) is None:
            require(args.resolution, f"{self.name} does not say its size: give --resolution.")
            options["sample_size"] = args.resolution  # the pipeline fails on null; else unused
        net = AutoModel.from_pretrained(folder, **options)
        if is_lora:
            layers = load_file(Path(student, LORA_FILE))
            net.load_lora_adapter(layers)
            found = sum("lora_" in name for name, _ in net.named_parameters())
            sentence = f"the LoRA in {student} does not fit this teacher: give one made from it."
            require(layers and found == len(layers), sentence)
        return net

    def check_weights(self, part):
        """Raise Mistake if a weight is not finite, or in no file: diffusers leaves it on "meta"."""
        weights = part.state_dict().items()
        bad = [name for name, x in weights if x.is_meta or not x.isfinite().all()]
        what = f"of {type(part).__name__}, {one_line(', '.join(bad))} are missing or not finite"
        require(not bad, f"--teacher {self.name}: {what}: copy its files again.")

    @torch.no_grad()
    def prepare_encoder(self, name, encoder, offload, folder):
        """Place a text encoder. Raise Mistake if two prompts have equal embeddings.

        They have if the tokenizer's vocabulary is missing.
        """
        if hasattr(encoder, "lm_head"):  # LongCat-Image's computes logits that nobody needs
            encoder.lm_head = torch.nn.Identity()
        if offload:
            encoder.register_forward_pre_hook(self.to_device)
            encoder.register_forward_hook(self.to_cpu)
        else:
            encoder.to(self.device)
        key = name.replace("text_encoder", "tokenizer")
        sentence = f"the files of {key} or {name} in {self.name} are not complete: copy them again."
        require(Path(folder, key, "tokenizer_config.json").exists(), sentence)
        tokenizer = self.pipe.components[key]
        self.tokenizers[key] = tokenizer
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        tokens = tokenizer(["red fox", "big cat"], **options).input_ids
        fox, cat = encoder(tokens.to(self.device))[0]
        require(not torch.equal(fox, cat), sentence)

    def to_device(self, encoder, _):
        """Hook: with --offload-text-encoders each one is on the GPU only while it runs."""
        encoder.to(self.device)

    def to_cpu(self, encoder, *_):
        encoder.to("cpu")

    def latent_shape(self, resolution):
        """The resolution, of which 0 is the teacher's own, and the shape (C, h, w) of a latent."""
        pixels = self.pipe.vae_scale_factor  # of a latent's side
        patch = 2 * pixels  # both families cut latents into patches of 2 x 2
        resolution = resolution or self.pipe.default_sample_size * pixels
        # LongCat-Image has no limit. 256 is ours.
        largest = patch * self.transformer.config.get("pos_embed_max_size", 256)
        fits = resolution % patch == 0 and resolution <= largest
        advice = f"give a multiple of {patch} up to {largest}"
        require(fits, f"--resolution {resolution} does not fit {self.name}: {advice}.")
        side = resolution // pixels
        return resolution, (self.pipe.vae.config.latent_channels, side, side)

    def time_shift(self):
        """The shift of the teacher's scheduler. Raises Mistake unless it samples as sample()."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
            calculate_shift,
        )

        scheduler = self.pipe.scheduler
        config = scheduler.config
        shift = config.get("shift", 1.0)
        mu = None
        if config.get("use_dynamic_shifting"):
            image_tokens = self.shape[1] * self.shape[2] // 4  # of 2 x 2 latents each
            bounds = (config.base_image_seq_len, config.max_image_seq_len)
            mu = calculate_shift(image_tokens, *bounds, config.base_shift, config.max_shift)
            shift = math.exp(mu)
        agrees = type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
        if agrees:  # its options may do more than shift: compare 4 steps of a test ODE, v = x t
            ours = sample(lambda x, t, _: x * t, torch.ones(1), uniform_times(4, shift), ())
            x = torch.ones(1)
            scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
            for t in scheduler.timesteps:
                x = scheduler.step(x * t / self.time_scale, t, x).prev_sample
            agrees = torch.allclose(x, ours, atol=1e-5)
        advice = "give the teacher a plain FlowMatchEulerDiscreteScheduler"
        require(agrees, f"the scheduler of {self.name} does more than shift the times: {advice}.")
        return shift

    def say_what_is_cut(self, prompts):
        """Print how many prompts are longer than a text encoder reads."""
        for key, tokenizer in self.tokenizers.items():
            limit = min(tokenizer.model_max_length, self.max_tokens())
            count = sum(len(ids) > limit for ids in tokenizer(list(prompts)).input_ids)
            if count:
                print(f"cdm.py: {key} cuts {count} of {len(prompts)} prompts at {limit} tokens")

    def uncond(self, n):
        """The empty prompt's cond for n samples."""
        return tuple(c.expand(n, *c.shape[1:]) for c in self.empty)

    def guided(self, model, scale):
        """The model under classifier-free guidance: v(empty) + scale (v(c) - v(empty))."""

        def guided_model(x_t, t, cond):
            v_empty = model(x_t, t, self.uncond(len(x_t)))
            return v_empty + scale * (model(x_t, t, cond) - v_empty)

        return guided_model

    @torch.no_grad()
    def images(self, model, noise, times, cond):
        """A PIL image for each sample, drawn one by one. noise: a list of (1, C, h, w)."""
        vae = self.pipe.vae
        images = []
        for i, z in enumerate(noise):
            x0 = sample(model, z.to(self.device), times, take(cond, slice(i, i + 1)))
            latents = x0 / vae.config.scaling_factor + (vae.config.shift_factor or 0)
            pixels = vae.decode(latents.to(vae.dtype)).sample.float()
            sentence = f"{self.name}, or a student of it, draws images that are not finite"
            advice = "check its files, or train with lower learning rates"
            require(pixels.isfinite().all(), f"{sentence}: {advice}.")
            images += self.pipe.image_processor.postprocess(pixels, output_type="pil")
        return images

    def card(self, folder, prompt, updates, lora):
        """The README of an exported student: what it is, and the code that draws with it."""
        absent = dict(self.absent)
        load = f'pipe.transformer.load_lora_adapter("{folder}", use_safetensors=True)'
        if not lora:
            absent["transformer"] = None
            network = f'diffusers.AutoModel.from_pretrained("{folder}", dtype=torch.bfloat16)'
            load = f"pipe.transformer = {network}"
        options = {"height": self.resolution, "width": self.resolution, "guidance_scale": 1.0}
        template = (ASSETS / "student_README.md").read_text(encoding="utf-8")
        return template.format(
            teacher=self.name,
            updates=updates,
            absent="".join(f"{part}=None, " for part in absent),
            load=load,
            prompt=repr(prompt),
            options=options | self.call_options(),
        )


class SD3(Family):
    """Stable Diffusion 3. cond: text (B, tokens, width) and pooled (B, width) embeddings."""

    absent = {}  # parts not to load, as {name: None}

    def max_tokens(self):
        """The longest text sequence: T5's. CLIP's is shorter."""
        return min(256, getattr(self.pipe.tokenizer_3, "model_max_length", 256))

    @torch.no_grad()
    def encode(self, prompts):
        """A list of prompts -> cond. An anchor's time is added to its last part."""
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_tokens(),
        )
        return text, pooled

    def velocity(self, net, x_t, t, cond):
        """Call the transformer: (B, C, h, w), t (B,) in [0, 1] -> (B, C, h, w)."""
        text, pooled = cond
        return net(
            hidden_states=x_t,
            timestep=self.time_scale * t,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    def call_options(self):
        """What the pipeline's call needs besides, for the exported student's README."""
        return {"max_sequence_length": self.max_tokens()}


class LongCatImage(Family):
    """LongCat-Image. cond: text embeddings (B, 512, width) alone."""

    absent = {"text_processor": None}  # it rewrites prompts

    def max_tokens(self):
        return self.pipe.tokenizer_max_length

    @torch.no_grad()
    def encode(self, prompts):
        text, self.text_ids = self.pipe.encode_prompt(prompts)  # the ids are always the same
        return (text,)

    def velocity(self, net, x_t, t, cond):
        (text,) = cond
        tokens = F.pixel_unshuffle(x_t, 2)  # (B, 4 C, h / 2, w / 2)
        side = tokens.shape[-1]  # images are square
        position = text.shape[1] + torch.arange(side, device=x_t.device)  # after the text
        modality = torch.ones_like(position[:1])  # of an image
        image_ids = torch.cartesian_prod(modality, position, position)
        v = net(
            hidden_states=tokens.flatten(2).mT,
            timestep=t,  # the network multiplies by 1000
            encoder_hidden_states=text,
            txt_ids=self.text_ids,  # (512, 3): 0, i, i
            img_ids=image_ids,  # (side x side, 3): 1, row, column
            return_dict=False,
        )[0]
        return F.pixel_shuffle(v.mT.reshape(tokens.shape), 2)

    def call_options(self):
        return {"enable_prompt_rewrite": False}


FAMILIES = {"StableDiffusion3Pipeline": SD3, "LongCatImagePipeline": LongCatImage}


def load_family(args, device, student=None):
    """--teacher, a hub id or a folder, as its family; student: see Family. Raises Mistake."""
    import diffusers
    import huggingface_hub
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    name = args.teacher
    if name == "stabilityai/stable-diffusion-3-medium":
        name += "-diffusers"  # the first holds single-file checkpoints only
    is_folder = os.path.isdir(name)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not os.path.exists(name)
    require(is_folder or is_hub_id, f"--teacher {name} is neither a folder nor a hub id: check it.")
    families = " or a ".join(FAMILIES)
    who = f"--teacher {name}"
    if student:
        who += f" with --student {student}"
    advice = "check the files"
    if is_hub_id:
        advice = (
            f"check the name, accept the licence at https://huggingface.co/{name} and run "
            "`hf auth login`; if it was downloaded before, set HF_HUB_OFFLINE=1"
        )
    with explained(f"{who} cannot be loaded as a {families}", advice):
        file = Path(name, "model_index.json")
        if is_hub_id:
            file = Path(huggingface_hub.hf_hub_download(name, file.name))
        index = json.loads(file.read_text(encoding="utf-8"))
        kind = index["_class_name"]
        require(kind in FAMILIES, f"--teacher {name} is a {kind}: give a {families}.")
        family = FAMILIES[kind]
        absent = dict(family.absent)
        if args.no_t5:  # its tokenizer stays and says the prompts' length
            require("text_encoder_3" in index, f"--no-t5: a {kind} has no T5, leave the flag out.")
            absent["text_encoder_3"] = None
        folder = name
        if is_hub_id:  # from the cache alone if the hub cannot be reached
            folder = diffusers.DiffusionPipeline.download(name, **absent)
        parts = {part: value for part, value in index.items() if isinstance(value, list)}
        for part, (library, _) in parts.items():
            if library and part not in absent:
                sentence = f"--teacher {name} lacks the folder {part}/: copy it, too."
                require(Path(folder, part).is_dir(), sentence)
            if not library and part.startswith(("text_encoder", "tokenizer")):
                absent[part] = None  # it was saved without this part
        return family(name, folder, absent, args, device, student)


# ==================================================================================================
# 3. Running: the command line, prompts, checkpoints, the loop, the exported student.
# ==================================================================================================


@dataclass
class Job:
    """the run"""

    teacher: str = "stabilityai/stable-diffusion-3-medium"  # hub id or pipeline folder
    prompts: str = ""  # UTF-8 text file, one prompt a line; none: assets/prompts.txt
    output_dir: str = ""  # none: runs/cdm, or runs/images with --generate
    iterations: int = 4000  # outer iterations, that is, fake-score updates
    batch_size: int = 0  # samples per update over all GPUs; 0: 16 on each
    resolution: int = 0  # pixels, square; 0: the teacher's own
    seed: int = 0  # seed of the run, or of --generate
    resume: bool = False  # continue the run in --output-dir
    lora_rank: int = 0  # 0: full fine-tuning; the authors' LoRA has rank 64
    weights: Literal["auto", "float32", "bfloat16"] = "auto"  # of the networks; auto: bf16 on GPUs
    save_every: int = 500  # iterations between checkpoints, of which the newest two are kept
    export_every: int = 0  # iterations between students that are kept; 0: the last one only
    sample_every: int = 500  # iterations between sample grids; 0: none
    sample_count: int = 8  # images in a row of the sample grid
    device: Literal["auto", "cuda", "cpu"] = "auto"  # where to run


@dataclass
class Memory:
    """memory and speed"""

    micro_batch_size: int = 0  # samples per forward pass; 0: up to 4 on a GPU, else all
    gradient_checkpointing: bool = True  # recompute activations in the backward pass
    offload_text_encoders: bool = False  # keep text encoders on the CPU between uses
    offload_ema: bool = False  # full, one GPU: keep the EMA on the CPU; costs seconds an update
    no_t5: bool = False  # leave out T5, 9.5 GB in bf16
    compile: bool = False  # torch.compile the transformer's repeated blocks


@dataclass
class Sampling:
    """sampling"""

    sample_steps: list[int] = field(default_factory=lambda: [4])  # of the grid, and of --generate
    generate: list[str] = field(default_factory=list)  # draw these prompts instead of training
    student: str = ""  # with --generate: a run's folder, or a student's
    times: list[float] = field(default_factory=list)  # with --generate: such as 1 0.9 0.75 0.5


@dataclass
class Settings(Sampling, Memory, Job, CDM):
    """Everything that the command line sets."""


def parse_args(argv=None):
    """Settings from the command line: a flag for each field, with its comment as help."""
    parser = argparse.ArgumentParser(
        usage="python cdm.py [--flag value ...]",
        description=__doc__.split("\n\n")[1],
        allow_abbrev=False,
    )

    def error(message):
        raise Mistake(f"{message}; --help lists the flags.")

    parser.error = error
    defaults = Settings()
    # A dataclass does not keep its comments, so this file is read: "name: type = default  # help".
    source = Path(__file__).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^    (\w+): [^#\n]* = [^#\n]*  # (.*)", source, re.M))
    for group in (Job, CDM, Memory, Sampling, AnchorAware):
        section = parser.add_argument_group(group.__doc__.splitlines()[0].rstrip("."))
        for name, kind in group.__annotations__.items():
            default = getattr(defaults, name)
            options = {"type": kind}
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction if default else "store_true"}
            elif get_origin(kind) is list:
                options = {"type": get_args(kind)[0], "nargs": "+"}
            elif get_origin(kind) is Literal:
                options = {"choices": get_args(kind)}
            text = comments[name] + (f" (default: {default})" if default else "")
            flag = "--" + name.replace("_", "-")
            section.add_argument(flag, default=default, help=text, **options)
    with explained("the command line cannot be read", "give UTF-8 text"):
        " ".join(sys.argv if argv is None else argv).encode()
    args = Settings(**vars(parser.parse_args(argv)))
    args.output_dir = args.output_dir or ("runs/images" if args.generate else "runs/cdm")
    args.prompts = args.prompts or str(ASSETS / "prompts.txt")
    for name in ("teacher", "prompts", "output_dir", "student"):
        setattr(args, name, os.path.expanduser(getattr(args, name)))
    check(args)
    return args


def check(args):
    """Raise Mistake for settings that cannot work, and replace "auto"."""
    at_least_1 = "iterations save_every sample_count student_every max_schedule_steps".split()
    for name, value in vars(args).items():
        if type(value) in (int, float):
            low = 1 if name in at_least_1 else 0
            flag = "--" + name.replace("_", "-")
            require(low <= value <= 1e18, f"{flag} is {value}: give {low} to 1e18.")
    weights = args.ca_weight + args.dm_weight + args.cdm_weight
    require(weights > 0, "--ca-weight, --dm-weight and --cdm-weight are all 0: give one a weight.")
    require(args.clip > 0, "--clip is 0: give a positive limit.")
    require(max(args.ema_decay, args.fake_pull) <= 1, "--ema-decay and --fake-pull are at most 1.")
    require(0 < args.time_low < args.time_high < 1, "0 < --time-low < --time-high < 1 must hold.")
    require(0 < args.tau_min < args.tau_max < 1, "0 < --tau-min < --tau-max < 1 must hold.")
    steps = args.sample_steps
    require(1 <= min(steps) <= max(steps) <= 50, f"--sample-steps {steps}: give 1 to 50.")
    if args.times:
        falling = args.times[0] == 1 and all(t > s > 0 for t, s in itertools.pairwise(args.times))
        require(falling, "--times must start at 1, fall, and stay above 0.")
    if args.offload_ema:
        one_process = int(os.environ.get("WORLD_SIZE") or 1) == 1
        fits = one_process and not args.lora_rank and not args.generate
        require(fits, "leave out --offload-ema: it is for full fine-tuning on one GPU.")
    if args.student or args.times:
        require(args.generate, "--student and --times go with --generate PROMPT.")
    cuda = torch.cuda.is_available()
    require(cuda or args.device != "cuda", "there is no CUDA device: use --device cpu.")
    if args.device == "auto":
        args.device = "cuda" if cuda else "cpu"
    if args.weights == "auto":
        args.weights = "bfloat16" if args.device == "cuda" else "float32"


def read_prompts(path):
    """The lines of a UTF-8 file that are not blank, without duplicates. Raises Mistake."""
    path = Path(path)
    require(path.suffix.lower() in ("", ".txt"), f"--prompts {path}: give plain text, a .txt file.")
    with explained(f"--prompts {path} cannot be read", "give UTF-8 text"):
        text = path.read_text(encoding="utf-8").replace("\ufeff", "")  # byte-order marks
    prompts = list(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))
    other = ("{", "[", "<", "version https://git-lfs")  # JSON, HTML, a file that is elsewhere
    plain = prompts and "\0" not in text and not prompts[0].startswith(other)
    require(plain, f"--prompts {path} holds no prompt that is plain text: give one prompt a line.")
    return prompts


def blocks(net):
    """A transformer's repeated blocks."""
    return [*net.transformer_blocks, *getattr(net, "single_transformer_blocks", [])]


def shard(net, parts, device):
    """FSDP2: shard a network and its parts over all ranks, with bf16 compute on GPUs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    compute = torch.bfloat16 if device.type == "cuda" else None
    # Inputs are not cast: SD3's timestep near 1000 would be off by up to 2 in bf16.
    policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    for part in [*parts, net]:
        # The root reshards too, because average_into edits the shards in place.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def gather(x):
    """Gather a sharded tensor from all ranks; return any other tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def draw_grid(rows, path):
    """Write one PNG from rows of (label, PIL images), small images enlarged."""
    from PIL import Image, ImageDraw

    side = min(max(rows[0][1][0].width, 96), 512)
    grid = Image.new("RGB", ((side + 4) * len(rows[0][1]) - 4, (side + 20) * len(rows)), "white")
    for y, (label, images) in enumerate(rows):
        top = y * (side + 20)
        ImageDraw.Draw(grid).text((2, top + 2), label, fill="black", font_size=13)
        for x, image in enumerate(images):
            image = image.resize((side, side), Image.Resampling.BOX)  # pixels stay squares
            grid.paste(image, (x * (side + 4), top + 20))
    grid.save(path, "PNG")


@contextlib.contextmanager
def own_errors():
    """dcp wraps what goes wrong inside, even Ctrl-C, in one exception. Raise it unwrapped."""
    try:
        yield
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


class Run:
    """One training run: its four networks, the prompts, and the files in --output-dir.

    A resumed run goes on as the run that never stopped would. save() writes every tensor that
    training changes. All else is a function of the settings and of k, the iterations done, because
    every random draw is seeded with (seed, k). settings() holds what must agree. On a CPU with the
    same number of threads the result is the same bit for bit. GPUs of one model and other numbers
    of processes sum in another order, so each iteration agrees to rounding.
    """

    def __init__(self, args, device, rank=0, world=1):
        self.args = args
        self.device = device
        self.rank = rank
        self.world = world
        self.k = 0
        self.stop = False  # a signal sets it
        self.log = ""  # the log's text at the checkpoint from which the run continues
        self.folder = Path(args.output_dir)
        self.log_file = self.folder / "log.jsonl"
        used = any(path.name != "lock" for path in self.folder.glob("*"))
        advice = "add --resume to continue its run, or choose another"
        require(args.resume or not used, f"--output-dir {self.folder} is not empty: {advice}.")
        begun = self.log_file.exists() or self.checkpoints()
        require(begun or not args.resume, f"--resume: no run is in {self.folder}.")
        args.batch_size = args.batch_size or 16 * world
        least = world * (args.micro_batch_size or 1)
        rule = f"must be a multiple of {least}: processes times --micro-batch-size"
        require(args.batch_size % least == 0, f"--batch-size {args.batch_size} {rule}.")
        self.batch = args.batch_size // world
        if not args.micro_batch_size:
            args.micro_batch_size = self.batch
            if device.type == "cuda":
                args.micro_batch_size = math.gcd(self.batch, 4)  # 4, 2 or 1

        self.prompts = read_prompts(args.prompts)
        self.family = load_family(args, device)
        # Tells teachers apart, wherever their files lie.
        weights = self.family.transformer.parameters()
        size = sum(p.abs().sum(dtype=torch.float64) for p in weights)
        self.identity = f"of weights that sum to {size:.8g}, of shift {self.family.shift:g}"
        self.build()
        self.rehearse()

    def full_networks(self):
        """Full fine-tuning: ema, fake_score, student and teacher, each with weights of its own.

        The EMA's parameters require gradients, too: Model.parameters() returns those that do.
        """
        teacher = self.family.transformer
        ema = copy.deepcopy(teacher).requires_grad_(True).float()  # in bf16 small steps round away
        yield ema.to("cpu" if self.args.offload_ema else self.device)
        fake_score = copy.deepcopy(teacher).requires_grad_(True)
        yield fake_score
        student = copy.deepcopy(teacher).requires_grad_(True)
        yield student
        # Parameters alone. Position embeddings are buffers. If they were rounded, teacher and
        # student would differ before any update.
        for p in teacher.parameters():
            p.data = p.data.to(self.family.dtype)
        yield teacher

    def lora_networks(self):
        """LoRA: the same four. All but the teacher have an adapter and the teacher's weights."""
        from peft import LoraConfig

        teacher = self.family.transformer
        rank = self.args.lora_rank
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=self.family.lora_targets)
        frozen = {id(x): x for x in (*teacher.parameters(), *teacher.buffers())}
        for _ in ("ema", "fake_score", "student"):
            # deepcopy takes what its memo lists as it is: new modules around the teacher's tensors.
            # It also writes to the memo, so each network gets one of its own.
            net = copy.deepcopy(teacher, dict(frozen))
            torch.manual_seed(self.args.seed)  # peft draws from this generator: all start alike
            net.add_adapter(config)
            for p in net.parameters():
                if p.requires_grad:
                    p.data = p.data.float()
            yield net
        yield teacher

    def build(self):
        """Make models of the four networks, and Learners of the two that are trained."""
        args = self.args
        networks = self.full_networks()
        if args.lora_rank:
            networks = self.lora_networks()
        if args.compile:
            # Blocks are compiled anew for each network and batch size, with and without gradients,
            # more often than torch allows by default.
            torch._dynamo.config.recompile_limit = 64
        models = []
        for net in networks:  # each is sharded before the next is made
            if args.compile:
                for block in blocks(net):
                    block.compile()
            if self.world > 1:
                shard(net, blocks(net), self.device)
            models.append(Model(net, self.family))
        ema, fake, student, teacher = models
        if args.gradient_checkpointing:
            student.transformer.enable_gradient_checkpointing()
            fake.transformer.enable_gradient_checkpointing()
        groups = [(fake.parameters(), args.fake_lr)]
        if args.anchor_aware_fake:
            layer = AnchorTime(self.family.empty[-1].shape[-1]).to(self.device)
            if self.world > 1:
                shard(layer, [], self.device)
            fake.anchor_time = layer
            params = {f"anchor_time.{name}": p for name, p in layer.named_parameters()}
            groups.append((params, args.anchor_lr))
        self.teacher = teacher
        self.fake_score = Learner(fake, groups, args)
        self.student = Learner(student, [(student.parameters(), args.student_lr)], args)
        self.ema_model = ema
        self.ema = ema.parameters()

    def stop_soon(self, number, _):
        """Handle a signal: the first one stops after this iteration, the second one now."""
        # Under torchrun a process gets Ctrl-C twice: from the terminal and from the launcher.
        if self.stop and self.world == 1:
            raise KeyboardInterrupt
        if number not in (signal.SIGINT, signal.SIGTERM):  # SIGHUP: the terminal is gone
            sys.stdout = sys.stderr = open(os.devnull, "w")
        if self.rank == 0 and not self.stop:
            again = "; again to stop now" if self.world == 1 else ""
            print(f"\ncdm.py: stopping after this iteration{again}.", file=sys.stderr)
        self.stop = True

    def rehearse(self):
        """Draw an image, as the sample grids will. Raises Mistake if it fails."""
        family = self.family
        advice = "leave out --compile" if self.args.compile else "check its files"
        # With --offload-ema the grids need the most memory, because they bring the EMA.
        model = self.ema_model if self.args.sample_every else self.teacher
        with explained(f"{family.name} cannot draw here", advice), self.on_device(model):
            noise = torch.randn(1, *family.shape, generator=generator("rehearsal"))
            times = uniform_times(2, family.shift)
            images = family.images(model, [noise], times, family.encode(self.prompts[:1]))
            draw_grid([("rehearsal", images)], os.devnull)

    @contextlib.contextmanager
    def on_device(self, model):
        """Inside, a model is on the device. With --offload-ema the EMA is on the CPU otherwise."""
        moves = self.args.offload_ema and model is self.ema_model
        if moves:
            model.transformer.to(self.device)
        yield
        if moves:
            model.transformer.to("cpu")

    def micro_batches(self, k):
        """Iteration k's (cond, uncond, Draw) for this rank, in micro-batches."""
        args = self.args
        family = self.family
        n = args.micro_batch_size
        gen = generator(args.seed, k, "prompts")
        chosen = torch.randint(len(self.prompts), (args.batch_size,), generator=gen)
        first = self.rank * self.batch
        cond = family.encode([self.prompts[j] for j in chosen[first : first + self.batch]])
        batches = []
        for i in range(0, self.batch, n):
            rows = slice(first + i, first + i + n)
            draw = draw_iteration(
                args, args.seed, k, args.batch_size, family.shape, family.shift, rows, self.device
            )
            batches.append((take(cond, slice(i, i + n)), family.uncond(n), draw))
        return batches

    def train(self):
        """Iterate, log, save, sample; at the end, or after a signal, export."""
        args = self.args
        if self.rank == 0:
            self.begin()
        ks = range(self.k + 1, args.iterations + 1)
        bar = tqdm(ks, initial=self.k, total=args.iterations, disable=self.rank > 0)
        seconds = 0.0  # since the last line of the log, without saving and sampling
        for k in bar:
            begun = time.perf_counter()
            batches = self.micro_batches(k)
            stats = cdm_iteration(
                k, batches, self.teacher, self.student, self.fake_score, self.ema, args
            )
            values, stop = self.gather_stats(stats)
            self.k = k
            seconds += time.perf_counter() - begun
            if k % args.student_every == 0 and self.rank == 0:
                bar.set_postfix({n: f"{x:.3g}" for n, x in values.items() if "loss" in n})
                values |= {"N": len(batches[0][2].schedule), "seconds": seconds}
                seconds = 0.0
                with open(self.log_file, "a") as file:
                    file.write(json.dumps({"iteration": k} | values) + "\n")
            last = stop or k == args.iterations
            if last or k % args.save_every == 0:
                self.save()  # before the samples: after a signal there may be little time
            if args.sample_every and (last or k % args.sample_every == 0):
                self.draw_samples()
            if args.export_every and k % args.export_every == 0:
                self.export(self.folder / "students" / f"step_{k:06d}")
            if stop:
                break
        self.export(self.folder / "student")
        if self.rank == 0:
            self.say_what_to_do_next()

    def begin(self):
        """Say what is trained on what. The log starts as it was at the checkpoint."""
        args = self.args
        family = self.family
        print(f"cdm.py: {family.name}, {family.resolution} pixels, shift {family.shift:g},")
        print(f"    {len(self.prompts)} prompts of {args.prompts}, {args.batch_size} an update")
        family.say_what_is_cut(self.prompts)
        if args.export_every:
            size = sum(p.numel() * p.element_size() for p in self.student.params.values()) / 1e9
            print(f"    {args.iterations // args.export_every} students of {size:.2g} GB on disk")
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        for half in self.folder.glob("checkpoint_[0-9]*.tmp"):
            shutil.rmtree(half)  # of a save that was killed
        if self.k:
            print(f"    continuing from iteration {self.k}; later lines of the log are dropped")
        elif args.resume:
            print("    there is no checkpoint yet: from the beginning")
        self.log_file.write_text(self.log)

    def say_what_to_do_next(self):
        """The last lines on the terminal."""
        updates = self.student.updates
        print(f"cdm.py: {self.folder}/student is the student after {updates} updates.")
        if self.args.sample_every:
            print(f"Look at {self.folder}/samples/step_{self.k:06d}.png.")
        example = f"--student {self.folder} --generate {shlex.quote(self.prompts[0])}"
        print(f"Draw with python cdm.py --teacher {self.args.teacher} {example}")
        if self.k < self.args.iterations:
            print("The same command with --resume continues the run.")

    def gather_stats(self, stats):
        """An iteration's values, averaged over ranks, and whether any rank was told to stop."""
        stop = torch.tensor(float(self.stop))
        values = torch.stack([gather(x).float().to(self.device) for x in [*stats.values(), stop]])
        if self.world > 1:
            torch.distributed.all_reduce(values)
        *numbers, stop = (values / self.world).tolist()  # waits for the GPU
        values = dict(zip(stats, numbers, strict=True))
        bad = ", ".join(name for name, x in values.items() if not math.isfinite(x))
        if bad:
            advice = "start again with lower learning rates, --student-lr and --fake-lr"
            found = self.checkpoints()
            if found:
                advice = f"--resume (if that fails, without {found[-1].name}) or {advice}"
            raise Mistake(f"{bad} is not finite at iteration {self.k + 1}: {advice}.")
        return values, stop > 0

    def draw_samples(self):
        """samples/step_NNNNNN.png: the EMA student's images under the teacher's."""
        args = self.args
        family = self.family
        prompts = [self.prompts[i % len(self.prompts)] for i in range(args.sample_count)]
        gens = [generator(args.seed, "sample", i) for i in range(args.sample_count)]
        noise = [torch.randn(1, *family.shape, generator=gen) for gen in gens]
        cond = family.encode(prompts)

        def row(label, model, steps):
            return label, family.images(model, noise, uniform_times(steps, family.shift), cond)

        scale = 1 + args.alpha if args.ca_weight else 1
        guided = family.guided(self.teacher, scale)
        rows = [row(f"teacher, 28 steps, guidance {scale:g}", guided, 28)]
        with self.on_device(self.ema_model):
            for n in args.sample_steps:
                rows.append(row(f"teacher, steps: {n}, no guidance", self.teacher, n))
                rows.append(row(f"student, steps: {n}, iteration {self.k}", self.ema_model, n))
        if self.rank == 0:
            draw_grid(rows, self.folder / "samples" / f"step_{self.k:06d}.png")

    def settings(self):
        """What must be the same in a run and its continuation, except for load()'s may_change."""
        names = [f.name for f in fields(CDM)]
        names += "batch_size micro_batch_size seed lora_rank weights no_t5 device".split()
        flags = {"--" + name.replace("_", "-"): getattr(self.args, name) for name in names}
        return flags | {
            "--teacher": self.identity,
            "--prompts": f"of checksum {zlib.crc32(repr(self.prompts).encode())}",
            "--resolution": self.family.resolution,
            "processes": self.world,
            "threads": torch.get_num_threads(),
        }

    def state(self):
        """Every tensor that training changes, by file and name."""
        files = {"ema": self.ema}
        for role, learner in (("student", self.student), ("fake_score", self.fake_score)):
            files[role] = learner.params
            moments = learner.optimizer.state
            for key in ("exp_avg", "exp_avg_sq", "step"):
                files[f"{role}_{key}"] = {n: moments[p][key] for n, p in learner.params.items()}
        return files

    def checkpoints(self):
        """The checkpoints' folders, oldest first."""
        found = [p for p in self.folder.glob("*") if re.fullmatch(r"checkpoint_\d{6,}", p.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint_")))

    @contextlib.contextmanager
    def replacing(self, path):
        """A folder that appears at `path` whole or not at all: filled elsewhere, then renamed."""
        tmp = path.with_suffix(".tmp")
        # dcp.save() waits for all ranks before it writes and before it returns. So rank 0 has
        # emptied tmp before any rank writes, and renames it after all have.
        if self.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)  # left by a save that was killed
        tmp.mkdir(parents=True, exist_ok=True)
        yield tmp
        if self.rank == 0:
            for file in tmp.rglob("*.safetensors"):
                file.chmod(0o644)  # safetensors lets nobody else read its files
            old = path.with_suffix(".old")
            shutil.rmtree(old, ignore_errors=True)  # as above
            if path.exists():
                path.rename(old)
            tmp.rename(path)
            shutil.rmtree(old, ignore_errors=True)

    def save(self):
        """checkpoint_NNNNNN: torch's distributed checkpoint, each rank its own shards.

        Any number of processes can go on from it. A kill at any moment leaves the last one intact.
        """
        packages = ("torch", "diffusers", "transformers", "peft")
        state = {
            "iteration": self.k,
            "settings": self.settings(),
            "command": sys.argv,
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }
        path = self.folder / f"checkpoint_{self.k:06d}"
        with self.replacing(path) as folder:
            for name, tensors in self.state().items():  # safetensors holds one file in memory
                writer = dcp.HuggingFaceStorageWriter(folder / name, save_distributed=True)
                with own_errors():
                    dcp.save(tensors, storage_writer=writer)
            if self.rank == 0:
                state["files"] = [str(p.relative_to(folder)) for p in folder.rglob("*.safetensors")]
                (folder / "state.json").write_text(json.dumps(state, indent=1))
                shutil.copy(self.log_file, folder)
        if self.rank == 0:
            # Keep this one and the one before. Newer ones are there only if resume() found them
            # damaged.
            found = self.checkpoints()
            first_kept = max(found.index(path) - 1, 0)
            for old in found[:first_kept]:
                shutil.rmtree(old)

    def resume(self):
        """Continue from the newest checkpoint that can be read, if there is one yet."""
        for folder in reversed(self.checkpoints()):
            try:
                self.load(folder)
                return
            except (Mistake, *GPU_ERRORS):
                raise
            except Exception as error:
                print(f"cdm.py: {folder} is damaged, taking the one before: {one_line(error)}")
        lost = self.checkpoints() or (self.folder / "student").exists()
        require(not lost, f"--resume: no checkpoint in {self.folder} can be read.")

    def load(self, folder):
        """Fill every tensor from a checkpoint. Raises Mistake if other settings made it."""
        saved = json.loads((folder / "state.json").read_text())
        now = self.settings()
        may_change = ["--student-lr", "--fake-lr", "--anchor-lr", "threads", "processes"]
        if saved["settings"]["processes"] != self.world:
            may_change.append("--micro-batch-size")  # its default depends on the processes
        for name, was in saved["settings"].items():
            if now[name] != was:
                said = f"--resume: {name} is {now[name]}, and was {was}"
                require(name in may_change, f"{said}: give what it was, or start another run.")
                if self.rank == 0:
                    print(f"cdm.py: {said}.")  # threads and processes: sums agree to rounding
        for name in saved["files"]:  # torch would not notice that the last shard is gone
            safe_open(folder / name, "pt")
        self.log = (folder / self.log_file.name).read_text()
        self.k = saved["iteration"]
        enough = self.k <= self.args.iterations
        require(enough, f"--resume: the run is at {self.k}: give more --iterations.")
        self.fake_score.updates = self.k
        self.student.updates = self.k // self.args.student_every
        for name, tensors in self.state().items():
            with own_errors():
                dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(folder / name))

    @torch.no_grad()
    def export(self, folder):
        """The EMA student as diffusers loads it, and a README that says how."""
        weights = {}
        for name, x in self.ema.items():
            x = gather(x)  # all ranks gather, rank 0 keeps
            if self.rank == 0:
                weights[name] = x.to("cpu", self.student.params[name].dtype)
        if self.rank > 0:
            return
        with self.replacing(folder) as tmp:
            if self.args.lora_rank:
                # The file holds no alpha, so programs assume alpha = rank. Our factor
                # alpha / rank = 2, see lora_networks, goes into B.
                layers = {}
                for name, x in weights.items():
                    layers[f"transformer.{name}"] = 2 * x if "lora_B" in name else x
                save_file(layers, tmp / LORA_FILE, metadata={"format": "pt"})
            else:
                net = self.student.model.transformer
                with torch.device("meta"):  # no weights yet: all are assigned
                    model = type(net).from_config(net.config)
                model.load_state_dict(weights | dict(net.named_buffers()), assign=True)
                if model.config.get("sample_size"):
                    model.register_to_config(sample_size=self.family.shape[-1])
                model.save_pretrained(tmp)
            # What --generate must know besides the weights.
            drawing = {"resolution": self.family.resolution, "no_t5": self.args.no_t5}
            (tmp / "cdm.json").write_text(json.dumps(drawing))
            updates = self.student.updates
            card = self.family.card(folder, self.prompts[0], updates, self.args.lora_rank)
            (tmp / "README.md").write_text(card, encoding="utf-8")


def generate(args, device):
    """--generate: write one PNG for each prompt and number of steps, and print its name."""
    folder = Path(args.student)
    if (folder / "student").is_dir():
        folder = folder / "student"
    found = any((folder / name).is_file() for name in ("config.json", LORA_FILE))
    advice = "give a run's folder, or a student's"
    require(args.student and found, f"--student {args.student!r} has no student: {advice}.")
    if (folder / "cdm.json").exists():
        with explained(f"{folder}/cdm.json cannot be read", "export the student again"):
            trained = json.loads((folder / "cdm.json").read_text())
            args.resolution = args.resolution or int(trained["resolution"])
            args.no_t5 = args.no_t5 or trained["no_t5"]
    family = load_family(args, device, folder)
    family.say_what_is_cut(args.generate)
    schedules = [uniform_times(n, family.shift) for n in args.sample_steps]
    if args.times:
        schedules = [torch.tensor(args.times)]
    model = Model(family.transformer, family)
    noise = torch.randn(1, *family.shape, generator=torch.Generator().manual_seed(args.seed))
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    number = 0
    for prompt, times in itertools.product(args.generate, schedules):
        while any(out.glob(f"{number:04d}_*.png")):  # nothing is overwritten
            number += 1
        path = out / f"{number:04d}_steps{len(times)}_seed{args.seed}.png"
        family.images(model, [noise], times, family.encode([prompt]))[0].save(path)
        print(f"{path}: {prompt}, {family.resolution} pixels")


def train(args, device, rank, world):
    """One process of a run, from loading to the exported student."""
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with explained(f"{world} processes do not meet", "use torchrun, or unset WORLD_SIZE"):
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    lock = FileLock(Path(args.output_dir, "lock"))  # freed with this process, however it ends
    try:
        run = Run(args, device, rank, world)
        signals = [signal.SIGINT, signal.SIGTERM]  # also in a background job, which ignores SIGINT
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signals.append(signal.SIGHUP)  # not on Windows, and not under nohup, which ignores it
        for number in signals:
            signal.signal(number, run.stop_soon)
        if rank == 0:
            lock.acquire(timeout=0)  # makes the folder, too
        if args.resume:
            run.resume()
        run.train()
    finally:
        lock.release(force=True)
    if world > 1:
        torch.distributed.destroy_process_group()


def main(argv=None):
    """Run the command line. Returns the exit code: 0, or 2 after one sentence about a mistake."""
    # Silence notices about optional packages, and about what is meant to be as it is, but not
    # those that name missing or unexpected weights.
    for library in ("TRANSFORMERS", "DIFFUSERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "critical")
    for logger in ("transformers.modeling_utils", "diffusers.models.modeling_utils"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore",
        r"torch.distributed is|barrier\(|local_dir_use_symlinks"
        r"|FSDP2-wrapped module|Mismatch dtype",  # LongCat-Image's blocks and RMS norms
    )
    rank = int(os.environ.get("RANK") or 0)
    world = int(os.environ.get("WORLD_SIZE") or 1)
    local = int(os.environ.get("LOCAL_RANK") or 0)
    everyone = False  # whether all ranks say what went wrong
    try:
        args = parse_args(argv)
        device = torch.device("cuda", local) if args.device == "cuda" else torch.device("cpu")
        if args.generate:
            generate(args, device)
        else:
            train(args, device, rank, world)
        return 0
    except Mistake as mistake:
        everyone = mistake.of_one_process
        sentence = str(mistake)
    except Timeout:
        sentence = f"another process trains in {args.output_dir}: wait, or stop it."
    except (OSError, SafetensorError) as error:
        everyone = True
        sentence = f"{error}: check the path, its permissions and the space left on the disk."
    except torch.OutOfMemoryError:
        everyone = True
        levers = "--offload-text-encoders or --no-t5"
        if not args.generate:
            levers = "--micro-batch-size 1, --offload-text-encoders, --lora-rank 64 or more GPUs"
        sentence = f"the GPU is out of memory: try {levers}; README has what each needs."
    except torch.AcceleratorError as error:
        everyone = True
        sentence = f"the GPU failed: {one_line(error)}: see nvidia-smi, is it used or broken?"
    except KeyboardInterrupt:
        print("cdm.py: stopped at once; what was saved before is kept.", file=sys.stderr)
        return 130
    if everyone or local == 0:  # all ranks make the same Mistake: one on each machine says so
        print(f"cdm.py: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
