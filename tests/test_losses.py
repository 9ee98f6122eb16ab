"""Eq. 1, Eqs. 3-4, Eq. 7 and sec. 3.3: worked examples, the formulas by hand, and closed forms.

The worked example: one sample of one entry, and models whose velocity is a number.

    x0_hat = 1    noise = 0    tau = 1/2    alpha = 2
    z      = (1 - tau) x0_hat + tau noise = 1/2
    D      = z - tau v = 1/2 - v / 2

    v_empty = 0   D_empty = 1/2
    v_fake  = 1   D_fake  = 0
    v_c = -3      D_real  = 2     |D_real - x0_hat| = 1   w = 1
    v_c = -1      D_real  = 1     |D_real - x0_hat| = 0   w = 10, by the floor of 0.1

A loss is (w delta)^2, and its slope in x0_hat is -2 w delta.
"""

import pytest
import torch
from reference import Net, assert_close, ca_by_hand, conditions, dm_by_hand, float64, noised, randn

import cdm

HALF = torch.tensor([0.5])


def number(x):
    return torch.tensor([[x]])


def velocity_is_cond(x, t, cond):
    return cond[0]


def velocity_is_one(x, t, cond):
    return torch.ones_like(x)


# --- Eq. 1, and the path that it comes from. ---


def test_eq_1_in_numbers():
    """D = x_t - t v: at x_t = 5, t = 1/2 and v = 2 the clean estimate is 4."""
    assert cdm.clean_estimate(number(5.0), HALF, number(2.0)).item() == 4


def test_path_in_numbers():
    """x_t = (1 - t) x_0 + t noise: a quarter of the way from 8 to 0 is 6."""
    assert cdm.add_noise(number(8.0), torch.tensor([0.25]), number(0.0)).item() == 6


# --- Eq. 7: off the trajectory. ---


def off_trajectory(t_off, **settings):
    """x_{t'} and t' for an anchor at x = 5, t_i = 1/2, v = 2, with renoising noise 8."""
    anchor = cdm.Anchor(number(5.0), HALF, number(2.0))
    noise = {"off": number(8.0), "start": number(100.0)}
    draw = cdm.Draw(torch.ones(1), torch.zeros(1).long(), torch.tensor([t_off]), {}, noise)
    x, t = cdm.off_trajectory_point(anchor, draw, cdm.CDMConfig(**settings))
    return x.item(), t.item()


def test_eq_7_in_numbers():
    """x_{t'} = x_{t_i} + (t' - t_i) v: up to 5.5 at t' = 3/4, down to 4.5 at t' = 1/4."""
    assert off_trajectory(0.75) == (5.5, 0.75)
    assert off_trajectory(0.25) == (4.5, 0.25)


def test_eq_7_its_ablations_in_numbers():
    """The point "anchor" stays at 5, t_i = 1/2. "renoise" noises D = 4 with 8: 7 at t' = 3/4."""
    assert off_trajectory(0.75, cdm_point="anchor") == (5, 0.5)
    assert off_trajectory(0.75, cdm_point="renoise") == (7, 0.75)
    assert off_trajectory(0.25, cdm_point="renoise") == (5, 0.25)


# --- Eqs. 3-4, L_CDM and L_fake in numbers. ---


CA = [(-3.0, 1, 3, 9, -6), (-1.0, 10, 1, 100, -20)]
DM = [(-3.0, 1, 2, 4, -4), (-1.0, 10, 1, 100, -20)]


@pytest.mark.parametrize("v_c, w, delta, value, slope", CA)
def test_eqs_3_4_ca_in_numbers(v_c, w, delta, value, slope):
    """delta = alpha (D_real - D_empty), here 2 (2 - 1/2) and 2 (1 - 1/2)."""
    x0_hat = number(1.0).requires_grad_()
    cond, uncond = (number(v_c),), (number(0.0),)
    loss, w_used = cdm.ca_loss(x0_hat, velocity_is_cond, cond, uncond, HALF, number(0.0), alpha=2.0)
    assert w_used.item() == w
    assert loss.item() == value == (w * delta) ** 2
    assert torch.autograd.grad(loss, x0_hat)[0].item() == slope == -2 * w * delta


