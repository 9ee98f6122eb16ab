"""CDM in two dimensions: the algorithm of cdm.py, imported and not copied, where everything can be checked.

    python toy_2d.py                   # under 3 minutes on two CPU cores
    python toy_2d.py --mixture ring    # equal mode weights (the default, uneq, has 8 : 4 : 2 : 1)
    python toy_2d.py --seeds 5 --iterations 3000   # means and standard deviations over seeds: README's numbers
    python toy_2d.py --quick           # 20 seconds: does everything run?

A Gaussian mixture with known means is the data. Its velocity has a closed form, so the teacher is exact, with and
without guidance, and so are the densities and bin masses that students are measured against. Student and fake score are
one small MLP, first fitted to the exact velocity (the counterpart of "initialised from the teacher"), then distilled by
cdm.cdm_iteration with the settings in METHODS and GUIDED below: small differences, no second code path.

It writes to runs/toy (see --output-dir) metrics.json with everything measured, and

    toy_ideas.png      the paths a student takes, where each method trains it, and what that buys
    toy_samples.png    samples of every method over the exact density, on and off the fixed schedule's times
    toy_steps.png      the step ladder: each metric against the number of steps
    toy_closeup.png    one mode at 4 steps: what mode-seeking does to a Gaussian
    toy_anchors.png    why it happens: the clean estimates of each anchor beside their mixture
    toy_guidance.png   L_CA with and without L_DM, beside the teacher with and without guidance
    toy_training.gif   samples over training, the fixed schedule beside CDM

A method with * uses cdm.py's anchor-aware fake score, which is NOT IN THE PAPER.

What it leaves out: images, text, any claim about SD3. Learning rates, N_max and the guidance are the toy's own.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import multiprocessing
import os
import pickle
import platform
import time
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import cdm

SHIFT = 3.0  # SD3's: the fixed schedule 1, .75, .5, .25 becomes t = 1, .9, .75, .5

# ======================================================================================================================
# 1. The data: a class-conditional Gaussian mixture, and its exact velocity.
# ======================================================================================================================


class Mixture:
    """p(x0 | c) = sum_k weights[c, k] N(means[k], std^2 I) in two dimensions. The last class is "empty", the average.

    means: K points; std: one number; weights: one row of K for each class, normalised here.
    """

    def __init__(self, means, std, weights):
        self.means, self.std = torch.tensor(means), std
        rows = F.normalize(torch.tensor(weights, dtype=torch.float32), p=1, dim=1)
        self.weights = torch.cat([rows, rows.mean(0, keepdim=True)])  # (classes + 1, K)
        self.classes = len(rows)

    def components(self, x_t, t, c):
        """log w_k N(x_t; (1 - t) mu_k, s_t^2 I) of each mode and its mean velocity there: (B, K) and (B, K, 2).

        On the path x_t = (1 - t) x0 + t noise a mode stays Gaussian: mean (1 - t) mu_k, variance
        s_t^2 = (1 - t)^2 std^2 + t^2. Given x_t, noise - x0 is then linear in the gap to that mean.
        """
        t = t[:, None, None]
        var = (1 - t) ** 2 * self.std**2 + t**2
        gap = x_t[:, None] - (1 - t) * self.means
        log_p = self.weights[c].log() - gap.square().sum(2) / (2 * var[..., 0]) - (2 * math.pi * var[..., 0]).log()
        return log_p, (t - (1 - t) * self.std**2) / var * gap - self.means

    def velocity(self, x_t, t, cond):
        """v(x_t, t, c) = E[noise - x0 | x_t, c], exactly. x_t: (B, 2); t: (B,) in [0, 1]; cond: ((B,) class,)."""
        log_p, v = self.components(x_t, t, cond[0])
        return (log_p.softmax(1)[..., None] * v).sum(1)

    def guided(self, scale):
        """The teacher with guidance in the notation of L_CA: v(c) + scale (v(c) - v(empty)); 0 is without."""

        def velocity(x_t, t, cond):
            v, empty = self.velocity(x_t, t, cond), torch.full_like(cond[0], self.classes)
            return v + scale * (v - self.velocity(x_t, t, (empty,)))

        return velocity

    def log_density(self, x_t, t, c):
        """log p_t(x_t | c), (B,)."""
        return self.components(x_t, t, c)[0].logsumexp(1)

    def distances(self, x, c):
        """Distance of x (B, 2) to each mode, (B, K); infinite to those that class c does not have."""
        return (x[:, None] - self.means).norm(dim=2).masked_fill(self.weights[c] == 0, math.inf)

    def sample(self, c, generator=None):
        """Exact samples for classes c, (B,). Returns (B, 2)."""
        k = torch.multinomial(self.weights[c], 1, replacement=True, generator=generator)[:, 0]
        return self.means[k] + self.std * torch.randn(len(c), 2, generator=generator)

    def bin_masses(self):
        """Exact mass of each histogram bin, (classes * BINS^2 + 1,): classes equally likely, the last bin: outside."""
        inside = torch.erf((EDGES.double() - self.means[..., None]) / (self.std * math.sqrt(2))).diff(dim=2) / 2
        mass = torch.einsum("ck,kx,ky->cxy", self.weights[:-1].double(), inside[:, 0], inside[:, 1]) / self.classes
        return torch.cat([mass.flatten(), 1 - mass.sum()[None]]).clamp(min=0).float()


def ring(n, radius=2.0):
    return [(radius * math.cos(2 * math.pi * i / n), radius * math.sin(2 * math.pi * i / n)) for i in range(n)]


EDGES = torch.linspace(-3.5, 3.5, 71)  # of the 70 x 70 histogram
BINS = len(EDGES) - 1
MIXTURES = {
    # two classes of four modes each, in turn
    "ring": Mixture(ring(8), 0.15, [[1, 0] * 4, [0, 1] * 4]),
    # the same places, weights 8 : 4 : 2 : 1
    "uneq": Mixture(ring(8), 0.15, [[8, 0, 4, 0, 2, 0, 1, 0], [0, 8, 0, 4, 0, 2, 0, 1]]),
    # modes 0 and 3 belong to both classes: guidance, which asks "which class?", has something to push against
    "shared": Mixture(ring(6), 0.15, [[1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1]]),
}

# ======================================================================================================================
# 2. The network, fitted to the exact velocity.
# ======================================================================================================================


class Net(nn.Module):
    """v(x_t, t, c): residual layers on (x_t, sin/cos of t, c). Only the anchor-aware fake score uses `anchor`.

    x_t: (B, 2); t: (B,) in [0, 1]; cond: ((B,) class,); anchor_t: (B,), the time that the clean estimate came from.
    The anchor layer starts at zero, so that telling the anchor's time changes nothing before training.
    """

    def __init__(self, classes, width=64, layers=4):
        super().__init__()
        self.register_buffer("frequency", (math.pi / 4 * 2.0 ** torch.linspace(0, 4, 8)).repeat(1, 2))
        self.register_buffer("phase", torch.tensor([0, math.pi / 2]).repeat_interleave(8))  # 8 sines and 8 cosines
        self.inp = nn.Linear(2 + 16, width)
        self.cls = nn.Embedding(classes + 1, width)  # the last one is "empty"
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out = nn.Linear(width, 2)
        self.anchor = nn.Linear(16, width, bias=False)
        nn.init.zeros_(self.anchor.weight)

    def waves(self, t):
        return torch.addmm(self.phase, t[:, None], self.frequency).sin()

    def forward(self, x_t, t, cond, anchor_t=None):
        h = self.inp(torch.cat([x_t, self.waves(t)], 1)) + self.cls(cond[0])
        if anchor_t is not None:
            h = h + self.anchor(self.waves(anchor_t))
        for layer in self.hidden:
            h = h + F.silu(layer(h))
        return self.out(h)

    def params(self, anchor=False):
        """Parameters by name: of the anchor layer, or of all the rest."""
        return {name: p for name, p in self.named_parameters() if name.startswith("anchor") == anchor}


def fit(mix, seed, steps, batch=512, lr=2e-3, report=lambda: None):
    """A Net regressed onto the exact velocity, "empty" included: what student and fake score start from."""
    torch.manual_seed(seed)
    net, gen = Net(mix.classes), cdm.generator(seed, "fit")
    optimizer = torch.optim.AdamW(net.params().values(), lr=lr, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        c, t = torch.randint(mix.classes + 1, (batch,), generator=gen), torch.rand(batch, generator=gen)
        x_t = cdm.add_noise(mix.sample(c, gen), t, torch.randn(batch, 2, generator=gen))
        F.mse_loss(net(x_t, t, (c,)), mix.velocity(x_t, t, (c,))).backward()
        optimizer.step(), optimizer.zero_grad(), cosine.step(), report()
    return net


# ======================================================================================================================
# 3. The methods: differences from one set of settings, and the distillation that runs them all.
# ======================================================================================================================

# Inner times over the whole range, as the authors later found to work as well; "t >= .5" below is the released range.
SETTINGS = cdm.CDM(ca_weight=0.0, guidance=1.0, max_schedule_steps=8, time_low=0.02, time_high=0.98,
                   student_lr=2e-3, fake_lr=4e-3, ema_decay=0.995)
FIXED, DYNAMIC = dict(schedule="fixed", cdm_weight=0.0), dict(cdm_weight=0.0)
AWARE, RELEASED = dict(anchor_aware_fake=True), dict(time_low=0.25, time_high=0.95)
METHODS = {  # on --mixture
    "DM fixed": FIXED,  # DMD2-like
    "DM dynamic": DYNAMIC,
    "CDM": {},
    "DM dynamic, t >= .5": DYNAMIC | RELEASED,
    "CDM, t >= .5": RELEASED,
    "DM fixed *": FIXED | AWARE,
    "DM dynamic *": DYNAMIC | AWARE,
    "CDM *": AWARE,
}
GUIDED = {  # on "shared"
    "DM alone": DYNAMIC,
    "CA alone": dict(ca_weight=1.0, dm_weight=0.0, cdm_weight=0.0),
    "CA + DM": dict(ca_weight=1.0) | DYNAMIC,
    "CA + DM + CDM": dict(ca_weight=1.0),
    "CA + DM + CDM *": dict(ca_weight=1.0) | AWARE,
}
REFERENCES = ("exact teacher", "guided teacher", "undistilled")  # sampled on the same grids, and not distilled

STEPS = (1, 2, 3, 4, 6, 8)
GRIDS = {f"{n} steps": cdm.uniform_times(n, SHIFT) for n in STEPS} | {
    "1, .9, .5": torch.tensor([1, 0.9, 0.5]),  # uneven, each of its times on the fixed schedule
    "1, .9, .6, .15": torch.tensor([1, 0.9, 0.6, 0.15]),  # uneven, off it
}
FOUR, OFF, MANY = "4 steps", "1, .9, .6, .15", "200 steps"  # the teachers are also sampled with MANY
PERCENT = ("artifacts", "shared_modes")


def distil(mix, cfg, net, seed, iterations, batch=256, report=lambda: None, snapshot=lambda k, ema: None):
    """Distils a copy of `net` against the exact velocity. Returns the student's EMA."""
    student, fake, ema = (copy.deepcopy(net) for _ in range(3))
    aware = [(fake.params(anchor=True), cfg.anchor_lr)] if cfg.anchor_aware_fake else []
    learners = (cdm.Learner(student, [(student.params(), cfg.student_lr)], cfg),
                cdm.Learner(fake, [(fake.params(), cfg.fake_lr), *aware], cfg))
    cond = torch.arange(batch) % mix.classes
    uncond = torch.full_like(cond, mix.classes)
    for k in range(iterations + 1):
        snapshot(k, ema)
        if k:
            draw = cdm.draw_iteration(cfg, seed, k, batch, (2,), SHIFT)
            cdm.cdm_iteration(k, [((cond,), (uncond,), draw)], mix.velocity, *learners, ema.params(), cfg)
            report()
    return ema


