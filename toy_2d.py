"""CDM in two dimensions, where everything can be seen and checked.

    python toy_2d.py                  # under 3 minutes on two CPU cores; README shows this run
    python toy_2d.py --seeds 5        # means and standard deviations over 5 seeds
    python toy_2d.py --mixture ring   # equal mode weights; the default, uneq, has 8 : 4 : 2 : 1
    python toy_2d.py --quick          # half a minute: does everything run? Too short to conclude

The data is a mixture of Gaussians. Its velocity has a closed form, so the teacher is exact, and so
are the densities that students are compared with. Student and fake score are one small MLP. It is
first fitted to the exact velocity, as SD3's student starts from its teacher. Then cdm.cdm_iteration
distils it. Methods differ in their settings only: see METHODS and GUIDED.

toy_iteration.png shows one iteration of training, in six panels. What to read beside each:

    1  a schedule, and the student's path to the anchors   sec. 3.2   backward_simulation
    2  the clean estimates at the anchors                  Eq. 1      clean_estimate
    3  L_CA, CFG augmentation                              Eqs. 3-4   ca_loss
    4  L_DM, distribution matching                         Eqs. 3-4   dm_loss
    5  the off-trajectory points                           Eq. 7      off_trajectory_point
    6  L_CDM, which is L_DM's function from there          sec. 3.3   dm_loss

Left out: images, text and any claim about SD3. SETTINGS has what is the toy's own.
"""

import argparse
import copy
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import cdm

# ==== 1. The data: a mixture of Gaussians for each class, and its exact velocity ==================

BINS = 70  # of the histogram, in each direction
EDGES = torch.linspace(-3.5, 3.5, BINS + 1)


class Mixture:
    """p(x0 | c) = sum_k weights[c, k] N(means[k], std^2 I), in two dimensions.

    weights: a row of K numbers for each class, normalised here. One more class, the last, is
    "empty": the average over all classes, as the empty prompt stands for all prompts.
    """

    def __init__(self, means, std, weights):
        self.means = torch.tensor(means)  # (K, 2)
        self.std = std
        self.classes = len(weights)
        rows = F.normalize(torch.tensor(weights, dtype=torch.float32), p=1, dim=1)
        self.weights = torch.cat([rows, rows.mean(0, keepdim=True)])  # (classes + 1, K)
        self.shared = (rows > 0).all(0)  # (K,): does the mode belong to every class?

    def modes_at(self, x_t, t, c):
        """log [w_k N(x_t; (1 - t) mu_k, var I)] of each mode k, and v_k = E[noise - x0 | x_t, k].

        On the path, mode k stays a Gaussian with variance var = (1 - t)^2 std^2 + t^2 around
        (1 - t) mu_k, so v_k is linear in the gap to that mean. Returns (B, K) and (B, K, 2).
        """
        t = t[:, None, None]
        var = (1 - t) ** 2 * self.std**2 + t**2
        gap = x_t[:, None] - (1 - t) * self.means
        v_k = (t - (1 - t) * self.std**2) / var * gap - self.means
        var = var[..., 0]
        square = gap.square().sum(2)
        log_p = self.weights[c].log() - square / (2 * var) - (2 * math.pi * var).log()
        return log_p, v_k

    def log_density(self, x_t, t, c):
        """log p_t(x_t | c), (B,)."""
        log_p, _ = self.modes_at(x_t, t, c)
        return log_p.logsumexp(1)

    def velocity(self, x_t, t, cond):
        """v(x_t, t, c) = E[noise - x0 | x_t, c], exactly. cond: (classes (B,),). Returns (B, 2)."""
        log_p, v_k = self.modes_at(x_t, t, cond[0])
        return (log_p.softmax(1)[..., None] * v_k).sum(1)

    def guided_velocity(self, scale, x_t, t, cond):
        """Classifier-free guidance: v(empty) + scale (v(c) - v(empty)). Scale 1 changes nothing."""
        empty = torch.full_like(cond[0], self.classes)
        v_empty = self.velocity(x_t, t, (empty,))
        return v_empty + scale * (self.velocity(x_t, t, cond) - v_empty)

    def distances(self, x, c):
        """Distance of x to each mode, (B, K). It is infinite if class c lacks the mode."""
        return (x[:, None] - self.means).norm(dim=2).masked_fill(self.weights[c] == 0, math.inf)

    def sample(self, c, generator=None):
        """Exact samples for classes c, (B,). Returns (B, 2)."""
        k = torch.multinomial(self.weights[c], 1, replacement=True, generator=generator)[:, 0]
        return self.means[k] + self.std * torch.randn(len(c), 2, generator=generator)

    def bin_masses(self):
        """Exact mass of each bin of the histogram, (classes * BINS^2 + 1,).

        Classes are equally likely. The last entry is the mass outside of all bins.
        """
        cumulative = torch.erf((EDGES.double() - self.means[..., None]) / (self.std * math.sqrt(2)))
        mass = cumulative.diff(dim=2) / 2  # (K, 2, BINS), of each mode in each direction
        weights = self.weights[:-1].double()
        joint = torch.einsum("ck,kx,ky->cxy", weights, mass[:, 0], mass[:, 1]) / self.classes
        return torch.cat([joint.flatten(), 1 - joint.sum()[None]]).clamp(min=0).float()


