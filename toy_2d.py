"""CDM in two dimensions, where everything can be checked. The algorithm is imported from cdm.py.

    python toy_2d.py                   # under 3 minutes on two CPU cores
    python toy_2d.py --quick           # half a minute: does everything run? Too short to conclude
    python toy_2d.py --mixture ring    # equal mode weights; the default, uneq, has 8 : 4 : 2 : 1
    python toy_2d.py --seeds 5 --iterations 3000   # means and standard deviations over 5 seeds

The data is a mixture of Gaussians. Its velocity has a closed form, so the teacher is exact, and so
are the densities that students are compared with. Student and fake score are one small MLP. It is
first fitted to the exact velocity, as SD3's student starts from its teacher. Then cdm.cdm_iteration
distils it. Methods differ in their settings only: see METHODS and GUIDED.

It writes metrics.json, toy_*.png and toy_training.gif to --output-dir.

Not in the paper: the methods marked *, which use the anchor-aware fake score of cdm.py. Left out:
images, text and any claim about SD3. SETTINGS has what is the toy's own, such as no L_CA.
"""

import argparse
import copy
import json
import math
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
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
    """v(x_t, t, c) by residual layers. Shapes as in Mixture.velocity.

    made_at, (B,), is for the anchor-aware fake score: the time of its clean estimate. Its layer
    starts at zero, so that it changes nothing at first.
    """

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
        self.anchor = nn.Linear(16, width, bias=False)
        nn.init.zeros_(self.anchor.weight)

    def waves(self, t):
        return torch.addmm(self.phase, t[:, None], self.frequency).sin()

    def forward(self, x_t, t, cond, made_at=None):
        h = self.inp(torch.cat([x_t, self.waves(t)], 1)) + self.cls(cond[0])
        if made_at is not None:
            h = h + self.anchor(self.waves(made_at))
        for layer in self.hidden:
            h = h + F.silu(layer(h))
        return self.out(h)

    def params(self, anchor=False):
        """Parameters by name: those of the anchor layer, or all others."""
        named = self.named_parameters()
        return {name: p for name, p in named if name.startswith("anchor") == anchor}


@cache  # so that a process does it once for all methods
def fit(mix, seed, steps, batch=512, lr=2e-3):
    """A Net regressed onto the exact velocity of all classes, "empty" included."""
    torch.manual_seed(seed)
    net = Net(mix.classes)
    gen = cdm.generator(seed, "fit")
    optimizer = torch.optim.AdamW(net.params().values(), lr=lr, fused=True)
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

