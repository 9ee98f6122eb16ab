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
6 dm_loss from there, which is L_CDM (sec. 3.3). Left out: images, text and any claim about SD3.
"""

import argparse
import copy
import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from tqdm import tqdm

import cdm

# ==== 1. The data: a mixture of Gaussians for each class, and its exact velocity ==================
EDGES = torch.linspace(-3.5, 3.5, 71)  # of the histogram's bins, in each direction


class Mixture:
    """p(x0 | c) = sum_k weights[c, k] N(means[k], std^2 I), with the K means on a circle.

    weights: a row of K numbers for each class, normalised here. One more class, the last, is
    "empty": the average over all classes, as the empty prompt stands for all prompts.
    """

    def __init__(self, weights, std=0.15, radius=2.0):
        angles = [2 * math.pi * k / len(weights[0]) for k in range(len(weights[0]))]
        self.means = torch.tensor([(radius * math.cos(a), radius * math.sin(a)) for a in angles])
        self.std = std
        self.classes = len(weights)
        rows = F.normalize(torch.tensor(weights, dtype=torch.float32), p=1, dim=1)
        self.weights = torch.cat([rows, rows.mean(0, keepdim=True)])  # (classes + 1, K)
        self.shared = (rows > 0).all(0)  # (K,): does the mode belong to every class?

    def modes_at(self, x_t, t, c):
        """log [w_k N(x_t; (1 - t) mu_k, var I)] and v_k = E[noise - x0 | x_t, k] of each mode k.

        On the path mode k stays a Gaussian, so v_k is linear. Returns (B, K) and (B, K, 2).
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


MIXTURES = {  # "ring" and "uneq" have two classes of four modes each, in turn
    "ring": Mixture([[1, 0] * 4, [0, 1] * 4]),
    "uneq": Mixture([[8, 0, 4, 0, 2, 0, 1, 0], [0, 8, 0, 4, 0, 2, 0, 1]]),
    # Modes 0 and 3 belong to both classes. Guidance moves samples away from them.
    "shared": Mixture([[1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1]]),
}