def ring(n, radius=2.0):
    """The corners of a regular polygon."""
    angles = [2 * math.pi * i / n for i in range(n)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


MIXTURES = {
    # Two classes of four modes each, in turn: first with equal weights, then with unequal ones.
    "ring": Mixture(ring(8), 0.15, [[1, 0] * 4, [0, 1] * 4]),
    "uneq": Mixture(ring(8), 0.15, [[8, 0, 4, 0, 2, 0, 1, 0], [0, 8, 0, 4, 0, 2, 0, 1]]),
    # Modes 0 and 3 belong to both classes. Guidance moves samples away from them.
    "shared": Mixture(ring(6), 0.15, [[1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1]]),
}


# ==== 2. The network, fitted to the exact velocity ================================================


class Net(nn.Module):
    """v(x_t, t, c) by residual layers. Shapes as in Mixture.velocity."""

    def __init__(self, classes, width=64, layers=4):
        super().__init__()
        # t is seen through 8 sines and 8 cosines, which are sines with a phase.
        frequency = math.pi / 4 * 2.0 ** torch.linspace(0, 4, 8)
        phase = torch.tensor([0, math.pi / 2])
        self.register_buffer("frequency", frequency.repeat(1, 2))
        self.register_buffer("phase", phase.repeat_interleave(8))
        self.inp = nn.Linear(2 + 16, width)
        self.cls = nn.Embedding(classes + 1, width)  # the last class is "empty"
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out = nn.Linear(width, 2)

    def waves(self, t):
        return torch.addmm(self.phase, t[:, None], self.frequency).sin()

    def forward(self, x_t, t, cond):
        h = self.inp(torch.cat([x_t, self.waves(t)], 1)) + self.cls(cond[0])
        for layer in self.hidden:
            h = h + F.silu(layer(h))
        return self.out(h)

    def params(self):
        """Parameters by name."""
        return dict(self.named_parameters())


def fit(mix, seed, steps, batch=512, lr=2e-3):
    """A Net regressed onto the exact velocity of all classes, "empty" included."""
    torch.manual_seed(seed)
    net = Net(mix.classes)
    gen = cdm.generator(seed, "fit")
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        c = torch.randint(mix.classes + 1, (batch,), generator=gen)
        t = torch.rand(batch, generator=gen)
        x_t = cdm.add_noise(mix.sample(c, gen), t, torch.randn(batch, 2, generator=gen))
        optimizer.zero_grad()
        F.mse_loss(net(x_t, t, (c,)), mix.velocity(x_t, t, (c,))).backward()
        optimizer.step()
        cosine.step()
    return net


# ==== 3. The methods, as differences from one set of settings, and the loop that trains them ======

SETTINGS = cdm.CDMConfig(
    ca_weight=0.0,
    alpha=1.0,  # with L_CA, students aim at guidance of scale 1 + alpha = 2
    max_schedule_steps=8,
    time_low=0.02,  # the range that the authors advised later
    time_high=0.98,
    student_lr=2e-3,
    fake_lr=4e-3,
    ema_decay=0.995,
)
FIXED = {"schedule": "fixed"}
NO_CDM = {"cdm_weight": 0.0}
RELEASED = {"time_low": 0.25, "time_high": 0.95}  # after the shift no inner time is below 0.5
CA = {"ca_weight": 1.0}

METHODS = {  # trained on --mixture. "DM fixed" is like DMD2 without its GAN and guidance
    "DM fixed": FIXED | NO_CDM,
    "DM dynamic": NO_CDM,
    "CDM": {},
    "DM dynamic, t >= .5": NO_CDM | RELEASED,
    "CDM, t >= .5": RELEASED,
}
GUIDED = {  # trained on the mixture "shared"
    "DM alone": NO_CDM,
    "CA alone": CA | NO_CDM | {"dm_weight": 0.0},
    "CA + DM": CA | NO_CDM,
    "CA + DM + CDM": CA,
}
UNDISTILLED = "undistilled"  # the fitted network itself
EXACT = "exact field"
TEACHERS = {EXACT: 1.0, "guided field": 1 + SETTINGS.alpha}  # and their guidance

BATCH = 256
SHIFT = 3.0  # SD3's: the fixed schedule 1, 0.75, 0.5, 0.25 becomes t = 1, 0.9, 0.75, 0.5
FOUR = "4 steps"
OTHER = "4 other times"
MANY = "200 steps"
GRIDS = {f"{n} steps": cdm.sampling_times(n, SHIFT) for n in (1, 2, 3, 4, 6, 8)}
GRIDS[OTHER] = torch.tensor([1, 0.9, 0.6, 0.15])  # "DM fixed" is not trained at the last two
TEACHER_GRIDS = GRIDS | {MANY: cdm.sampling_times(200)}


def distil(mix, cfg, net, seed, iterations):
    """Distil the exact velocity into a copy of `net`. Yields (k, student, fake score, EMA)."""
    student, fake, ema = (copy.deepcopy(net) for _ in range(3))
    learner = cdm.Learner(student, student.params(), cfg.student_lr, cfg)
    fake_learner = cdm.Learner(fake, fake.params(), cfg.fake_lr, cfg)
    cond = (torch.arange(BATCH) % mix.classes,)
    uncond = (torch.tensor([mix.classes]),)
    yield 0, student, fake, ema
    for k in range(1, iterations + 1):
        draw = cdm.draw_iteration(cfg, seed, k, BATCH, (2,), SHIFT)
        cdm.cdm_iteration(
            k, cond, uncond, draw, mix.velocity, learner, fake_learner, ema.params(), cfg
        )
        yield k, student, fake, ema


# ==== 4. The metrics, against exact values ========================================================


def histogram(x, c, classes):
    """Share of samples in each bin, in the order of Mixture.bin_masses. x: (B, 2); c: (B,)."""
    row, column = (torch.bucketize(x, EDGES, right=True) - 1).unbind(1)
    inside = ((x >= EDGES[0]) & (x < EDGES[-1])).all(1)
    outside = classes * BINS**2
    bins = torch.where(inside, (c * BINS + row) * BINS + column, outside)
    return torch.bincount(bins, minlength=outside + 1) / len(x)


def spread(mix, x, c, mode):
    """Median distance to the centre of the own mode, relative to the data's: 1.177 std.

    Each mode's centre is the median of the samples that are nearest to it.
    """
    radii = []
    for cls, k in mix.weights[:-1].nonzero().tolist():
        own = x[(c == cls) & (mode == k)]
        if len(own):
            radii.append((own - own.median(0).values).norm(dim=1) / mix.std)
    return torch.cat(radii).median() / math.sqrt(2 * math.log(2))


def measure(mix, x, c):
    """All metrics of samples x (B, 2) of classes c (B,), by name."""
    x = x.nan_to_num(1e6).clamp(-1e6, 1e6)  # a method may diverge
    distance, mode = mix.distances(x, c).min(1)
    modes = len(mix.means)
    counts = torch.bincount(c * modes + mode, minlength=mix.classes * modes).view(-1, modes)
    shares = counts / counts.sum(1, keepdim=True)  # of each class's samples, nearest to each mode
    metrics = {
        # Total variation between the histogram and the exact masses, in [0, 1].
        "tv": (mix.bin_masses() - histogram(x, c, mix.classes)).abs().sum() / 2,
        # Share of samples farther than 4 std from every mode of their class.
        "artifacts": (distance > 4 * mix.std).double().mean(),
        # Total variation between the shares of the modes and their weights.
        "weights": ((shares - mix.weights[:-1]).abs().sum(1) / 2).mean(),
        # Below 1, samples are closer together than the data.
        "spread": spread(mix, x, c, mode),
    }
    if mix.shared.any():
        metrics["shared"] = shares[:, mix.shared].sum(1).mean()
    return {name: round(float(value), 5) for name, value in metrics.items()}


def start(mix, n, *key):
    """Noise and classes, which are equally frequent, of n samples."""
    return torch.randn(n, 2, generator=cdm.generator(*key)), torch.arange(n) % mix.classes


@torch.no_grad()
def sample_grids(model, mix, n, grids):
    """Metrics of n samples on each grid."""
    noise, c = start(mix, n, "evaluate")
    return {
        name: measure(mix, cdm.sample(model, noise, times, (c,)), c)
        for name, times in grids.items()
    }


@torch.no_grad()
def anchor_estimates(model, mix, cfg, n):
    """Clean estimates at n anchors, drawn as in training: what the fake score learns.

    Returns {group: (estimates, classes)}. Each time of the fixed schedule is in another group.
    """
    cond = (torch.arange(BATCH) % mix.classes,)
    parts = []
    for k in range(1, n // BATCH + 1):
        draw = cdm.draw_iteration(cfg, "anchors", k, BATCH, (2,), SHIFT)
        a = cdm.backward_simulation(model, draw.noise["start"], draw.schedule, draw.index, cond)
        parts.append((cdm.clean_estimate(a.x_t, a.t, a.v), a.t, cond[0]))
    x0_hat, t, c = (torch.cat(part) for part in zip(*parts, strict=True))
    groups = {
        "t = 1": t == 1,
        ".8 < t < 1": (t > 0.8) & (t < 1),
        ".6 < t < .8": (t > 0.6) & (t < 0.8),
        "t < .6": t < 0.6,
        "all": t > 0,
    }
    return {name: (x0_hat[rows], c[rows]) for name, rows in groups.items()}


# ==== 5. The figures. Colours are Okabe and Ito's, which colour-blind readers can tell apart ======

BLUE = "#0072B2"
ORANGE = "#E69F00"
RED = "#D55E00"
GREEN = "#009E73"
LINES = {  # colour and marker
    UNDISTILLED: ("#888888", "x"),
    "DM fixed": (RED, "o"),
    "DM dynamic": (ORANGE, "s"),
    "CDM": (BLUE, "D"),
}
STYLE = {
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "lines.markersize": 3.5,
}


@dataclass
class Results:
    """All that the tables and the figures show."""

    mixture: str
    runs: dict  # {(mixture, method): the metrics of each seed}
    models: dict  # {(mixture, method): the first seed's EMA after the iterations in `frames`}
    frames: list
    halfway: dict = field(default_factory=dict)  # {(mixture, method): what toy_iteration.png needs}

    def values(self, mixture, method, metric, points, part="grids"):
        """Mean and standard deviation over seeds of a metric at some grids or groups of anchors."""
        seeds = self.runs[mixture, method]
        values = torch.tensor([[run[part][point][metric] for point in points] for run in seeds])
        if len(values) == 1:
            return values[0], torch.zeros(len(points))
        return values.mean(0), values.std(0)

    def text(self, mixture, method, metric, point, part="grids"):
        [mean], [std] = self.values(mixture, method, metric, [point], part)
        style = ".1%" if metric in ("artifacts", "shared") else ".2f"
        if std > 0:
            return f"{mean:{style}}±{std:{style}}"
        return f"{mean:{style}}"

    def samples(self, mixture, method, grid, frame=-1):
        """Samples and their classes, to be drawn."""
        noise, c = start(MIXTURES[mixture], 1800, "figures")
        model = self.models[mixture, method][frame]
        return cdm.sample(model, noise, TEACHER_GRIDS[grid], (c,)), c


def draw_density(ax, mix, c):
    """The data's density in grey. c: a class, or mix.classes for all."""
    side = torch.linspace(-3, 3, 150)
    at = torch.cartesian_prod(side, side)
    c = torch.full((len(at),), c)
    density = mix.log_density(at, torch.zeros(len(at)), c).exp().sqrt().view(150, 150).T
    ax.imshow(density, "Greys", origin="lower", extent=(-3, 3, -3, 3), vmax=2 * density.max())
    ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=(-2, 0, 2), yticks=(-2, 0, 2))
    ax.tick_params(labelleft=ax.get_subplotspec().is_first_col())


def draw_points(ax, mix, x, c, title, notes):
    """Samples, a colour for each class, over the density."""
    draw_density(ax, mix, mix.classes)
    for cls, colour in enumerate((BLUE, ORANGE)):
        ax.plot(*x[c == cls].T, ".", ms=1.6, mew=0, color=colour)
    if (x.abs() > 3).any(1).all():
        ax.text(0, 0, "all far outside", ha="center", va="center")
    ax.set(title=title, xlabel="\n".join(notes))


def draw_samples(figure, results, methods, metrics=(), frame=-1):
    """Samples on the fixed schedule, and below them on four other times."""
    mixture = results.mixture
    axes = figure.subplots(2, len(methods))
    for row, grid in zip(axes, (FOUR, OTHER), strict=True):
        for ax, method in zip(row, methods, strict=True):
            x, c = results.samples(mixture, method, grid, frame)
            notes = [f"{name} {results.text(mixture, method, name, grid)}" for name in metrics]
            draw_points(ax, MIXTURES[mixture], x, c, method, notes)
        row[0].set_ylabel("t = " + ", ".join(f"{t:.2g}" for t in GRIDS[grid]))


def draw_guidance(figure, results):
    """Samples of teachers at 200 steps, and of students at 4."""
    axes = figure.subplots(2, 4).flat
    axes[-1].set_axis_off()
    for ax, method in zip(axes, (*TEACHERS, UNDISTILLED, *GUIDED), strict=False):
        grid = MANY if method in TEACHERS else FOUR
        x, c = results.samples("shared", method, grid)
        names = ("shared", "artifacts")
        notes = [f"{name} {results.text('shared', method, name, grid)}" for name in names]
        draw_points(ax, MIXTURES["shared"], x, c, f"{method}, {grid}", notes)


def draw_pool(figure, results):
    """Clean estimates by their anchor's time, and all together, beside the guided teacher."""
    mix = MIXTURES["shared"]
    method = "CA + DM + CDM"
    cfg = replace(SETTINGS, **GUIDED[method])
    groups = anchor_estimates(results.models["shared", method][-1], mix, cfg, 20_000)
    *axes, last = figure.subplots(1, len(groups) + 1)
    for ax, (group, (x, c)) in zip(axes, groups.items(), strict=True):
        text = results.text("shared", method, "shared", group, "anchors")
        draw_points(ax, mix, x[:1800], c[:1800], group, [f"shared {text}"])
    x, c = results.samples("shared", "guided field", MANY)
    text = results.text("shared", "guided field", "shared", MANY)
    draw_points(last, mix, x, c, "guided field", [f"shared {text}"])


def draw_steps(figure, results):
    """Metrics over the number of steps. The last grid has no place in their order, so no line."""
    axes = figure.subplots(1, 3)
    steps = [grid for grid in GRIDS if grid != OTHER]
    for ax, metric in zip(axes, ("tv", "artifacts", "spread"), strict=True):
        for i, (method, (colour, marker)) in enumerate(LINES.items()):
            mean, std = results.values(results.mixture, method, metric, GRIDS)
            x = torch.arange(len(GRIDS)) + 0.08 * (i - 1.5)  # so that methods do not hide others
            style = {"color": colour, "elinewidth": 0.7}
            ax.errorbar(x[:-1], mean[:-1], std[:-1], fmt=marker + "-", label=method, **style)
            ax.errorbar(x[-1:], mean[-1:], std[-1:], fmt=marker, **style)
        labels = [grid.removesuffix(" steps") for grid in steps]
        ax.set_xticks(range(len(GRIDS)), [*labels, "4 other\ntimes"])
        ax.set(title=metric, xlabel="sampling steps")
    axes[-1].set_yscale("log", base=2)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4)


