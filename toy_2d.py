"""CDM in two dimensions, where everything can be seen and checked.

    python toy_2d.py                  # under 3 minutes on two CPU cores; README shows this run
    python toy_2d.py --seeds 5        # means and standard deviations over 5 seeds
    python toy_2d.py --mixture ring   # equal mode weights; the default, uneq, has 8 : 4 : 2 : 1
    python toy_2d.py --quick          # half a minute: does everything run? Too short to conclude

The data is a mixture of Gaussians. Its velocity has a closed form, so the teacher is exact, and so
are the densities that students are compared with. Student and fake score are one small MLP. It is
first fitted to the exact velocity, as SD3's student starts from its teacher. Then cdm.cdm_iteration
distils it. Methods differ in their settings only: see METHODS and GUIDED.

toy_iteration.png shows one iteration. Its panels are 1 backward_simulation (sec. 3.2),
2 clean_estimate (Eq. 1), 3 ca_loss and 4 dm_loss (Eqs. 3-4), 5 off_trajectory_point (Eq. 7) and
6 dm_loss from there, which is L_CDM (sec. 3.3).

Left out: images, text and any claim about SD3. SETTINGS has what is the toy's own.
"""

import argparse
import copy
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
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

EDGES = torch.linspace(-3.5, 3.5, 71)  # of the histogram's bins, in each direction


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

    def velocity(self, x_t, t, cond):
        """v(x_t, t, c) = E[noise - x0 | x_t, c], exactly. cond: (classes (B,),). Returns (B, 2)."""
        log_p, v_k = self.modes_at(x_t, t, cond[0])
        return (log_p.softmax(1)[..., None] * v_k).sum(1)

    def guided_velocity(self, scale, x_t, t, cond):
        """Classifier-free guidance: v(empty) + scale (v(c) - v(empty)). Scale 1 changes nothing."""
        empty = torch.full_like(cond[0], self.classes)
        v_empty = self.velocity(x_t, t, (empty,))
        return v_empty + scale * (self.velocity(x_t, t, cond) - v_empty)

    def sample(self, c, generator=None):
        """Exact samples for classes c, (B,). Returns (B, 2)."""
        k = torch.multinomial(self.weights[c], 1, replacement=True, generator=generator)[:, 0]
        return self.means[k] + self.std * torch.randn(len(c), 2, generator=generator)

    def bin_masses(self):
        """Exact mass of each bin, (classes, bins, bins). The classes are equally likely."""
        cumulative = torch.erf((EDGES.double() - self.means[..., None]) / (self.std * math.sqrt(2)))
        mass = cumulative.diff(dim=2) / 2  # (K, 2, bins), of each mode in each direction
        weights = self.weights[:-1].double() / self.classes
        return torch.einsum("ck,kx,ky->cxy", weights, mass[:, 0], mass[:, 1])


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

    def forward(self, x_t, t, cond):
        waves = torch.addmm(self.phase, t[:, None], self.frequency).sin()
        h = self.inp(torch.cat([x_t, waves], 1)) + self.cls(cond[0])
        for layer in self.hidden:
            h = h + F.silu(layer(h))
        return self.out(h)


@cache  # so that a process does it once for all methods
def fit(mixture, seed, steps, batch=512):
    """A Net regressed onto the exact velocity of all classes, "empty" included."""
    mix = MIXTURES[mixture]
    torch.manual_seed(seed)
    net = Net(mix.classes)
    gen = cdm.generator(seed, "fit")
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, fused=True)
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
TEACHERS = {"exact field": 1.0, "guided field": 1 + SETTINGS.alpha}  # and their guidance

BATCH = 256
SHIFT = 3.0  # SD3's: the fixed schedule 1, 0.75, 0.5, 0.25 becomes t = 1, 0.9, 0.75, 0.5
GRIDS = {f"{n} steps": cdm.sampling_times(n, SHIFT) for n in (1, 2, 3, 4, 6, 8)}
GRIDS["4 other times"] = torch.tensor([1, 0.9, 0.6, 0.15])  # the last two are new to "DM fixed"
ALL_GRIDS = GRIDS | {"200 steps": cdm.sampling_times(200)}


def recorded(model, said):
    """The model. It appends x_t and D(x_t, t, c) of every call to `said`."""

    def call(x_t, t, cond):
        v = model(x_t, t, cond)
        said.append((x_t.detach(), cdm.clean_estimate(x_t, t, v).detach()))
        return v

    return call


