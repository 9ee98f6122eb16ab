"""Network evaluations and calls of cdm.py, and of the authors' release by our reading of it.

    python tests/experiments/evaluations.py

Counted over 2,000 iterations, at the defaults, in micro-batches of 4. The release simulates every
sample to the schedule's end, and its L_CA and L_DM evaluate the student for themselves.
"""

import itertools
import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import cdm

iterate = cdm.cdm_iteration
simulate = cdm.backward_simulation


def simulate_to_the_end(student, noise, schedule, index, cond):
    points = []

    def recorded(x_t, t, cond):
        points.append((x_t, student(x_t, t, cond)))
        return points[-1][1]

    simulate(recorded, noise, schedule, torch.full_like(index, len(schedule) - 1), cond)
    rows = torch.arange(len(index))
    x_t, v = (torch.stack(x)[index, rows] for x in zip(*points, strict=True))
    return cdm.Anchor(x_t, schedule[index].to(noise), v)


def released(k, cond, uncond, draw, teacher, student, *rest):
    """cdm_iteration with the evaluations of the release."""
    model = student.model
    passes = itertools.count()

    def twice_at_the_anchor(x_t, t, cond):
        v = model(x_t, t, cond)
        if torch.is_grad_enabled() and next(passes) % 2 == 0:  # the others are L_CDM's
            v = (v + model(x_t, t, cond)) / 2
        return v

    with (
        patch.object(student, "model", twice_at_the_anchor),
        patch.object(cdm, "backward_simulation", simulate_to_the_end),
    ):
        return iterate(k, cond, uncond, draw, teacher, student, *rest)


def count(iteration, batch=16, iterations=2000):
    """Evaluations of a sample in a student update, and calls of the student in a simulation."""
    cfg = cdm.CDMConfig()
    p = torch.ones(1, requires_grad=True)
    evaluations, calls = [], []

    def model(x_t, t, cond):
        evaluations.append(len(t))
        return p * x_t

    def student_model(x_t, t, cond):
        calls.append(torch.is_grad_enabled())
        return model(x_t, t, cond)

    student = cdm.Learner(student_model, {"p": p}, 0, cfg)
    fake_score = cdm.Learner(model, {"p": p}, 0, cfg)
    for k in range(1, iterations + 1):
        draw = cdm.draw_iteration(cfg, 0, k, batch, (1,))
        iteration(k, (), (), draw, model, student, fake_score, {"p": p.detach()}, cfg, 4)
    updates = iterations / cfg.student_every
    return sum(evaluations) / batch / updates, calls.count(False) / iterations


def main():
    ours, calls = count(iterate)
    with patch("torch.distributed.is_initialized", return_value=True):
        fsdp_calls, part_calls = count(iterate)[1], count(iterate, batch=4)[1]
    print(f"evaluations of a sample in a student update: {ours:.2f}, expected 25.5")
    print(f"the release's: {count(released)[0]:.2f}, expected 40")
    print(f"calls of the student in an iteration's simulation, one process: {calls:.2f}")
    print(f"FSDP, to the schedule's length: {fsdp_calls:.2f}, expected 14.5")
    print(f"FSDP, in four micro-batches, as before: {4 * part_calls:.2f}, expected 58")


if __name__ == "__main__":
    main()
