"""The losses of section 1 of cdm.py: a worked example, the formulas by hand, and closed forms."""

import pytest
import torch
from reference import (
    Net,
    assert_close,
    ca_by_hand,
    col,
    conditions,
    dm_by_hand,
    float64,
    noised,
    randn,
)

import cdm

# --------------------------------------------------------------------------------------------------
# A worked example: one sample of one entry, and models whose velocity is a number.
#
#     x0_hat = 1    noise = 0    tau = 1/2    alpha = 2
#     z      = (1 - tau) x0_hat + tau noise = 1/2
#     D      = z - tau v = 1/2 - v / 2
#
#     v_empty = 0   D_empty = 1/2
#     v_fake  = 1   D_fake  = 0
#     v_c = -3      D_real  = 2     |D_real - x0_hat| = 1   w = 1
#     v_c = -1      D_real  = 1     |D_real - x0_hat| = 0   w = 10, by the floor of 0.1
#
# The loss is (w delta)^2, and its slope in x0_hat is -2 w delta.
# --------------------------------------------------------------------------------------------------


def number(x):
    return torch.tensor([[x]])


def velocity_is_cond(x, t, cond):
    return cond[0]


def velocity_is_one(x, t, cond):
    return torch.ones_like(x)


def velocity_is_2z(z, t, cond):
    return 2 * z


@pytest.mark.parametrize(
    "v_c, w, delta, value, slope",
    [(-3.0, 1, 3, 9, -6), (-1.0, 10, 1, 100, -20)],
)
def test_ca_loss_in_numbers(v_c, w, delta, value, slope):
    """L_CA: delta = alpha (D_real - D_empty), here 2 (2 - 1/2) and 2 (1 - 1/2)."""
    x0_hat = number(1.0).requires_grad_()
    cond, uncond = (number(v_c),), (number(0.0),)
    tau, noise = torch.tensor([0.5]), number(0.0)
    loss, w_used = cdm.ca_loss(x0_hat, velocity_is_cond, cond, uncond, tau, noise, alpha=2.0)
    assert w_used.item() == w
    assert loss.item() == value == (w * delta) ** 2
    assert torch.autograd.grad(loss, x0_hat)[0].item() == slope == -2 * w * delta


@pytest.mark.parametrize(
    "v_c, w, delta, value, slope",
    [(-3.0, 1, 2, 4, -4), (-1.0, 10, 1, 100, -20)],
)
def test_dm_loss_in_numbers(v_c, w, delta, value, slope):
    """L_DM and L_CDM: delta = D_real - D_fake, here 2 - 0 and 1 - 0."""
    x0_hat = number(1.0).requires_grad_()
    cond = (number(v_c),)
    tau, noise = torch.tensor([0.5]), number(0.0)
    loss, w_used = cdm.dm_loss(x0_hat, velocity_is_cond, velocity_is_one, cond, tau, noise)
    assert w_used.item() == w
    assert loss.item() == value == (w * delta) ** 2
    assert torch.autograd.grad(loss, x0_hat)[0].item() == slope == -2 * w * delta


def test_fake_score_loss_in_numbers():
    """L_fake: v_phi(z) = 2 z = 1 where noise - x0 = -1, so the loss is 2^2."""
    tau, noise = torch.tensor([0.5]), number(0.0)
    loss = cdm.fake_score_loss(velocity_is_2z, number(1.0), (), tau, noise)
    assert loss.item() == 4


# --- The losses against the formulas by hand. ---


def cast(x, dtype):
    """A tensor, a module, or a tuple of them in another precision. Numbers stay."""
    if isinstance(x, tuple):
        return tuple(cast(y, dtype) for y in x)
    if isinstance(x, float):
        return x
    return x.to(dtype)


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["ca", "dm"])
@pytest.mark.parametrize(
    "shape, tau",
    [
        ((5, 2), (0.02, 0.025, 0.3, 0.6, 0.98)),
        ((3, 4, 8, 8), (0.98, 0.02, 0.5)),
        ((1, 4, 8, 8), (0.9,)),
        ((1, 4, 8, 8), (0.02,)),
        ((1, 2), (0.7,)),
    ],
)
def test_losses_and_gradients_by_hand(shape, tau, kind, dtype, tol):
    """L_CA and L_DM have the value, weights and gradient of the formulas by hand."""
    teacher, fake = Net(shape[1:], 1), Net(shape[1:], 2)
    x0_hat, noise = randn(*shape), randn(*shape, seed=1)
    cond, uncond = conditions(shape[0]), conditions(shape[0], 1)
    tau = float64(tau)
    if kind == "ca":
        loss_of, by_hand = cdm.ca_loss, ca_by_hand
        args = (teacher, cond, uncond, tau, noise, 7.0)
    else:
        loss_of, by_hand = cdm.dm_loss, dm_by_hand
        args = (teacher, fake, cond, tau, noise)
    want = by_hand(x0_hat, *args)
    # At tau = 0.02, z is nearly x0_hat and the floor of w is active; from 0.3 on it is not. No two
    # samples have the same distance, so a weight of the wrong sample would show.
    assert ((want.distance < 0.1) == (tau < 0.1)).all()
    assert len(set(want.distance.tolist())) == len(tau)

    x0_hat = cast(x0_hat, dtype).requires_grad_()
    loss, w = loss_of(x0_hat, *cast(args, dtype))
    assert_close(loss, want.value, tol)
    assert_close(w, want.w, tol)
    assert_close(torch.autograd.grad(loss, x0_hat)[0], want.gradient, tol)


