"""CDM in two dimensions: the algorithm of cdm.py, imported and not copied, where everything can be checked.

    python toy_2d.py                   # under 3 minutes on two CPU cores
    python toy_2d.py --mixture ring    # equal mode weights (the default, uneq, has 8 : 4 : 2 : 1)
    python toy_2d.py --seeds 5 --iterations 3000   # means and standard deviations over seeds: README's numbers
    python toy_2d.py --quick           # half a minute: does everything run? (too short to learn anything)

A Gaussian mixture with known means is the data. Its velocity has a closed form, so the teacher is exact, with and
without guidance, and so are the densities and bin masses that students are measured against. Student and fake score are
one small MLP, first fitted to the exact velocity (the counterpart of "initialised from the teacher"), then distilled by
cdm.cdm_iteration with the settings in METHODS and GUIDED below: small differences, no second code path.

Writes metrics.json, figures toy_*.png (see FIGURES) and toy_training.gif into --output-dir. A method with *
uses cdm.py's anchor-aware fake score, which is NOT IN THE PAPER. What this leaves out: images, text, any claim about
SD3. Learning rates, N_max and the guidance are the toy's own.
"""

import argparse, copy, json, math, multiprocessing, os, pickle, platform, time
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import matplotlib.animation, matplotlib.figure
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm
import cdm

# ---------------------------------------- 1. the data: a class-conditional Gaussian mixture, and its exact velocity

EDGES, BINS = torch.linspace(-3.5, 3.5, 71), 70  # of the histogram, in each direction

class Mixture:
    """p(x0 | c) = sum_k weights[c, k] N(means[k], std^2 I) in two dimensions; weights: a row of K for each class, whose
    sum need not be 1. The last class is "empty", the average."""

    def __init__(self, means, std, weights):
        self.means, self.std, self.classes = torch.tensor(means), std, len(weights)
        rows = F.normalize(torch.tensor(weights, dtype=torch.float32), p=1, dim=1)
        self.weights = torch.cat([rows, rows.mean(0, keepdim=True)])  # (classes + 1, K)
        self.shared = (rows > 0).all(0)  # (K,): does it belong to all classes?

    def components(self, x_t, t, c):
        """log w_k N(x_t; (1 - t) mu_k, s_t^2 I) of each mode and its mean velocity there: (B, K) and (B, K, 2).

        On the path x_t = (1 - t) x0 + t noise a mode stays Gaussian, with mean (1 - t) mu_k and variance s_t^2 =
        (1 - t)^2 std^2 + t^2. Given x_t, noise - x0 is then linear in the gap to that mean."""
        t = t[:, None, None]
        var = (1 - t) ** 2 * self.std**2 + t**2
        gap = x_t[:, None] - (1 - t) * self.means
        log_p = self.weights[c].log() - gap.square().sum(2) / (2 * var[..., 0]) - (2 * math.pi * var[..., 0]).log()
        return log_p, (t - (1 - t) * self.std**2) / var * gap - self.means

    def velocity(self, x_t, t, cond):
        """v(x_t, t, c) = E[noise - x0 | x_t, c], exactly. x_t: (B, 2); t: (B,) in [0, 1]; cond: ((B,) class,)."""
        log_p, v = self.components(x_t, t, cond[0])
        return (log_p.softmax(1)[..., None] * v).sum(1)

    def guided(self, scale, x_t, t, cond):
        """The teacher with guidance in the notation of L_CA: v(c) + scale (v(c) - v(empty)); 0 is without."""
        v, empty = self.velocity(x_t, t, cond), torch.full_like(cond[0], self.classes)
        return v + scale * (v - self.velocity(x_t, t, (empty,)))

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

MIXTURES = {  # two classes of four modes each, in turn; then with weights 8 : 4 : 2 : 1
    "ring": Mixture(ring(8), 0.15, [[1, 0] * 4, [0, 1] * 4]),
    "uneq": Mixture(ring(8), 0.15, [[8, 0, 4, 0, 2, 0, 1, 0], [0, 8, 0, 4, 0, 2, 0, 1]]),
    # modes 0 and 3 belong to both classes: guidance, which asks "which class?", has something to push against
    "shared": Mixture(ring(6), 0.15, [[1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1]]),
}

