"""CDM, Continuous-Time Distribution Matching (arXiv:2605.06376), to be read beside the paper.

CDM distils a flow-matching text-to-image model into a generator that needs 4 steps. It learns from
prompts alone: no images, no GAN, no reward. Teachers: SD3-Medium and LongCat-Image.

    python cdm.py --teacher stabilityai/stable-diffusion-3-medium       # one GPU of 80 GB
    python cdm.py --teacher ... --lora-rank 64 --offload-text-encoders  # one GPU of 24 GB
    torchrun --standalone --nproc_per_node=8 cdm.py --teacher ...       # many GPUs, FSDP2

Section 1 is the algorithm, in torch alone and for any model; toy_2d.py imports it.
Section 2 connects it to two model families of diffusers. Section 3 runs it.

Notation, and where it is in the paper and in the code. t = 0 is data, t = 1 is noise, c is the
prompt, uncond the empty one, sg[] stops the gradient.

    x_t = (1 - t) x_0 + t noise    the straight path from data to noise      add_noise
    v(x_t, t, c)                   velocity, an estimate of noise - x_0
    D(x_t, t, c), x0_hat           clean estimate, x_t - t v      Eq. 1      clean_estimate
    v_theta, D_theta               the few-step generator                    student
    v_real, D_real                 the pretrained model                      teacher
    v_phi, D_fake                  learns the student's samples              fake_score
    theta_bar                      the student's moving average              ema, average_into
    1 = t_1 > ... > t_N > 0        dynamic schedule               sec. 3.2   sample_schedule
    x_{t_i}, t_i                   anchor, on the trajectory      sec. 3.2   backward_simulation
    x_{t'}, t'                     off-trajectory point           Eq. 7      off_trajectory_point
    z = (1 - tau) sg[x0_hat] + tau noise   x0_hat noised again, to time tau  add_noise
    w                              weight of a sample                        dmd_weight
    sg[x0_hat + w delta]           pseudo-target                             pseudo_target_loss
    L_CA                           CFG augmentation by alpha      Eqs. 3-4   ca_loss
    L_DM                           distribution matching          Eqs. 3-4   dm_loss
    L_CDM                          the same at x_{t'}             sec. 3.3   dm_loss
    L_fake                         flow matching on x0_hat                   fake_score_loss
    phi <- beta phi + (1 - beta) theta   the fake score is pulled            average_into
    L = L_CA + L_DM + L_CDM        one iteration                             cdm_iteration

What differs from the authors' release: prompts are drawn with replacement, by default from 2,016
short ones, theirs without, from 200,000 captions. The EMA is float32, theirs bf16 by our reading.
All processes share a schedule's inner times, theirs draw their own. Warm-up takes 100 updates,
theirs 14 on 8 processes. Each LoRA is a network around the teacher's weights, theirs share one.
"""

import contextlib
import copy
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

# ==== 1. The algorithm ============================================================================
#
# A model is any callable model(x_t, t, cond) -> v. Shapes, here and below:
#     x_t, v  (B, ...) latents      t  (B,) times in [0, 1]      cond  a tuple of (B, ...) tensors
# SD3-Medium at 1024 x 1024: x_t is (B, 16, 128, 128), and cond is the text (B, 333, 4096) and the
# pooled text (B, 2048). 333 are 77 CLIP and 256 T5 tokens.


