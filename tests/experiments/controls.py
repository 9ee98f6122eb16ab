"""The control rows of digits_ablation.py: cdm.py with a function replaced.

    python tests/experiments/controls.py "CDM *, fed with noise" --anchor-aware-fake --teacher ...

The first word names the control. The rest are flags of cdm.py, --anchor-aware-fake among them.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import cdm


def fake_off_the_path(gen):
    """The paper's fake score, trained off the trajectory as well: its additional layer gives 0."""
    forward = cdm.AnchorTime.forward

    def silent(self, t):
        return 0 * forward(self, t)

    cdm.AnchorTime.forward = silent


def fed_with_noise(gen):
    """The same additional parameters as the anchor-aware fake score, fed with random times."""
    forward = cdm.AnchorTime.forward

    def blind(self, t):
        return forward(self, torch.rand(t.shape, generator=gen))

    cdm.AnchorTime.forward = blind


def guided_off_the_path(gen):
    """L_CA, with tau ~ U(0, t'), at the off-trajectory estimate too, added to L_CDM.

    In a student update cdm_iteration calls ca_loss, dm_loss for L_DM and dm_loss for L_CDM.
    """
    ca_loss = cdm.ca_loss
    dm_loss = cdm.dm_loss
    update = {}

    def remembered(x0_hat, teacher, cond, uncond, tau, noise, alpha):
        update.update(uncond=uncond, alpha=alpha, dm_calls=0)
        return ca_loss(x0_hat, teacher, cond, uncond, tau, noise, alpha)

    def guided(x0_hat, teacher, fake_score, cond, tau, noise):
        loss = dm_loss(x0_hat, teacher, fake_score, cond, tau, noise)
        update["dm_calls"] += 1
        if update["dm_calls"] == 1:  # L_DM
            return loss
        t_off = fake_score.keywords["anchor_t"]
        below = (t_off * torch.rand(t_off.shape, generator=gen)).clamp(0.02, 0.98)
        fresh = torch.randn(noise.shape, generator=gen)
        ca = ca_loss(x0_hat, teacher, cond, update["uncond"], below, fresh, update["alpha"])
        return dataclasses.replace(loss, value=loss.value + ca.value)

    cdm.ca_loss = remembered
    cdm.dm_loss = guided


CONTROLS = {
    "CDM, fake off the path": fake_off_the_path,
    "CDM *, fed with noise": fed_with_noise,
    "CDM *, guided off the path": guided_off_the_path,
}


def main():
    """Replace the functions of the named control and run cdm.py. Returns its exit code."""
    name, *flags = sys.argv[1:]
    seed = cdm.parse_args(flags).seed
    CONTROLS[name](cdm.generator(seed, "control"))
    return cdm.main(flags)


if __name__ == "__main__":
    sys.exit(main())