# ------------------------------------------------------------------- 2. the network, fitted to the exact velocity

class Net(nn.Module):
    """v(x_t, t, c): residual layers on (x_t, sin/cos of t, c). Shapes as in Mixture.velocity. anchor_t, (B,), is for
    the anchor-aware fake score: the time that its clean estimate came from, in a layer that starts at zero."""

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

@cache  # so that a process does it once, for all methods
def fit(mix, seed, steps, batch=512, lr=2e-3):
    """A Net regressed onto the exact velocity, "empty" included: what student and fake score start from."""
    torch.manual_seed(seed)
    net, gen = Net(mix.classes), cdm.generator(seed, "fit")
    optimizer = torch.optim.AdamW(net.params().values(), lr=lr, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        c, t = torch.randint(mix.classes + 1, (batch,), generator=gen), torch.rand(batch, generator=gen)
        x_t = cdm.add_noise(mix.sample(c, gen), t, torch.randn(batch, 2, generator=gen))
        optimizer.zero_grad()
        F.mse_loss(net(x_t, t, (c,)), mix.velocity(x_t, t, (c,))).backward()
        optimizer.step()
        cosine.step()
    return net

# -------------------------- 3. the methods: differences from one set of settings, and the distillation that runs them

# Inner times over the whole range, as the authors later found to work as well; "t >= .5" below is the released range.
SETTINGS = cdm.CDM(ca_weight=0.0, guidance=1.0, max_schedule_steps=8, time_low=0.02, time_high=0.98,
                   student_lr=2e-3, fake_lr=4e-3, ema_decay=0.995)
FIXED, DYNAMIC = dict(schedule="fixed", cdm_weight=0.0), dict(cdm_weight=0.0)
AWARE, RELEASED = dict(anchor_aware_fake=True), dict(time_low=0.25, time_high=0.95)
METHODS = {  # on --mixture; the first is like DMD2
    "DM fixed": FIXED, "DM dynamic": DYNAMIC, "CDM": {},
    "DM dynamic, t >= .5": DYNAMIC | RELEASED, "CDM, t >= .5": RELEASED,
    "DM fixed *": FIXED | AWARE, "DM dynamic *": DYNAMIC | AWARE, "CDM *": AWARE,
}
CA = dict(ca_weight=1.0)
GUIDED = {  # on "shared"
    "DM alone": DYNAMIC, "CA alone": CA | dict(dm_weight=0.0, cdm_weight=0.0), "CA + DM": CA | DYNAMIC,
    "CA + DM + CDM": CA, "CA + DM + CDM *": CA | AWARE,
}
TEACHERS = {"exact teacher": 0, "guided teacher": SETTINGS.guidance}  # and their guidance
SHIFT = 3.0  # SD3's: the fixed schedule 1, .75, .5, .25 becomes t = 1, .9, .75, .5
STEPS = (1, 2, 3, 4, 6, 8)
FOUR, OFF, MANY = "4 steps", "1, .9, .6, .15", "200 steps"
GRIDS = {f"{n} steps": cdm.uniform_times(n, SHIFT) for n in STEPS} | {  # every model is sampled on all of these
    "1, .9, .5": torch.tensor([1, 0.9, 0.5]),  # uneven, each of its times on the fixed schedule
    OFF: torch.tensor([1, 0.9, 0.6, 0.15]),  # uneven, off it
}

def distil(mix, cfg, net, seed, iterations, batch=256):
    """Distils a copy of `net` against the exact velocity. Yields the student's EMA at the start and each iteration."""
    student, fake, ema = (copy.deepcopy(net) for _ in range(3))
    groups = [(fake.params(), cfg.fake_lr), (fake.params(anchor=True), cfg.anchor_lr)]  # the latter rests except for *
    learners = cdm.Learner(student, [(student.params(), cfg.student_lr)], cfg), cdm.Learner(fake, groups, cfg)
    cond, uncond = torch.arange(batch) % mix.classes, torch.full((batch,), mix.classes)
    yield ema
    for k in range(1, iterations + 1):
        draw = cdm.draw_iteration(cfg, seed, k, batch, (2,), SHIFT)
        cdm.cdm_iteration(k, [((cond,), (uncond,), draw)], mix.velocity, *learners, ema.params(), cfg)
        yield ema

# ------------------------------------------------------------------------------ 4. measuring, against exact values

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
    """All metrics of samples x (B, 2) of classes c (B,); guided: a histogram of the guided teacher's samples."""
    x, truth = x.nan_to_num(1e6).clamp(-1e6, 1e6), mix.weights[:-1]  # a method may diverge
    p, q = mix.bin_masses(), histogram(x, c, mix.classes)
    (near, k), share, radii = mix.distances(x, c).min(1), torch.zeros_like(truth), torch.zeros(0)
    for cls, mode in truth.nonzero().tolist():
        own = x[(c == cls) & (k == mode)]  # the samples nearest to this mode; their median is its centre
        share[cls, mode] = len(own) / (c == cls).sum()
        if len(own):
            radii = torch.cat([radii, (own - own.median(0).values).norm(dim=1) / mix.std])
    metrics = {
        "tv": (p - q).abs().sum() / 2,  # total variation from the exact bin masses, in [0, 1]
        "kl_data": kl(p, q),  # KL(data || samples): large when something is missed
        "kl_samples": kl(q, p),  # KL(samples || data): large when something is invented
        "artifacts": (near > 4 * mix.std).double(),  # share farther than 4 std from every mode of their class
        "weights": (share - truth).abs().sum(1) / 2,  # total variation of the modes' shares from their weights
        # Median distance to the mode's centre over the truth's, 1.177 std: under 1 is mode-seeking, artifacts count.
        # Then the same from the root mean square of what is within 4 std of the centre: without artifacts.
        "spread": radii.median() / math.sqrt(2 * math.log(2)),
        "core_spread": (radii[radii <= 4].square().mean() / 2).sqrt().nan_to_num(0),
    }
    if guided is not None:  # total variation from the guided teacher; share of samples nearest to modes of all classes
        metrics |= dict(tv_guided=(guided - q).abs().sum() / 2, shared_modes=share[:, mix.shared].sum(1))
    return {name: round(float(value.mean()), 5) for name, value in metrics.items()}

def start(mix, n, *key):
    """Noise and classes (equally often) for n samples."""
    return torch.randn(n, 2, generator=cdm.generator(*key)), torch.arange(n) % mix.classes

@cache
def teacher_samples(mix, n, guidance):
    """Samples of the exact teacher by many Euler steps: with guidance there is no closed form for what they follow."""
    noise, c = start(mix, n, "teacher")
    return cdm.sample(partial(mix.guided, guidance), noise, cdm.uniform_times(200), (c,)), c

def anchor_estimates(model, noise, c):
    """The anchors on the fixed schedule, and {"t = ...": (D(x_t, t, c), c)} of each and of their mixture."""
    anchors = [cdm.backward_simulation(model, noise, GRIDS[FOUR], torch.full_like(c, i), (c,)) for i in range(4)]
    estimates = {f"t = {t:.2g}": (cdm.clean_estimate(*a), c) for t, a in zip(GRIDS[FOUR], anchors)}
    few = slice(len(c) // 4)  # a mixture as large as its parts: TV depends on the number of samples
    estimates["mixture"] = torch.cat([x0[few] for x0, _ in estimates.values()]), c[few].repeat(4)
    return anchors, estimates

@torch.no_grad()
def evaluate(model, mix, n, teacher_guidance=None):
    """Everything that metrics.json says about one model: on each grid, at each anchor, and off the trajectory."""
    noise, c = start(mix, n, "evaluate")
    guided = histogram(*teacher_samples(mix, n, SETTINGS.guidance), mix.classes) if mix.shared.any() else None
    grids = {name: measure(mix, cdm.sample(model, noise, t, (c,)), c, guided) for name, t in GRIDS.items()}
    if teacher_guidance is not None:
        grids[MANY] = measure(mix, *teacher_samples(mix, n, teacher_guidance), guided)
    anchors, estimates = anchor_estimates(model, noise, c)
    few, c, off = slice(n // 4), c[: n // 4].repeat(4), {}
    for t_off in torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9]):  # Eq. 7 from every anchor to t'
        x_off = torch.cat([cdm.euler_step(a.x_t, a.t, t_off, a.v)[few] for a in anchors])
        x0_hat = cdm.clean_estimate(x_off, t_off, model(x_off, t_off.expand(n), (c,)))
        off[f"t' = {t_off:g}"] = measure(mix, x0_hat, c)
    at_anchors = {name: measure(mix, *pair, guided) for name, pair in estimates.items()}
    return dict(grids=grids, anchors=at_anchors, off_trajectory=off)

# ----------- 5. the table and the figures; the colours are Okabe and Ito's, which colour-blind readers can tell apart

BLACK, GREY, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000", "#888888", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
LINES = {  # the colour is the schedule, a dashed line the anchor-aware fake score
    "exact teacher": (BLACK, ".:"), "undistilled": (GREY, "x-"), "DM fixed": (RED, "o-"), "DM dynamic": (ORANGE, "s-"),
    "CDM": (BLUE, "D-"), "DM fixed *": (RED, "o--"), "DM dynamic *": (ORANGE, "s--"), "CDM *": (BLUE, "D--"),
}
SHOWN = ("undistilled", "DM fixed", "DM dynamic", "CDM", "DM fixed *", "CDM *")
LABELS = dict(tv="TV", artifacts="artifacts", spread="spread", shared_modes="shared modes", tv_guided="TV to guided")
PERCENT, STAR = ("artifacts", "shared_modes"), "* anchor-aware fake score: not in the paper"
FIGURES = {  # height in inches, rows and columns of panels, title
    "ideas": (3.1, 1, 4, ""),  # student paths, where each method trains them, and what that buys
    "samples": (5.6, 2, 6, "On the fixed schedule; below, off it. Grey: the exact density. A colour for each class. "),
    "steps": (3.3, 1, 4, "The same student sampled with 1 to 8 steps; bars: one standard deviation over seeds. "),
    "closeup": (2.6, 1, 6, "One mode at 4 steps: what mode-seeking does to a Gaussian; circles at 1, 2, 3 true std. "),
    "anchors": (3.2, 1, 4, "Clean estimates by anchor. One fake score for all anchors sees only their mixture. "),
    "guidance": (5.9, 2, 4, "Guidance: the left and right modes belong to both classes. Students at 4 steps. "),
}
STYLE = {"font.size": 9, "axes.titlesize": 9.5, "figure.titlesize": 9.5, "figure.constrained_layout.use": True,
         "axes.spines.top": False, "axes.spines.right": False, "lines.markersize": 3.5, "lines.linewidth": 1.3,
         "legend.fontsize": 8, "legend.frameon": False, "legend.handlelength": 1.4, "legend.columnspacing": 1}

class Report:
    """The table and the figures. summary: {mixture: {method: evaluate's nesting of [mean, std]}} over all seeds;
    models: {(mixture, method): [a model after each number of iterations in `frames`]}, of the first seed."""

    def __init__(self, name, summary, models, frames):
        self.name, self.mix, self.summary, self.models, self.frames = name, MIXTURES[name], summary, models, frames
        self.noise, self.c = start(self.mix, 4000, "figures")

    def values(self, name, method, metric, points, part="grids"):
        """A metric's means and standard deviations over seeds at some grids or anchors: (2, len(points))."""
        pairs = [self.summary[name][method][part][point][metric] for point in points]
        return torch.tensor(pairs, dtype=torch.float64).T * (100 if metric in PERCENT else 1)

    def text(self, name, method, metric, point, part="grids"):
        mean, std = self.values(name, method, metric, [point], part)[:, 0].tolist()
        digits = 1 if metric in PERCENT else 3 if metric == "weights" else 2
        return f"{mean:.{digits}f}" + f"±{std:.{digits}f}" * (std > 0) + "%" * (metric in PERCENT)

    def table(self, name, methods, columns):
        """Prints one row a method and one column for each (metric, grid)."""
        rows = [(head, *words) for head, words in zip(("\n" + name, ""), zip(*columns))]
        rows += [(method, *(self.text(name, method, *column) for column in columns)) for method in methods]
        print("\n".join(f"{head:20}" + "".join(f"{cell:>16}" for cell in cells) for head, *cells in rows))

    @torch.no_grad()
    def draw(self, folder):
        matplotlib.rcParams.update(STYLE)
        for name, (height, rows, columns, title) in FIGURES.items():
            figure, path = matplotlib.figure.Figure((10, height)), folder / f"toy_{name}.png"
            getattr(self, name)(figure.subplots(rows, columns, sharey=name == "anchors"))
            figure.suptitle(title and title + STAR)
            figure.savefig(path, dpi=180)
            Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
        figure, writer = matplotlib.figure.Figure((5, 5.4)), matplotlib.animation.PillowWriter(fps=5)
        axes = figure.subplots(2, 2)
        with writer.saving(figure, folder / "toy_training.gif", dpi=110):
            for frame, k in enumerate(self.frames):
                self.samples(axes, ("DM fixed", "CDM"), frame)
                figure.suptitle(f"iteration {k}")
                for _ in range(10 if k == self.frames[-1] else 1):  # a rest at the end
                    writer.grab_frame()

    def panel(self, ax, name, method, grid, metrics, frame=None, middle=0, unit=1, side=3):
        """Samples of the last model, or that of a frame, over the exact density, a colour for each class, and metrics.
        The axes show middle +- side * unit, in that unit."""
        mix, model = MIXTURES[name], self.models[name, method][-1 if frame is None else frame]
        x = cdm.sample(model, self.noise, cdm.uniform_times(200) if grid == MANY else GRIDS[grid], (self.c,))
        at = torch.cartesian_prod(*2 * [torch.linspace(-side, side, 150)])
        p = mix.log_density(middle + unit * at, torch.zeros(len(at)), torch.full((len(at),), mix.classes)).exp().sqrt()
        ax.clear()
        ax.imshow(p.view(150, 150).T, "Greys", origin="lower", extent=(-side, side, -side, side), vmax=2 * p.max())
        for cls, colour in enumerate((BLUE, ORANGE)):
            ax.plot(*((x[self.c == cls][:900] - middle) / unit).T, ".", ms=side / 1.8, mew=0, color=colour)
        if (x.abs() > 3).any(1).all():
            ax.text(0, 1, "all far outside", ha="center")
        notes = [f"\n{LABELS[metric]} {self.text(name, method, metric, grid)}" for metric in metrics]
        if frame is not None:
            notes = [f"\nartifacts {measure(mix, x, self.c)['artifacts']:.0%}"]
        ticks, of, left = (-side / 1.5, 0, side / 1.5), " / std" * (unit != 1), ax.get_subplotspec().is_first_col()
        ax.set(xlim=(-side, side), ylim=(-side, side), xticks=ticks, yticks=ticks, title=method,
               xlabel=f"$x_1${of}" + "".join(notes), ylabel=f"$x_2${of}" if left else "")
        ax.tick_params(labelleft=left)

    def ideas(self, axes):
        """Student paths in the plane of time and x_1, where each method trains them, and artifacts on several grids."""
        t, x1 = torch.linspace(1, 0, 200)[:, None], torch.linspace(-3, 3, 200)[:, None, None]
        mean, var = (1 - t) * self.mix.means[:, 0], (1 - t) ** 2 * self.mix.std**2 + t**2
        density = (self.mix.weights[0] * (-((x1 - mean) ** 2) / (2 * var)).exp() / var.sqrt()).sum(2).sqrt()
        titles = {"DM fixed": "Fixed schedule:\ntrained at four times only",
                  "DM dynamic": "1. Dynamic continuous schedule:\nnew times in each iteration",
                  "CDM": "2. Continuous-time matching:\nalso off the path, at any t'"}
        for j, (method, title) in enumerate(titles.items()):
            ax, model, colour = axes[j], self.models[self.name, method][-1], LINES[method][0]
            ax.imshow(density, "Greys", origin="lower", extent=(1, 0, -3, 3), aspect="auto", vmax=3.5)
            for i, x in enumerate(torch.tensor([[1.9, 0.9], [1.0, -0.6], [0.2, 0.9], [-0.6, -1.2], [-1.8, 0.3]])):
                times = cdm.sample_schedule(5, 0.02, 0.98, SHIFT, True, cdm.generator(method, i)) if j else GRIDS[FOUR]
                n, cond = len(times), torch.zeros(len(times), dtype=torch.long)
                a = cdm.backward_simulation(model, x.expand(n, 2), times, torch.arange(n), (cond,))  # all its anchors
                ax.plot([*times, 0], [*a.x_t[:, 0], cdm.clean_estimate(*a)[-1, 0]], color=colour, lw=1)
                ax.plot(times, a.x_t[:, 0], "o", color=colour, label="" if i else "anchor")
                if method == "CDM" and i % 2 == 0:  # Eq. 7 from the last anchor, up and down, and the velocity there
                    t_off, (x_t, t_i, v) = torch.tensor([0.85, 0.45]), (part[[-1, -1]] for part in a)
                    x_off = cdm.euler_step(x_t, t_i, t_off, v)
                    arrow = torch.full((2,), -0.15), -0.15 * model(x_off, t_off, (cond[:2],))[:, 0]
                    ax.plot(torch.stack([t_i, t_off]), torch.stack([x_t, x_off])[..., 0], ":", color=BLACK, lw=1)
                    ax.quiver(t_off, x_off[:, 0], *arrow, angles="xy", scale_units="xy", scale=1, color=RED, width=0.01,
                              zorder=2)
                    ax.plot(t_off, x_off[:, 0], "D", mfc="white", mec=BLACK, ms=4, label="" if i else "$x_{t'}$, Eq. 7")
            ax.set(xlim=(1.02, 0), ylim=(-3.7, 3), xlabel="time t  (1 noise, 0 data)", ylabel="" if j else "$x_1$",
                   title=title, xticks=(1, 0.9, 0.75, 0.5, 0), xticklabels=("1", ".9", ".75", ".5", "0"))
            ax.legend(loc="lower left")
            mean, std = self.values(self.name, method, "artifacts", (FOUR, "6 steps", "8 steps", OFF))
            bars = axes[3].bar(torch.arange(4) + 0.3 * j, mean, 0.29, yerr=std, error_kw={"lw": 0.8},
                               color=colour, label=method)
            axes[3].bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
        axes[0].vlines(GRIDS[FOUR], -3, 3, color=RED, lw=0.7, ls="--")
        axes[3].set(xticks=torch.arange(4) + 0.3, xticklabels=("4", "6", "8", "4, other\ntimes"), yticks=(0, 50, 100),
                    ylim=(0, 125), title="What it buys", xlabel="sampling steps",
                    ylabel="samples far from\nevery mode (%)")
        axes[3].legend(loc="upper left")

    def samples(self, axes, methods=SHOWN, frame=None):
        for row, grid in zip(axes, (FOUR, OFF)):
            for ax, method in zip(row, methods):
                self.panel(ax, self.name, method, grid, ("tv", "artifacts", "spread"), frame)
            row[0].set_ylabel(f"sampled at t = {'1, .9, .75, .5' if grid == FOUR else grid}\n$x_2$")

    def steps(self, axes):
        labels = ("total variation", "artifacts (%)", "error of the mode weights", "within-mode spread")
        for ax, metric, label in zip(axes, ("tv", "artifacts", "weights", "spread"), labels):
            for i, (method, (colour, fmt)) in enumerate(LINES.items()):
                mean, std = self.values(self.name, method, metric, [f"{n} steps" for n in STEPS])
                mean[mean == 0] = math.nan  # the spread of one step of the exact teacher: one point for each class
                x = torch.tensor(STEPS) + 0.04 * (i - 3.5)
                ax.errorbar(x, mean, std, fmt=fmt, color=colour, elinewidth=0.7, label=method)
            ax.set(xlabel="sampling steps", ylabel=label, xticks=STEPS)
        for ax, ticks in ((axes[2], (0.01, 0.1, 1)), (axes[3], (0.25, 0.5, 1, 2, 4))):
            ax.set(yscale="log", ylim=(ticks[0], ticks[-1]), yticks=ticks, yticklabels=ticks)
            ax.minorticks_off()
        axes[3].axhline(1, color=GREY, lw=0.8, zorder=0)
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=8)

    def closeup(self, axes):
        middle = self.mix.means[self.mix.weights[0].argmax()]
        for ax, method in zip(axes, SHOWN):
            self.panel(ax, self.name, method, FOUR, ["spread"], None, middle, self.mix.std, 4.5)
            for radius in (1, 2, 3):
                ax.add_patch(matplotlib.patches.Circle((0, 0), radius, fill=False, lw=0.8))

    def anchors(self, axes):
        r, (noise, c) = torch.linspace(0.05, 5.95, 60), start(self.mix, 20_000, "anchors")
        for ax, method in zip(axes, ("DM fixed", "CDM", "DM fixed *", "CDM *")):
            ax.fill_between(r, r * (-(r**2) / 2).exp(), color="#dddddd", label="data: 1")
            _, curves = anchor_estimates(self.models[self.name, method][-1], noise, c)
            for (point, (x0, cls)), colour in zip(curves.items(), (PURPLE, ORANGE, SKY, GREEN, BLACK)):
                near = self.mix.distances(x0, cls).min(1).values / self.mix.std
                ax.plot(r, torch.histc(near, 60, 0, 6) / len(c) * 10, color=colour, lw=2 if colour == BLACK else 1.3,
                        label=f"{point}: {self.text(self.name, method, 'spread', point, 'anchors')}")
            ax.set(xlabel="distance to the nearest mode / std", title=method, xlim=(0, 5))
            ax.legend(title="spread of the estimates at", title_fontsize=8, loc="upper right")
        axes[0].set_ylabel("density")

    def guidance(self, axes):
        *panels, ax = axes.flat
        for where, method in zip(panels, (*TEACHERS, *GUIDED)):
            grid = MANY if method in TEACHERS else FOUR
            self.panel(where, "shared", method, grid, ("shared_modes", "artifacts", "tv_guided"))
        times = ("1", "0.9", "0.75", "0.5")
        for method, colour in zip(GUIDED, (ORANGE, GREEN, PURPLE, BLUE, BLUE)):
            mean, std = self.values("shared", method, "shared_modes", [f"t = {t}" for t in times], "anchors")
            ax.errorbar(times, mean, std, fmt="o--" if "*" in method else "o-", color=colour, label=method)
        for method, line in zip(TEACHERS, (":", "-")):
            level = self.values("shared", method, "shared_modes", [MANY])[0, 0]
            ax.axhline(level, color=GREY, ls=line, label=method, zorder=0)
        ax.set(xlabel="anchor $t_i$", ylabel="clean estimates in\nshared modes (%)", title="by anchor", ylim=(-4, 104))
        ax.legend(loc="upper center", bbox_to_anchor=(0.3, -0.3), ncols=2)