@pytest.mark.parametrize("v_c, w, delta, value, slope", DM)
def test_eqs_3_4_dm_in_numbers(v_c, w, delta, value, slope):
    """delta = D_real - D_fake, here 2 - 0 and 1 - 0."""
    x0_hat = number(1.0).requires_grad_()
    cond = (number(v_c),)
    loss, w_used = cdm.dm_loss(x0_hat, velocity_is_cond, velocity_is_one, cond, HALF, number(0.0))
    assert w_used.item() == w
    assert loss.item() == value == (w * delta) ** 2
    assert torch.autograd.grad(loss, x0_hat)[0].item() == slope == -2 * w * delta


def test_sec_3_3_cdm_in_numbers():
    """At Eq. 7's 5.5 and t' = 3/4, a student's v = 6 gives x0_hat = 1, where L_CDM is L_DM's 4."""
    x, t = off_trajectory(0.75)
    x0_hat = cdm.clean_estimate(number(x), torch.tensor([t]), number(6.0))
    args = (velocity_is_cond, velocity_is_one, (number(-3.0),), HALF, number(0.0))
    assert x0_hat.item() == 1
    assert cdm.dm_loss(x0_hat, *args)[0].item() == 4


def test_fake_score_loss_in_numbers():
    """v_phi(z) = 2 z = 1 where noise - x0 = -1, so the loss is 2^2."""

    def velocity_is_2z(z, t, cond):
        return 2 * z

    assert cdm.fake_score_loss(velocity_is_2z, number(1.0), (), HALF, number(0.0)).item() == 4


def test_weight_in_numbers():
    """w = 1 / max(mean |D_real - x0_hat|, 0.1), each sample its own: distances 2, 1/4, 0.05."""
    d_real = float64([[3.0, 1.0], [-0.5, 0.0], [0.1, 0.0]])
    assert_close(cdm.dmd_weight(d_real, torch.zeros_like(d_real)), [0.5, 4, 10])


# --- The losses against the formulas by hand. ---


def check_loss(loss_of, by_hand, x0_hat, *args):
    """A loss has the value, the weights and the gradient of the formulas by hand."""
    want = by_hand(x0_hat, *args)
    assert want.w.min() < want.w.max() == 10  # the floor is active for some samples
    x0_hat.requires_grad_()
    loss, w = loss_of(x0_hat, *args)
    assert_close(loss, want.value)
    assert_close(w, want.w)
    assert not w.requires_grad
    assert_close(torch.autograd.grad(loss, x0_hat)[0], want.gradient)


# At tau = 0.02, z is nearly x0_hat.
CASES = [((5, 2), (0.02, 0.025, 0.3, 0.6, 0.98)), ((3, 4, 8, 8), (0.98, 0.02, 0.5))]


@pytest.mark.parametrize("shape, tau", CASES)
def test_eqs_3_4_ca_by_hand(shape, tau):
    n, *entries = shape
    x0_hat, noise = randn(*shape), randn(*shape, seed=1)
    teacher = Net(entries, 1)
    args = (teacher, conditions(n), conditions(n, 1), float64(tau), noise, 7.0)
    check_loss(cdm.ca_loss, ca_by_hand, x0_hat, *args)


@pytest.mark.parametrize("shape, tau", CASES)
def test_eqs_3_4_dm_by_hand(shape, tau):
    n, *entries = shape
    x0_hat, noise = randn(*shape), randn(*shape, seed=1)
    teacher, fake = Net(entries, 1), Net(entries, 2)
    check_loss(cdm.dm_loss, dm_by_hand, x0_hat, teacher, fake, conditions(n), float64(tau), noise)


