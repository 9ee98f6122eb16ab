"""cdm.py as if its weights were bf16: a control for the ablation, fast on a CPU.

    python tests/experiments/rounded.py --teacher ...                 # the flags of cdm.py
    python tests/experiments/rounded.py --stochastic --teacher ...
    python tests/experiments/rounded.py --rounded-ema --teacher ...

At the start and after each update the parameters and both moments of AdamW are rounded to bf16.
They stay in float32 tensors, and all arithmetic is float32's. So this is the rounding of `--weights
bfloat16` and nothing else. A CPU without bf16 units needs much longer for the flag.

With --stochastic a number is rounded up or down at random, so that small updates count on average.
With --rounded-ema the student's average is rounded, too, as by our reading the authors' is. At the
end it prints how far the average is behind the student.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import cdm


@torch.no_grad()
def round_to_bf16(tensors, stochastic):
    for x in tensors:
        if stochastic:
            # bf16 is the upper half of float32. A random lower half carries over in proportion.
            bits = x.view(torch.int32)
            x.copy_(((bits + torch.randint_like(bits, 2**16)) & -(2**16)).view(torch.float32))
        else:
            x.copy_(x.bfloat16())


def distance(a, b):
    """Between two sets of parameters."""
    return math.sqrt(sum((a[name] - b[name]).square().sum() for name in a))


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stochastic", action="store_true")
    parser.add_argument("--rounded-ema", action="store_true")
    own, flags = parser.parse_known_args()
    round_all = partial(round_to_bf16, stochastic=own.stochastic)
    trained = set()  # which dicts of parameters are no average
    seen = {}  # the average, the student, and its start
    build = cdm.Learner.__init__
    step = cdm.Learner.step
    average_into = cdm.average_into

    def rounded_build(learner, *rest):
        build(learner, *rest)
        trained.add(id(learner.params))
        round_all(learner.params.values())
        # The student's Learner is the last one.
        seen["start"] = {name: p.detach().clone() for name, p in learner.params.items()}

    def rounded_step(learner):
        norm = step(learner)
        round_all(learner.params.values())
        for state in learner.optimizer.state.values():
            round_all([state["exp_avg"], state["exp_avg_sq"]])
        return norm

    def rounded_average(params, others, decay):
        average_into(params, others, decay)
        if own.rounded_ema or id(params) in trained:
            round_all(params[name] for name in others)
        if id(params) not in trained:
            seen.update(average=params, student=others)

    cdm.Learner.__init__ = rounded_build
    cdm.Learner.step = rounded_step
    cdm.average_into = rounded_average
    code = cdm.main(flags)
    if code == 0:
        with torch.no_grad():
            gone = distance(seen["student"], seen["start"])
            behind = distance(seen["student"], seen["average"])
        print(f"The student has gone {gone:.4f}, and its average is {behind:.4f} from it.")
    return code


if __name__ == "__main__":
    sys.exit(main())
