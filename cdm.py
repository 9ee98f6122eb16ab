"""CDM (docstring comes last)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

# ======================================================================================================================
# 1. The algorithm. Nothing below this line knows about SD3, files or flags.
#    A model is any callable  model(x_t, t, cond) -> v  with  x_t: (B, ...) latents,  t: (B,) in [0, 1] with 1 = noise,
#    cond: a tuple of tensors whose first axis is B,  v: (B, ...), the velocity, an estimate of  noise - x0.
# ======================================================================================================================


def _like(t, x):
    """Views times t, (B,) or a scalar, so that they multiply x of shape (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def _rows(cond, index):
    """The given rows of a condition, which is a tuple of tensors with first axis B."""
    return tuple(c[index] for c in cond)


def clean_estimate(x_t, t, v):
    """D(x_t, t, c) = x_t - t v: the data point that the velocity points to.  (Eq. 1)

    x_t, v: (B, ...); t: (B,) in [0, 1]. Returns x0_hat: (B, ...).
    """
    return x_t - _like(t, x_t) * v


def add_noise(x0, t, noise):
    """x_t = (1 - t) x0 + t noise: the straight path from data (t = 0) to noise (t = 1).  (paper.md section 1)

    x0, noise: (B, ...); t: (B,) in [0, 1]. Returns x_t: (B, ...).
    """
    return (1 - _like(t, x0)) * x0 + _like(t, x0) * noise


def euler_step(x_t, t, s, v):
    """x_s = x_t + (s - t) v: follow the velocity from time t to time s, up or down. With s = t' it is Eq. 7.

    x_t, v: (B, ...); t, s: (B,) or scalar tensors in [0, 1]. Returns x_s: (B, ...).
    """
    return x_t + _like(s - t, x_t) * v


def shift_times(t, shift):
    """t <- shift t / (1 + (shift - 1) t), as the teacher's scheduler does it (SD3: shift 3, so 0.75 becomes 0.9)."""
    return shift * t / (1 + (shift - 1) * t)


def uniform_times(steps, shift=1.0):
    """The released sampling grid: (steps,) times 1, 1 - 1/steps, ..., shifted. 4 steps at shift 3: 1, 0.9, 0.75, 0.5."""
    return shift_times(1 - torch.arange(steps) / steps, shift)


# ---------------------------------------------------------------------------------------- dynamic schedule (section 3.2)


def sample_schedule(max_steps, low, high, shift=1.0, stratified=False, generator=None):
    """Draws N ~ U{1..max_steps} and times 1 = t_1 > t_2 > ... > t_N, the inner ones random.  (section 3.2)

    Inner times are U[low, high], independent or, if stratified, one in each of N - 1 equal bins of that range (the
    authors' later advice); then all are shifted. Returns (N,) float32 times on the CPU, descending, first exactly 1.
    """
    n = int(torch.randint(1, max_steps + 1, (), generator=generator))
    u = torch.rand(n - 1, generator=generator)
    if stratified:
        u = (torch.arange(n - 1) + u) / max(n - 1, 1)
    inner = (low + (high - low) * u).sort(descending=True).values
    return shift_times(torch.cat([torch.ones(1), inner]), shift)


class Anchor(NamedTuple):
    """A point of the student's own trajectory: x_t (B, ...), its time t (B,), and the student's velocity there v (B, ...)."""

    x_t: torch.Tensor
    t: torch.Tensor
    v: torch.Tensor


@torch.no_grad()
def backward_simulation(student, noise, schedule, index, cond, calls=0):
    """Integrates the student's ODE from pure noise, each sample to its own anchor and no further.  (section 3.2)

    noise: (B, ...), x at t_1 = 1; schedule: (N,) descending times; index: (B,) integers in [0, N), the anchors, best
    kept on the CPU like the schedule (no device synchronisation then); cond: the condition of the B samples.
    Returns Anchor(x_t, t, v) at t = schedule[index]. Costs exactly sum(index + 1) sample evaluations: at step i only the
    samples with index >= i are evaluated. `calls`: under FSDP all ranks must call the student equally often; a rank
    whose own samples are done makes up the number with one-sample calls whose result is dropped.
    """
    order = index.argsort(descending=True)  # the samples still under way are then always the first n
    back = order.argsort().to(noise.device, non_blocking=True)
    order = order.to(noise.device, non_blocking=True)
    times, x, v, cond = schedule.to(noise), noise[order], torch.zeros_like(noise), _rows(cond, order)
    for i in range(max(int(index.max()) + 1, calls)):
        n, onward = int((index >= i).sum()), int((index > i).sum())
        t, s = times[min(i, len(times) - 1)], times[min(i + 1, len(times) - 1)]
        first = slice(max(n, 1))
        v[:n] = student(x[first], t.expand(len(x[first])), _rows(cond, first))[:n].to(v.dtype)
        x[:onward] = euler_step(x[:onward], t, s, v[:onward])
    return Anchor(x[back], schedule[index].to(noise), v[back])


@torch.no_grad()
def sample(model, noise, times, cond):
    """Few-step generation: Euler from noise along `times` ((N,) descending, first 1) and from the last one to 0.

    noise: (B, ...). Returns clean samples (B, ...). N network evaluations a sample, no guidance (guidance 1.0).
    """
    x, times = noise, torch.cat([times, torch.zeros(1)]).to(noise)
    for t, s in zip(times[:-1], times[1:]):
        x = euler_step(x, t, s, model(x, t.expand(len(x)), cond))
    return x


# ------------------------------------------------------------------------- the losses (section 3.1, Eqs. 3-4; section 3.3)


def dmd_weight(d_real, x0_hat, floor=0.1):
    """Per-sample weight w = 1 / max(mean |D_real - x0_hat|, floor), mean over all latent entries. Returns (B,)."""
    return 1 / (d_real - x0_hat).abs().flatten(1).mean(1).clamp(min=floor)


def pseudo_target_loss(x0_hat, delta, w, log=None):
    """Regression of x0_hat onto the detached pseudo-target sg[x0_hat + w delta], so that the gradient is along -w delta.

    x0_hat: (B, ...) with gradient; delta: (B, ...); w: (B,). Returns a scalar. Convention, as released: mean over all
    entries and no 1/2, so dL/dx0_hat = -2 w delta / x0_hat.numel(); the paper's 1/2 ||.||^2 has -w delta. Adam does not
    see the difference, gradient clipping does, and the released clipping at 1.0 belongs to this one.
    `log`: a dict that receives the loss, the step w delta and the mean weight, for the log line.
    """
    step = (_like(w, delta) * delta).detach()
    loss = F.mse_loss(x0_hat, x0_hat.detach() + step)
    if log is not None:
        log.update(loss=loss.detach(), step=step, w=w.mean())
    return loss


def ca_loss(x0_hat, teacher, cond, uncond, tau, noise, scale, log=None):
    """L_CA, CFG augmentation: delta = scale [D_real(z, tau, c) - D_real(z, tau, empty)].  (section 3.1, Eqs. 3-4)

    x0_hat: (B, ...), the student's clean estimate at its anchor, with gradient; tau: (B,) times of re-noising, which the
    caller draws below the anchor's own time; noise: (B, ...); scale: the guidance alpha. Two teacher evaluations.
    """
    with torch.no_grad():
        z = add_noise(x0_hat, tau, noise)
        d_cond = clean_estimate(z, tau, teacher(z, tau, cond))
        d_uncond = clean_estimate(z, tau, teacher(z, tau, uncond))
        w = dmd_weight(d_cond, x0_hat)  # the conditional estimate enters w, not the guided one
    return pseudo_target_loss(x0_hat, scale * (d_cond - d_uncond), w, log)


def dm_loss(x0_hat, teacher, fake_score, cond, tau, noise, log=None):
    """L_DM, distribution matching: delta = D_real(z, tau, c) - D_fake(z, tau, c).  (section 3.1, Eqs. 3-4)

    By Tweedie, D_real - D_fake = tau^2 / (1 - tau) (s_real - s_fake): the DMD direction. L_CDM (section 3.3) is this very
    function at the off-trajectory estimate. x0_hat: (B, ...) with gradient; tau: (B,); noise: (B, ...).
    """
    with torch.no_grad():
        z = add_noise(x0_hat, tau, noise)
        d_real = clean_estimate(z, tau, teacher(z, tau, cond))
        d_fake = clean_estimate(z, tau, fake_score(z, tau, cond))
        w = dmd_weight(d_real, x0_hat)
    return pseudo_target_loss(x0_hat, d_real - d_fake, w, log)


def fake_score_loss(fake_score, x0, cond, tau, noise):
    """L_fake = || v_fake(z, tau, c) - (noise - x0) ||^2, flow matching on the student's own outputs.

    x0: (B, ...), clean estimates of the student, detached here; tau: (B,); noise: (B, ...). Mean over entries.
    """
    x0 = x0.detach()
    return F.mse_loss(fake_score(add_noise(x0, tau, noise), tau, cond), noise - x0)


# -------------------------------------------------------------------------------------------------------- one iteration


def flag(default, text, **kwargs):
    """A dataclass field that is also a command-line flag: default, help text, and what argparse should know besides."""
    return field(default=default, metadata=dict(help=text, **kwargs))


@dataclass
class CDM:
    """The method's own settings. Defaults are the released SD3-Medium configuration."""

    ca_weight: float = flag(1.0, "weight of L_CA, CFG augmentation")
    dm_weight: float = flag(1.0, "weight of L_DM, distribution matching")
    cdm_weight: float = flag(1.0, "weight of L_CDM, continuous-time matching")
    guidance: float = flag(7.0, "alpha in L_CA")
    schedule: str = flag("dynamic", "backward simulation's times: a new random schedule each iteration, or DMD2's fixed "
                                    "1, .75, .5, .25 (before the shift)", choices=("dynamic", "fixed"))
    max_schedule_steps: int = flag(28, "N_max, the most steps of a dynamic schedule")
    time_low: float = flag(0.25, "inner times are U[low, high] before the shift")
    time_high: float = flag(0.95, "see --time-low")
    stratified: bool = flag(False, "draw inner times one per equal bin (the authors' later advice)")
    cdm_point: str = flag("euler", "where L_CDM sits: off the trajectory by Eq. 7; on it, at the anchor (t' = t_i); or at "
                                   "Gaussian re-noising of the clean estimate", choices=("euler", "anchor", "renoise"))
    tau_min: float = flag(0.02, "every drawn tau and t' is clamped to [tau-min, tau-max]")
    tau_max: float = flag(0.98, "see --tau-min")
    student_every: int = flag(2, "R, fake-score updates per student update")
    student_lr: float = flag(1e-5, "AdamW learning rate of the student")
    fake_lr: float = flag(5e-6, "AdamW learning rate of the fake score")
    warmup: int = flag(100, "updates of linear learning-rate warm-up, counted for each network")
    weight_decay: float = flag(1e-4, "AdamW weight decay")
    clip: float = flag(1.0, "gradient norm limit")
    ema_decay: float = flag(0.999, "student EMA; warms up as min((1 + n) / (10 + n), this)")
    fake_pull: float = flag(0.999, "beta of the fake score's pull to the student; 1 switches it off")
    anchor_aware_fake: bool = flag(False, "NOT IN THE PAPER: tell the fake score which anchor time its input came from")
    anchor_lr: float = flag(1e-3, "NOT IN THE PAPER: learning rate of the anchor-time layer")


@dataclass
class Draw:
    """All the randomness of one iteration for B samples, so that the iteration itself is a plain function."""

    schedule: torch.Tensor  # (N,) times 1 = t_1 > ... > t_N, one schedule for all samples; on the CPU, like index
    index: torch.Tensor  # (B,) anchor index of each sample, shared by the fake score and all three losses
    t_off: torch.Tensor  # (B,) t', where L_CDM is taken
    tau: dict  # (B,) re-noising times of "ca", "dm", "cdm" and "fake"
    noise: dict  # (B, ...) normal noise: "start" is x at t = 1, the others re-noise
    calls: int  # student calls that backward simulation makes over the whole global batch: the same on every rank

    def rows(self, r):
        """The same draw for rows r of the batch (a slice)."""
        tau, noise = ({name: x[r] for name, x in d.items()} for d in (self.tau, self.noise))
        return Draw(self.schedule, self.index[r], self.t_off[r], tau, noise, self.calls)


def generator(*key, device="cpu"):
    """A torch.Generator that is a function of its key, such as (seed, iteration): resuming needs no saved state."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


def draw_iteration(cfg, seed, k, batch, shape, shift=1.0, rows=slice(None), device="cpu"):
    """The Draw of iteration k for rows `rows` of a global batch of samples of the given shape, a function of (seed, k).

    Every rank draws the whole batch and keeps its rows, so the number of ranks changes nothing.
    """
    cpu, gen = generator(seed, k, "schedule"), generator(seed, k, "noise", device=device)
    schedule = uniform_times(4, shift)  # DMD2's fixed schedule
    if cfg.schedule == "dynamic":
        schedule = sample_schedule(cfg.max_schedule_steps, cfg.time_low, cfg.time_high, shift, cfg.stratified, cpu)
    index = torch.randint(len(schedule), (batch,), generator=cpu)
    t_i = schedule[index[rows]].to(device, non_blocking=True)
    u = 1 - torch.rand(5, batch, generator=gen, device=device)[:, rows]  # on (0, 1]
    u[1] *= t_i  # only L_CA's tau is bounded by the anchor's time: tau ~ U(0, t_i)
    u = u.clamp(cfg.tau_min, cfg.tau_max)
    names = ("start", "ca", "dm", "cdm", "fake") + (("renoise",) if cfg.cdm_point == "renoise" else ())
    noise = {name: torch.randn(batch, *shape, generator=gen, device=device)[rows] for name in names}
    t_off = t_i if cfg.cdm_point == "anchor" else u[0]
    return Draw(schedule, index[rows], t_off, dict(zip(("ca", "dm", "cdm", "fake"), u[1:])), noise, int(index.max()) + 1)


class Learner:
    """A network in training: its role (the callable), its parameters by name, AdamW with warm-up, and clipping.

    groups: a list of (parameters by name, learning rate).
    """

    def __init__(self, role: Callable, groups, cfg: CDM):
        self.role, self.cfg, self.updates = role, cfg, 0
        self.params = {name: p for params, _ in groups for name, p in params.items()}
        groups = [dict(params=list(params.values()), lr=lr, base_lr=lr) for params, lr in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=cfg.weight_decay, fused=True)

    def step(self):
        """Clips, updates, and frees the gradients. Returns the gradient norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), self.cfg.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * min(1.0, (self.updates + 1) / max(self.cfg.warmup, 1))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # student and fake score never hold gradients at the same time
        self.updates += 1
        return norm

    @torch.no_grad()
    def pull_to(self, target, decay):
        """p <- decay p + (1 - decay) target, for the parameters that the two share by name."""
        for name, p in target.items():
            self.params[name].lerp_(p, 1 - decay)