# ======================================================================================================================
# 4. Measuring, against exact values.
# ======================================================================================================================


def histogram(x, c, classes):
    """Share of samples in each bin, laid out as in Mixture.bin_masses. x: (B, 2); c: (B,)."""
    row, col = (torch.bucketize(x, EDGES, right=True) - 1).unbind(1)
    inside = ((x >= EDGES[0]) & (x < EDGES[-1])).all(1)
    bins = torch.where(inside, (c * BINS + row) * BINS + col, classes * BINS**2)
    return torch.bincount(bins, minlength=classes * BINS**2 + 1) / len(x)


def kl(p, q, floor=1e-3):
    """KL(p || q) after mixing both with a `floor` share of the uniform, or an empty bin would make it infinite."""
    p, q = ((d + floor / len(d)) / (1 + floor) for d in (p.double(), q.double()))
    return (p * (p / q).log()).sum()


def measure(mix, x, c, guided=None):
    """All metrics of samples x (B, 2) of classes c (B,); guided: a histogram of the guided teacher's samples.

    tv           total variation of the histogram from the exact bin masses, in [0, 1]
    kl_data      KL(data || samples): large when something is missed
    kl_samples   KL(samples || data): large when something is invented
    artifacts    share of samples farther than 4 std from every mode of their class
    weights      total variation between the shares of samples nearest to each mode and the true weights
    spread       median distance of the samples to their mode's centre (the median of the samples nearest to it) over
                 the truth's, 1.177 std. Under 1 is mode-seeking. Nobody is left out, so artifacts count as spread
    core_spread  the same from the root mean square of those within 4 std of the centre, so that artifacts do not count
    tv_guided    total variation from the guided teacher's histogram
    shared_modes share of samples nearest to a mode that all classes have
    """
    x = x.nan_to_num(1e6).clamp(-1e6, 1e6)  # a method may diverge
    p, q = mix.bin_masses(), histogram(x, c, mix.classes)
    near, k = mix.distances(x, c).min(1)
    share, radii = torch.zeros_like(mix.weights[:-1]), []
    for cls, mode in mix.weights[:-1].nonzero().tolist():
        own = x[(c == cls) & (k == mode)]
        share[cls, mode] = len(own) / (c == cls).sum()
        if len(own):
            radii.append((own - own.median(0).values).norm(dim=1) / mix.std)
    radii = torch.cat(radii)
    metrics = dict(tv=(p - q).abs().sum() / 2, kl_data=kl(p, q), kl_samples=kl(q, p),
                   artifacts=(near > 4 * mix.std).double(),
                   weights=(share - mix.weights[:-1]).abs().sum(1).mean() / 2,
                   spread=radii.median() / math.sqrt(2 * math.log(2)),
                   core_spread=(radii[radii <= 4].square().mean() / 2).sqrt().nan_to_num(0))
    if guided is not None:
        in_all = (mix.weights[:-1] > 0).all(0)
        metrics |= dict(tv_guided=(guided - q).abs().sum() / 2, shared_modes=share[:, in_all].sum(1).mean())
    return {name: round(float(value.mean()), 5) for name, value in metrics.items()}