def draw_paths(ax, model, cfg, colour):
    """Paths of class 0 over time, each along the schedule of another iteration."""
    starts = torch.tensor([[1.9, 0.9], [1.0, -0.6], [0.2, 0.9], [-0.6, -1.2], [-1.8, 0.3]])
    for k, x in enumerate(starts, 1):
        draw = cdm.draw_iteration(cfg, 0, k, 1, (2,), SHIFT)
        n = len(draw.schedule)
        cond = (torch.zeros(n, dtype=torch.long),)
        # Row i stops at anchor i, so the rows are all anchors of one path.
        a = cdm.backward_simulation(model, x.expand(n, 2), draw.schedule, torch.arange(n), cond)
        end = cdm.clean_estimate(a.x_t, a.t, a.v)[-1, 0]
        ax.plot([*a.t, 0], [*a.x_t[:, 0], end], color=colour)
        ax.plot(a.t, a.x_t[:, 0], "o", color=colour)
        if cfg.cdm_weight:
            x_off, t_off = cdm.off_trajectory_point(a, draw, cfg)
            ax.plot([a.t[-1], t_off[-1]], [a.x_t[-1, 0], x_off[-1, 0]], "k:")
            ax.plot(t_off[-1], x_off[-1, 0], "kD", mfc="white")
    ax.set(xticks=(1, 0.9, 0.75, 0.5, 0), xticklabels=("1", ".9", ".75", ".5", "0"))
    ax.set(xlim=(1.03, 0), ylim=(-3, 3), yticks=(-2, 0, 2), xlabel="t (1 noise, 0 data)")