# ==== 2. The network, fitted to the exact velocity ================================================
class Net(torch.nn.Module):
    """v(x_t, t, c) by residual layers. Shapes as in Mixture.velocity."""

    def __init__(self, classes, width=64, layers=4):
        super().__init__()
        # t is seen through 8 sines and 8 cosines, which are sines with a phase.
        self.frequency = math.pi / 4 * 2.0 ** torch.linspace(0, 4, 8).repeat(1, 2)
        self.phase = torch.tensor([0, math.pi / 2]).repeat_interleave(8)
        self.inp = torch.nn.Linear(2 + 16, width)
        self.cls = torch.nn.Embedding(classes + 1, width)  # the last class is "empty"
        self.hidden = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.out = torch.nn.Linear(width, 2)

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
NO_CDM = {"cdm_weight": 0.0}
RELEASED = {"time_low": 0.25, "time_high": 0.95}  # after the shift no inner time is below 0.5
CA = {"ca_weight": 1.0}
METHODS = {  # trained on --mixture. "DM fixed" is like DMD2 without its GAN and guidance
    "DM fixed": NO_CDM | {"schedule": "fixed"},
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
TEACHERS = {"Euler, exact field": 1.0, "Euler, guided field": 1 + SETTINGS.alpha}  # guidance
BATCH = 256
SHIFT = 3.0  # SD3's: the fixed schedule 1, 0.75, 0.5, 0.25 becomes t = 1, 0.9, 0.75, 0.5
GRIDS = {f"{n} steps": cdm.sampling_times(n, SHIFT) for n in (1, 2, 3, 4, 6, 8)}
OTHER = "4 other times"
GRIDS[OTHER] = torch.tensor([1, 0.9, 0.6, 0.15])  # the last two are new to "DM fixed"
ALL_GRIDS = GRIDS | {"200 steps": cdm.sampling_times(200)}


def recorded(model, said):
    """The model. It appends x_t and D(x_t, t, c) of every call to `said`."""

    def call(x_t, t, cond):
        v = model(x_t, t, cond)
        said.append((x_t.detach(), cdm.clean_estimate(x_t, t, v).detach()))
        return v

    return call


def train(mixture, settings, seed, size):
    """Distil the exact velocity into a fitted network. Returns the student's metrics on GRIDS, its
    EMA at a few iterations, and of one half-way the draw and what the models were asked.
    """
    mix = MIXTURES[mixture]
    cfg = replace(SETTINGS, **settings)
    student, fake, ema = (copy.deepcopy(fit(mixture, seed, size["fit_steps"])) for _ in range(3))
    asked = {"student": [], "teacher": [], "fake": []}
    learners = []
    for name, net, lr in (("student", student, cfg.student_lr), ("fake", fake, cfg.fake_lr)):
        model = recorded(net, asked[name])
        learners.append(cdm.Learner(model, dict(net.named_parameters()), lr, cfg))
    teacher = recorded(mix.velocity, asked["teacher"])
    cond = (torch.arange(BATCH) % mix.classes,)
    uncond = (torch.tensor([mix.classes]),)
    average = dict(ema.named_parameters())
    models = [copy.deepcopy(ema)]
    for k in range(1, size["iterations"] + 1):
        for calls in asked.values():
            calls.clear()
        draw = cdm.draw_iteration(cfg, seed, k, BATCH, (2,), SHIFT)
        cdm.cdm_iteration(k, cond, uncond, draw, teacher, *learners, average, cfg)
        if k == size["iterations"] // 4 * 2 + 2:
            halfway = copy.deepcopy(asked) | {"draw": draw}
        if k % size["frame_every"] == 0 or k == size["iterations"]:
            models.append(copy.deepcopy(ema))
    return evaluate(ema, mix, size["samples"], GRIDS), models, halfway


# ==== 4. The metrics, against exact values ========================================================
def measure(mix, x, c):
    """Metrics of samples x, (B, 2), of classes c: total variation between their histogram and the
    data; the share that is farther than 4 std from every mode of its class; the median distance to
    the own mode's centre, relative to the data's; the share in modes that all classes have.
    """
    x = x.nan_to_num(1e6).clamp(-1e6, 1e6)  # a method may diverge
    distances = (x[:, None] - mix.means).norm(dim=2)
    distance, mode = distances.masked_fill(mix.weights[c] == 0, math.inf).min(1)
    counts = [torch.histogramdd(x[c == cls], [EDGES, EDGES]).hist for cls in range(mix.classes)]
    excess = torch.stack(counts).double() / len(x) - mix.bin_masses()
    radii = []  # distances to the centre of the own mode, in std
    for cls, k in mix.weights[:-1].nonzero().tolist():
        own = x[(c == cls) & (mode == k)]
        if len(own):
            radii.append((own - own.median(0).values).norm(dim=1) / mix.std)
    metrics = {
        "tv": (excess.abs().sum() + excess.sum().abs()) / 2,  # of all bins and of their outside
        "artifacts": (distance > 4 * mix.std).double().mean(),
        "spread": torch.cat(radii).median() / math.sqrt(2 * math.log(2)),  # 1 for the data
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
SHOWN = [14, 220, 30, 36, 50, 80, 98, 106]  # in toy_iteration.png: of class 0, lying apart
LINES = {"Euler, exact field": "C7x", "DM fixed": "C3o", "DM dynamic": "C1s", "CDM": "C0D"}
OKABE = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #F0E442 #888888"  # are C0 to C7
matplotlib.rc("axes", titlesize=9.5, prop_cycle=matplotlib.cycler(color=OKABE.split()))
matplotlib.rc("figure.constrained_layout", use=True)
matplotlib.rc("legend", fontsize=7.5, frameon=False, labelspacing=0.3)
matplotlib.rc("lines", markersize=3.5, linewidth=1)


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
        for cls in range(mix.classes):
            ax.plot(*x[c == cls].T, f"C{cls}.", ms=1.6, mew=0)
        notes = [f"{metric} {text(runs, metric, grid)}" for metric in metrics]
        ax.set(title=f"{method}\n{grid}", xlabel="\n".join(notes))


def draw_ideas(figure, results, mixture):
    """The times at which three students are trained, and metrics over the number of steps."""
    top, bottom = figure.subplots(2, 3, height_ratios=(1, 1.4))
    words = ("always at four times", "at new times each iteration", "also off the path, at t' (○)")
    for ax, method, caption in zip(top, ("DM fixed", "DM dynamic", "CDM"), words, strict=True):
        cfg = replace(SETTINGS, **METHODS[method])
        for k in range(1, 7):
            draw = cdm.draw_iteration(cfg, 0, k, 6, (2,), SHIFT)
            if cfg.cdm_weight:
                ax.plot(draw.t_off, [k] * 6, "ko", mfc="white")
            ax.plot(draw.schedule, [k] * len(draw.schedule), LINES[method])
        ax.set(title=f"{method}: trained\n{caption}", xlabel="t (1 noise, 0 data)")
        ax.set(xlim=(1.05, -0.05), xticks=(1, 0.75, 0.5, 0.25, 0), ylabel="iteration")
    words = ("total variation to the data", "share far from every mode", "spread, 1 for the data")
    for ax, metric, title in zip(bottom, ("tv", "artifacts", "spread"), words, strict=True):
        for i, (method, style) in enumerate(LINES.items()):
            mean, std = mean_and_std(results[mixture, method], metric, GRIDS)
            x = torch.arange(len(GRIDS)) + 0.08 * (i - 1.5)  # so that no method hides another
            ax.errorbar(x, mean, std, fmt=style, elinewidth=0.7, label=method)
            ax.plot(x[:-1], mean[:-1], style[:2])  # other times have no place in the order
        ax.set_xticks(range(len(GRIDS)), [*"123468", "4 other\ntimes"])
        ax.set(title=title, xlabel="sampling steps")
    figure.legend(*bottom[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_loss(ax, x0_hat, real, other, marker, name):
    """The push on each estimate. For two samples, the two answers whose difference it is."""
    (z, d_real), (_, d_other) = real, other
    delta = d_real - d_other
    most = delta.norm(dim=1).argsort()[-2:]
    links = torch.stack([x0_hat[most], z[most], d_real[most], z[most], d_other[most]])
    ax.plot(*links.permute(2, 0, 1), "C7:")
    ax.plot(*x0_hat.T, "C0o", label=r"student's clean estimate $\hat x_0$")
    ax.plot(*z[most].T, "C0o", mfc="white", label=r"$z$: two $\hat x_0$ noised again (dotted)")
    ax.plot(*d_real[most].T, "C2^", label="teacher's clean estimate from $z$")
    ax.plot(*d_other[most].T, marker, label=name)
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.012, "color": "C3"}
    ax.quiver(*d_other[most].T, *delta[most].T, alpha=0.3, label="from ▼ to ▲", **arrows)
    ax.quiver(*x0_hat.T, *delta.T, zorder=3, label=r"the same, as a push on $\hat x_0$", **arrows)


def draw_iteration(figure, asked):
    """One call of cdm.cdm_iteration, from what it asked student, teacher and fake score."""
    titles = (
        "1. Follow the student's path to an anchor\nbackward_simulation, sec. 3.2",
        "2. From there, jump straight to t = 0\nclean_estimate, Eq. 1",
        "3. L_CA, guidance: what the class changes\nca_loss, Eqs. 3-4",
        "4. L_DM: from the fake score to the teacher\ndm_loss, Eqs. 3-4",
        "5. Along the line of 2, to any time t'\noff_trajectory_point, Eq. 7",
        "6. L_CDM: jump from there, push as in 4\ndm_loss, sec. 3.3",
    )
    # In the order in which cdm_iteration asks. Simulation's call i is of samples not yet there.
    *simulation, at_anchor, off = asked["student"]
    path = torch.full((len(simulation), BATCH, 2), math.nan)
    for i, (x_t, _) in enumerate(simulation):
        path[i, asked["draw"].index >= i] = x_t
    path = path[:, SHOWN]
    answers = (at_anchor, off, *asked["teacher"], *asked["fake"])
    answers = [(x[SHOWN], estimate[SHOWN]) for x, estimate in answers]
    (x_t, x0_hat), (x_off, x0_off), ca, ca_empty, dm, dm_off, _, fake, fake_off = answers
    axes = figure.subplots(2, 3).flat
    for ax, title in zip(axes, titles, strict=True):
        draw_density(ax, MIXTURES["shared"], 0)
        ax.set_title(title)
    axes[0].plot(*path.permute(2, 0, 1), "C7.-")
    axes[0].plot([], [], "C7.-", label="path, at newly drawn times")
    axes[0].plot(*path[0].T, "C7o", mfc="white", label="noise, t = 1")
    for ax in (axes[1], axes[4]):
        ax.plot(*torch.stack([x_t, x0_hat]).permute(2, 0, 1), "C0-")
    axes[4].plot(*torch.stack([x_t, x_off]).permute(2, 0, 1), "k:")
    axes[5].plot(*torch.stack([x_off, x0_off]).permute(2, 0, 1), "C0-")
    for ax in (axes[0], axes[1], axes[4]):
        ax.plot(*x_t.T, "ks", label="anchor: it stops here, some at once")
    for ax in (axes[4], axes[5]):
        ax.plot(*x_off.T, "kD", mfc="white", label="off-trajectory point")
    axes[1].plot(*x0_hat.T, "C0o", label=r"student's clean estimate $\hat x_0$")
    draw_loss(axes[2], x0_hat, ca, ca_empty, "C1v", "teacher's without the class")
    draw_loss(axes[3], x0_hat, dm, fake, "C4v", "fake score's, for student data")
    draw_loss(axes[5], x0_off, dm_off, fake_off, "C4v", "fake score's, for student data")
    for ax in axes:
        ax.legend(loc="lower left")


def draw_all(folder, results, mixture, every):
    def draw(name, height, title, function, *options):
        figure = Figure((9, height), dpi=160)
        figure.suptitle(title, size=11)
        function(figure, *options)
        figure.savefig(folder / f"toy_{name}.png")

    _, models, asked = results["shared", "CA + DM + CDM"][0]
    title = "One iteration of CDM: eight samples of a class. Grey: the data"
    title += "\nThe student is pushed by 3, 4 and 6. The fake score learns the estimates of 2"
    draw("iteration", 7.6, title, draw_iteration, asked)
    draw("ideas", 5.5, "Where students are trained, and how they do", draw_ideas, results, mixture)
    title = "On the fixed schedule (top), and off it. Grey: the data"
    rows = [[(mixture, method, grid) for method in LINES] for grid in ("4 steps", OTHER)]
    draw("samples", 6.8, title, draw_samples, results, rows, ("tv", "artifacts", "spread"))
    title = "Left and right: modes of both classes, where CA + DM ends. CA alone leaves the picture"
    panels = [("shared", teacher, "200 steps") for teacher in TEACHERS]
    panels += [("shared", method, "4 steps") for method in GUIDED]
    guided = panels[:3], panels[3:]
    draw("guidance", 6.2, title, draw_samples, results, guided, ("shared", "artifacts"))
    figure = Figure((5, 5.4))
    writer = PillowWriter(fps=5)
    with writer.saving(figure, folder / "toy_training.gif", dpi=110):
        for frame in range(len(models)):
            figure.clear()
            figure.suptitle(f"iteration {frame * every}")
            draw_samples(figure, results, [row[1::2] for row in rows], frame=frame)
            writer.grab_frame()


# ==== 6. The program: one process on each core, each on one thread ================================
FULL = {"iterations": 2000, "frame_every": 100, "fit_steps": 2000, "samples": 20_000}
QUICK = {"iterations": 20, "frame_every": 20, "fit_steps": 100, "samples": 1000}
# Models return by shared memory. By default each of their tensors would be an open file.
torch.multiprocessing.set_sharing_strategy("file_system")


def print_table(results, mixture, metric, methods, grids):
    print(f"\n{mixture + ': ' + metric:28}" + "".join(f"{grid:>16}" for grid in grids))
    for method in methods:
        cells = [text(results[mixture, method], metric, grid) for grid in grids]
        print(f"{method:28}" + "".join(f"{cell:>16}" for cell in cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--mixture", choices=MIXTURES, default="uneq", help="guidance is always shown on shared")
    add("--seeds", type=int, default=1, help="how many seeds, from 0 (default 1)")
    add("--iterations", type=int, help="of each method (default 2000)")
    add("--quick", action="store_true", help="a few iterations, to see that everything runs")
    add("--output-dir", type=Path, default=Path("runs/toy"), help="default runs/toy")
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    size = size | {"iterations": args.iterations or size["iterations"]}
    if args.seeds < 1 or size["iterations"] < 2:
        parser.error("it needs a seed and two iterations")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the networks are too small for more

    pool = ProcessPoolExecutor(None, get_context("spawn"), torch.set_num_threads, (1,))
    plan = [(args.mixture, method, settings) for method, settings in METHODS.items()]
    plan += [("shared", method, settings) for method, settings in GUIDED.items()]
    jobs = []
    for seed in range(args.seeds):
        for mixture, method, settings in plan:
            jobs.append((mixture, method, pool.submit(train, mixture, settings, seed, size)))
    results = {}
    for mixture, grids in {args.mixture: GRIDS, "shared": ALL_GRIDS}.items():  # as they train
        for teacher, scale in TEACHERS.items():
            velocity = partial(MIXTURES[mixture].guided_velocity, scale)
            metrics = evaluate(velocity, MIXTURES[mixture], size["samples"], grids)
            results[mixture, teacher] = [(metrics, [velocity], {})]
    for mixture, method, job in tqdm(jobs, "training", unit="model"):
        results.setdefault((mixture, method), []).append(job.result())

    runs = {", ".join(key): [metrics for metrics, *_ in runs] for key, runs in results.items()}
    report = {"size": size, "settings": asdict(SETTINGS), "methods": METHODS | GUIDED, "runs": runs}
    (args.output_dir / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    grids = ("4 steps", "8 steps", OTHER)
    for metric in ("artifacts", "tv", "spread"):
        print_table(results, args.mixture, metric, ("Euler, exact field", *METHODS), grids)
    for metric in ("shared", "artifacts"):
        print_table(results, "shared", metric, TEACHERS, ["200 steps"])
        print_table(results, "shared", metric, GUIDED, ["1 steps", "4 steps"])
    print("\nquick run: too short to conclude\n" if args.quick else "")
    draw_all(args.output_dir, results, args.mixture, size["frame_every"])
    print(f"Wrote metrics.json, 4 figures and an animation to {args.output_dir}.")


if __name__ == "__main__":
    main()