SETTINGS = cdm.CDM(
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
AWARE = {"anchor_aware_fake": True}
CA = {"ca_weight": 1.0}

METHODS = {  # trained on --mixture. "DM fixed" is like DMD2 without its GAN and guidance
    "DM fixed": FIXED | NO_CDM,
    "DM dynamic": NO_CDM,
    "CDM": {},
    "DM dynamic, t >= .5": NO_CDM | RELEASED,
    "CDM, t >= .5": RELEASED,
    "DM fixed *": FIXED | NO_CDM | AWARE,
    "DM dynamic *": NO_CDM | AWARE,
    "CDM *": AWARE,
}
GUIDED = {  # trained on the mixture "shared"
    "DM alone": NO_CDM,
    "CA alone": CA | NO_CDM | {"dm_weight": 0.0},
    "CA + DM": CA | NO_CDM,
    "CA + DM + CDM": CA,
    "CA + DM + CDM *": CA | AWARE,
}
UNDISTILLED = "undistilled"  # the fitted network itself
TEACHERS = {"exact teacher": 1.0, "guided teacher": 1 + SETTINGS.alpha}  # and their guidance

SHIFT = 3.0  # SD3's: the fixed schedule 1, 0.75, 0.5, 0.25 becomes t = 1, 0.9, 0.75, 0.5
FOUR = "4 steps"
OTHER = "4 others"
MANY = "200 steps"
GRIDS = {f"{n} steps": cdm.uniform_times(n, SHIFT) for n in (1, 2, 3, 4, 6, 8)}
GRIDS[OTHER] = torch.tensor([1, 0.9, 0.6, 0.15])  # "DM fixed" is not trained at the last two
TEACHER_GRIDS = GRIDS | {MANY: cdm.uniform_times(200)}


def distil(mix, cfg, net, seed, iterations, batch=256):
    """Distil the exact velocity into a copy of `net`. Yields (k, the student's EMA)."""
    student, fake, ema = (copy.deepcopy(net) for _ in range(3))
    student_groups = [(student.params(), cfg.student_lr)]
    # The anchor layer gets no gradient, and AdamW leaves it alone, unless the method has a *.
    fake_groups = [(fake.params(), cfg.fake_lr), (fake.params(anchor=True), cfg.anchor_lr)]
    learners = cdm.Learner(student, student_groups, cfg), cdm.Learner(fake, fake_groups, cfg)
    cond = (torch.arange(batch) % mix.classes,)
    uncond = (torch.full((batch,), mix.classes),)
    for k in range(1, iterations + 1):
        draw = cdm.draw_iteration(cfg, seed, k, batch, (2,), SHIFT)
        batches = [(cond, uncond, draw)]
        cdm.cdm_iteration(k, batches, mix.velocity, *learners, ema.params(), cfg)
        yield k, ema


# ==== 4. The metrics, against exact values ========================================================


def histogram(x, c, classes):
    """Share of samples in each bin, in the order of Mixture.bin_masses. x: (B, 2); c: (B,)."""
    row, column = (torch.bucketize(x, EDGES, right=True) - 1).unbind(1)
    inside = ((x >= EDGES[0]) & (x < EDGES[-1])).all(1)
    outside = classes * BINS**2
    bins = torch.where(inside, (c * BINS + row) * BINS + column, outside)
    return torch.bincount(bins, minlength=outside + 1) / len(x)


def mode_shares(mix, mode, c):
    """Share of each class's samples that is nearest to each mode, (classes, K)."""
    modes = len(mix.means)
    counts = torch.bincount(c * modes + mode, minlength=mix.classes * modes).view(-1, modes)
    return counts / counts.sum(1, keepdim=True)


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
    shares = mode_shares(mix, mode, c)
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
        metrics["shared_modes"] = shares[:, mix.shared].sum(1).mean()
    return {name: round(float(value), 5) for name, value in metrics.items()}


def start(mix, n, *key):
    """Noise and classes, which are equally frequent, of n samples."""
    return torch.randn(n, 2, generator=cdm.generator(*key)), torch.arange(n) % mix.classes


def anchor_estimates(model, noise, c):
    """{"t = ...": (clean estimates, classes)} at each time of the fixed schedule, and of all four.

    All four together are as many as those of each, for TV depends on the number of samples.
    """
    estimates = {}
    for i, t in enumerate(GRIDS[FOUR]):
        index = torch.full_like(c, i)
        a = cdm.backward_simulation(model, noise, GRIDS[FOUR], index, (c,))
        estimates[f"t = {t:.2g}"] = (cdm.clean_estimate(a.x_t, a.t, a.v), c)
    quarter = len(c) // 4
    parts = [x0[:quarter] for x0, _ in estimates.values()]
    estimates["all four"] = (torch.cat(parts), c[:quarter].repeat(4))
    return estimates


@torch.no_grad()
def evaluate(model, mix, n, grids):
    """All that metrics.json says of one model: samples on all grids, estimates at anchors."""
    noise, c = start(mix, n, "evaluate")
    samples = {name: (cdm.sample(model, noise, times, (c,)), c) for name, times in grids.items()}
    parts = {"grids": samples, "anchors": anchor_estimates(model, noise, c)}
    return {
        part: {name: measure(mix, x, classes) for name, (x, classes) in points.items()}
        for part, points in parts.items()
    }


# ==== 5. The figures. Colours are Okabe and Ito's, which colour-blind readers can tell apart ======

LINES = {  # colour, marker and line. Dashed: anchor-aware fake score
    "undistilled": ("#888888", "x-"),
    "DM fixed": ("#D55E00", "o-"),
    "DM dynamic": ("#E69F00", "s-"),
    "CDM": ("#0072B2", "D-"),
    "DM fixed *": ("#D55E00", "o--"),
    "DM dynamic *": ("#E69F00", "s--"),
    "CDM *": ("#0072B2", "D--"),
}
STAR = "* anchor-aware fake score: not in the paper"
STYLE = {
    "figure.constrained_layout.use": True,
    "legend.handlelength": 3.5,
    "lines.markersize": 3.5,
}


@dataclass
class Results:
    """All that the table and the figures show."""

    mixture: str
    runs: dict  # {mixture: {method: {seed: what evaluate returns}}}
    models: dict  # {(mixture, method): the first seed's models after the iterations in `frames`}
    frames: list
    note: str  # what every figure says below its title

    def values(self, mixture, method, metric, points, part="grids"):
        """Mean and standard deviation over seeds of a metric at some grids or anchors."""
        seeds = self.runs[mixture][method].values()
        values = torch.tensor([[run[part][point][metric] for point in points] for run in seeds])
        if len(values) == 1:
            return values[0], torch.zeros(len(points))
        return values.mean(0), values.std(0)

    def text(self, mixture, method, metric, grid):
        [mean], [std] = self.values(mixture, method, metric, [grid])
        style = ".1%" if metric in ("artifacts", "shared_modes") else ".2f"
        if std > 0:
            return f"{mean:{style}}±{std:{style}}"
        return f"{mean:{style}}"


def draw_panel(ax, results, mixture, method, grid, metrics=(), frame=-1):
    """Samples over the exact density, a colour for each class, and some metrics below."""
    mix = MIXTURES[mixture]
    side = torch.linspace(-3, 3, 150)
    at = torch.cartesian_prod(side, side)
    empty = torch.full((len(at),), mix.classes)
    density = mix.log_density(at, torch.zeros(len(at)), empty).exp().sqrt().view(150, 150).T
    ax.imshow(density, "Greys", origin="lower", extent=(-3, 3, -3, 3), vmax=2 * density.max())
    noise, c = start(mix, 1800, "figures")
    x = cdm.sample(results.models[mixture, method][frame], noise, TEACHER_GRIDS[grid], (c,))
    for cls, colour in enumerate(("#0072B2", "#E69F00")):
        ax.plot(*x[c == cls].T, ".", ms=1.6, mew=0, color=colour)
    if (x.abs() > 3).any(1).all():
        ax.text(0, 0, "all far outside", ha="center", va="center")
    notes = [f"{metric} {results.text(mixture, method, metric, grid)}" for metric in metrics]
    ax.set(title=method, xlabel="\n".join(notes).replace("_", " "))
    ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=(-2, 0, 2), yticks=(-2, 0, 2))
    ax.tick_params(labelleft=ax.get_subplotspec().is_first_col())