def draw_ideas(figure, results):
    """Where three students are trained, and how many samples are then far from every mode."""
    captions = {
        "DM fixed": "trained at four times",
        "DM dynamic": "new times each iteration",
        "CDM": "also off the path (◇)",
    }
    *axes, last = figure.subplots(1, 4)
    grids = (FOUR, "8 steps", OTHER)
    for i, (ax, method) in enumerate(zip(axes, captions, strict=True)):
        colour, _ = LINES[method]
        model = results.models[results.mixture, method][-1]
        draw_paths(ax, model, replace(SETTINGS, **METHODS[method]), colour)
        ax.set_title(f"{method}:\n{captions[method]}")
        mean, std = results.values(results.mixture, method, "artifacts", grids)
        last.bar(torch.arange(3) + 0.25 * (i - 1), 100 * mean, 0.25, color=colour, label=method)
    axes[0].set_ylabel("$x_1$")
    last.set_xticks(range(3), ["4 steps", "8 steps", "4 other\ntimes"])
    last.set(title="samples far from\nevery mode, in %")
    last.legend(loc="upper left")


def recorded(model, said):
    """The model. It also appends (x_t, D(x_t, t, c)) of every call to `said`."""

    def call(x_t, t, cond):
        v = model(x_t, t, cond)
        said.append((x_t, cdm.clean_estimate(x_t, t, v)))
        return v

    return call