@pytest.mark.parametrize("shape", [(5, 2), (3, 4, 8, 8), (1, 2)])
def test_fake_score_loss_by_hand(shape):
    """L_fake is the mean of error^2, error = v_phi(z) - (noise - x0), and so is its gradient."""
    fake = Net(shape[1:], 2)
    x0, noise = randn(*shape), randn(*shape, seed=1)
    cond = conditions(shape[0])
    tau = torch.linspace(0.1, 0.9, shape[0]).double()
    loss = cdm.fake_score_loss(fake, x0, cond, tau, noise)

    v = fake(noised(x0, tau, noise), tau, cond)
    error = (v - (noise - x0)).detach()
    assert_close(loss, (error**2).sum() / x0.numel())
    phi = list(fake.parameters())
    want = torch.autograd.grad((2 * error * v).sum() / x0.numel(), phi)
    for got, g in zip(torch.autograd.grad(loss, phi), want, strict=True):
        assert_close(got, g)


@pytest.mark.parametrize("kind, trained", [("ca", "student"), ("dm", "student"), ("fake", "fake")])
def test_gradients_reach_one_network_only(kind, trained):
    """L_CA and L_DM leave gradients in the student alone, L_fake in the fake score alone."""
    nets = {name: Net((2,), seed) for seed, name in enumerate(("student", "teacher", "fake"))}
    teacher, fake = nets["teacher"], nets["fake"]
    cond, uncond = conditions(5), conditions(5, 1)
    tau, noise = torch.full((5,), 0.6).double(), randn(5, 2, seed=1)
    x0_hat = cdm.clean_estimate(noise, tau, nets["student"](noise, tau, cond))
    losses = {
        "ca": cdm.ca_loss(x0_hat, teacher, cond, uncond, tau, noise, 7.0)[0],
        "dm": cdm.dm_loss(x0_hat, teacher, fake, cond, tau, noise)[0],
        "fake": cdm.fake_score_loss(fake, x0_hat, cond, tau, noise),
    }
    losses[kind].backward()
    for name, net in nets.items():
        assert all((p.grad is not None) == (name == trained) for p in net.parameters())


# --- A Gaussian N(mu, s^2 I), whose velocity, score and posterior mean have closed forms. ---


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


def test_clean_estimate_is_the_posterior_mean():
    """Eq. 1 with the velocity of N(0.7, 0.5^2) is E[x0 | x_t], integrated numerically over x0."""
    mu, s = 0.7, 0.5
    t = float64([0.02, 0.3, 0.5, 0.9, 0.98, 1.0])
    x_t = 2 * randn(6, 1)
    x0 = torch.linspace(mu - 12 * s, mu + 12 * s, 100_001, dtype=torch.float64)
    log_prior = -(((x0 - mu) / s) ** 2) / 2
    log_likelihood = -(((x_t - (1 - t[:, None]) * x0) / t[:, None]) ** 2) / 2
    posterior = (log_prior + log_likelihood).softmax(1)
    mean = (posterior * x0).sum(1, keepdim=True)
    assert_close(cdm.clean_estimate(x_t, t, gaussian_velocity(mu, s)(x_t, t)), mean, 1e-10)


REAL, FAKE = (0.7, 0.5), (-0.4, 0.8)  # (mu, s) of two Gaussians


def test_clean_estimate_in_score_form():
    """Tweedie's formula: D(z, u) = (z + u^2 grad log p_u(z)) / (1 - u)."""
    u = float64([0.1, 0.3, 0.6, 0.9])
    z = noised(randn(4, 3), u, randn(4, 3, seed=1))
    d_real = (z + col(u, z) ** 2 * gaussian_score(*REAL, z, u)) / (1 - col(u, z))
    assert_close(cdm.clean_estimate(z, u, gaussian_velocity(*REAL)(z, u)), d_real)