def start(mix, n, *key):
    """Noise and classes (equally often) for n samples."""
    return torch.randn(n, 2, generator=cdm.generator(*key)), torch.arange(n) % mix.classes


def teacher_samples(mix, n, guidance):
    """Samples of the exact teacher by many Euler steps: with guidance there is no closed form for what they follow."""
    noise, c = start(mix, n, "teacher")
    return cdm.sample(mix.guided(guidance), noise, cdm.uniform_times(200), (c,)), c


def anchor_estimates(model, noise, cond):
    """[(t_i, D(x_{t_i}, t_i, c), anchor)] for each anchor of the fixed schedule. The last one is the 4-step sample."""
    times = cdm.uniform_times(4, SHIFT)
    anchors = [cdm.backward_simulation(model, noise, times, torch.full((len(noise),), i), cond) for i in range(4)]
    return [(round(float(t), 3), cdm.clean_estimate(*a), a) for t, a in zip(times, anchors)]


@torch.no_grad()
def evaluate(model, mix, n, guided=None):
    """Everything that metrics.json says about one model: on each grid, at each anchor, and off the trajectory."""
    noise, c = start(mix, n, "evaluate")
    report = dict(grids={name: measure(mix, cdm.sample(model, noise, times, (c,)), c, guided)
                         for name, times in GRIDS.items()})
    anchors = anchor_estimates(model, noise, (c,))
    report["anchors"] = {f"t = {t:g}": measure(mix, x0, c, guided) for t, x0, _ in anchors}
    few, c = slice(n // 4), c[: n // 4].repeat(4)  # a mixture as large as its parts: TV depends on n
    report["anchors"]["mixture"] = measure(mix, torch.cat([x0[few] for _, x0, _ in anchors]), c, guided)
    report["off_trajectory"] = {}  # Eq. 7 from every anchor to t'
    for t_off in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
        x_off = torch.cat([cdm.euler_step(a.x_t, a.t, torch.tensor(t_off), a.v)[few] for *_, a in anchors])
        x0_hat = cdm.clean_estimate(x_off, torch.tensor(t_off), model(x_off, torch.full((len(c),), t_off), (c,)))
        report["off_trajectory"][f"t' = {t_off:g}"] = measure(mix, x0_hat, c)
    return report


# ======================================================================================================================
# 5. Figures. Colours: Okabe and Ito's, which colour-blind readers can tell apart.
# ======================================================================================================================

BLACK, GREY, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000", "#888888", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
LINES = {  # the colour is the schedule, a dashed line the anchor-aware fake score
    "exact teacher": (BLACK, ":", "."), "undistilled": (GREY, "-", "x"),
    "DM fixed": (RED, "-", "o"), "DM dynamic": (ORANGE, "-", "s"), "CDM": (BLUE, "-", "D"),
    "DM fixed *": (RED, "--", "o"), "DM dynamic *": (ORANGE, "--", "s"), "CDM *": (BLUE, "--", "D"),
}
SHOWN = ("undistilled", "DM fixed", "DM dynamic", "CDM", "DM fixed *", "CDM *")
STAR = "* anchor-aware fake score: not in the paper"


class Figures:
    """All figures of a run. models: {(mixture, method): Net} and frames: {method: samples over training} of its first
    seed; summary: {mixture: {method: evaluate's nesting of [mean, std]}} over all of them."""

    def __init__(self, folder, mixture, models, frames, summary, seeds):
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams.update({
            "font.size": 9, "axes.titlesize": 9.5, "figure.titlesize": 9.5, "savefig.dpi": 180, "lines.markersize": 3.5,
            "lines.linewidth": 1.3, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
            "legend.fontsize": 8, "legend.handlelength": 1.4, "figure.constrained_layout.use": True})
        import matplotlib.pyplot as plt

        self.plt, self.folder, self.name, self.mix = plt, folder, mixture, MIXTURES[mixture]
        self.models, self.frames, self.summary, self.seeds = models, frames, summary, seeds
        self.noise, self.c = start(self.mix, 4000, "figures")

    def save(self, figure, name):
        from PIL import Image  # matplotlib brings it

        figure.savefig(self.folder / name)
        self.plt.close(figure)
        Image.open(self.folder / name).convert("RGB").quantize(128).save(self.folder / name, optimize=True)

    def text(self, method, grid, metric, mixture=None, part="grids"):
        """A metric's mean over seeds as text, with the standard deviation if there is more than one."""
        scale, digits, unit = (100, 1, "%") if metric in PERCENT else (1, 2, "")
        mean, std = (f"{scale * v:.{digits}f}" for v in self.summary[mixture or self.name][method][part][grid][metric])
        return mean + (f"±{std}" if self.seeds > 1 else "") + unit

    def draw(self, method, grid, n=4000):
        return cdm.sample(self.models[self.name, method], self.noise[:n], GRIDS[grid], (self.c[:n],))

    def panel(self, ax, x, c, mix=None, title="", note="", ylabel=""):
        """Samples over the exact density, a colour for each class, and below them what matters. Returns the artists."""
        mix, side = mix or self.mix, torch.linspace(-3, 3, 150)
        at = torch.cartesian_prod(side, side)
        density = mix.log_density(at, torch.zeros(len(at)), torch.full((len(at),), mix.classes)).exp().sqrt()
        ax.imshow(density.view(150, 150).T, origin="lower", extent=(-3, 3, -3, 3), cmap="Greys", vmax=2 * density.max())
        dots = [ax.plot(*x[c == k][:900].T, ".", ms=1.7, mew=0, color=col)[0] for k, col in enumerate((BLUE, ORANGE))]
        ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=(-2, 0, 2), yticks=(-2, 0, 2), title=title, xlabel=f"$x_1$\n{note}")
        ax.set_ylabel(ylabel, labelpad=-3)
        ax.tick_params(labelleft=bool(ylabel))
        return dots

    def samples(self):
        figure, axes = self.plt.subplots(2, len(SHOWN), figsize=(10, 5.5))
        for row, grid, where in zip(axes, (FOUR, OFF), ("1, .9, .75, .5", OFF)):
            for ax, method in zip(row, SHOWN):
                note = "\n".join(f"{name} {self.text(method, grid, m)}" for name, m in (
                    ("TV", "tv"), ("artifacts", "artifacts"), ("spread", "spread")))
                self.panel(ax, self.draw(method, grid), self.c, title=method if grid == FOUR else "", note=note,
                           ylabel=f"sampled at t = {where}\n$x_2$" if ax is row[0] else "")
        figure.suptitle("Top: the fixed schedule's own four times. Bottom: four others. Grey: the exact density; a "
                        f"colour for each class.\n{STAR}")
        self.save(figure, "toy_samples.png")

    def steps(self):
        figure, axes = self.plt.subplots(1, 4, figsize=(10, 3.3))
        labels = dict(tv="total variation", artifacts="artifacts (share of samples)",
                      weights="error of the mode weights", spread="within-mode spread")
        for ax, (metric, label) in zip(axes, labels.items()):
            for method, (colour, line, marker) in LINES.items():
                grids = self.summary[self.name][method]["grids"]
                mean, std = torch.tensor([grids[f"{n} steps"][metric] for n in STEPS]).T
                mean[mean < 0.25 * (metric == "spread")] = math.nan  # one step of the teacher is a few points only
                ax.errorbar(STEPS, mean, std, fmt=line + marker, color=colour, elinewidth=0.7, label=method)
            ax.set(xlabel="sampling steps", ylabel=label, xticks=STEPS)
        axes[2].set(ylim=(0, 0.15))
        axes[3].set(yscale="log", ylim=(0.3, 4), yticks=(0.5, 1, 2, 4), yticklabels=("½", "1", "2", "4"))
        axes[3].minorticks_off()
        axes[3].axhline(1, color=GREY, lw=0.8, zorder=0)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, columnspacing=1)
        figure.suptitle(f"The same student sampled with 1 to 8 steps; bars: one standard deviation over seeds. {STAR}")
        self.save(figure, "toy_steps.png")

    def closeup(self):
        figure, axes = self.plt.subplots(1, len(SHOWN), figsize=(10, 2.6))
        middle, turn = self.mix.means[self.mix.weights[0].argmax()], torch.linspace(0, 2 * math.pi, 100)
        for ax, method in zip(axes, SHOWN):
            x = (self.draw(method, FOUR)[self.c == 0] - middle) / self.mix.std
            ax.plot(*x[x.norm(dim=1) < 4.5][:500].T, ".", ms=2.5, mew=0, color=BLUE)
            for r in (1, 2, 3):
                ax.plot(r * turn.cos(), r * turn.sin(), color=BLACK, lw=0.8)
            ax.set(xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), xticks=(-3, 0, 3), yticks=(-3, 0, 3), aspect="equal",
                   title=method, xlabel=f"$x_1$ / std\nspread {self.text(method, FOUR, 'spread')}")
            ax.tick_params(labelleft=ax is axes[0])
        axes[0].set_ylabel("$x_2$ / std", labelpad=-3)
        figure.suptitle(f"500 samples of one mode at 4 steps; circles at 1, 2, 3 true std. {STAR}")
        self.save(figure, "toy_closeup.png")

    def anchors(self):
        figure, axes = self.plt.subplots(1, 4, figsize=(10, 3.2), sharey=True)
        r = torch.linspace(0.05, 5.95, 60)
        noise, c = start(self.mix, 20_000, "anchors")
        for ax, method in zip(axes, ("DM fixed", "CDM", "DM fixed *", "CDM *")):
            curves = [(f"t = {t:g}", x0) for t, x0, _ in anchor_estimates(self.models[self.name, method], noise, (c,))]
            curves.append(("mixture", torch.cat([x0 for _, x0 in curves])))
            ax.fill_between(r, r * (-(r**2) / 2).exp(), color="#dddddd", label="data: 1")
            for (name, x0), colour in zip(curves, (PURPLE, ORANGE, SKY, GREEN, BLACK)):
                near = self.mix.distances(x0, c.repeat(len(x0) // len(c))).min(1).values / self.mix.std
                ax.plot(r, torch.histc(near, 60, 0, 6) / len(x0) * 10, color=colour, lw=2 if name == "mixture" else 1.3,
                        label=f"{name}: {self.text(method, name, 'spread', part='anchors')}")
            ax.set(xlabel="distance to the nearest mode / std", title=method, xlim=(0, 5))
            ax.legend(title="spread of the estimates at", title_fontsize=8, loc="upper right", borderaxespad=0)
        axes[0].set_ylabel("density")
        figure.suptitle(f"Clean estimates by anchor. One fake score for all anchors sees only their mixture. {STAR}")
        self.save(figure, "toy_anchors.png")

    def guidance(self):
        mix, runs = MIXTURES["shared"], self.summary["shared"]
        noise, c = start(mix, 4000, "figures")
        panels = [("exact teacher", MANY, *teacher_samples(mix, 2000, 0)),
                  ("guided teacher", MANY, *teacher_samples(mix, 2000, SETTINGS.guidance))]
        panels += [(m, FOUR, cdm.sample(self.models["shared", m], noise, GRIDS[FOUR], (c,)), c) for m in GUIDED]
        figure, axes = self.plt.subplots(2, 4, figsize=(10, 5.9))
        for ax, (method, grid, x, cls) in zip(axes.flat, panels):
            note = "\n".join(f"{name} {self.text(method, grid, m, 'shared')}" for name, m in (
                ("shared modes", "shared_modes"), ("artifacts", "artifacts"), ("TV to guided", "tv_guided")))
            self.panel(ax, x, cls, mix, title=method, note=note, ylabel="$x_2$" if ax in axes[:, 0] else "")
            if (x.abs() > 3).any(1).all():
                ax.text(0, 1, "all far outside", ha="center")
        ax, times = axes[1, 3], ("1", "0.9", "0.75", "0.5")
        for method, fmt in (("DM alone", "-"), ("CA + DM", "-"), ("CA + DM + CDM", "-"), ("CA + DM + CDM *", "--")):
            mean, std = 100 * torch.tensor([runs[method]["anchors"][f"t = {t}"]["shared_modes"] for t in times]).T
            colour = {"DM alone": ORANGE, "CA + DM": PURPLE}.get(method, BLUE)
            ax.errorbar(range(4), mean, std, fmt="o" + fmt, color=colour, label=method)
        for method, line in (("exact teacher", ":"), ("guided teacher", "-")):
            level = 100 * runs[method]["grids"][MANY]["shared_modes"][0]
            ax.axhline(level, color=GREY, ls=line, label=method, zorder=0)
        ax.set(xlabel="anchor $t_i$", ylabel="clean estimates in\nshared modes (%)", xticks=range(4), xticklabels=times,
               title="by anchor", ylim=(-4, 104))
        ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.22))
        figure.suptitle(f"Guidance: the left and right modes belong to both classes. Students at 4 steps. {STAR}")
        self.save(figure, "toy_guidance.png")

    @torch.no_grad()
    def ideas(self):
        """Student paths in the plane of time and x_1, where each method trains them, and artifacts on several grids."""
        figure, axes = self.plt.subplots(1, 4, figsize=(10, 3.1), width_ratios=(1, 1, 1, 0.95))
        t, x1 = torch.linspace(1, 0, 200)[:, None], torch.linspace(-3, 3, 200)
        std = ((1 - t) ** 2 * self.mix.std**2 + t**2).sqrt()
        density = sum(w / std * torch.exp(-(((x1 - (1 - t) * m) / std) ** 2) / 2)
                      for w, m in zip(self.mix.weights[0], self.mix.means[:, 0]))
        noise = torch.tensor([[1.9, 0.9], [1.0, -0.6], [0.2, 0.9], [-0.6, -1.2], [-1.8, 0.3]])
        cond = (torch.zeros(1).long(),)
        panels = (("DM fixed", RED, "Fixed schedule:\ntrained at four times only"),
                  ("DM dynamic", ORANGE, "1. Dynamic continuous schedule:\nnew times in each iteration"),
                  ("CDM", BLUE, "2. Continuous-time matching:\nalso off the path, at any t'"))
        for ax, (method, colour, title) in zip(axes, panels):
            ax.imshow(density.T.sqrt(), origin="lower", extent=(1, 0, -3, 3), aspect="auto", cmap="Greys", vmax=3.5,
                      interpolation="bilinear")
            model = self.models[self.name, method]
            for i, x in enumerate(noise.split(1)):
                times = cdm.uniform_times(4, SHIFT)
                if method != "DM fixed":
                    times = cdm.sample_schedule(5, 0.02, 0.98, SHIFT, True, cdm.generator(method, i))
                path = [cdm.backward_simulation(model, x, times, torch.tensor([n]), cond) for n in range(len(times))]
                ends = [float(a.x_t[0, 0]) for a in path] + [float(cdm.clean_estimate(*path[-1])[0, 0])]
                ax.plot([*times, 0], ends, color=colour, lw=1)
                ax.plot(times, ends[:-1], "o", color=colour, label="" if i else "anchor")
                if method != "CDM" or i % 2:
                    continue
                a = path[-1]  # Eq. 7 from the last anchor, up and down in time
                for t_off in torch.tensor([[0.85], [0.45]]):
                    x_off = cdm.euler_step(a.x_t, a.t, t_off, a.v)
                    onward = cdm.euler_step(x_off, t_off, t_off - 0.15, model(x_off, t_off, cond))
                    at, x_at, x_to = float(t_off), float(x_off[0, 0]), float(onward[0, 0])
                    ax.plot([float(a.t), at], [float(a.x_t[0, 0]), x_at], ":", color=BLACK, lw=1)
                    ax.annotate("", (at - 0.15, x_to), (at, x_at), arrowprops=dict(arrowstyle="->", color=RED, lw=1.4))
                    label = "" if i or at < 0.5 else "$x_{t'}$, Eq. 7"
                    ax.plot(at, x_at, "D", mfc="white", mec=BLACK, ms=4, label=label)
            ax.set(xlim=(1.02, 0), ylim=(-3.7, 3), xlabel="time t  (1 noise, 0 data)", title=title,
                   xticks=(1, 0.75, 0.5, 0.25, 0), xticklabels=("1", ".75", ".5", ".25", "0"))
            ax.legend(loc="lower left", handletextpad=0.3, borderaxespad=0)
        axes[0].vlines(cdm.uniform_times(4, SHIFT), -3, 3, color=RED, lw=0.7, ls="--")
        axes[0].set(ylabel="$x_1$", xticks=(1, 0.9, 0.75, 0.5, 0), xticklabels=("1", ".9", ".75", ".5", "0"))
        grids = {FOUR: "4", "6 steps": "6", "8 steps": "8", OFF: "4, other\ntimes"}
        for i, (method, colour, _) in enumerate(panels):
            mean, std = 100 * torch.tensor([self.summary[self.name][method]["grids"][g]["artifacts"] for g in grids]).T
            bars = axes[3].bar(torch.arange(4) + 0.3 * (i - 1), mean, 0.29, color=colour, label=method,
                               yerr=std if self.seeds > 1 else None, error_kw=dict(lw=0.8))
            axes[3].bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
        axes[3].set(xticks=range(4), xticklabels=grids.values(), ylim=(0, 125), yticks=(0, 50, 100),
                    title="What it buys", xlabel="sampling steps", ylabel="samples far from\nevery mode (%)")
        axes[3].legend(loc="upper left", borderaxespad=0)
        self.save(figure, "toy_ideas.png")

    def training(self):
        """The animation: samples over training, at the fixed schedule's times and at others."""
        from PIL import Image

        figure, axes = self.plt.subplots(2, 2, figsize=(5, 5.6), dpi=110)
        artists, pages = [], []
        for row, grid in zip(axes, (FOUR, OFF)):
            for ax, method in zip(row, ("DM fixed", "CDM")):
                title = method if ax in axes[0] else ""
                dots = self.panel(ax, self.noise, self.c, title=title, note="-", ylabel="$x_2$")
                artists.append((ax, method, grid, dots))
        heading = figure.suptitle("iteration 0")
        for i, (k, _) in enumerate(self.frames["CDM"]):
            for ax, method, grid, dots in artists:
                x = self.frames[method][i][1][grid]
                far = (self.mix.distances(x, self.c).min(1).values > 4 * self.mix.std).float().mean()
                ax.set_xlabel(f"$x_1$\nt = {'1, .9, .75, .5' if grid == FOUR else OFF}: artifacts {100 * far:.0f}%")
                for cls, line in enumerate(dots):
                    line.set_data(*x[self.c == cls][:900].T)
            heading.set_text(f"iteration {k}")
            figure.canvas.draw()
            figure.set_layout_engine("none")  # laid out once
            pages.append(Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba())
                         .convert("RGB").quantize(64))
        self.plt.close(figure)
        pages[0].save(self.folder / "toy_training.gif", save_all=True, append_images=pages[1:], loop=0,
                      duration=[200] * (len(pages) - 1) + [2000])