def draw_loss(ax, x0_hat, loss, said, other):
    """A loss: x0_hat noised again, where two models see its data, and the push along delta.

    said: the records of the models that the loss asks; other: the second one's name.
    """
    x0_hat = x0_hat.detach().requires_grad_()
    value, w = loss(x0_hat)
    value.backward()
    delta = -x0_hat.grad * x0_hat.numel() / 2 / w[:, None]  # see pseudo_target_loss
    (z, d_real), (_, d_other) = said
    x0_hat = x0_hat.detach()
    draw_links(ax, x0_hat, z, "-", color="0.7")
    draw_links(ax, z, d_real, ":", color="0.4")
    draw_links(ax, z, d_other, ":", color="0.4")
    ax.plot(*z.T, "o", color="0.5", mfc="white", label="noised again, $z$")
    ax.plot(*d_other.T, "v", color=ORANGE, label=other)
    ax.plot(*d_real.T, "^", color=GREEN, label="teacher")
    ax.plot(*x0_hat.T, "o", color=BLUE, label=r"estimate $\hat x_0$")
    draw_pushes(ax, x0_hat, delta)


def draw_links(ax, a, b, style, **options):
    """A line from each point of a to that of b."""
    ax.plot(*torch.stack([a, b]).permute(2, 0, 1), style, lw=0.8, **options)