def train(mixture, settings, seed, size, frames=()):
    """Distil the exact velocity into a fitted network, and measure the student's EMA.

    Returns its metrics, its models after the iterations in `frames`, and of an iteration half-way
    the draw and what student, teacher and fake score were asked and answered.
    """
    mix = MIXTURES[mixture]
    cfg = replace(SETTINGS, **settings)
    student, fake, ema = (copy.deepcopy(fit(mixture, seed, size["fit_steps"])) for _ in range(3))
    learner = cdm.Learner(student, dict(student.named_parameters()), cfg.student_lr, cfg)
    fake_learner = cdm.Learner(fake, dict(fake.named_parameters()), cfg.fake_lr, cfg)
    averaged = dict(ema.named_parameters())
    cond = (torch.arange(BATCH) % mix.classes,)
    uncond = (torch.tensor([mix.classes]),)
    models = [copy.deepcopy(ema)]
    said = {"student": [], "teacher": [], "fake": []}
    for k in range(1, size["iterations"] + 1):
        draw = cdm.draw_iteration(cfg, seed, k, BATCH, (2,), SHIFT)
        teacher = mix.velocity
        if k == size["iterations"] // 2 + 2:
            said["draw"] = draw
            teacher = recorded(teacher, said["teacher"])
            learner.model = recorded(student, said["student"])
            fake_learner.model = recorded(fake, said["fake"])
        cdm.cdm_iteration(k, cond, uncond, draw, teacher, learner, fake_learner, averaged, cfg)
        learner.model = student
        fake_learner.model = fake
        if k in frames:
            models.append(copy.deepcopy(ema))
    return evaluate(ema, mix, size["samples"], GRIDS), models, said


# ==== 4. The metrics, against exact values ========================================================


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
    distances = (x[:, None] - mix.means).norm(dim=2)
    distance, mode = distances.masked_fill(mix.weights[c] == 0, math.inf).min(1)
    counts = [torch.histogramdd(x[c == cls], [EDGES, EDGES]).hist for cls in range(mix.classes)]
    excess = torch.stack(counts).double() / len(x) - mix.bin_masses()
    metrics = {
        # Total variation between the samples and the data over all bins and their outside, 0 to 1.
        "tv": (excess.abs().sum() + excess.sum().abs()) / 2,
        # Share of samples farther than 4 std from every mode of their class.
        "artifacts": (distance > 4 * mix.std).double().mean(),
        # Below 1, samples are closer together than the data.
        "spread": spread(mix, x, c, mode),
        # Share of samples in modes that belong to all classes.
        "shared": mix.shared[mode].double().mean(),
    }
    return {name: round(float(value), 5) for name, value in metrics.items()}


def evaluate(model, mix, n, grids):
    """Metrics of n samples on each grid."""
    c = torch.arange(n) % mix.classes  # equally frequent
    noise = torch.randn(n, 2, generator=cdm.generator("evaluate"))
    metrics = {}
    for name, times in grids.items():
        metrics[name] = measure(mix, cdm.sample(model, noise, times, (c,)), c)
    return metrics


# ==== 5. The figures. Colours are Okabe and Ito's, which colour-blind readers can tell apart ======

LINES = {  # colour and marker of a method
    UNDISTILLED: ("#888888", "x"),
    "DM fixed": ("#D55E00", "o"),
    "DM dynamic": ("#E69F00", "s"),
    "CDM": ("#0072B2", "D"),
}


def mean_and_std(runs, metric, grids):
    """Over seeds, of a metric on each grid. runs: what train returned for each seed."""
    values = torch.tensor([[metrics[grid][metric] for grid in grids] for metrics, *_ in runs])
    return values.mean(0), values.std(0, correction=min(1, len(runs) - 1))


def text(runs, metric, grid):
    [mean], [std] = mean_and_std(runs, metric, [grid])
    style = ".1%" if metric in ("artifacts", "shared") else ".2f"
    return f"{mean:{style}} ± {std:{style}}" if len(runs) > 1 else f"{mean:{style}}"


