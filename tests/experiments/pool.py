"""Why guidance ends in the wrong modes: variants of CA + DM on the toy's mixture "shared".

    python tests/experiments/pool.py --seeds 5     # 15 minutes of a core; draws toy_pool.png

"warm": from student and fake score of 1,000 iterations of L_DM. "free tau": the anchor's time does
not bound L_CA's tau. "guided L_CDM": with a guided teacher. These are no flags of cdm.py.
"""

import argparse
import copy
import itertools
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))
import cdm
import toy_2d as toy

torch.set_num_threads(1)
MIX = toy.MIXTURES["shared"]
VARIANTS = (
    "CA + DM",
    "CA + DM, warm",
    "CA + DM, warm, free tau",
    "CA + DM + CDM",
    "CA + DM + CDM, warm, free tau",
    "CA + DM + CDM, guided L_CDM",
    "CA + DM + CDM, warm, free tau, guided L_CDM",
)


def distil(variant, seed, iterations, student, fake, ema):
    """Train the networks in place."""
    cfg = replace(toy.SETTINGS, **toy.GUIDED[variant.split(",")[0]])
    learner = cdm.Learner(student, dict(student.named_parameters()), cfg.student_lr, cfg)
    fake_learner = cdm.Learner(fake, dict(fake.named_parameters()), cfg.fake_lr, cfg)
    learners = learner, fake_learner, dict(ema.named_parameters())
    # cdm_iteration asks the teacher four times, the last time in L_CDM.
    scales = itertools.cycle([1.0, 1.0, 1.0, 1 + cfg.alpha])

    def guided_in_cdm(x_t, t, cond):
        return MIX.guided_velocity(next(scales), x_t, t, cond)

    teacher = guided_in_cdm if "guided L_CDM" in variant else MIX.velocity
    cond = (torch.arange(toy.BATCH) % MIX.classes,)
    uncond = (torch.tensor([MIX.classes]),)
    for k in iterations:
        draw = cdm.draw_iteration(cfg, seed, k, toy.BATCH, (2,), toy.SHIFT)
        if "free tau" in variant:
            free = torch.rand(toy.BATCH, generator=cdm.generator(seed, k, "free tau"))
            draw.tau["ca"] = free.clamp(cfg.tau_min, cfg.tau_max)
        cdm.cdm_iteration(k, cond, uncond, draw, teacher, *learners, cfg)


def train(variant, seed, steps):
    """The student's EMA."""
    net = toy.fit("shared", seed, toy.FULL["fit_steps"])
    student, fake, ema = (copy.deepcopy(net) for _ in range(3))
    first = 1001 if "warm" in variant else 1
    if "warm" in variant:
        distil("DM alone", seed, range(1, first), student, fake, ema)
        ema = copy.deepcopy(student)
    distil(variant, seed, range(first, first + steps), student, fake, ema)
    return ema


def anchor_estimates(model, n=20_000):
    """Clean estimates at anchors drawn as in training, by time: what the one fake score learns."""
    c = torch.arange(toy.BATCH) % MIX.classes
    parts = []
    for k in range(n // toy.BATCH):
        draw = cdm.draw_iteration(toy.SETTINGS, "anchors", k, toy.BATCH, (2,), toy.SHIFT)
        a = cdm.backward_simulation(model, draw.noise["start"], draw.schedule, draw.index, (c,))
        parts.append((cdm.clean_estimate(a.x_t, a.t, a.v), a.t, c))
    x0_hat, t, c = (torch.cat(part) for part in zip(*parts, strict=True))
    groups = {"t = 1": t == 1, ".8 < t < 1": (t > 0.8) & (t < 1)}
    groups |= {".6 < t < .8": (t > 0.6) & (t < 0.8), "t < .6": t < 0.6, "all anchors": t > 0}
    return {name: (x0_hat[rows], c[rows]) for name, rows in groups.items()}


def draw_pool(model, groups):
    """The estimates in groups, the student's samples and the guided teacher's."""
    teacher = partial(MIX.guided_velocity, 1 + toy.SETTINGS.alpha)
    c = torch.arange(20_000) % MIX.classes
    noise = torch.randn(len(c), 2, generator=cdm.generator("evaluate"))
    panels = groups | {"4 steps": (cdm.sample(model, noise, toy.GRIDS["4 steps"], (c,)), c)}
    panels["guided teacher"] = cdm.sample(teacher, noise, cdm.sampling_times(200), (c,)), c
    figure = Figure((9, 2.1), dpi=160)
    figure.suptitle("CA + DM + CDM: clean estimates by the time t of their anchor, and samples")
    for ax, (name, (x, c)) in zip(figure.subplots(1, 7), panels.items(), strict=True):
        toy.draw_density(ax, MIX, MIX.classes)
        ax.scatter(*x[:1800].T, 0.6, [f"C{cls}" for cls in c[:1800]])
        ax.set(title=name, xlabel=f"shared {toy.measure(MIX, x, c)['shared']:.1%}")
    figure.savefig("toy_pool.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    seeds = range(parser.parse_args().seeds)
    for variant in VARIANTS:
        runs = []
        for seed in seeds:
            model = train(variant, seed, toy.FULL["iterations"])
            groups = anchor_estimates(model)
            metrics = {name: toy.measure(MIX, *points) for name, points in groups.items()}
            runs.append((metrics | toy.evaluate(model, MIX, 20_000, toy.GRIDS),))
            if variant == "CA + DM + CDM" and seed == 0:
                draw_pool(model, groups)
        shared = [f"{name}: {toy.text(runs, 'shared', name)}" for name in (*groups, "4 steps")]
        print(variant, *shared, f"artifacts {toy.text(runs, 'artifacts', '4 steps')}", sep="\n    ")


if __name__ == "__main__":
    main()