def draw_pushes(ax, at, delta):
    options = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.012, "zorder": 3}
    ax.quiver(*at.T, *delta.T, color=RED, label="push", **options)


def draw_iteration(figure, results):
    """One iteration, in the order of cdm.cdm_iteration, of eight samples of class 0."""
    mix = MIXTURES["shared"]
    cfg = replace(SETTINGS, **GUIDED["CA + DM + CDM"])
    (student, fake), k = results.halfway["shared", "CA + DM + CDM"]
    draw = cdm.draw_iteration(cfg, 0, k, BATCH, (2,), SHIFT, rows=slice(0, 16, 2))
    cond = (torch.zeros(8, dtype=torch.long),)
    uncond = (torch.full((8,), mix.classes),)
    axes = figure.subplots(2, 3).flat
    for ax in axes:
        draw_density(ax, mix, 0)

    # Each sample stops at its anchor. Stopping all of them earlier shows their paths.
    def stop(i):
        index = draw.index.clamp(max=i)
        return cdm.backward_simulation(student, draw.noise["start"], draw.schedule, index, cond)

    steps = len(draw.schedule)
    path = torch.stack([stop(i).x_t for i in range(steps)])  # (N, 8, 2)
    anchor = stop(steps)
    x0_hat = cdm.clean_estimate(anchor.x_t, anchor.t, anchor.v)
    x_off, t_off = cdm.off_trajectory_point(anchor, draw, cfg)
    x0_off = cdm.clean_estimate(x_off, t_off, student(x_off, t_off, cond)).detach()

    axes[0].plot(*path.permute(2, 0, 1), ".-", color="0.5", ms=3, lw=0.8)
    axes[0].plot(*path[0].T, "o", color="0.5", mfc="white", label="noise, $t = 1$")
    for ax in (axes[0], axes[1], axes[4]):
        ax.plot(*anchor.x_t.T, "s", color="black", label="anchor")
    draw_links(axes[1], anchor.x_t, x0_hat, "-", color=BLUE)
    axes[1].plot(*x0_hat.T, "o", color=BLUE, label=r"estimate $\hat x_0$")

    def name(loss):
        return {"tau": draw.tau[loss], "noise": draw.noise[loss]}

    said = []
    teacher = recorded(mix.velocity, said)
    ca = partial(cdm.ca_loss, teacher=teacher, cond=cond, uncond=uncond, alpha=cfg.alpha)
    draw_loss(axes[2], x0_hat, partial(ca, **name("ca")), said, "without class")
    said.clear()
    dm = partial(cdm.dm_loss, teacher=teacher, fake_score=recorded(fake, said), cond=cond)
    draw_loss(axes[3], x0_hat, partial(dm, **name("dm")), said, "fake score")
    draw_links(axes[4], anchor.x_t, x_off, ":", color="black")
    axes[4].plot(*x_off.T, "D", color="black", mfc="white", label="$x_{t'}$")
    said.clear()
    draw_links(axes[5], x_off, x0_off, "-", color=BLUE)
    axes[5].plot(*x_off.T, "D", color="black", mfc="white", label="$x_{t'}$")
    draw_loss(axes[5], x0_off, partial(dm, **name("cdm")), said, "fake score")