@torch.no_grad()
def update_ema(ema, student):
    """theta_bar <- d theta_bar + (1 - d) theta with warm-up d = min((1 + n) / (10 + n), ema_decay), n earlier updates."""
    n = student.updates - 1
    decay = min((1 + n) / (10 + n), student.cfg.ema_decay)
    for name, p in student.params.items():
        ema[name].lerp_(p, 1 - decay)


def cdm_iteration(k, batches, teacher, student, fake_score, ema, cfg):
    """Iteration k = 1, 2, ...: simulate, update the fake score, and on every R-th also the student and its EMA.

    batches: micro-batches [(cond, uncond, Draw)] whose gradients accumulate; teacher: a callable; student, fake_score:
    Learners; ema: the student's averaged parameters by name. Returns scalars by name (tensors, not yet synchronised).
    """
    stats, share = {}, 1 / len(batches)

    def record(name, value):
        stats[name] = stats.get(name, 0) + share * value.detach()

    def student_estimate(x_t, t, cond):  # D_theta
        return clean_estimate(x_t, t, student.role(x_t, t, cond))

    def fake_from(t):  # --anchor-aware-fake is not in the paper: it says from which time the clean estimate came
        return partial(fake_score.role, anchor_t=t) if cfg.anchor_aware_fake else fake_score.role

    # Backward simulation (section 3.2): each sample to its anchor on the student's own trajectory, without gradient.
    points = []
    for cond, _, d in batches:
        anchor = backward_simulation(student.role, d.noise["start"], d.schedule, d.index, cond, d.calls)
        x0 = clean_estimate(*anchor)  # Eq. 1 with the recorded velocity: no further evaluation
        if cfg.cdm_point == "renoise":  # the paper's ablation of Eq. 7
            x_off = add_noise(x0, d.t_off, d.noise["renoise"])
        else:  # Eq. 7: off the trajectory, along the recorded velocity, to t' that knows nothing of the schedule
            x_off = euler_step(anchor.x_t, anchor.t, d.t_off, anchor.v)
        points.append((anchor, x0, x_off))

    # Fake score, every iteration: flow matching on the student's clean estimates.
    for (cond, _, d), (anchor, x0, x_off) in zip(batches, points):
        t_from, half = anchor.t, slice(k % 2, None, 2)
        if cfg.anchor_aware_fake and cfg.cdm_weight and len(x0[half]):
            x0, t_from = x0.clone(), t_from.clone()  # not in the paper: L_CDM will ask it about t', so half is from t'
            with torch.no_grad():
                x0[half] = student_estimate(x_off[half], d.t_off[half], _rows(cond, half))
            t_from[half] = d.t_off[half]
        loss = fake_score_loss(fake_from(t_from), x0, cond, d.tau["fake"], d.noise["fake"])
        (share * loss).backward()
        record("loss_fake", loss)
    stats["grad_norm_fake"] = fake_score.step()
    fake_score.pull_to(student.params, cfg.fake_pull)
    if k % cfg.student_every:
        return stats

    # Student, every R-th iteration: L_CA + L_DM at the anchor (one student evaluation for both), L_CDM off the trajectory.
    for (cond, uncond, d), (anchor, _, x_off) in zip(batches, points):
        if cfg.ca_weight or cfg.dm_weight:
            x0_hat, loss, ca, dm = student_estimate(anchor.x_t, anchor.t, cond), 0, {}, {}
            if cfg.ca_weight:
                loss = cfg.ca_weight * ca_loss(x0_hat, teacher, cond, uncond, d.tau["ca"], d.noise["ca"], cfg.guidance, ca)
                record("loss_ca", ca["loss"]), record("w_ca", ca["w"])
            if cfg.dm_weight:
                loss = loss + cfg.dm_weight * dm_loss(
                    x0_hat, teacher, fake_from(anchor.t), cond, d.tau["dm"], d.noise["dm"], dm)
                record("loss_dm", dm["loss"]), record("w_dm", dm["w"])
            if ca and dm:
                record("cos_ca_dm", F.cosine_similarity(ca["step"].flatten(1), dm["step"].flatten(1)).mean())
            (share * loss).backward()  # before L_CDM's forward: one graph in memory at a time
        if cfg.cdm_weight:
            x0_hat, cdm = student_estimate(x_off, d.t_off, cond), {}
            loss = dm_loss(x0_hat, teacher, fake_from(d.t_off), cond, d.tau["cdm"], d.noise["cdm"], cdm)
            (share * cfg.cdm_weight * loss).backward()
            record("loss_cdm", cdm["loss"]), record("w_cdm", cdm["w"])
    stats["grad_norm_student"] = student.step()
    update_ema(ema, student)
    return stats