# ======================================================================================================================
# 6. Running: one process a core, each on one thread, for matrices this small gain nothing from more.
# ======================================================================================================================


def worker(counter):
    global COUNTER
    COUNTER = counter
    torch.set_num_threads(1)


def tick():
    with COUNTER.get_lock():
        COUNTER.value += 1


def fit_job(mixture, seed, size):
    """The fitted network, and where guidance is shown also a histogram of the guided teacher's samples; pickled."""
    mix, guided = MIXTURES[mixture], None
    if mixture == "shared":
        guided = histogram(*teacher_samples(mix, size["samples"], SETTINGS.guidance), mix.classes)
    return pickle.dumps((fit(mix, seed, size["fit"], report=tick), guided))


def distil_job(mixture, method, seed, fitted, size):
    """One method on one mixture with one seed: its metrics, its network and its samples over training; pickled."""
    mix, frames, (net, guided) = MIXTURES[mixture], [], pickle.loads(fitted)
    noise, c = start(mix, 4000, "figures")

    def snapshot(k, ema):
        if k in size["frames"] and method in ("DM fixed", "CDM"):
            frames.append((k, {grid: cdm.sample(ema, noise, GRIDS[grid], (c,)) for grid in (FOUR, OFF)}))

    if method.endswith("teacher"):
        scale = SETTINGS.guidance if method == "guided teacher" else 0
        metrics = evaluate(mix.guided(scale), mix, size["samples"], guided)
        metrics["grids"][MANY] = measure(mix, *teacher_samples(mix, size["samples"], scale), guided)
        return pickle.dumps((metrics, None, None))
    if method != "undistilled":
        cfg = replace(SETTINGS, **(METHODS | GUIDED)[method])
        net = distil(mix, cfg, net, seed, size["iterations"], report=tick, snapshot=snapshot)
    return pickle.dumps((evaluate(net, mix, size["samples"], guided), net, frames))