def draw_training(path, results):
    """The samples of two methods over training, as an animation."""
    figure = Figure((5, 5.4))
    writer = PillowWriter(fps=5)
    with writer.saving(figure, path, dpi=110):
        for frame in [*range(len(results.frames)), *6 * [-1]]:  # rests at the end
            figure.clear()
            figure.suptitle(f"iteration {results.frames[frame]}")
            draw_samples(figure, results, ("DM fixed", "CDM"), frame=frame)
            writer.grab_frame()


def draw_all(folder, results):
    matplotlib.rcParams.update(STYLE)

    def draw(name, height, title, function, *options):
        figure = Figure((9, height), dpi=160)
        function(figure, results, *options)
        figure.suptitle(title)
        figure.savefig(folder / f"toy_{name}.png")

    draw("iteration", 6.6, "One iteration of CDM, of eight samples", draw_iteration)
    with torch.no_grad():
        title = "Student paths from noise to data, and where they are trained"
        draw("ideas", 3.2, title, draw_ideas)
        title = "On the fixed schedule (top), and off it. Grey: the data."
        methods = (UNDISTILLED, "DM fixed", "DM dynamic", "CDM")
        draw("samples", 5.8, title, draw_samples, methods, ("tv", "artifacts", "spread"))
        draw("steps", 3.4, "Students on other numbers of steps", draw_steps)
        draw("guidance", 6.2, "The left and right modes belong to both classes", draw_guidance)
        title = "Clean estimates of CA + DM + CDM, by the time of the anchor"
        draw("pool", 2.6, title, draw_pool)
        draw_training(folder / "toy_training.gif", results)


# ==== 6. The program: one process on each core, each on one thread ================================

FULL = {"iterations": 3000, "fit_steps": 2000, "samples": 20_000, "frames": 24}
QUICK = {"iterations": 40, "fit_steps": 200, "samples": 4000, "frames": 4}


def begin():
    """Prepare a process: the networks are too small for more than one thread."""
    torch.set_num_threads(1)
    # Models return by shared memory. By default each of their tensors would be an open file.
    torch.multiprocessing.set_sharing_strategy("file_system")