def per_sample(t, x):
    """Reshape t, (B,) or (), so that it broadcasts against x, (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def take(cond, rows):
    """The given rows of a condition: a slice or indices."""
    return tuple(c[rows] for c in cond)


def repeat(cond, n):
    """A condition of one sample, (1, ...) tensors, for n samples."""
    return tuple(c.expand(n, *c.shape[1:]) for c in cond)


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


def sampling_times(steps, shift=1.0):
    """(steps,) times 1, 1 - 1/steps, ..., 1/steps, shifted. sampling_times(4, 3): 1, .9, .75, .5"""
    return shift_times(1 - torch.arange(steps) / steps, shift)


def sample_schedule(max_steps, low, high, shift=1.0, stratified=False, generator=None):
    """Draw N ~ U{1..max_steps} and times 1 = t_1 > t_2 > ... > t_N > 0.  (sec. 3.2)

    The inner times are U[low, high], then all times are shifted. Stratified draws one inner time in
    each of N - 1 equal bins (the authors' later advice). Returns (N,) times on the CPU.
    """
    n = int(torch.randint(1, max_steps + 1, (), generator=generator))
    u = torch.rand(n - 1, generator=generator)
    if stratified:
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

    noise: (B, ...), x at t_1 = 1; schedule: (N,) times; index: (B,) of the anchor, from 0, where
    the paper's i is from 1. Both are on the CPU, so that reading them does not wait for the GPU.
    Samples past their anchor are not evaluated: sum(index + 1) evaluations in all.
    """
    x = noise.clone()
    v = torch.zeros_like(noise)
    times = schedule.to(noise)
    last = int(index.max())
    for i in range(last + 1):
        # rows: samples that still have to reach their anchor. The others keep their anchor's x, v.
        rows = (index >= i).nonzero()[:, 0].to(noise.device)
        if i > 0:
            x[rows] = euler_step(x[rows], times[i - 1], times[i], v[rows])
        v[rows] = student(x[rows], times[i].expand(len(rows)), take(cond, rows))
    # FSDP gathers weights in every call, so all processes must make the same number of calls. These
    # fill up to the schedule's length, for one sample each, and nobody looks at their results.
    if torch.distributed.is_initialized():
        for t in times[last + 1 :]:
            student(x[:1], t.expand(1), take(cond, slice(1)))
    return Anchor(x, schedule[index].to(noise), v)


@torch.no_grad()
def sample(model, noise, times, cond):
    """Few-step generation: noise to x0, (B, ...), by Euler steps along (N,) times and then to 0."""
    x = noise
    times = torch.cat([times, torch.zeros(1)]).to(noise)
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = euler_step(x, t, s, model(x, t.expand(len(x)), cond))
    return x


# The losses. The student's (Eqs. 3-4; sec. 3.3) are pseudo-target regressions: x0_hat carries its
# gradient and is pulled towards sg[x0_hat + w delta]. They return a scalar and w, (B,).
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

    It carries the guidance: it moves x0_hat to where the prompt makes a difference. tau: (B,),
    bounded by the anchor's time, so that it does not disturb what the simulation has settled.
    """
    with torch.no_grad():
        z = add_noise(x0_hat, tau, noise)
        d_cond = clean_estimate(z, tau, teacher(z, tau, cond))
        d_uncond = clean_estimate(z, tau, teacher(z, tau, uncond))
        w = dmd_weight(d_cond, x0_hat)  # of the conditional estimate, not of the guided one
    return pseudo_target_loss(x0_hat, alpha * (d_cond - d_uncond), w), w


def dm_loss(x0_hat, teacher, fake_score, cond, tau, noise):
    """L_DM, distribution matching: delta = D_real(z, c) - D_fake(z, c).  (Eqs. 3-4)

    It keeps samples on the data. By Tweedie's formula delta is tau^2 / (1 - tau) (s_real - s_fake),
    the DMD direction. L_CDM (sec. 3.3) is this function with x0_hat from the off-trajectory point:
    it keeps estimates on the data from any point and time, visited by a schedule or not.
    """
    with torch.no_grad():
        z = add_noise(x0_hat, tau, noise)
        d_real = clean_estimate(z, tau, teacher(z, tau, cond))
        d_fake = clean_estimate(z, tau, fake_score(z, tau, cond))
        w = dmd_weight(d_real, x0_hat)
    return pseudo_target_loss(x0_hat, d_real - d_fake, w), w


def fake_score_loss(fake_score, x0_hat, cond, tau, noise):
    """L_fake = || v_phi(z, tau, c) - (noise - x0_hat) ||^2: flow matching on student samples."""
    x0_hat = x0_hat.detach()
    z = add_noise(x0_hat, tau, noise)
    return F.mse_loss(fake_score(z, tau, cond), noise - x0_hat)


@dataclass
class CDMConfig:
    """The method, with the defaults that the authors published for SD3-Medium: by our reading for
    bf16 weights. Which version gave the paper's numbers is not known."""

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
    index: torch.Tensor  # (B,) anchor index, shared by the fake score and all losses; on the CPU
    t_off: torch.Tensor  # (B,) t', the time of the off-trajectory point
    tau: dict  # (B,) for each of "ca", "dm", "cdm", "fake": the time of its re-noising
    noise: dict  # (B, ...) for the same names, and for "start": x at t = 1


def generator(*key, device="cpu"):
    """A torch.Generator that depends on its key alone, such as (seed, iteration, name)."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


def draw_iteration(cfg, seed, k, batch, shape, shift=1.0, rows=slice(None), device="cpu"):
    """The Draw of iteration k = 1, 2, ... for a part of the batch.

    batch: samples over all processes, of which rows are drawn; shape: of one; shift: of schedule
    times. A sample's draws do not depend on the rows. Draws of a new name change no other draw.
    """
    gen = generator(seed, k, "schedule")
    if cfg.schedule == "dynamic":
        schedule = sample_schedule(
            cfg.max_schedule_steps, cfg.time_low, cfg.time_high, shift, cfg.stratified, gen
        )
    else:
        schedule = sampling_times(4, shift)
    index = torch.randint(len(schedule), (batch,), generator=gen)[rows]

    def uniform(name):
        gen = generator(seed, k, "time", name, device=device)
        return 1 - torch.rand(batch, generator=gen, device=device)[rows]  # on (0, 1]

    def normal(name):
        gen = generator(seed, k, "noise", name, device=device)
        # Cloned, because a view would keep the whole batch's memory.
        return torch.randn(batch, *shape, generator=gen, device=device)[rows].clone()

    # tau ~ U(0, 1], but in L_CA tau ~ U(0, t_i): bounded by the anchor's own time.
    tau = {name: uniform(name) for name in ("ca", "dm", "cdm", "fake")}
    tau["ca"] *= schedule[index].to(device)
    # A small time_low allows t_i below tau_min. There the clamp lifts L_CA's tau above t_i.
    tau = {name: t.clamp(cfg.tau_min, cfg.tau_max) for name, t in tau.items()}
    noise = {name: normal(name) for name in ("start", *tau)}

    t_off = uniform("off").clamp(cfg.tau_min, cfg.tau_max)  # t' ~ U(0, 1], whatever the schedule
    if cfg.cdm_point == "renoise":
        noise["off"] = normal("off")
    return Draw(schedule, index, t_off, tau, noise)


class Learner:
    """A network in training: AdamW, linear warm-up, gradient clipping. params: tensors by name."""

    def __init__(self, model, params, lr, cfg):
        self.model = model
        self.params = params
        self.lr = lr
        self.cfg = cfg
        self.updates = 0
        decay = cfg.weight_decay
        self.optimizer = torch.optim.AdamW(params.values(), weight_decay=decay, fused=True)
        # AdamW makes its state at its first step. It is made here, so that resume() can fill it.
        for p in params.values():
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = moments | {"step": torch.zeros((), device=p.device)}

    def tensors(self):
        """All that training changes: the weights and AdamW's state, as live tensors by name."""
        state = {name: self.optimizer.state[p] for name, p in self.params.items()}
        return {"weights": self.params, "adamw": state}

    def step(self):
        """Clip, update and free the gradients. Returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), self.cfg.clip)
        self.updates += 1
        warm = min(1.0, self.updates / max(self.cfg.warmup, 1))
        self.optimizer.param_groups[0]["lr"] = warm * self.lr
        self.optimizer.step()
        # This frees them: student and fake score never hold gradients at the same time.
        self.optimizer.zero_grad()
        return norm


@torch.no_grad()
def average_into(params, others, decay):
    """p <- decay p + (1 - decay) other, in place, for each name in `others`. 0: a copy."""
    for name, other in others.items():
        p = params[name]
        p.lerp_(other.to(p.device, p.dtype), 1 - decay)


def off_trajectory_point(anchor, draw, cfg):
    """x_{t'} and t', where L_CDM looks.  (sec. 3.3, Eq. 7, and two of the paper's ablations)"""
    if cfg.cdm_point == "anchor":  # ablation: stay on the trajectory
        return anchor.x_t, anchor.t
    if cfg.cdm_point == "renoise":  # ablation: noise the clean estimate again
        x0_hat = clean_estimate(anchor.x_t, anchor.t, anchor.v)
        return add_noise(x0_hat, draw.t_off, draw.noise["off"]), draw.t_off
    # Eq. 7: along the velocity that backward simulation recorded, to any time t'.
    return euler_step(anchor.x_t, anchor.t, draw.t_off, anchor.v), draw.t_off


def cdm_iteration(k, cond, uncond, draw, teacher, student, fake_score, ema, cfg, micro_batch=0):
    """Iteration k = 1, 2, ...: simulate, update the fake score, and every R-th time the student.

    cond: of the B samples; uncond: of one; teacher: a model; student, fake_score: Learners; ema:
    tensors by name; micro_batch: samples per pass with gradient, 0: all. Returns scalars to log.
    """
    batch = len(draw.index)
    size = micro_batch or batch
    parts = [slice(i, i + size) for i in range(0, batch, size)]
    tau, noise = draw.tau, draw.noise
    stats = {"N": torch.tensor(float(len(draw.schedule)))}

    def record(share, **values):
        for name, value in values.items():
            stats[name] = stats.get(name, 0) + share * value.detach()

    # Backward simulation (sec. 3.2): each sample to its anchor, without gradient.
    anchor = backward_simulation(student.model, noise["start"], draw.schedule, draw.index, cond)

    # Fake score, in every iteration: flow matching on the student's clean estimates, Eq. 1 with the
    # recorded velocity. share: a part's fraction of the batch, whose mean the parts add up to.
    x0_hat = clean_estimate(anchor.x_t, anchor.t, anchor.v)
    for rows in parts:
        x0, c = x0_hat[rows], take(cond, rows)
        share = len(x0) / batch
        loss = fake_score_loss(fake_score.model, x0, c, tau["fake"][rows], noise["fake"][rows])
        (share * loss).backward()
        record(share, loss_fake=loss)
    stats["grad_norm_fake"] = fake_score.step()
    # phi is pulled to theta. In bf16 most of this rounds away, in the released code too by our
    # reading. With LoRA the factors A and B are averaged, not their product.
    average_into(fake_score.params, student.params, cfg.fake_pull)
    if k % cfg.student_every != 0:
        return stats

    # Student, in every R-th iteration: L = L_CA + L_DM + L_CDM, one graph in memory at a time.
    x_off, t_off = off_trajectory_point(anchor, draw, cfg)
    for rows in parts:
        # L_CA and L_DM at the anchor, from one evaluation of the student.
        c = take(cond, rows)
        x_t, t = anchor.x_t[rows], anchor.t[rows]
        share = len(t) / batch
        at = {name: (tau[name][rows], noise[name][rows]) for name in tau}
        x0_hat = clean_estimate(x_t, t, student.model(x_t, t, c))
        ca, w_ca = ca_loss(x0_hat, teacher, c, repeat(uncond, len(t)), *at["ca"], cfg.alpha)
        dm, w_dm = dm_loss(x0_hat, teacher, fake_score.model, c, *at["dm"])
        (share * (cfg.ca_weight * ca + cfg.dm_weight * dm)).backward()
        record(share, loss_ca=ca, w_ca=w_ca.mean(), loss_dm=dm, w_dm=w_dm.mean())
        # L_CDM at the off-trajectory point, from a second evaluation.
        if cfg.cdm_weight:
            x_t, t = x_off[rows], t_off[rows]
            x0_hat = clean_estimate(x_t, t, student.model(x_t, t, c))
            cdm, w_cdm = dm_loss(x0_hat, teacher, fake_score.model, c, *at["cdm"])
            (share * cfg.cdm_weight * cdm).backward()
            record(share, loss_cdm=cdm, w_cdm=w_cdm.mean())
    n = student.updates  # those before this one
    stats["grad_norm_student"] = student.step()
    average_into(ema, student.params, min((1 + n) / (10 + n), cfg.ema_decay))  # theta_bar
    return stats


# ==== 2. Model families: a diffusers pipeline as the algorithm needs it ===========================

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"
RANK = int(os.environ.get("RANK", 0))  # torchrun's: the number of this process,
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # and how many there are


def require(condition, sentence):
    """Unless it holds, say in one sentence what the user can correct, and exit with code 2."""
    if not condition:
        if RANK == 0:  # all processes find the same
            print(f"cdm.py: {' '.join(sentence.split())}", file=sys.stderr)
        sys.exit(2)


class Family:
    """A loaded pipeline. A new family defines embed, velocity and call_options as SD3 does, and is
    named in load_family. Also look at patch in here, shard, and the targets in make_learner."""

    skip = ()  # parts of the pipeline that are not loaded

    def __init__(self, pipe, absent, args):
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        pipe.transformer.requires_grad_(False)
        self.pipe = pipe
        self.absent = absent  # {name: None} of the parts that were not loaded
        self.bf16 = pipe.dtype == torch.bfloat16
        patch = 2 * pipe.vae_scale_factor  # pixels of a token's side: a token is 2 x 2 latents
        self.resolution = args.resolution or pipe.default_sample_size * pipe.vae_scale_factor
        require(self.resolution % patch == 0, f"--resolution must be a multiple of {patch}.")
        side = self.resolution // patch  # in tokens
        self.shape = (pipe.vae.config.latent_channels, 2 * side, 2 * side)  # of latents
        self.offloaded = []  # tensors of text encoders that are on the GPU only in encode()
        for name, part in pipe.components.items():
            if name.startswith("tokenizer") and part:  # without its files it reads all words alike
                fox, cat = part(["fox", "cat"], truncation=True).input_ids
                require(fox != cat, f"the teacher's {name} is not complete: copy its files again.")
            if name.startswith("text_encoder") and part and args.offload_text_encoders:
                self.offloaded += [*part.parameters(), *part.buffers()]
            elif isinstance(part, torch.nn.Module):
                part.to(DEVICE)
        if DEVICE == "cuda":
            for x in self.offloaded:
                x.data = x.data.pin_memory()
        self.uncond = self.encode([""])  # of one sample
        self.strips = {}  # rows of the sample grid, by their labels

        # The shift of the teacher's scheduler, which must do nothing else with the times. A dynamic
        # one is e^mu, where mu is linear in the number of image tokens.
        config = pipe.scheduler.config
        lengths = (config.base_image_seq_len, config.max_image_seq_len)
        mu = calculate_shift(side**2, *lengths, config.base_shift, config.max_shift)
        self.shift = math.exp(mu) if config.use_dynamic_shifting else config.shift
        pipe.scheduler.set_timesteps(sigmas=sampling_times(4).tolist(), mu=mu)
        plain = torch.allclose(pipe.scheduler.sigmas[:-1], sampling_times(4, self.shift))
        require(plain, "the teacher's scheduler does more than shift the times: give a plain one.")

    @torch.no_grad()
    def encode(self, prompts):
        """A list of prompts -> cond."""
        home = [x.data for x in self.offloaded]
        for x in self.offloaded:
            x.data = x.data.to(DEVICE, non_blocking=True)
        cond = self.embed(prompts)
        for x, data in zip(self.offloaded, home, strict=True):
            x.data = data  # nothing is copied back
        return cond

    def predict(self, net, x_t, t, cond, guidance=1.0):
        """A transformer's v; partial(predict, net) is a model. guidance: the scale of CFG."""
        # No autocast cache: it would keep a bf16 copy of every float32 weight that trains.
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            v = self.velocity(net, x_t, t, cond).float()
            if guidance != 1:
                v_empty = self.velocity(net, x_t, t, repeat(self.uncond, len(x_t))).float()
                v = v_empty + guidance * (v - v_empty)
        return v

    @torch.no_grad()
    def image(self, model, noise, steps, cond):
        """The PIL image that a model draws in some steps. noise: (1, C, h, w)."""
        x0 = sample(model, noise.to(DEVICE), sampling_times(steps, self.shift), cond)
        vae = self.pipe.vae
        latents = x0 / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        pixels = vae.decode(latents.to(vae.dtype)).sample.float()
        return self.pipe.image_processor.postprocess(pixels, output_type="pil")[0]


class SD3(Family):
    """Stable Diffusion 3 and 3.5. cond: text (B, tokens, width), pooled (B, width) embeddings."""

    @property
    def call_options(self):
        """Of the pipeline's call: the authors' 256 T5 tokens, fewer if T5's tokenizer says so."""
        return {"max_sequence_length": min(256, self.pipe.tokenizer_3.model_max_length)}

    def embed(self, prompts):
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, **self.call_options
        )
        return text, pooled

    def velocity(self, net, x_t, t, cond):
        text, pooled = cond
        return net(x_t, text, pooled, 1000 * t, return_dict=False)[0]  # SD3 counts time to 1000


class LongCatImage(Family):
    """LongCat-Image. cond: text embeddings (B, 512, width) alone."""

    skip = ("text_processor",)  # it rewrites prompts
    call_options = {"enable_prompt_rewrite": False}

    def embed(self, prompts):
        self.pipe.text_encoder.lm_head = torch.nn.Identity()  # nobody needs its logits
        # The ids, (512, 3), are positions: token i has (0, i, i), whatever the prompt.
        text, self.text_ids = self.pipe.encode_prompt(prompts)
        return (text,)

    def velocity(self, net, x_t, t, cond):
        (text,) = cond
        tokens = F.pixel_unshuffle(x_t, 2)  # (B, 4 C, h / 2, w / 2)
        position = text.shape[1] + torch.arange(tokens.shape[-1], device=x_t.device)
        one = torch.ones_like(position[:1])  # image tokens are 1, row, column
        ids = torch.cartesian_prod(one, position, position)
        # The network multiplies t by 1000.
        v = net(tokens.flatten(2).mT, text, t, ids, self.text_ids, return_dict=False)[0]
        return F.pixel_shuffle(v.mT.reshape(tokens.shape), 2)


def load_family(args):
    """--teacher, a hub id or a folder, as its family."""
    from diffusers import DiffusionPipeline

    families = {"StableDiffusion3Pipeline": SD3, "LongCatImagePipeline": LongCatImage}
    if args.teacher == "stabilityai/stable-diffusion-3-medium":
        args.teacher += "-diffusers"  # the other holds single-file checkpoints only
    try:
        index = DiffusionPipeline.load_config(args.teacher)  # model_index.json
    except OSError as error:
        require(False, f"--teacher {args.teacher} is no folder and no hub id: {error}")
    family = families.get(index["_class_name"])
    require(family, f"--teacher is a {index['_class_name']}: give a {' or a '.join(families)}.")
    absent = dict.fromkeys(family.skip)
    if args.no_t5:  # its tokenizer stays: call_options reads the length from it
        absent["text_encoder_3"] = None
    # What does not train is bf16 on a GPU, whatever --weights says.
    dtype = torch.bfloat16 if DEVICE == "cuda" else getattr(torch, args.weights)
    pipe = DiffusionPipeline.from_pretrained(args.teacher, dtype=dtype, **absent)
    return family(pipe, absent, args)


# ==== 3. Running: flags, networks, sample grids, checkpoints, the exported student, the loop ======


@dataclass
class Settings(CDMConfig):
    """Everything that the command line sets: the method, the run, memory and speed."""

    teacher: str = "stabilityai/stable-diffusion-3-medium"  # hub id or pipeline folder
    prompts: str = str(Path(__file__).parent / "assets" / "prompts.txt")  # one prompt a line
    output_dir: str = "runs/cdm"  # log, samples, checkpoints, student
    iterations: int = 4000  # outer iterations, that is, fake-score updates
    batch_size: int = 16 * WORLD  # samples per update over all GPUs
    resolution: int = 0  # pixels, square; 0: the teacher's own
    seed: int = 0  # of all draws
    lora_rank: int = 0  # 0: full fine-tuning; the authors' LoRA has rank 64
    weights: Literal["bfloat16", "float32"] = DTYPE  # of what trains; a LoRA is always float32
    no_t5: bool = False  # leave out T5, 9.5 GB in bf16
    resume: bool = False  # continue the run in --output-dir
    save_every: int = 500  # iterations between checkpoints, of which the newest two are kept
    export_every: int = 0  # iterations between exported students, all kept; 0: the last one only
    sample_every: int = 500  # iterations between sample grids; 0: none
    sample_count: int = 8  # images in a row of the sample grid
    sample_steps: list[int] = field(default_factory=lambda: [4])  # of the grid's few-step rows
    micro_batch_size: int = 4 if DEVICE == "cuda" else 0  # samples per pass with gradient; 0: all
    gradient_checkpointing: bool = True  # recompute activations in the backward pass
    offload_text_encoders: bool = False  # keep text encoders on the CPU between uses
    ema_device: Literal["cuda", "cpu"] = DEVICE  # cpu: saves GPU memory, costs seconds an update


def parse_args(argv=None):
    """Settings from the command line, checked: a flag for each field, with its comment as help."""
    from transformers import HfArgumentParser

    # A dataclass does not keep its comments, so this file is read: "name: type = default  # help".
    source = Path(__file__).read_text(encoding="utf-8")
    for name, comment in re.findall(r"^    (\w+): .* = .*  # (.*)", source, re.M):
        Settings.__dataclass_fields__[name].metadata = {"help": comment}
    parser = HfArgumentParser(Settings, usage="cdm.py [--flag value ...]", allow_abbrev=False)
    args = Settings(**vars(parser.parse_args(argv)))

    counts = "iterations save_every sample_count batch_size student_every max_schedule_steps"
    for name, value in vars(args).items():
        if type(value) in (int, float):
            low = 1 if name in counts.split() else 0
            require(low <= value < math.inf, f"--{name.replace('_', '-')} must be at least {low}.")
    require(args.batch_size % WORLD == 0, f"--batch-size must be a multiple of {WORLD} processes.")
    fresh = not any(Path(args.output_dir).glob("*"))
    require(args.resume or fresh, "--output-dir is not empty: add --resume, or choose another.")
    return args


def shard(net):
    """FSDP2: shard a network over all processes, block by block, in place. Returns it."""
    if WORLD == 1:
        return net
    # Inputs are not cast: SD3's timestep near 1000 would be off by up to 2 in bf16.
    compute = torch.bfloat16 if DEVICE == "cuda" else None
    policy = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in [*net.transformer_blocks, *getattr(net, "single_transformer_blocks", []), net]:
        # The root too, which by default keeps what it gathered: average_into edits the shards.
        fully_shard(part, mp_policy=policy, reshard_after_forward=True)
    return net


def make_learner(family, lr, args):
    """A Learner that starts as the teacher: a copy of it, or a LoRA around its own weights."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    teacher = family.pipe.transformer
    if args.lora_rank:
        # The memo keeps deepcopy from copying parameters: new modules, the teacher's own weights.
        net = copy.deepcopy(teacher, {id(p): p for p in teacher.parameters()})
        torch.manual_seed(args.seed)  # student, fake score and all processes start from one A
        rank = args.lora_rank
        targets = (  # the authors' for SD3: attention and feed-forward, of image and text
            "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj "
            "attn.add_v_proj attn.to_add_out ff.net.0.proj ff.net.2 ff_context.net.0.proj "
            "ff_context.net.2"
        ).split()
        net.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        for module in net.modules():
            if isinstance(module, LoraLayer):  # inputs would be copied to float32, then cast back
                module.cast_input_dtype_enabled = False
    else:
        net = copy.deepcopy(teacher).requires_grad_(True)
    cast_training_params(net, torch.float32 if args.lora_rank else getattr(torch, args.weights))
    if args.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    shard(net)
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    return Learner(partial(family.predict, net), params, lr, args)


def full(x):
    """Gather a sharded tensor from all processes; return any other tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def sample_grid(k, family, student, ema, cond, args):
    """samples/step_NNNNNN.png: images of the EMA student under those of the teacher."""
    n = args.sample_count
    side = min(384, 3 * family.resolution)  # pixels of an image in the grid
    scale = 1 + args.alpha if args.ca_weight else 1
    teacher = partial(family.predict, family.pipe.transformer)
    rows = [(f"teacher, steps: 28, guidance {scale:g}", partial(teacher, guidance=scale), 28)]
    for steps in args.sample_steps:
        rows.append((f"teacher, steps: {steps}, no guidance", teacher, steps))
        rows.append((f"student, steps: {steps}", student.model, steps))

    # The student's network has the EMA's weights while it draws.
    own = {name: p.detach().clone() for name, p in student.params.items()}
    average_into(student.params, ema, decay=0)
    grid = Image.new("RGB", (side * n, (side + 20) * len(rows)))
    for y, (label, model, steps) in enumerate(rows):
        if model is student.model or label not in family.strips:  # the teacher's never change
            strip = Image.new("RGB", (side * n, side + 20), "white")
            ImageDraw.Draw(strip).text((2, 2), label, fill="black", font_size=13)
            for i in range(n):
                noise = torch.randn(1, *family.shape, generator=generator(args.seed, "sample", i))
                image = family.image(model, noise, steps, take(cond, slice(i, i + 1)))
                strip.paste(image.resize((side, side), Image.Resampling.BOX), (i * side, 20))
            family.strips[label] = strip
        grid.paste(family.strips[label], (0, y * (side + 20)))
    average_into(student.params, own, decay=0)
    if RANK == 0:
        grid.save(Path(args.output_dir, "samples", f"step_{k:06d}.png"))


def save(k, tensors, args):
    """checkpoint_NNNNNN, each process its own shards. It appears whole or not at all."""
    folder = Path(args.output_dir)
    unfinished = folder / "unfinished"
    if RANK == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a save that was killed
    dcp.save(tensors, checkpoint_id=unfinished)  # waits for all processes before it writes
    if RANK > 0:
        return
    (unfinished / "run.json").write_text(json.dumps(vars(args) | {"k": k}, indent=1))
    unfinished.rename(folder / f"checkpoint_{k:06d}")
    for old in sorted(folder.glob("checkpoint_[0-9]*"))[:-2]:
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():  # a network file system may refuse
            print(f"cdm.py: {old} could not be removed, and stays.", file=sys.stderr)


def resume(tensors, args):
    """Fill the tensors from the newest checkpoint, made with the same settings. Returns its k."""
    folder = max(Path(args.output_dir).glob("checkpoint_[0-9]*"), default=None)
    require(
        folder, f"--resume: no checkpoint is in {args.output_dir}: start without, in a new folder."
    )
    saved = json.loads((folder / "run.json").read_text())
    k = saved.pop("k")
    unlike = ", ".join(sorted(saved.keys() ^ vars(args).keys()))
    require(not unlike, f"--resume: {folder} is of another version of cdm.py, see {unlike}.")
    same = "teacher prompts batch_size resolution seed lora_rank weights no_t5".split()
    for name in [*vars(CDMConfig()), *same]:
        now, was = getattr(args, name), saved[name]
        require(now == was, f"--resume: --{name.replace('_', '-')} is {now}, and was {was}.")
    dcp.load(tensors, checkpoint_id=folder)
    if RANK == 0:  # the log has a line for each student update
        log = folder.parent / "log.jsonl"
        log.touch()  # there is none before the first student update
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(lines[: k // args.student_every]))
    return k


def export(folder, family, student, ema, prompt, args):
    """The EMA student as diffusers loads it, and a README that says how."""
    weights = {}
    for name, x in ema.items():  # all processes gather
        weights[name] = full(x).to("cpu", student.params[name].dtype)
    if RANK > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if args.lora_rank:
        load = "pipe.transformer.load_lora_adapter(student, use_safetensors=True)"
        # The file holds no alpha, so programs assume alpha = rank. Our factor alpha / rank = 2, see
        # make_learner, goes into B. peft's adapter is called "default".
        layers = {}
        for name, x in weights.items():
            name = "transformer." + name.replace(".default.", ".")
            layers[name] = 2 * x if "lora_B" in name else x
        save_file(layers, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})
    else:
        load = "pipe.transformer = diffusers.AutoModel.from_pretrained(student, dtype=dtype)"
        teacher = family.pipe.transformer
        with torch.device("meta"):  # no weights yet: all are assigned
            net = type(teacher).from_config(teacher.config)
        net.load_state_dict(weights | dict(teacher.named_buffers()), assign=True)
        net.save_pretrained(folder)
    options = {"height": family.resolution, "width": family.resolution, "guidance_scale": 1.0}
    readme = f"""The EMA after {student.updates} student updates of CDM (arXiv:2605.06376), which
distils {args.teacher} into few steps. The teacher's licence holds.

    import diffusers, torch

    teacher, student, dtype = "{args.teacher}", "{folder}", torch.bfloat16
    pipe = diffusers.DiffusionPipeline.from_pretrained(teacher, dtype=dtype, **{family.absent})
    {load}
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    times = [1.0, 0.75, 0.5, 0.25]  # others work, too; the scheduler shifts them
    options = {options | family.call_options}
    pipe({prompt!r}, num_inference_steps=4, sigmas=times, **options).images[0].save("image.png")
"""
    (folder / "README.md").write_text(readme, encoding="utf-8")


def run_iteration(k, prompts, family, networks, stop, args):
    """Iteration k of this process. Returns means over all processes: what is logged, and stop."""
    total = args.batch_size
    rows = slice(total * RANK // WORLD, total * (RANK + 1) // WORLD)
    gen = generator(args.seed, k, "prompts")
    chosen = torch.randint(len(prompts), (total,), generator=gen)[rows]
    cond = family.encode([prompts[j] for j in chosen])
    draw = draw_iteration(args, args.seed, k, total, family.shape, family.shift, rows, DEVICE)
    stats = cdm_iteration(k, cond, family.uncond, draw, *networks, args, args.micro_batch_size)
    stats["stop"] = stop
    values = torch.stack([full(x).float().to(DEVICE) for x in stats.values()])
    if WORLD > 1:
        torch.distributed.all_reduce(values)
    return dict(zip(stats, (values / WORLD).tolist(), strict=True))  # waits for the GPU


def main(argv=None):
    """One process of a run, from the command line to the exported student."""
    args = parse_args(argv)
    require(Path(args.prompts).is_file(), f"--prompts {args.prompts} is not a file.")
    lines = Path(args.prompts).read_text(encoding="utf-8-sig").split("\n")
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    require(prompts, f"--prompts {args.prompts} holds no prompt: give one a line.")
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo")
    family = load_family(args)
    student = make_learner(family, args.student_lr, args)
    fake_score = make_learner(family, args.fake_lr, args)
    teacher = partial(family.predict, shard(family.pipe.transformer))  # after it was copied
    ema = {}
    for name, p in student.params.items():  # in bf16 small steps would round away
        ema[name] = p.detach().to(args.ema_device, torch.float32, copy=True)

    # tensors is all that training changes, and every draw follows from seed, k and the prompts. So
    # a resumed run goes on as if it had not stopped: on a CPU bit for bit, on another number of
    # processes, which sum in another order, to rounding.
    tensors = {"ema": ema, "student": student.tensors(), "fake_score": fake_score.tensors()}
    done = resume(tensors, args) if args.resume else 0
    fake_score.updates = done
    student.updates = done // args.student_every

    stop = torch.zeros(())  # a tensor: run_iteration averages it over processes

    def stop_soon(number, _):
        """A signal stops the run after this iteration. A second one kills it."""
        signal.signal(number, signal.SIG_DFL)
        stop.fill_(1)

    signal.signal(signal.SIGINT, stop_soon)
    signal.signal(signal.SIGTERM, stop_soon)
    folder = Path(args.output_dir)
    if WORLD > 1:
        torch.distributed.barrier()  # nothing is written before all have come this far
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    grid_cond = family.encode([prompts[i % len(prompts)] for i in range(args.sample_count)])
    if args.sample_every:  # the picture before training, and an early test of drawing
        sample_grid(done, family, student, ema, grid_cond, args)
    seconds = 0
    bar = tqdm(initial=done, total=args.iterations, disable=RANK > 0)
    for k in range(done + 1, args.iterations + 1):
        began = time.perf_counter()
        values = run_iteration(k, prompts, family, (teacher, student, fake_score, ema), stop, args)
        seconds += time.perf_counter() - began
        stopped = values.pop("stop") > 0
        last = stopped or k == args.iterations
        finite = all(map(math.isfinite, values.values()))
        require(finite, f"not finite at iteration {k}, try lower learning rates: {values}")
        if k % args.student_every == 0 and RANK == 0:
            losses = {name: f"{x:.3g}" for name, x in values.items() if "loss" in name}
            bar.set_postfix(losses, refresh=False)
            values["samples_per_second"] = args.student_every * args.batch_size / seconds
            seconds = 0
            with open(folder / "log.jsonl", "a") as file:
                file.write(json.dumps({"iteration": k} | values) + "\n")
        with contextlib.suppress(BrokenPipeError):  # `2>&1 | tee log`: Ctrl-C also ends tee
            bar.update()
        if last or k % args.save_every == 0:
            save(k, tensors, args)  # before the samples: after a signal there may be little time
        if args.sample_every and (last or k % args.sample_every == 0):
            sample_grid(k, family, student, ema, grid_cond, args)
        if args.export_every and k % args.export_every == 0:
            export(folder / "students" / f"step_{k:06d}", family, student, ema, prompts[0], args)
        if stopped:
            break
    export(folder / "student", family, student, ema, prompts[0], args)
    if WORLD > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