# ------------------------------------------------------------- 6. running: one process a core, each on one thread

def job(mixture, method, seed, size):
    """One method on one mixture with one seed: its metrics and its models over training. Pickled, or torch would pass
    each tensor as an open file. job.done, which main sets, counts the iterations of all processes."""
    torch.set_num_threads(1)
    mix, trained, models = MIXTURES[mixture], METHODS | GUIDED, []
    if method in TEACHERS:
        models.append(partial(mix.guided, TEACHERS[method]))
    else:
        cfg, iterations = replace(SETTINGS, **trained.get(method, {})), size["iterations"] * (method in trained)
        for k, ema in enumerate(distil(mix, cfg, fit(mix, seed, size["fit"]), seed, iterations)):
            if k in size["frames"]:
                models.append(copy.deepcopy(ema))
            with job.done.get_lock():
                job.done.value += k > 0
    return pickle.dumps((evaluate(models[-1], mix, size["samples"], TEACHERS.get(method)), models))

def summarise(runs):
    """The same nesting with a list over seeds in the place of each number, as [mean, standard deviation]."""
    if isinstance(runs[0], dict):
        return {key: summarise([run[key] for run in runs]) for key in runs[0]}
    values = torch.tensor(runs, dtype=torch.float64)
    return [round(float(values.mean()), 5), round(float(values.std()) if len(runs) > 1 else 0.0, 5)]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"toy_2d.py: {message}\n")
    parser.add_argument("--mixture", choices=MIXTURES, default="uneq", help="(guidance is always shown on shared)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--iterations", type=int, help="of each method (default 1200)")
    parser.add_argument("--quick", action="store_true", help="a few iterations, to see that everything runs")
    parser.add_argument("--output-dir", type=Path, help="default runs/toy, with --quick runs/toy_quick; is overwritten")
    args, began = parser.parse_args(), time.time()
    if args.seeds < 1 or args.seed < 0 or (args.iterations is not None and args.iterations < 1):
        parser.error("--seeds and --iterations must be at least 1, --seed at least 0")
    args.output_dir = args.output_dir or Path("runs/toy_quick" if args.quick else "runs/toy")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "metrics.json").touch()  # better now than after minutes of training
    except OSError as error:
        parser.error(f"cannot write to {args.output_dir}: {error.strerror}")

    iterations, steps, samples, n = (40, 200, 4000, 4) if args.quick else (1200, 2000, 20_000, 24)
    size = dict(iterations=args.iterations or iterations, fit=steps, samples=samples)
    size["frames"] = [round(size["iterations"] * (i / n) ** 2) for i in range(n + 1)]  # most happens early
    seeds, context = range(args.seed, args.seed + args.seeds), multiprocessing.get_context("spawn")
    methods, guided = ("exact teacher", "undistilled", *METHODS), (*TEACHERS, "undistilled", *GUIDED)
    names = dict.fromkeys([(args.mixture, method) for method in methods] + [("shared", method) for method in guided])
    tasks = [(*name, seed) for seed in seeds for name in names]
    total = size["iterations"] * sum(method in METHODS | GUIDED for _, method, _ in tasks)
    done = context.Value("l")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), context, setattr, (job, "done", done)) as pool, \
            tqdm(total=total, desc="distilling", unit="it", smoothing=0.05, mininterval=1) as bar:
        futures = [pool.submit(job, *task, size) for task in tasks]
        while wait(futures, timeout=0.2).not_done:
            bar.update(done.value - bar.n)
        bar.update(done.value - bar.n)

    runs, models = {}, {}
    for (mixture, method, seed), future in zip(tasks, futures):
        metrics, over_training = pickle.loads(future.result())
        runs.setdefault(mixture, {}).setdefault(method, {})[seed] = metrics
        models.setdefault((mixture, method), over_training)
    summary = {mixture: {m: summarise(list(by_seed.values())) for m, by_seed in methods.items()}
               for mixture, methods in runs.items()}
    settings = dict(mixture=args.mixture, seeds=list(seeds), **size, shift=SHIFT, cdm=asdict(SETTINGS),
                    methods=METHODS, guided=GUIDED, grids={name: times.tolist() for name, times in GRIDS.items()})
    metrics = dict(settings=settings, versions=dict(python=platform.python_version(), torch=torch.__version__),
                   summary=summary, runs=runs)
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    report = Report(args.mixture, summary, models, size["frames"])
    columns = [("tv", FOUR), ("artifacts", FOUR), ("weights", FOUR), ("spread", FOUR)]
    report.table(args.mixture, methods, columns + [(m, grid) for grid in ("8 steps", OFF) for m in ("tv", "artifacts")])
    report.table("shared", guided, columns + [("tv_guided", FOUR), ("shared_modes", FOUR)])
    report.draw(args.output_dir)
    print(f"\n{STAR}\nwrote metrics.json and 7 figures to {args.output_dir} in {time.time() - began:.0f} s")

if __name__ == "__main__":
    main()