def in_parallel(pool, counter, job, tasks, ticks, title):
    """Runs job(*task) for every task, with one progress bar over the iterations of all of them."""
    counter.value, futures = 0, [pool.submit(job, *task) for task in tasks]
    with tqdm(total=ticks, desc=title, unit="it", smoothing=0.05, mininterval=1) as bar:
        while wait(futures, timeout=0.2).not_done:
            bar.update(counter.value - bar.n)
        bar.update(counter.value - bar.n)
    return [future.result() for future in futures]


def summarise(runs):
    """The same nesting with a list over seeds in the place of each number, as [mean, standard deviation]."""
    if isinstance(runs[0], dict):
        return {key: summarise([run[key] for run in runs]) for key in runs[0]}
    values = torch.tensor(runs, dtype=torch.float64)
    return [round(float(values.mean()), 5), round(float(values.std()) if len(runs) > 1 else 0.0, 5)]


def table(summary, seeds, mixture, methods, columns):
    """Prints one row a method and one column for each (metric, grid)."""
    print(f"\n{mixture:20}" + "".join(f"{metric:>16}" for metric, _ in columns))
    print(" " * 20 + "".join(f"{grid:>16}" for _, grid in columns))
    for method in methods:
        row = f"{method:20}"
        for metric, grid in columns:
            scale, unit = (100, "%") if metric in PERCENT else (1, "")
            mean, std = (scale * value for value in summary[mixture][method]["grids"][grid][metric])
            row += f"{mean:.3g}{unit}{f' ±{std:.2g}' if seeds > 1 else ''}".rjust(16)
        print(row)