def draw_density(ax, mix, c):
    """The data's density in grey. c: a class, or mix.classes for all."""
    side = torch.linspace(-3, 3, 150)
    at = torch.cartesian_prod(side, side)
    log_p, _ = mix.modes_at(at, torch.zeros(len(at)), torch.full((len(at),), c))
    density = log_p.exp().sum(1).sqrt().view(150, 150).T
    ax.imshow(density, "Greys", origin="lower", extent=(-3, 3, -3, 3), vmax=2 * density.max())
    ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=(), yticks=())


def draw_samples(figure, results, rows, metrics=(), frame=-1):
    """Samples, a colour for each class. rows: of panels, each a (mixture, method, grid)."""
    axes = figure.subplots(len(rows), len(rows[0]))
    for ax, (mixture, method, grid) in zip(axes.flat, [*rows[0], *rows[1]], strict=True):
        mix = MIXTURES[mixture]
        runs = results[mixture, method]
        _, models, *_ = runs[0]
        c = torch.arange(1800) % mix.classes
        noise = torch.randn(len(c), 2, generator=cdm.generator("figures"))
        x = cdm.sample(models[frame], noise, ALL_GRIDS[grid], (c,))
        draw_density(ax, mix, mix.classes)
        for cls, colour in enumerate(("#0072B2", "#E69F00")):
            ax.plot(*x[c == cls].T, ".", ms=1.6, mew=0, color=colour)
        notes = [f"{metric} {text(runs, metric, grid)}" for metric in metrics]
        ax.set(title=f"{method}\n{grid}", xlabel="\n".join(notes))


def draw_times(ax, method, words):
    """At which times a student is trained, in six iterations."""
    cfg = replace(SETTINGS, **METHODS[method])
    for k in range(1, 7):
        draw = cdm.draw_iteration(cfg, 0, k, 6, (2,), SHIFT)
        if cfg.cdm_weight:
            ax.plot(draw.t_off, [k] * 6, "kD", mfc="white")
        ax.plot(draw.schedule, [k] * len(draw.schedule), "o", color=LINES[method][0])
    ax.set(title=f"{method}: trained\n{words}", xlabel="t (1 noise, 0 data)", ylabel="iteration")
    ax.set(xlim=(1.05, -0.05), xticks=(1, 0.9, 0.75, 0.5, 0))