def draw_samples(figure, results, methods, metrics=(), frame=-1):
    """Samples on the fixed schedule, and below them on four other times."""
    axes = figure.subplots(2, len(methods))
    for row, grid in zip(axes, (FOUR, OTHER), strict=True):
        for ax, method in zip(row, methods, strict=True):
            draw_panel(ax, results, results.mixture, method, grid, metrics, frame)
        row[0].set_ylabel("t = " + ", ".join(f"{t:.2g}" for t in GRIDS[grid]))


def draw_guidance(figure, results):
    methods = (*TEACHERS, UNDISTILLED, *GUIDED)
    for ax, method in zip(figure.subplots(2, 4).flat, methods, strict=True):
        grid = MANY if method in TEACHERS else FOUR
        draw_panel(ax, results, "shared", method, grid, ("shared_modes", "artifacts"))


def draw_lines(ax, results, methods, metric, points, part="grids"):
    """A metric at several grids or anchors, a line for each method, with one std as bars."""
    for i, method in enumerate(methods):
        colour, style = LINES[method]
        mean, std = results.values(results.mixture, method, metric, points, part)
        x = torch.arange(len(points)) + 0.05 * (i - len(methods) / 2)  # bars do not overlap
        ax.errorbar(x, mean, std, fmt=style, color=colour, elinewidth=0.7, label=method)
    labels = [point.removeprefix("t = ").removesuffix(" steps") for point in points]
    ax.set_xticks(range(len(points)), [label.replace(" ", "\n") for label in labels])


def draw_metrics(figure, results, methods, points, part, xlabel):
    """All metrics at several grids or anchors."""
    axes = figure.subplots(1, 4)
    for ax, metric in zip(axes, ("tv", "artifacts", "weights", "spread"), strict=True):
        draw_lines(ax, results, methods, metric, points, part)
        ax.set(xlabel=xlabel, title=metric)
    axes[-1].set_yscale("log", base=2)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )


def draw_paths(ax, results, method):
    """Student paths of class 0 over time, with the schedules of iterations 1 to 5."""
    mix = MIXTURES[results.mixture]
    model = results.models[results.mixture, method][-1]
    colour, _ = LINES[method]
    cfg = replace(SETTINGS, **METHODS[method])
    starts = torch.tensor([[1.9, 0.9], [1.0, -0.6], [0.2, 0.9], [-0.6, -1.2], [-1.8, 0.3]])
    for k, x in enumerate(starts, 1):
        times = cdm.draw_iteration(cfg, 0, k, 1, (2,), SHIFT).schedule
        n = len(times)
        cond = (torch.zeros(n, dtype=torch.long),)
        # Row i stops at anchor i, so the rows are all anchors of one path.
        a = cdm.backward_simulation(model, x.expand(n, 2), times, torch.arange(n), cond)
        end = cdm.clean_estimate(a.x_t, a.t, a.v)[-1, 0]
        ax.plot([*times, 0], [*a.x_t[:, 0], end], color=colour)
        ax.plot(times, a.x_t[:, 0], "o", color=colour, label="anchor" if k == 1 else None)
        if method == "CDM" and k % 2 == 1:
            t_off = torch.tensor([times[-1], 0.85, 0.45])
            x_off = cdm.euler_step(a.x_t[-1:], a.t[-1:], t_off, a.v[-1:])
            label = "$x_{t'}$ (Eq. 7)" if k == 1 else None
            style = {"color": "black", "mfc": "white", "ms": 4, "markevery": [1, 2]}
            ax.plot(t_off, x_off[:, 0], "D:", label=label, **style)
    modes = mix.means[mix.weights[0] > 0, 0]
    ax.plot(torch.zeros(len(modes)), modes, "<", color="grey", ms=7, clip_on=False, label="mode")
    ax.legend(loc="lower left", handlelength=1, frameon=False)
    ax.set(xticks=(1, 0.9, 0.75, 0.5, 0), xticklabels=("1", ".9", ".75", ".5", "0"))
    ax.set(xlim=(1.03, 0), ylim=(-5.8, 3), yticks=(-2, 0, 2), xlabel="t (1 noise, 0 data)")


def draw_ideas(figure, results):
    methods = ("DM fixed", "DM dynamic", "CDM")
    captions = ("trained at four times", "random new times", "also off the path")
    *axes, last = figure.subplots(1, 4)
    for ax, method, caption in zip(axes, methods, captions, strict=True):
        draw_paths(ax, results, method)
        ax.set_title(f"{method}:\n{caption}")
    axes[0].set_ylabel("$x_1$")
    draw_lines(last, results, methods, "artifacts", (FOUR, "6 steps", "8 steps", OTHER))
    last.set(xlabel="sampling steps", title="samples far from\nevery mode", ylim=(0, 1.5))
    last.set_yticks((0, 0.5, 1), ("0", "50%", "100%"))
    last.legend(loc="upper left", frameon=False)


def draw_training(path, results):
    """The samples of two methods over training, as an animation."""
    figure = Figure((5, 5.4))
    writer = PillowWriter(fps=5)
    with writer.saving(figure, path, dpi=110):
        for frame in [*range(len(results.frames)), *6 * [-1]]:  # rests at the end
            figure.clear()
            figure.suptitle(f"iteration {results.frames[frame]}{results.note}")
            draw_samples(figure, results, ("DM fixed", "CDM"), frame=frame)
            writer.grab_frame()


@torch.no_grad()
def draw_all(folder, results):
    matplotlib.rcParams.update(STYLE)

    def draw(name, height, title, function, *options):
        figure = Figure((9, height), dpi=160)
        function(figure, results, *options)
        figure.suptitle(title + results.note)
        figure.savefig(folder / f"toy_{name}.png")

    draw("ideas", 3.2, "Student paths from noise to data, and where they are trained", draw_ideas)
    title = f"On the fixed schedule (top), and off it. Grey: the data. {STAR}"
    methods = (UNDISTILLED, "DM fixed", "DM dynamic", "CDM", "CDM *")
    draw("samples", 5.8, title, draw_samples, methods, ("tv", "artifacts", "spread"))
    title = f"Each student on several grids. Bars: std over seeds. {STAR}"
    draw("steps", 3.6, title, draw_metrics, LINES, GRIDS, "grids", "sampling steps")
    title = f"Clean estimates at each anchor and at all four. {STAR}"
    methods = ("DM fixed", "CDM", "DM fixed *", "CDM *")
    points = ("t = 1", "t = 0.9", "t = 0.75", "t = 0.5", "all four")
    draw("anchors", 3.4, title, draw_metrics, methods, points, "anchors", "anchor's time t")
    draw("guidance", 6.2, f"The left and right modes belong to both classes. {STAR}", draw_guidance)
    draw_training(folder / "toy_training.gif", results)


# ==== 6. The program: one process on each core, each on one thread ================================

FULL = {"iterations": 1200, "fit_steps": 2000, "samples": 20_000, "frames": 24}
QUICK = {"iterations": 40, "fit_steps": 200, "samples": 4000, "frames": 4}


def job(mixture, method, seed, size):
    """Train and measure one method. Returns (metrics, models) as bytes.

    Pickled here, because torch would send each tensor as an open file.
    """
    mix = MIXTURES[mixture]
    if method in TEACHERS:
        teacher = partial(mix.guided_velocity, TEACHERS[method])
        return pickle.dumps((evaluate(teacher, mix, size["samples"], TEACHER_GRIDS), [teacher]))
    models = [fit(mix, seed, size["fit_steps"])]
    if method != UNDISTILLED:
        cfg = replace(SETTINGS, **(METHODS | GUIDED)[method])
        for k, ema in distil(mix, cfg, models[0], seed, size["iterations"]):
            if k in size["frames"]:
                models.append(copy.deepcopy(ema))
    return pickle.dumps((evaluate(models[-1], mix, size["samples"], GRIDS), models))