def arguments():
    def at_least(low):
        def number(text):
            if not text.lstrip("+-").isdigit() or int(text) < low:
                raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
            return int(text)

        return number

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"toy_2d.py: {message}\n")
    parser.add_argument("--mixture", choices=MIXTURES, default="uneq", help="(guidance is always shown on shared)")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="how many seeds (default 1)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="the first seed (default 0)")
    parser.add_argument("--iterations", type=at_least(1), help="of each method (default 1200)")
    parser.add_argument("--quick", action="store_true", help="a few iterations, to see that everything runs")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/toy"), help="default runs/toy")
    args = parser.parse_args()
    if not importlib.util.find_spec("matplotlib"):
        parser.error("the figures need matplotlib: pip install matplotlib")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "metrics.json").touch()  # better now than after minutes of training
    except OSError as error:
        parser.error(f"cannot write to {args.output_dir}: {error.strerror}")
    return args


def main():
    args, began = arguments(), time.time()
    torch.set_num_threads(1)
    seeds = range(args.seed, args.seed + args.seeds)
    size = dict(iterations=args.iterations or (40 if args.quick else 1200), fit=200 if args.quick else 2000,
                samples=4000 if args.quick else 20_000)
    n = 4 if args.quick else 24
    size["frames"] = [round(size["iterations"] * (i / n) ** 2) for i in range(n + 1)]  # most happens early

    todo = [(args.mixture, m) for m in ("exact teacher", "undistilled", *METHODS)]
    todo += [("shared", m) for m in (*REFERENCES, *GUIDED) if ("shared", m) not in todo]
    context = multiprocessing.get_context("spawn")
    counter = context.Value("l")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), context, worker, (counter,)) as pool:
        tasks = [(mixture, seed, size) for mixture in dict(todo) for seed in seeds]
        fitted = in_parallel(pool, counter, fit_job, tasks, len(tasks) * size["fit"], "fitting  ")
        fitted = {task[:2]: result for task, result in zip(tasks, fitted)}
        tasks = [(mixture, m, seed, fitted[mixture, seed], size) for seed in seeds for mixture, m in todo]
        ticks = sum(m not in REFERENCES for _, m, *_ in tasks) * size["iterations"]
        results = in_parallel(pool, counter, distil_job, tasks, ticks, "distilling")

    runs, models, frames = {}, {}, {}
    for (mixture, method, seed, *_), result in zip(tasks, results):
        metrics, model, over_training = pickle.loads(result)
        runs.setdefault(mixture, {}).setdefault(method, {})[seed] = metrics
        if seed == args.seed:
            models[mixture, method], frames[method] = model, frames.get(method) or over_training
    summary = {mixture: {m: summarise(list(by_seed.values())) for m, by_seed in methods.items()}
               for mixture, methods in runs.items()}
    settings = dict(mixture=args.mixture, seeds=list(seeds), **size, shift=SHIFT, cdm=asdict(SETTINGS),
                    methods=METHODS, guided=GUIDED, grids={name: times.tolist() for name, times in GRIDS.items()})
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    text = json.dumps(dict(settings=settings, versions=versions, summary=summary, runs=runs), indent=1)
    (args.output_dir / "metrics.json").write_text(text + "\n")

    columns = [("tv", FOUR), ("artifacts", FOUR), ("weights", FOUR), ("spread", FOUR)]
    table(summary, len(seeds), args.mixture, ("exact teacher", "undistilled", *METHODS),
          [*columns, ("tv", "8 steps"), ("artifacts", "8 steps"), ("tv", OFF), ("artifacts", OFF)])
    table(summary, len(seeds), "shared", ("undistilled", *GUIDED),
          [*columns, ("tv_guided", FOUR), ("shared_modes", FOUR)])
    figures = Figures(args.output_dir, args.mixture, models, frames, summary, len(seeds))
    for draw in (figures.ideas, figures.samples, figures.steps, figures.closeup, figures.anchors, figures.guidance,
                 figures.training):
        draw()
    print(f"\n{STAR}\nwrote metrics.json and 7 figures to {args.output_dir} in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