@pytest.mark.parametrize("shape", [(5, 2), (3, 4, 8, 8)])
def test_fake_score_loss_by_hand(shape):
    """L_fake is the mean of error^2, error = v_phi(z) - (noise - x0), and so is its gradient.

    It does not reach the student, which made x0.
    """
    fake = Net(shape[1:], 2)
    x0, noise = randn(*shape), randn(*shape, seed=1)
    cond = conditions(shape[0])
    tau = torch.linspace(0.1, 0.9, shape[0]).double()
    loss = cdm.fake_score_loss(fake, x0.requires_grad_(), cond, tau, noise)
    assert torch.autograd.grad(loss, x0, retain_graph=True, allow_unused=True) == (None,)

    v = fake(noised(x0, tau, noise), tau, cond)
    error = (v - (noise - x0)).detach()
    assert_close(loss, (error**2).sum() / x0.numel())
    phi = list(fake.parameters())
    want = torch.autograd.grad((2 * error * v).sum() / x0.numel(), phi)
    for got, g in zip(torch.autograd.grad(loss, phi), want, strict=True):
        assert_close(got, g)


# --- A Gaussian N(mu, s^2 I), whose velocity and score have closed forms. ---


def gaussian_variance(s, t):
    """The variance of x_t: V = (1 - t)^2 s^2 + t^2."""
    return (1 - t) ** 2 * s**2 + t**2


def gaussian_velocity(mu, s):
    """The model E[noise - x0 | x_t] = a (x_t - (1 - t) mu) - mu, a = (t - (1 - t) s^2) / V."""

    def model(x, t, cond=()):
        t = t.view(-1, 1)
        a = (t - (1 - t) * s**2) / gaussian_variance(s, t)
        return a * (x - (1 - t) * mu) - mu

    return model


def gaussian_score(mu, s, z, t):
    """grad log p_t(z), by autograd of the log density of N((1 - t) mu, V)."""
    z = z.clone().requires_grad_()
    t = t.view(-1, 1)
    density = torch.distributions.Normal((1 - t) * mu, gaussian_variance(s, t).sqrt())
    return torch.autograd.grad(density.log_prob(z).sum(), z)[0]


REAL, FAKE = (0.7, 0.5), (-0.4, 0.8)  # (mu, s) of two Gaussians


def test_eq_1_in_score_form():
    """Tweedie's formula: D(z, u) = (z + u^2 grad log p_u(z)) / (1 - u)."""
    u = float64([0.1, 0.3, 0.6, 0.9])
    z = noised(randn(4, 3), u, randn(4, 3, seed=1))
    score = gaussian_score(*REAL, z, u)
    d_real = (z + u[:, None] ** 2 * score) / (1 - u[:, None])
    assert_close(cdm.clean_estimate(z, u, gaussian_velocity(*REAL)(z, u)), d_real)


def test_eqs_3_4_dm_moves_along_the_difference_of_scores():
    """Its delta is u^2 / (1 - u) (s_real - s_fake): the DMD direction."""
    u = float64([0.1, 0.3, 0.6, 0.9])
    x0, noise = randn(4, 3).requires_grad_(), randn(4, 3, seed=1)
    real, fake = gaussian_velocity(*REAL), gaussian_velocity(*FAKE)
    loss, _ = cdm.dm_loss(x0, real, fake, (), u, noise)
    (gradient,) = torch.autograd.grad(loss, x0)

    z = noised(x0.detach(), u, noise)
    s_real, s_fake = gaussian_score(*REAL, z, u), gaussian_score(*FAKE, z, u)
    u = u[:, None]
    delta = u**2 / (1 - u) * (s_real - s_fake)
    d_real = (z + u**2 * s_real) / (1 - u)
    w = 1 / (d_real - x0.detach()).abs().mean(1, keepdim=True).clamp(min=0.1)
    assert_close(gradient, -2 * w * delta / x0.numel())
