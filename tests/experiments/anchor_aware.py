"""A worked example of changing the method: a fake score that is told the anchor's time.

    python tests/experiments/anchor_aware.py             # five seeds, 15 minutes of a core
    python tests/experiments/anchor_aware.py --seeds 1

NOT IN THE PAPER. In CDM one fake score serves all anchors. L_DM is content when the clean estimates
of all anchors together look like data, whatever each anchor does by itself. Here the fake score is
also told the time at which an estimate was made: t_i in L_DM, t' in L_CDM. The lines that this
changes in cdm.cdm_iteration are marked CHANGED. Student, teacher and sampling stay.

The idea is known. TDM (arXiv:2503.06674) makes the diagnosis: one fake score for overlapping noise
ranges fits a mixture of several student distributions. verl-distill (shaoshitong/verl-distill)
gives the generator's time to the fake score. What is measured here is new: a continuous time under
a dynamic schedule, t' in L_CDM, and a layer that starts at zero, so that training starts as CDM's.
"""

import argparse
import copy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import cdm
import toy_2d as toy

ANCHOR_LR = 1e-3  # of the layer that embeds the time
METHODS = {
    "DM fixed": ("uneq", toy.METHODS["DM fixed"]),
    "DM dynamic": ("uneq", toy.METHODS["DM dynamic"]),
    "CDM": ("uneq", toy.METHODS["CDM"]),
    "CA + DM + CDM": ("shared", toy.GUIDED["CA + DM + CDM"]),
}


class AwareNet(toy.Net):
    """The toy's network with one more input: made_at, (B,), the time of a clean estimate."""

    def __init__(self, net, classes):
        super().__init__(classes)
        self.load_state_dict(net.state_dict())
        self.anchor = torch.nn.Linear(16, net.out.in_features, bias=False)
        torch.nn.init.zeros_(self.anchor.weight)

    def forward(self, x_t, t, cond, made_at):
        def waves(t):
            return torch.addmm(self.phase, t[:, None], self.frequency).sin()

        h = self.inp(torch.cat([x_t, waves(t)], 1)) + self.cls(cond[0])
        h = h + self.anchor(waves(made_at))
        for layer in self.hidden:
            h = h + F.silu(layer(h))
        return self.out(h)


def aware_iteration(k, cond, uncond, draw, teacher, student, fake_score, layer, ema, cfg):
    """cdm.cdm_iteration, without micro-batches and logging.

    fake_score: the Learner of an AwareNet without its layer; layer: the Learner of the layer.
    """
    tau, noise = draw.tau, draw.noise
    anchor = cdm.backward_simulation(student.model, noise["start"], draw.schedule, draw.index, cond)
    x_off, t_off = cdm.off_trajectory_point(anchor, draw, cfg)

    x0_hat = cdm.clean_estimate(anchor.x_t, anchor.t, anchor.v)
    made_at = anchor.t.clone()  # CHANGED
    if cfg.cdm_weight:  # CHANGED: L_CDM asks it about t', so in half of the rows it learns there.
        rows = slice(k % 2, None, 2)
        with torch.no_grad():
            v = student.model(x_off[rows], t_off[rows], cdm.take(cond, rows))
        x0_hat[rows] = cdm.clean_estimate(x_off[rows], t_off[rows], v)
        made_at[rows] = t_off[rows]
    told = partial(fake_score.model, made_at=made_at)  # CHANGED
    cdm.fake_score_loss(told, x0_hat, cond, tau["fake"], noise["fake"]).backward()
    fake_score.step()
    layer.step()  # CHANGED
    cdm.average_into(fake_score.params, student.params, cfg.fake_pull)
    if k % cfg.student_every != 0:
        return

    x0_hat = cdm.clean_estimate(anchor.x_t, anchor.t, student.model(anchor.x_t, anchor.t, cond))
    ca, _ = cdm.ca_loss(x0_hat, teacher, cond, uncond, tau["ca"], noise["ca"], cfg.alpha)
    told = partial(fake_score.model, made_at=anchor.t)  # CHANGED
    dm, _ = cdm.dm_loss(x0_hat, teacher, told, cond, tau["dm"], noise["dm"])
    (cfg.ca_weight * ca + cfg.dm_weight * dm).backward()
    if cfg.cdm_weight:
        x0_hat = cdm.clean_estimate(x_off, t_off, student.model(x_off, t_off, cond))
        told = partial(fake_score.model, made_at=t_off)  # CHANGED
        off, _ = cdm.dm_loss(x0_hat, teacher, told, cond, tau["cdm"], noise["cdm"])
        (cfg.cdm_weight * off).backward()
    n = student.updates
    student.step()
    cdm.average_into(ema, student.params, min((1 + n) / (10 + n), cfg.ema_decay))


def distil(mixture, settings, seed, size):
    """As toy_2d.train, with an anchor-aware fake score. Returns the EMA's metrics."""
    mix = toy.MIXTURES[mixture]
    cfg = replace(toy.SETTINGS, **settings)
    net = toy.fit(mixture, seed, size["fit_steps"])
    student, ema = copy.deepcopy(net), copy.deepcopy(net)
    fake = AwareNet(net, mix.classes)
    weights = dict(fake.named_parameters())
    layer = {"anchor.weight": weights.pop("anchor.weight")}
    student = cdm.Learner(student, dict(student.named_parameters()), cfg.student_lr, cfg)
    fake_score = cdm.Learner(fake, weights, cfg.fake_lr, cfg)
    learners = student, fake_score, cdm.Learner(fake, layer, ANCHOR_LR, cfg)
    cond = (torch.arange(toy.BATCH) % mix.classes,)
    uncond = (torch.full((toy.BATCH,), mix.classes),)
    average = dict(ema.named_parameters())
    for k in range(1, size["iterations"] + 1):
        draw = cdm.draw_iteration(cfg, seed, k, toy.BATCH, (2,), toy.SHIFT)
        aware_iteration(k, cond, uncond, draw, mix.velocity, *learners, average, cfg)
    return toy.evaluate(ema, mix, size["samples"], toy.GRIDS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    metrics = ("tv", "artifacts", "spread", "shared")
    print(f"{'4 steps':30}" + "".join(f"{metric:>16}" for metric in metrics))
    for name, (mixture, settings) in METHODS.items():
        plain, aware = [], []
        for seed in range(args.seeds):
            plain.append(toy.train(mixture, settings, seed, toy.FULL))
            aware.append((distil(mixture, settings, seed, toy.FULL),))
        for label, runs in ((name, plain), (f"{name}, told the time", aware)):
            cells = [toy.text(runs, metric, "4 steps") for metric in metrics]
            print(f"{label:30}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