def run_jobs(jobs, size):
    """(metrics, models) of each job, a (mixture, method, seed), in their order."""
    context = multiprocessing.get_context("spawn")
    processes = min(multiprocessing.cpu_count(), 16)
    print(f"Starting {processes} processes. Each first fits a network: about 10 s.", flush=True)
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(job, *key, size) for key in jobs]
        for _ in tqdm(as_completed(futures), "training", len(futures), unit="model"):
            pass
    return [pickle.loads(future.result()) for future in futures]


def print_table(results, mixture, methods, grid):
    metrics = list(results.runs[mixture][UNDISTILLED].values())[0]["grids"][FOUR]
    print(f"\n{mixture + ', ' + grid:22}" + "".join(f"{metric:>14}" for metric in metrics))
    for method in methods:
        cells = [results.text(mixture, method, metric, grid) for metric in metrics]
        print(f"{method:22}" + "".join(f"{cell:>14}" for cell in cells))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"toy_2d.py: {message}\n")


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mixture", choices=MIXTURES, default="uneq", help="guidance is always shown on shared")
    add("--seeds", type=int, default=1, help="how many seeds (default 1)")
    add("--seed", type=int, default=0, help="the first seed (default 0)")
    add("--iterations", type=int, help="of each method (default 1200)")
    add("--quick", action="store_true", help="a few iterations, to see that everything runs")
    add("--output-dir", type=Path, help="default runs/toy, with --quick runs/toy_quick")
    args = parser.parse_args()
    if args.iterations is None:
        args.iterations = (QUICK if args.quick else FULL)["iterations"]
    if args.seeds < 1 or args.seed < 0 or args.iterations < 1:
        parser.error("--seeds and --iterations must be at least 1, --seed at least 0")
    if args.output_dir is None:
        args.output_dir = Path("runs/toy_quick" if args.quick else "runs/toy")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "metrics.json").touch()  # better now than after minutes of training
    except OSError as error:
        parser.error(f"cannot write to {args.output_dir}: {error.strerror}")
    return args


def main():
    args = parse_args()
    torch.set_num_threads(1)  # the networks are too small for more
    size = (QUICK if args.quick else FULL) | {"iterations": args.iterations}
    n = size["frames"]  # most of them early, when most happens
    size["frames"] = sorted({round(args.iterations * (i / n) ** 2) for i in range(n + 1)})
    pairs = [(args.mixture, method) for method in ("exact teacher", UNDISTILLED, *METHODS)]
    pairs += [("shared", method) for method in (*TEACHERS, UNDISTILLED, *GUIDED)]
    seeds = range(args.seed, args.seed + args.seeds)
    # A dict leaves out what is there twice, if --mixture is "shared" itself.
    jobs = [(*pair, seed) for seed in seeds for pair in dict.fromkeys(pairs)]

    runs = {}
    models = {}
    for (mixture, method, seed), outcome in zip(jobs, run_jobs(jobs, size), strict=True):
        metrics, trained = outcome
        runs.setdefault(mixture, {}).setdefault(method, {})[seed] = metrics
        models.setdefault((mixture, method), trained)
    settings = {"mixture": args.mixture, "seeds": list(seeds), "torch": torch.__version__, **size}
    settings |= {"cdm": asdict(SETTINGS), "methods": METHODS, "guided": GUIDED}
    settings["grids"] = {name: times.tolist() for name, times in GRIDS.items()}
    report = json.dumps({"settings": settings, "runs": runs}, indent=1)
    (args.output_dir / "metrics.json").write_text(report + "\n")

    note = "\nquick run: too short to conclude" if args.quick else ""
    results = Results(args.mixture, runs, models, size["frames"], note)
    for grid in (FOUR, "8 steps", OTHER):
        print_table(results, args.mixture, ("exact teacher", UNDISTILLED, *METHODS), grid)
    print_table(results, "shared", TEACHERS, MANY)
    print_table(results, "shared", (UNDISTILLED, *GUIDED), FOUR)
    print(f"\n{STAR}{note}\nDrawing the figures takes about 20 seconds.", flush=True)
    draw_all(args.output_dir, results)
    print(f"Wrote metrics.json and 6 figures to {args.output_dir}.")


if __name__ == "__main__":
    main()