def test_dm_moves_along_the_difference_of_scores():
    """The delta of L_DM is u^2 / (1 - u) (s_real - s_fake): the DMD direction."""
    u = float64([0.1, 0.3, 0.6, 0.9])
    x0, noise = randn(4, 3).requires_grad_(), randn(4, 3, seed=1)
    real, fake = gaussian_velocity(*REAL), gaussian_velocity(*FAKE)
    loss, _ = cdm.dm_loss(x0, real, fake, (), u, noise)
    (gradient,) = torch.autograd.grad(loss, x0)

    z = noised(x0.detach(), u, noise)
    u = col(u, z)
    s_real, s_fake = gaussian_score(*REAL, z, u), gaussian_score(*FAKE, z, u)
    delta = u**2 / (1 - u) * (s_real - s_fake)
    d_real = (z + u**2 * s_real) / (1 - u)
    w = 1 / (d_real - x0.detach()).abs().mean(1, keepdim=True).clamp(min=0.1)
    assert_close(gradient, -2 * w * delta / x0.numel())


def test_dm_is_zero_when_fake_equals_real():
    """With the same velocity as teacher and as fake score, loss and gradient are exactly 0."""
    x0, noise = randn(6, 3).requires_grad_(), randn(6, 3, seed=1)
    tau = torch.linspace(0.02, 0.98, 6).double()
    model = gaussian_velocity(0.7, 0.5)
    loss, _ = cdm.dm_loss(x0, model, model, (), tau, noise)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, x0)[0] == 0).all()


def test_dm_steps_carry_the_mean_to_the_teachers():
    """Each L_DM step moves a Gaussian student's mean m along mu - m; 20 steps carry it to mu.

    The student is m + s noise, the teacher N(mu, s^2), and the fake score is kept at N(m, s^2).
    """
    mu, s = float64([1.0, -2.0]), 0.5
    m = float64([0.0, 0.0], requires_grad=True)
    u = torch.linspace(0.02, 0.98, 64).double()
    U = u[:, None]
    V = gaussian_variance(s, U)
    for i in range(20):
        before = mu - m.detach()
        x0, noise = m + s * randn(64, 2, seed=2 * i), randn(64, 2, seed=2 * i + 1)
        real, fake = gaussian_velocity(mu, s), gaussian_velocity(m.detach(), s)
        loss, _ = cdm.dm_loss(x0, real, fake, (), u, noise)
        (gradient,) = torch.autograd.grad(loss, m)

        # Posterior means: D_real - D_fake = u^2 / V (mu - m) at every z.
        z = noised(x0, u, noise)
        d_real = mu + (1 - U) * s**2 / V * (z - (1 - U) * mu)
        w = 1 / (d_real - x0).abs().mean(1, keepdim=True).clamp(min=0.1)
        assert_close(gradient, -2 / x0.numel() * (w * U**2 / V).sum() * before, 1e-9)
        m.data -= 0.2 * gradient
        assert (mu - m).norm() < before.norm()
    assert (mu - m).norm() < 1e-3


def test_fake_score_alone_converges_to_the_exact_velocity():
    """L_fake alone, from v_phi = 0, finds the velocity of the student's samples N(0.7, 0.5^2).

    Samples and noise lie on a grid with exactly a Gaussian's first two moments. The least squares
    of v = a(t) z + b(t), at each of five times, is then exactly that Gaussian's velocity.
    """
    mu, s = 0.7, 0.5
    times = float64([0.1, 0.3, 0.5, 0.7, 0.9])
    q = torch.distributions.Normal(0, 1).icdf((torch.arange(16).double() + 0.5) / 16)
    q = q / q.pow(2).mean().sqrt()
    grid = torch.meshgrid(mu + s * q, q, torch.arange(5).double(), indexing="ij")
    x0, noise, j = (axis.reshape(-1, 1) for axis in grid)
    j = j.long()[:, 0]
    phi = torch.zeros(2, 5).double().requires_grad_()
    optimizer = torch.optim.LBFGS([phi], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def linear(z, t, cond):
        return phi[0, j, None] * z + phi[1, j, None]

    def closure():
        optimizer.zero_grad()
        loss = cdm.fake_score_loss(linear, x0, (), times[j], noise)
        loss.backward()
        return loss

    optimizer.step(closure)
    z = torch.linspace(-3, 3, 7).double()[:, None]
    for a, b, t in zip(*phi, times, strict=True):
        assert_close(a * z + b, gaussian_velocity(mu, s)(z, t.expand(7)), 1e-6)