def shown_iteration(cfg, seed, iterations):
    """For toy_iteration.png: a student's iteration, half-way, whose schedule has 4 to 6 steps."""
    k = max(2, iterations // 4 * 2)
    while not 4 <= len(cdm.draw_iteration(cfg, seed, k, 1, (2,), SHIFT).schedule) <= 6:
        k += 2
    return k


def train(mixture, settings, net, seed, iterations, samples, frames):
    """Distil and measure. Returns metrics, the EMA at each of `frames`, and networks half-way."""
    mix = MIXTURES[mixture]
    cfg = replace(SETTINGS, **settings)
    shown = shown_iteration(cfg, seed, iterations)
    models = []
    for k, student, fake, ema in distil(mix, cfg, net, seed, iterations):
        if k in frames:
            models.append(copy.deepcopy(ema))
        if k == min(shown - 1, iterations):
            halfway = copy.deepcopy((student, fake)), shown
    groups = anchor_estimates(ema, mix, cfg, samples)
    anchors = {name: measure(mix, x, c) for name, (x, c) in groups.items()}
    return {"grids": sample_grids(ema, mix, samples, GRIDS), "anchors": anchors}, models, halfway


def run_all(mixture, seeds, size, frames):
    """Train and measure all methods, for seeds 0, 1, ... Returns Results."""
    plan = {"shared": {UNDISTILLED: {}} | GUIDED}
    plan[mixture] = {UNDISTILLED: {}} | plan.get(mixture, {}) | METHODS
    results = Results(mixture, {}, {}, frames)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(None, context, begin) as pool:
        nets = {}
        for seed in range(seeds):
            for name in plan:
                key = name, seed
                nets[key] = pool.submit(fit, MIXTURES[name], seed, size["fit_steps"])
        jobs = {}
        for (name, seed), net in nets.items():
            for method, settings in plan[name].items():
                steps = 0 if method == UNDISTILLED else size["iterations"]
                kept = frames if seed == 0 else []
                options = net.result(), seed, steps, size["samples"], kept
                jobs[name, method, seed] = pool.submit(train, name, settings, *options)
        for name in plan:
            for teacher, scale in TEACHERS.items():
                velocity = partial(MIXTURES[name].guided_velocity, scale)
                grids = sample_grids(velocity, MIXTURES[name], size["samples"], TEACHER_GRIDS)
                results.runs[name, teacher] = [{"grids": grids}]
                results.models[name, teacher] = [velocity]
        for (name, method, seed), job in tqdm(jobs.items(), "training", unit="model"):
            metrics, models, halfway = job.result()
            results.runs.setdefault((name, method), []).append(metrics)
            if seed == 0:
                results.models[name, method] = models
                results.halfway[name, method] = halfway
    return results


def print_table(results, mixture, methods, metric, points, part="grids"):
    print(f"\n{mixture + ', ' + metric:32}" + "".join(f"{point:>16}" for point in points))
    for method in methods:
        cells = [results.text(mixture, method, metric, point, part) for point in points]
        name = f"Euler steps of the {method}" if method in TEACHERS else method
        print(f"{name:32}" + "".join(f"{cell:>16}" for cell in cells))


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mixture", choices=MIXTURES, default="uneq", help="guidance is always shown on shared")
    add("--seeds", type=int, default=1, help="how many seeds, from 0 (default 1)")
    add("--iterations", type=int, help="of each method (default 3000)")
    add("--quick", action="store_true", help="a few iterations, to see that everything runs")
    add("--output-dir", type=Path, help="default runs/toy, with --quick runs/toy_quick")
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    if args.iterations is None:
        args.iterations = size["iterations"]
    if args.seeds < 1 or args.iterations < 1:
        parser.error("--seeds and --iterations must be at least 1")
    if args.output_dir is None:
        args.output_dir = Path("runs/toy_quick" if args.quick else "runs/toy")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return args, size | {"iterations": args.iterations}


def main():
    args, size = parse_args()
    begin()
    share = [i / size["frames"] for i in range(size["frames"] + 1)]
    # Most of the animation's frames are early, when most happens.
    frames = sorted({round(size["iterations"] * s**2) for s in share})
    results = run_all(args.mixture, args.seeds, size, frames)
    settings = {"mixture": args.mixture, "seeds": args.seeds, "torch": torch.__version__, **size}
    settings |= {"cdm": asdict(SETTINGS), "methods": METHODS, "guided": GUIDED}
    runs = {}
    for (mixture, method), seeds in results.runs.items():
        runs.setdefault(mixture, {})[method] = seeds
    report = json.dumps({"settings": settings, "runs": runs}, indent=1)
    (args.output_dir / "metrics.json").write_text(report + "\n")

    for metric in ("artifacts", "tv", "spread"):
        methods = (EXACT, UNDISTILLED, *METHODS)
        print_table(results, args.mixture, methods, metric, (FOUR, "8 steps", OTHER))
    for metric in ("shared", "artifacts"):
        print_table(results, "shared", TEACHERS, metric, [MANY])
        print_table(results, "shared", GUIDED, metric, [FOUR])
    points = results.runs["shared", "CA + DM"][0]["anchors"]
    print_table(results, "shared", GUIDED, "shared", points, "anchors")
    if args.quick:
        print("\nquick run: too short to conclude")
    print("Drawing the figures takes about 20 seconds.", flush=True)
    draw_all(args.output_dir, results)
    print(f"Wrote metrics.json and 7 figures to {args.output_dir}.")


if __name__ == "__main__":
    main()