def draw_steps(figure, results, mixture):
    """Where three students are trained, and metrics over the number of steps."""
    top, bottom = figure.subplots(2, 3, height_ratios=(1, 1.4))
    draw_times(top[0], "DM fixed", "always at four times")
    draw_times(top[1], "DM dynamic", "at new times each iteration")
    draw_times(top[2], "CDM", "and off the path, at any t' (◇)")
    for ax, metric in zip(bottom, ("tv", "artifacts", "spread"), strict=True):
        for i, (method, (colour, marker)) in enumerate(LINES.items()):
            mean, std = mean_and_std(results[mixture, method], metric, GRIDS)
            x = torch.arange(len(GRIDS)) + 0.08 * (i - 1.5)  # so that no method hides another
            ax.errorbar(x, mean, std, fmt=marker, color=colour, elinewidth=0.7, label=method)
            ax.plot(x[:-1], mean[:-1], color=colour)  # other times have no place in the order
        ax.set_xticks(range(len(GRIDS)), [*"123468", "4 other\ntimes"])
        ax.set(title=metric, xlabel="sampling steps")
    bottom[2].set_yscale("log", base=2)
    figure.legend(*bottom[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def link(ax, a, b, style, **options):
    """A line from each point of a to that of b."""
    ax.plot(*torch.stack([a, b]).permute(2, 0, 1), style, lw=0.8, **options)


def draw_loss(ax, x0_hat, real, other, style, name):
    """The push on each estimate. For three samples, the two answers whose difference it is."""
    (z, d_real), (_, d_other) = real, other
    delta = d_real - d_other
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.012, "color": "#D55E00"}
    ax.quiver(*x0_hat.T, *delta.T, zorder=3, label="push, as from ▽ to ▲", **arrows)
    most = delta.norm(dim=1).argsort()[-3:]
    ax.quiver(*d_other[most].T, *delta[most].T, alpha=0.3, **arrows)
    for a, b in ((x0_hat, z), (z, d_real), (z, d_other)):
        link(ax, a[most], b[most], ":", color="grey")
    ax.plot(*z[most].T, "o", color="#0072B2", mfc="white", label="z, the estimate noised again")
    ax.plot(*d_other[most].T, style, label=name)
    ax.plot(*d_real[most].T, "g^", label="teacher's estimate from z")
    ax.plot(*x0_hat.T, "o", color="#0072B2", label="student's clean estimate")


def draw_iteration(figure, said):
    """One call of cdm.cdm_iteration. said: as train returns it."""
    titles = (
        "1. Follow the student to an anchor\nbackward_simulation, sec. 3.2",
        "2. Jump straight to clean data\nclean_estimate, Eq. 1",
        "3. L_CA: what does the class change?\nca_loss, Eqs. 3-4",
        "4. L_DM: more like the data\ndm_loss, Eqs. 3-4",
        "5. Leave the path, to any time t'\noff_trajectory_point, Eq. 7",
        "6. L_CDM: jump from there, then as 4\ndm_loss, sec. 3.3",
    )
    axes = figure.subplots(2, 3).flat
    for ax, title in zip(axes, titles, strict=True):
        draw_density(ax, MIXTURES["shared"], 0)
        ax.set_title(title)
    # The order in which cdm_iteration asks. Simulation's call i asks about those not yet there.
    *simulation, at_anchor, off = said["student"]
    path = torch.full((len(simulation), BATCH, 2), math.nan)
    for i, (x_t, _) in enumerate(simulation):
        path[i, said["draw"].index >= i] = x_t
    rows = slice(0, 16, 2)  # eight samples of class 0
    losses = [(x[rows], d[rows]) for x, d in [at_anchor, off, *said["teacher"], *said["fake"][1:]]]
    (x_t, x0_hat), (x_off, x0_off), ca, ca_empty, dm, dm_off, fake, fake_off = losses

    axes[0].plot(*path[:, rows].permute(2, 0, 1), ".-", color="grey", lw=0.8)
    axes[0].plot(*path[0, rows].T, "o", color="grey", mfc="white", label="noise, t = 1")
    for ax in (axes[0], axes[1], axes[4]):
        ax.plot(*x_t.T, "ks", label="anchor")
    link(axes[1], x_t, x0_hat, "-", color="#0072B2")
    axes[1].plot(*x0_hat.T, "o", color="#0072B2", label="student's clean estimate")
    draw_loss(axes[2], x0_hat, ca, ca_empty, "yv", "teacher's without the class")
    draw_loss(axes[3], x0_hat, dm, fake, "mv", "fake score's estimate from z")
    link(axes[4], x_t, x_off, "k:")
    link(axes[5], x_off, x0_off, "-", color="#0072B2")
    for ax in (axes[4], axes[5]):
        ax.plot(*x_off.T, "kD", mfc="white", label="off-trajectory point")
    draw_loss(axes[5], x0_off, dm_off, fake_off, "mv", "fake score's estimate from z")
    marks = {}  # each once
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        marks |= dict(zip(labels, handles, strict=True))
    figure.legend(marks.values(), marks, loc="outside lower center", ncols=3)


def draw_all(folder, results, mixture, frames):
    """All figures and the animation."""
    style = {"figure.constrained_layout.use": True, "legend.frameon": False}
    matplotlib.rcParams.update(style | {"lines.markersize": 3.5})

    def draw(name, height, title, function, *options):
        figure = Figure((9, height), dpi=160)
        figure.suptitle(title)
        function(figure, *options)
        figure.savefig(folder / f"toy_{name}.png")

    def on_two_grids(methods):
        return [[(mixture, m, grid) for m in methods] for grid in ("4 steps", "4 other times")]

    _, _, said = results["shared", "CA + DM + CDM"][0]
    draw("iteration", 7.5, "One iteration of CDM, eight samples of a class", draw_iteration, said)
    draw("steps", 5.5, "Where students are trained, and how they do", draw_steps, results, mixture)
    metrics = ("tv", "artifacts", "spread")
    title = "On the fixed schedule (top), and off it. Grey: the data"
    draw("samples", 5.8, title, draw_samples, results, on_two_grids(LINES), metrics)
    rows = [[("shared", teacher, "200 steps") for teacher in TEACHERS], []]
    rows[0] += [("shared", "DM alone", "4 steps")]
    rows[1] = [("shared", method, "4 steps") for method in ("CA alone", "CA + DM", "CA + DM + CDM")]
    title = "The left and right modes belong to both classes"
    draw("guidance", 6.2, title, draw_samples, results, rows, ("shared", "artifacts"))

    figure = Figure((5, 5.4))
    writer = PillowWriter(fps=5)
    with writer.saving(figure, folder / "toy_training.gif", dpi=110):
        for frame in [*range(len(frames)), *6 * [-1]]:  # rests at the end
            figure.clear()
            figure.suptitle(f"iteration {frames[frame]}")
            draw_samples(figure, results, on_two_grids(("DM fixed", "CDM")), (), frame)
            writer.grab_frame()


# ==== 6. The program: one process on each core, each on one thread ================================

FULL = {"iterations": 2000, "fit_steps": 2000, "samples": 20_000, "frames": 24}
QUICK = {"iterations": 40, "fit_steps": 200, "samples": 4000, "frames": 4}
# Models return by shared memory. By default each of their tensors would be an open file.
torch.multiprocessing.set_sharing_strategy("file_system")


def train_all(mixture, seeds, size, frames):
    """{(mixture, method): what train returned for each seed}."""
    plan = {(mixture, name): settings for name, settings in METHODS.items()}
    plan |= {("shared", name): settings for name, settings in GUIDED.items()}
    results = {}
    for name in (mixture, "shared"):
        for teacher, scale in TEACHERS.items():
            velocity = partial(MIXTURES[name].guided_velocity, scale)
            metrics = evaluate(velocity, MIXTURES[name], size["samples"], ALL_GRIDS)
            results[name, teacher] = [(metrics, [velocity], {})]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(None, context, torch.set_num_threads, (1,)) as pool:
        jobs = {}
        for seed in range(seeds):
            kept = frames if seed == 0 else ()
            for (name, method), settings in plan.items():
                jobs[name, method, seed] = pool.submit(train, name, settings, seed, size, kept)
            untrained = size | {"iterations": 0}
            jobs[mixture, UNDISTILLED, seed] = pool.submit(train, mixture, {}, seed, untrained)
        for (name, method, _), job in tqdm(jobs.items(), "training", unit="model"):
            results.setdefault((name, method), []).append(job.result())
    return results


def print_table(results, mixture, metric, methods, grids):
    print(f"\n{mixture + ': ' + metric:28}" + "".join(f"{grid:>16}" for grid in grids))
    for method in methods:
        name = f"Euler steps of the {method}" if method in TEACHERS else method
        cells = [text(results[mixture, method], metric, grid) for grid in grids]
        print(f"{name:28}" + "".join(f"{cell:>16}" for cell in cells))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mixture", choices=MIXTURES, default="uneq", help="guidance is always shown on shared")
    add("--seeds", type=int, default=1, help="how many seeds, from 0 (default 1)")
    add("--iterations", type=int, help="of each method (default 2000)")
    add("--quick", action="store_true", help="a few iterations, to see that everything runs")
    add("--output-dir", type=Path, default=Path("runs/toy"), help="default runs/toy")
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    size = size | {"iterations": args.iterations or size["iterations"]}
    if args.seeds < 1 or size["iterations"] < 1:
        parser.error("--seeds and --iterations must be at least 1")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the networks are too small for more
    # Most of the animation's frames are early, when most happens.
    share = torch.linspace(0, 1, size["frames"] + 1).square()
    frames = (size["iterations"] * share).round().int().unique().tolist()

    results = train_all(args.mixture, args.seeds, size, frames)
    settings = {"seeds": args.seeds, "torch": torch.__version__, **size, **asdict(SETTINGS)}
    runs = {", ".join(key): [metrics for metrics, *_ in runs] for key, runs in results.items()}
    report = {"settings": settings, "methods": METHODS | GUIDED, "runs": runs}
    (args.output_dir / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    for metric in ("artifacts", "tv", "spread"):
        methods = ("exact field", UNDISTILLED, *METHODS)
        print_table(results, args.mixture, metric, methods, ("4 steps", "8 steps", "4 other times"))
    for metric in ("shared", "artifacts"):
        print_table(results, "shared", metric, TEACHERS, ["200 steps"])
        print_table(results, "shared", metric, GUIDED, ["1 steps", "4 steps"])
    if args.quick:
        print("\nquick run: too short to conclude")
    print("\nDrawing takes about 20 seconds.", flush=True)
    draw_all(args.output_dir, results, args.mixture, frames)
    print(f"Wrote metrics.json and 5 figures to {args.output_dir}.")


if __name__ == "__main__":
    main()
