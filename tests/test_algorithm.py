"""The algorithm, section 1 of cdm.py: worked examples, closed forms, and the paper's formulas written out again.

The references work in float64 and share no code with cdm.py. Random draws have fixed seeds; a chi-square statistic is
held against the 0.999 quantile of its distribution.
"""

import copy, itertools, math
from functools import partial

import pytest
import torch

import cdm

TAUS = {"ca", "dm", "cdm", "fake"}
CHI2 = {3: 16.27, 9: 27.88, 24: 51.18, 27: 55.48}  # 0.999 quantiles by degrees of freedom
Settings = partial(cdm.CDM, max_schedule_steps=6, student_lr=1e-2, fake_lr=1e-2, warmup=0, guidance=3.0)
float64 = partial(torch.tensor, dtype=torch.float64)

@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)

def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def conditions(n, seed=0):
    return randn(n, 4, 1, seed=seed + 50), randn(n, 3, seed=seed + 51)

def assert_close(got, want, tol=1e-12):
    """Largest error at most tol times the largest entry."""
    got, want = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (got, want))
    assert got.shape == want.shape and (got - want).abs().max() <= tol * want.abs().max(), (got, want)

def assert_uniform(cells, n):
    """Chi-square test: integers `cells` are uniform on 0..n-1."""
    expected = len(cells) / n
    statistic = float(((torch.bincount(cells, minlength=n) - expected) ** 2 / expected).sum())
    assert expected >= 20 and statistic < CHI2[n - 1], statistic

class Net(torch.nn.Module):
    """A nonlinear model(x_t, t, cond) -> v of few parameters, which keeps a log of how it was called."""

    def __init__(self, shape, seed, aware=False):
        super().__init__()
        n = math.prod(shape)
        self.a, self.b, self.log = torch.nn.Linear(n + 5, 16).double(), torch.nn.Linear(16, n).double(), []
        for i, p in enumerate(self.parameters()):
            p.data = 0.5 * randn(*p.shape, seed=100 * seed + i)
        self.anchor_time = cdm.AnchorTime(3).double() if aware else None

    def forward(self, x, t, cond, anchor_t=None):
        self.log.append(dict(n=len(x), grad=torch.is_grad_enabled(), x=x.detach(), t=t, anchor_t=anchor_t))
        pooled = cond[1] if anchor_t is None else cond[1] + self.anchor_time(anchor_t)
        h = torch.cat([x.flatten(1), t[:, None], cond[0].mean(1), pooled], 1)
        return self.b(torch.tanh(self.a(h))).view(x.shape)

    def evaluations(self, grad):
        return sum(call["n"] for call in self.log if call["grad"] == grad)

# ---------------------------------------------------------------------------------- the formulas of the paper, again

def col(t, x):
    return t.view(len(t), *[1] * (x.dim() - 1))

def D(model, x, t, cond):
    return x - col(t, x) * model(x, t, cond)

def loss_by_hand(x0_hat, teacher, other, cond, other_cond, tau, noise, alpha=1.0):
    """Value and gradient with respect to x0_hat, weights w and their mean distances, for
    delta = alpha [D_real(z, tau, cond) - D_other(z, tau, other_cond)]: L_CA if `other` is the teacher, else L_DM."""
    with torch.no_grad():
        z = (1 - col(tau, noise)) * x0_hat + col(tau, noise) * noise
        d_real = D(teacher, z, tau, cond)
        delta = alpha * (d_real - D(other, z, tau, other_cond))
        distances = [float((a - b).abs().sum() / a.numel()) for a, b in zip(d_real, x0_hat)]
        w = float64([1 / max(d, 0.1) for d in distances])
        step = torch.stack([w[b] * delta[b] for b in range(len(w))])
    return (step**2).sum() / step.numel(), -2 * step / step.numel(), w, float64(distances)

def rollout(model, noise, times, cond):
    """Plain Euler integration of all samples to t = 0: x and v at each time, (N, B, ...), and the end point."""
    xs, vs, x = [], [], noise
    with torch.no_grad():
        for t, s in zip(times, [*times[1:], 0.0]):
            xs.append(x), vs.append(model(x, torch.full((len(x),), float(t)).double(), cond))
            x = x + (float(s) - float(t)) * vs[-1]
    return torch.stack(xs), torch.stack(vs), x

class AdamW:
    """Clipping, linear warm-up and AdamW with betas 0.9 and 0.999, from their definitions."""

    def __init__(self, params, lr, decay, clip, warmup):
        self.p, self.lr, self.decay, self.clip, self.warmup, self.n = params, lr, decay, clip, warmup, 0
        self.m, self.v = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))

    def step(self, gradients):
        self.n += 1
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients.values()))
        for name, g in gradients.items():
            g, p = g * min(1.0, self.clip / (norm + 1e-6)), self.p[name]  # the 1e-6 is torch's
            lr = self.lr[name] * min(1.0, self.n / self.warmup)
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * g * g
            m, v = self.m[name] / (1 - 0.9**self.n), self.v[name] / (1 - 0.999**self.n)
            self.p[name] = p - lr * self.decay * p - lr * m / (v.sqrt() + 1e-8)
        return self.p

# ------------------------------------------------------------------------------------------------------ the losses

@pytest.mark.parametrize("v_c, ca, dm", [(-3.0, (9, -6), (4, -4)), (-1.0, (100, -20), (100, -20))])
def test_losses_in_numbers(v_c, ca, dm):
    """x0_hat = 1, noise = 0, tau = 1/2: z = 1/2. v_c = -3, v_empty = 0, v_fake = 1: D = 2, 1/2, 0; alpha = 2: deltas 3
    and 2; w = 1; L_CA = 9, L_DM = 4. v_c = -1: D_real = x0_hat, floor: w = 10, steps 10, losses 100. L_fake = 4."""
    x0, tau, noise = torch.ones(1, 1, requires_grad=True), torch.tensor([0.5]), torch.zeros(1, 1)
    cond, uncond, model = (torch.tensor([[v_c]]),), (torch.zeros(1, 1),), lambda x, t, c: c[0]
    losses = (cdm.ca_loss(x0, model, cond, uncond, tau, noise, 2.0),
              cdm.dm_loss(x0, model, lambda x, t, c: torch.ones(1, 1), cond, tau, noise))
    for loss, (value, slope) in zip(losses, (ca, dm)):
        assert loss.item() == value and torch.autograd.grad(loss, x0)[0].item() == slope
    assert cdm.fake_score_loss(lambda x, t, c: 2 * x, x0, cond, tau, noise).item() == 4  # v = 1, noise - x0 = -1

@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["ca", "dm"])
@pytest.mark.parametrize("shape, tau", [((5, 2), (0.02, 0.025, 0.3, 0.6, 0.98)), ((3, 4, 8, 8), (0.98, 0.02, 0.5)),
                                        ((1, 4, 8, 8), (0.9,)), ((1, 4, 8, 8), (0.02,)), ((1, 2), (0.7,))])
def test_losses_and_gradients_by_hand(shape, tau, kind, dtype, tol):
    """At tau = 0.02, z is nearly x0_hat and the floor 0.1 is active; from 0.3 on it is not; one batch has both, and no
    two samples have the same distance. Value, dL/dx0_hat = -2 w delta / numel and the logged mean w."""
    teacher, fake, tau, log = Net(shape[1:], 1), Net(shape[1:], 2), float64(tau), {}
    x0, noise, cond, uncond = randn(*shape), randn(*shape, seed=1), conditions(shape[0]), conditions(shape[0], 1)
    other = (teacher, cond, uncond, tau, noise, 7.0) if kind == "ca" else (fake, cond, cond, tau, noise)
    value, gradient, w, distances = loss_by_hand(x0, teacher, *other)
    assert ((distances < 0.1) == (tau < 0.1)).all() and len(set(distances.tolist())) == len(tau)
    x0, tau, noise, teacher, fake = (x.to(dtype) for x in (x0, tau, noise, teacher, fake))
    cond, uncond = (tuple(x.to(dtype) for x in c) for c in (cond, uncond))
    args = (teacher, cond, uncond, tau, noise, 7.0, log) if kind == "ca" else (teacher, fake, cond, tau, noise, log)
    loss = (cdm.ca_loss if kind == "ca" else cdm.dm_loss)(x0.requires_grad_(), *args)
    assert_close(loss, value, tol)
    assert_close(torch.autograd.grad(loss, x0)[0], gradient, tol)
    assert_close(log["w"], w.mean(), tol)

@pytest.mark.parametrize("shape", [(5, 2), (3, 4, 8, 8), (1, 2)])
def test_fake_score_loss_by_hand(shape):
    """|| v_phi(z, tau, c) - (noise - x0) ||^2, z = (1 - tau) x0 + tau noise, averaged over entries; its gradient in phi
    is that of 2 sg[error] v_phi / numel."""
    fake, x0, noise, cond = Net(shape[1:], 2), randn(*shape), randn(*shape, seed=1), conditions(shape[0])
    tau, params = torch.linspace(0.1, 0.9, shape[0]).double(), list(fake.parameters())
    v = fake((1 - col(tau, x0)) * x0 + col(tau, x0) * noise, tau, cond)
    error, loss = (v - (noise - x0)).detach(), cdm.fake_score_loss(fake, x0, cond, tau, noise)
    assert_close(loss, (error**2).sum() / x0.numel())
    want = torch.autograd.grad((2 * error * v).sum() / x0.numel(), params)
    for got, g in zip(torch.autograd.grad(loss, params), want):
        assert_close(got, g)

@pytest.mark.parametrize("kind, trained", [("ca", 0), ("dm", 0), ("fake", 2)])
def test_gradients_reach_one_network_only(kind, trained):
    """x0_hat = D_theta: L_CA and L_DM leave gradients in theta alone; L_fake, on the same x0_hat, in phi alone."""
    student, teacher, fake = nets = [Net((2,), seed) for seed in range(3)]
    cond, uncond, tau, noise = conditions(5), conditions(5, 1), torch.full((5,), 0.6).double(), randn(5, 2, seed=1)
    x0_hat = cdm.clean_estimate(noise, tau, student(noise, tau, cond))
    loss = {"ca": lambda: cdm.ca_loss(x0_hat, teacher, cond, uncond, tau, noise, 7.0),
            "dm": lambda: cdm.dm_loss(x0_hat, teacher, fake, cond, tau, noise),
            "fake": lambda: cdm.fake_score_loss(fake, x0_hat, cond, tau, noise)}[kind]()
    loss.backward()
    for i, net in enumerate(nets):
        assert all((p.grad is not None) == (i == trained) for p in net.parameters())

# --------------------------------------------- a Gaussian N(mu, s^2 I): velocity and posterior mean in closed form

def gaussian_velocity(mu, s):
    """E[noise - x0 | x_t] = a (x_t - (1 - t) mu) - mu, a = (t - (1 - t) s^2) / V, V = (1 - t)^2 s^2 + t^2."""
    def model(x, t, cond=()):
        t = t.view(-1, 1)
        return (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) * (x - (1 - t) * mu) - mu
    return model

def gaussian_score(mu, s, z, t):
    """grad log p_t(z), by autograd of the log density of N((1 - t) mu, V)."""
    z, t = z.clone().requires_grad_(), t.view(-1, 1)
    density = torch.distributions.Normal((1 - t) * mu, ((1 - t) ** 2 * s**2 + t**2).sqrt())
    return torch.autograd.grad(density.log_prob(z).sum(), z)[0]

def test_clean_estimate_is_the_posterior_mean():
    """Eq. 1 with the velocity of N(0.7, 0.5^2) equals E[x0 | x_t] by numerical integration over x0."""
    mu, s, t, x_t = 0.7, 0.5, float64([0.02, 0.3, 0.5, 0.9, 0.98, 1.0]), 2 * randn(6, 1)
    x0 = torch.linspace(mu - 12 * s, mu + 12 * s, 100_001, dtype=torch.float64)
    log_p = -((x0 - mu) / s) ** 2 / 2 - ((x_t - (1 - t[:, None]) * x0) / t[:, None]) ** 2 / 2
    mean = (log_p.softmax(1) * x0).sum(1, keepdim=True)
    assert_close(cdm.clean_estimate(x_t, t, gaussian_velocity(mu, s)(x_t, t)), mean, 1e-10)

def test_score_form():
    """D(z, u) = (z + u^2 grad log p_u(z)) / (1 - u), and what moves x0_hat in L_DM is D_real - D_fake =
    u^2 / (1 - u) (s_real - s_fake), for N(0.7, 0.5^2) and N(-0.4, 0.8^2)."""
    real, fake, u = (0.7, 0.5), (-0.4, 0.8), float64([0.1, 0.3, 0.6, 0.9])
    x0, noise, U = randn(4, 3), randn(4, 3, seed=1), u[:, None]
    z = (1 - U) * x0 + U * noise
    d_real = (z + U**2 * gaussian_score(*real, z, u)) / (1 - U)
    assert_close(cdm.clean_estimate(z, u, gaussian_velocity(*real)(z, u)), d_real)
    delta = U**2 / (1 - U) * (gaussian_score(*real, z, u) - gaussian_score(*fake, z, u))
    w = 1 / (d_real - x0).abs().mean(1, keepdim=True).clamp(min=0.1)
    loss = cdm.dm_loss(x0.requires_grad_(), gaussian_velocity(*real), gaussian_velocity(*fake), (), u, noise)
    assert_close(torch.autograd.grad(loss, x0)[0], -2 * w * delta / 12)

def test_dm_direction_is_zero_when_fake_equals_real():
    """The same velocity as teacher and as fake score: loss and gradient are 0.0, not merely small."""
    x0, model = randn(6, 3).requires_grad_(), gaussian_velocity(0.7, 0.5)
    loss = cdm.dm_loss(x0, model, model, (), torch.linspace(0.02, 0.98, 6).double(), randn(6, 3, seed=1))
    assert loss.item() == 0 and (torch.autograd.grad(loss, x0)[0] == 0).all()

def test_dm_steps_carry_the_mean_to_the_teachers():
    """Student m + s noise, teacher N(mu, s^2), fake score N(m, s^2): D_real - D_fake = u^2 / V (mu - m) at every z, so
    a gradient step moves m exactly along mu - m; 20 steps, with the fake score kept right, carry it there."""
    mu, s, m, u = float64([1.0, -2.0]), 0.5, float64([0.0, 0.0], requires_grad=True), torch.linspace(0.02, 0.98, 64)
    u, U = u.double(), u.double()[:, None]
    for step in range(20):
        x0, noise, before = m + s * randn(64, 2, seed=2 * step), randn(64, 2, seed=2 * step + 1), mu - m.detach()
        loss = cdm.dm_loss(x0, gaussian_velocity(mu, s), gaussian_velocity(m.detach(), s), (), u, noise)
        gradient, = torch.autograd.grad(loss, m)
        V, z = (1 - U) ** 2 * s**2 + U**2, (1 - U) * x0 + U * noise
        w = 1 / (mu + (1 - U) * s**2 / V * (z - (1 - U) * mu) - x0).abs().mean(1, keepdim=True).clamp(min=0.1)
        assert_close(gradient, -2 / 128 * (w * U**2 / V).sum() * before, 1e-9)
        m.data -= 0.2 * gradient
        assert (mu - m).norm() < before.norm()
    assert (mu - m).norm() < 1e-3

def test_fake_score_alone_converges_to_the_exact_velocity():
    """Student's samples N(0.7, 0.5^2), on a grid with just these moments: the least squares of a(t) z + b(t), at five
    times, is then exactly that Gaussian's velocity. L_fake alone, from a = b = 0, must lead there."""
    m, s, times = 0.7, 0.5, float64([0.1, 0.3, 0.5, 0.7, 0.9])
    q = torch.distributions.Normal(0, 1).icdf((torch.arange(16).double() + 0.5) / 16)
    q = q / q.pow(2).mean().sqrt()
    x0, noise, j = (x.reshape(-1, 1) for x in torch.meshgrid(m + s * q, q, torch.arange(5).double(), indexing="ij"))
    phi, j = torch.zeros(2, 5).double().requires_grad_(), j.long()[:, 0]
    optimizer = torch.optim.LBFGS([phi], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = cdm.fake_score_loss(lambda z, t, cond: phi[0, j, None] * z + phi[1, j, None], x0, (), times[j], noise)
        loss.backward()
        return loss

    optimizer.step(closure)
    z = torch.linspace(-3, 3, 7).double()[:, None]
    for a, b, t in zip(*phi, times):
        assert_close(a * z + b, gaussian_velocity(m, s)(z, t.expand(7)), 1e-6)

# ---------------------------------------------------------------------------------------------------- the schedule

def test_number_of_steps_is_uniform():
    """N ~ U{1..28}: of 2,800 schedules, each N has about 100; in one stream of draws, and over iterations 1 to 2800."""
    gen = torch.Generator().manual_seed(0)
    assert_uniform(torch.tensor([len(cdm.sample_schedule(28, 0.25, 0.95, generator=gen)) for _ in range(2800)]) - 1, 28)
    drawn = [cdm.draw_iteration(cdm.CDM(), 0, k, 1, (1,)) for k in range(1, 2801)]
    assert_uniform(torch.tensor([len(d.schedule) for d in drawn]) - 1, 28)

@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("low, high, shift, least, most", [(0.25, 0.95, 3, 0.5, 0.98276), (0.02, 0.98, 1, 0.02, 0.98)])
def test_schedule_times(low, high, shift, least, most, stratified):
    """First 1, then strictly down, the inner ones in [low, high] after the shift: [0.25, 0.95] at shift 3 becomes
    [0.5, 0.983]. Before it they are uniform; if stratified, each of the N - 1 equal bins holds exactly one."""
    gen, inner, one_per_bin = torch.Generator().manual_seed(1), [], []
    for _ in range(300):
        times = cdm.sample_schedule(28, low, high, shift, stratified, gen).double()
        assert times[0] == 1 and (times.diff() < 0).all()
        assert ((times[1:] > least - 1e-5) & (times[1:] < most + 1e-5)).all()
        u = (times[1:] / (shift - (shift - 1) * times[1:]) - low) / (high - low)  # the shift undone
        one_per_bin.append((u.flip(0) * len(u)).floor().tolist() == list(range(len(u))))
        inner.append(u)
    assert all(one_per_bin) if stratified else sum(one_per_bin) < 60  # by chance at N = 1, 2 and few others
    inner = torch.cat(inner)
    assert inner.min() < 0.02 and inner.max() > 0.98
    assert_uniform((inner * 25).long().clamp(0, 24), 25)

def test_shift_is_the_schedulers():
    """uniform_times(4, 3) = 1, 0.9, 0.75, 0.5 is what FlowMatchEulerDiscreteScheduler(shift=3) makes of 1, 0.75, 0.5,
    0.25; and a schedule drawn at shift 3 is what it makes of the one drawn at shift 1."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert_close(cdm.uniform_times(4, 3.0), scheduler.sigmas[:-1], 1e-6)
    assert_close(cdm.uniform_times(4, 3.0), [1.0, 0.9, 0.75, 0.5], 1e-6)
    for seed in range(5):
        plain, shifted = (cdm.sample_schedule(28, 0.02, 0.98, shift, generator=torch.Generator().manual_seed(seed))
                          for shift in (1.0, 3.0))
        scheduler.set_timesteps(sigmas=plain.tolist())
        assert_close(shifted, scheduler.sigmas[:-1], 1e-6)

# ------------------------------------------------------------------------------------ backward simulation, sampling

@pytest.mark.parametrize("n, shape", [(1, (4, 2)), (2, (1, 2)), (7, (16, 2)), (5, (6, 4, 8, 8))])
def test_backward_simulation_is_a_full_rollout_at_the_anchors(n, shape):
    """All samples integrated to 0 and read off at their anchors: the same (x_t, t, v), for sum(index + 1) evaluations,
    without gradient. calls above max(index) + 1 adds as many one-sample calls and changes nothing."""
    student, noise, cond = Net(shape[1:], 1), randn(*shape).requires_grad_(), conditions(shape[0])
    schedule = torch.tensor([1.0, 0.93, 0.8, 0.55, 0.5, 0.21, 0.04])[:n]
    index = torch.randint(n, shape[:1], generator=torch.Generator().manual_seed(3))
    steps, evaluations, anchors = int(index.max()) + 1, int((index + 1).sum()), []
    for calls in (0, 1, steps + 3):
        student.log.clear()
        anchors.append(cdm.backward_simulation(student, noise, schedule, index, cond, calls))
        idle = max(calls - steps, 0)
        assert len(student.log) == steps + idle and student.evaluations(False) == evaluations + idle
        assert not any(x.requires_grad for x in anchors[-1]) and student.evaluations(True) == 0
    x, v, _ = rollout(student, noise.detach(), schedule, cond)
    for got, want in zip(anchors[0], (x[index, range(len(index))], schedule[index], v[index, range(len(index))])):
        assert_close(got, want)
    assert all(torch.equal(a, b) for other in anchors[1:] for a, b in zip(anchors[0], other))

def test_sampling():
    """Euler by hand at 1, 0.9, 0.75, 0.5, 0; and on the straight path from noise to x0 one step, or any, gives x0."""
    model, noise, cond, times = Net((4, 8, 8), 1), randn(3, 4, 8, 8), conditions(3), torch.tensor([1.0, 0.9, 0.75, 0.5])
    out = cdm.sample(model, noise, times, cond)
    assert len(model.log) == 4 and not out.requires_grad
    assert_close(out, rollout(model, noise, times, cond)[2])
    noise, x0 = torch.tensor([[8.0, -4.0]]), torch.tensor([[2.0, 6.0]])
    for times in ([1.0], [1.0, 0.5], [1.0, 0.75, 0.25]):
        assert torch.equal(cdm.sample(lambda x, t, c: noise - x0, noise, torch.tensor(times), ()), x0)

# ----------------------------------------------------------------------------------------- an iteration's randomness

def test_draw_is_a_function_of_seed_and_iteration():
    """Twice the same for (seed, k), whatever the global generator did, which it leaves alone; other k or seed, other
    values. Rank 1 of 4 holds rows 2 and 3 of the very batch that a single process draws."""
    draw = partial(cdm.draw_iteration, cdm.CDM(), batch=8, shape=(4, 2), shift=3.0)
    a, state = draw(0, 5), torch.manual_seed(1).get_state()
    for rows in (slice(None), slice(2, 4)):
        b = draw(0, 5, rows=rows, ranks=4)
        assert a.tau.keys() == b.tau.keys() == TAUS and a.noise.keys() == b.noise.keys() == TAUS | {"start"}
        assert torch.equal(a.schedule, b.schedule)
        for x, y in zip(*({"index": d.index, "off": d.t_off, **d.tau}.values() for d in (a, b))):
            assert torch.equal(x[rows], y)
        assert all(torch.equal(a.noise[name][rows], b.noise[name]) for name in a.noise)
        assert a.calls == 0 and b.calls == int(a.index.max()) + 1  # all ranks call the student equally often
    assert torch.equal(torch.get_rng_state(), state)
    for b in (draw(0, 6), draw(1, 5)):
        assert not any(torch.equal(x, y) for x, y in zip((a.t_off, *a.noise.values()), (b.t_off, *b.noise.values())))

def test_schedule_and_noise_are_independent():
    """Over 600 schedules of 2 or 3 steps, the mean inner time has no correlation with any time (L_CA's over t_i) or
    noise of a batch of 4, in the same iteration and in the one before: |r| < 4 / sqrt(600)."""
    draws = [cdm.draw_iteration(cdm.CDM(max_schedule_steps=3), 0, k, 4, (1,)) for k in range(1, 1000)]
    drawn = [torch.stack([d.t_off, *d.tau.values(), *(x[:, 0] for x in d.noise.values())]) for d in draws]
    for d, x in zip(draws, drawn):
        x[1 + list(d.tau).index("ca")] /= d.schedule[d.index]
    rows = [torch.cat([d.schedule[1:].mean()[None], x.flatten(), before.flatten()])
            for d, x, before in zip(draws[1:], drawn[1:], drawn) if len(d.schedule) > 1][:600]
    r = torch.corrcoef(torch.stack(rows).T)[0, 1:]
    assert len(rows) == 600 and len(r) == 80 and r.abs().max() < 4 / math.sqrt(600)

def test_times_of_the_losses():
    """20,000 samples. L_DM, L_CDM, L_fake and t': uniform, clamped to [0.02, 0.98]; L_CA: uniform up to t_i, and where
    t_i < 0.02 only the clamp is left. They, t_i and the noises are uncorrelated: |r| < 4 / sqrt(20000) for any two."""
    d = cdm.draw_iteration(cdm.CDM(schedule="fixed"), 0, 1, 20_000, (1,), 3.0)
    t_i = d.schedule[d.index]
    times = {"off": d.t_off, **d.tau, "ca": d.tau["ca"] / t_i}
    assert (d.tau["ca"] <= t_i).all() and d.tau["ca"].max() > 0.97
    for name, u in times.items():
        assert name == "ca" or (float(u.min()), float(u.max())) == pytest.approx((0.02, 0.98))
        assert_uniform((u * 10).long().clamp(max=9), 10)
    r = torch.corrcoef(torch.stack([*times.values(), t_i, *(x[:, 0] for x in d.noise.values())]))
    assert len(r) == 11 and (r - torch.eye(11)).abs().max() < 4 / math.sqrt(20_000)
    d = cdm.draw_iteration(cdm.CDM(time_low=0.005, time_high=0.05), 0, 3, 1000, (1,))
    t_i = d.schedule[d.index]
    assert t_i.min() < 0.01 and (d.tau["ca"] >= 0.02).all() and (d.tau["ca"] <= t_i.clamp(0.02, 0.98)).all()
    assert (d.t_off > 0.5).any()  # t' ignores the schedule

def test_anchors_and_settings_of_the_draw():
    """Anchors are uniform on the N steps. Fixed schedule at shift 3: 1, 0.9, 0.75, 0.5. cdm_point "anchor": t' = t_i;
    "renoise": one more noise, all else as it was. Clamps, range and stratified times follow the settings."""
    fixed = cdm.draw_iteration(cdm.CDM(schedule="fixed"), 0, 1, 4000, (1,), 3.0)
    assert_close(fixed.schedule, [1.0, 0.9, 0.75, 0.5], 1e-6)
    assert_uniform(fixed.index, 4)
    draws = [cdm.draw_iteration(cdm.CDM(), 0, k, 4000, (1,), 3.0) for k in range(1, 150)]
    for n in (10, 28):
        assert_uniform(next(d for d in draws if len(d.schedule) == n).index, n)
    a, b, c = (cdm.draw_iteration(cdm.CDM(cdm_point=p), 0, 1, 8, (2,), 3.0) for p in ("euler", "anchor", "renoise"))
    assert torch.equal(b.t_off, b.schedule[b.index]) and torch.equal(a.t_off, c.t_off)
    assert c.noise.keys() - a.noise.keys() == {"off"} and a.noise.keys() == b.noise.keys()
    for d, name in itertools.product((b, c), TAUS):
        assert torch.equal(d.noise[name], a.noise[name]) and torch.equal(d.tau[name], a.tau[name])
    cfg = cdm.CDM(tau_min=0.4, tau_max=0.6, stratified=True, time_low=0.5, time_high=0.75)
    d = cdm.draw_iteration(cfg, 0, 3, 100, (1,))
    assert all((u.min(), u.max()) == (u.new_tensor(0.4), u.new_tensor(0.6)) for u in (d.t_off, *d.tau.values()))
    bins = (d.schedule[1:].flip(0) - 0.5) / 0.25 * (len(d.schedule) - 1)
    assert len(bins) > 2 and bins.floor().tolist() == list(range(len(bins)))

# ----------------------------------------------------------------------------------------------------- one iteration

class World:
    """Three small networks as roles, conditions and draws in float64, and the iteration on them."""

    def __init__(self, cfg, shape=(2,), batch=8):
        self.cfg, self.shape, self.batch, self.gradients = cfg, shape, batch, {}
        self.nets = Net(shape, 1), Net(shape, 2), Net(shape, 3, cfg.anchor_aware_fake)
        self.teacher, self.student, self.fake = self.nets
        self.learners = [cdm.Learner(net, [(dict(net.named_parameters()), lr)], cfg)
                         for net, lr in ((self.student, cfg.student_lr), (self.fake, cfg.fake_lr))]
        self.ema = self.parameters(self.student)
        for learner in self.learners:  # notes the gradients that AdamW sees
            learner.optimizer.register_step_pre_hook(lambda *_, learner=learner: self.gradients.__setitem__(
                learner.role, {n: p.grad.clone() for n, p in learner.params.items()}))

    def draw(self, k, rows=slice(None)):
        d = cdm.draw_iteration(self.cfg, 0, k, self.batch, self.shape, 3.0, rows)
        tau, noise = ({n: x.double() for n, x in group.items()} for group in (d.tau, d.noise))
        cond, uncond = (tuple(c[rows] for c in conditions(self.batch, seed)) for seed in (k, 1000))
        return cond, uncond, d._replace(t_off=d.t_off.double(), tau=tau, noise=noise)

    def iterate(self, k, micro=1):
        for net in self.nets:
            net.log.clear()
        n = self.batch // micro
        batches = [self.draw(k, slice(i, i + n)) for i in range(0, self.batch, n)]
        return cdm.cdm_iteration(k, batches, self.teacher, *self.learners, self.ema, self.cfg)

    def anchors(self, k, student):
        """x_{t_i}, t_i and v of iteration k, by integrating all samples to the end."""
        cond, _, d = self.draw(k)
        x, v, _ = rollout(copy.deepcopy(student), d.noise["start"], d.schedule, cond)
        rows = torch.arange(self.batch)
        return x[d.index, rows], d.schedule[d.index].double(), v[d.index, rows]

    def evaluations(self):
        """In samples: student without gradient, with; teacher; fake score with gradient, without."""
        assert self.teacher.evaluations(True) == 0
        return (self.student.evaluations(False), self.student.evaluations(True), self.teacher.evaluations(False),
                self.fake.evaluations(True), self.fake.evaluations(False))

    def parameters(self, net):
        return {n: p.detach().clone() for n, p in net.named_parameters()}

@pytest.mark.parametrize("ca, dm, cdm_", [w for w in itertools.product((0, 1), repeat=3) if any(w)])
def test_evaluations_of_each_role(ca, dm, cdm_):
    """Batch 8, R = 2. Each iteration: sum(index + 1) of the student, 8 of the fake score. Each student update, weights
    1, 1, 1: student 8 at the anchors, 8 at t'; teacher 32; fake score 16. A weight of 0 removes exactly its own."""
    world = World(Settings(ca_weight=ca, dm_weight=dm, cdm_weight=cdm_))
    for k in (1, 2, 3, 4):
        world.iterate(k)
        d, n, anchor = world.draw(k)[2], 8 * (k % 2 == 0), max(ca, dm)
        simulated = int((d.index + 1).sum())
        assert world.evaluations() == (simulated, n * (anchor + cdm_), n * (2 * ca + dm + cdm_), 8, n * (dm + cdm_))
        at = [call["t"] for call in world.student.log if call["grad"]]
        want = ([d.schedule[d.index].double()] * anchor + [d.t_off] * cdm_) * (n > 0)
        assert len(at) == len(want) and all(map(torch.equal, at, want))

def test_evaluations_per_student_update():
    """N_max = 28, R = 2, per sample: ours R (N_max + 3) / 4 + 2 + 4 + R + 2 = 25.5. The released code integrates all to
    the end, with two anchor forwards: R (N_max + 1) / 2 + 3 + 4 + R + 2 = 40. The mean of 400 iterations agrees."""
    n_max, R, iterations = 28, 2, 400
    expected = R * sum((n + 1) / 2 for n in range(1, n_max + 1)) / n_max + 2 + 4 + R + 2  # E[index + 1 | N] by N
    released = R * sum(range(1, n_max + 1)) / n_max + 3 + 4 + R + 2
    assert (expected, released) == (25.5, 40) == (R * (n_max + 3) / 4 + 8 + R, R * (n_max + 1) / 2 + 9 + R)
    world, counts = World(cdm.CDM(), batch=16), torch.zeros(5)
    for k in range(1, iterations + 1):
        world.iterate(k)
        counts += torch.tensor(world.evaluations()) * R / (16 * iterations)
    print(f"\nper sample and student update: {expected} expected, {counts.sum():.2f} counted, {released} released")
    assert counts[1:].tolist() == pytest.approx([2, 4, R, 2])
    # An iteration's mean of index + 1 varies with N, by (28^2 - 1) / 48, and within its batch, by E[N^2 - 1] / 12 / 16.
    error = R * math.sqrt(((n_max**2 - 1) / 48 + (275.5 - 1) / 12 / 16) / iterations)
    assert abs(counts.sum() - expected) < 3.3 * error < 1.5

@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 1.3, 0.4), (0.0, 0.0, 2.0)])
@pytest.mark.parametrize("point", ["euler", "anchor", "renoise"])
def test_student_gradient_by_hand(point, weights):
    """The gradient that AdamW sees is that of ca L_CA + dm L_DM + cdm L_CDM, from a full rollout and the formulas, with
    L_CDM at Eq. 7's x_{t'} or its ablations, the fake score as just updated. So are the logged losses, w, cosine."""
    ca, dm, cdm_ = weights
    world = World(Settings(ca_weight=ca, dm_weight=dm, cdm_weight=cdm_, cdm_point=point, clip=1e9), (3,))
    world.iterate(1)
    student = copy.deepcopy(world.student)
    stats, (cond, uncond, d), (x, t, v) = world.iterate(2), world.draw(2), world.anchors(2, student)
    t_off = t if point == "anchor" else d.t_off
    x_off = x + (t_off - t)[:, None] * v
    if point == "renoise":
        x_off = (1 - t_off[:, None]) * (x - t[:, None] * v) + t_off[:, None] * d.noise["off"]
    total, steps = 0, {}
    for name, weight in zip(("ca", "dm", "cdm"), weights):
        x0_hat = D(student, *((x_off, t_off) if name == "cdm" else (x, t)), cond)
        other, c, alpha = (world.teacher, uncond, 3.0) if name == "ca" else (world.fake, cond, 1.0)
        value, gradient, w, _ = loss_by_hand(x0_hat, world.teacher, other, cond, c, d.tau[name], d.noise[name], alpha)
        total, steps[name] = total + weight * (gradient * x0_hat).sum(), gradient
        assert (f"loss_{name}" in stats) == (f"w_{name}" in stats) == (weight > 0)
        if weight:
            assert_close(stats[f"loss_{name}"], value)
            assert_close(stats[f"w_{name}"], w.mean())
    gradients, names = torch.autograd.grad(total, list(student.parameters())), dict(student.named_parameters())
    for name, g in zip(names, gradients):
        assert_close(world.gradients[world.student][name], g, 1e-11)
    assert_close(stats["grad_norm_student"], torch.cat([g.flatten() for g in gradients]).norm(), 1e-11)
    if ca:
        assert_close(stats["cos_ca_dm"], torch.cosine_similarity(steps["ca"], steps["dm"]).mean())

def test_fake_score_update_by_hand():
    """Iteration 1: x0 = x_{t_i} - t_i v, L_fake, AdamW by hand, then phi <- beta phi + (1 - beta) theta; beta = 0.9."""
    world = World(Settings(fake_pull=0.9, weight_decay=0.01))
    fake, (cond, _, d), (x, t, v) = copy.deepcopy(world.fake), world.draw(1), world.anchors(1, world.student)
    x0, u, noise = x - t[:, None] * v, d.tau["fake"], d.noise["fake"]
    loss = (fake((1 - u[:, None]) * x0 + u[:, None] * noise, u, cond) - (noise - x0)).pow(2).mean()
    params, theta, stats = world.parameters(fake), world.parameters(world.student), world.iterate(1)
    gradients = dict(zip(params, torch.autograd.grad(loss, list(fake.parameters()))))
    stepped = AdamW(params, dict.fromkeys(params, 1e-2), 0.01, 1.0, 1).step(gradients)
    assert_close(stats["loss_fake"], loss)
    for name, p in world.fake.named_parameters():
        assert_close(p, 0.9 * stepped[name] + 0.1 * theta[name], 1e-10)

def test_learner_step():
    """Learning rates 0.1 and 0.03, warm-up 3, so 1/3, 2/3, 1, 1 of them; one norm over both groups, 0.1, 5, 0.5, 40,
    clipped at 1; weight decay 0.1: AdamW from its definition. The norm returned is the one before clipping."""
    params, lr = {"a": randn(3, 2).requires_grad_(), "b": randn(4, seed=1).requires_grad_()}, {"a": 0.1, "b": 0.03}
    learner = cdm.Learner(None, [({n: p}, lr[n]) for n, p in params.items()], cdm.CDM(warmup=3, weight_decay=0.1))
    by_hand = AdamW({n: p.detach().clone() for n, p in params.items()}, lr, 0.1, 1.0, 3)
    for i, norm in enumerate((0.1, 5.0, 0.5, 40.0)):
        g = randn(10, seed=i) * norm / randn(10, seed=i).norm()
        params["a"].grad, params["b"].grad = g[:6].view(3, 2).clone(), g[6:].clone()
        want = by_hand.step({n: p.grad.clone() for n, p in params.items()})
        assert_close(learner.step(), norm)
        assert learner.updates == i + 1 and all(p.grad is None for p in params.values())
        for name, p in params.items():
            assert_close(p, want[name], 1e-11)

@pytest.mark.parametrize("decay, n", [(0.999, 0), (0.4, 0), (0.999, 8987)])
def test_who_changes_when(decay, n):
    """R = 3: the fake score changes in each iteration, student and EMA in 3, 6, 9, ..., the teacher never. After n
    updates the EMA's next decay is min((1 + n) / (10 + n), limit): 0.1, 2/11, ...; 0.4 from n = 5, 0.999 from 8990."""
    world = World(Settings(student_every=3, ema_decay=decay))
    world.learners[0].updates = n
    for k in range(1, 22):
        (teacher, student, fake), ema = map(world.parameters, world.nets), copy.deepcopy(world.ema)
        world.iterate(k)
        now = world.parameters(world.student)
        assert not any(torch.equal(fake[name], p) for name, p in world.fake.named_parameters())
        assert all(torch.equal(teacher[name], p) for name, p in world.teacher.named_parameters())
        d = 1 if k % 3 else min((1 + n) / (10 + n), decay)
        n += k % 3 == 0
        for name in ema:
            assert torch.equal(now[name], student[name]) == (k % 3 > 0)
            assert_close(world.ema[name], d * ema[name] + (1 - d) * now[name])
        assert all(p.grad is None for net in world.nets for p in net.parameters())

@pytest.mark.parametrize("aware, micro", [(False, 2), (False, 8), (True, 2)])
def test_micro_batches(aware, micro):
    """2 micro-batches of 4, or 8 of 1: the gradients and figures of one batch of 8, and the same weights after it."""
    one, two = (World(Settings(anchor_aware_fake=aware)) for _ in range(2))
    for k in (1, 2, 3, 4):
        a, b = one.iterate(k), two.iterate(k, micro)
        assert a.keys() == b.keys()
        for name in a:
            assert_close(b[name], a[name], 1e-8)
        for net, other in zip(one.nets[1:], two.nets[1:]):
            for name, p in net.named_parameters():
                assert_close(dict(other.named_parameters())[name], p, 1e-8)
                if net in one.gradients:
                    assert_close(two.gradients[other][name], one.gradients[net][name], 1e-8)

# ------------------------------------------------------------------- not in the paper: the anchor-aware fake score

def test_anchor_aware_fake_starts_as_the_papers():
    """The layer is zero: the same output to the last bit, told any time or none, and (L_CDM off) the same L_fake and
    gradients in the first iteration; after it the layer has learnt. The paper's fake score is told nothing."""
    assert (cdm.AnchorTime(5)(torch.rand(7)) == 0).all()
    aware, plain = (World(Settings(anchor_aware_fake=on, cdm_weight=0, clip=1e9)) for on in (True, False))
    t, cond = torch.linspace(0.02, 1, 6).double(), conditions(6)
    assert torch.equal(aware.fake(randn(6, 2), t, cond, anchor_t=t.flip(0)), plain.fake(randn(6, 2), t, cond))
    assert torch.equal(aware.iterate(1)["loss_fake"], plain.iterate(1)["loss_fake"])
    for name, g in plain.gradients[plain.fake].items():
        assert torch.equal(aware.gradients[aware.fake][name], g)
    assert aware.fake.anchor_time.linear.weight.abs().max() > 0 and plain.fake.log[0]["anchor_t"] is None

@pytest.mark.parametrize("cdm_weight", [0.0, 1.0])
def test_anchor_aware_fake_is_told_the_right_time(cdm_weight):
    """L_DM tells it t_i, L_CDM t'. With L_CDM it also trains on clean estimates at x_{t'}, told t': in rows 1, 3, 5, 7
    of odd iterations, 0, 2, 4, 6 of even ones, for 4 more student evaluations; without L_CDM on anchors alone."""
    world, on = World(Settings(anchor_aware_fake=True, cdm_weight=cdm_weight, student_every=1)), int(cdm_weight)
    for k in (1, 2):
        student = copy.deepcopy(world.student)
        x, t_i, v = world.anchors(k, student)
        world.iterate(k)
        (cond, _, d), (train, *rest) = world.draw(k), world.fake.log
        off = (torch.arange(8) % 2 == k % 2) & bool(on)
        told = [t_i] + [d.t_off] * on
        assert len(rest) == len(told) and all(torch.equal(call["anchor_t"], t) for call, t in zip(rest, told))
        assert torch.equal(train["anchor_t"], torch.where(off, d.t_off, t_i))
        simulated = int((d.index + 1).sum())
        assert world.evaluations() == (simulated + 4 * on, 8 + 8 * on, 24 + 8 * on, 8, 8 + 8 * on)
        x_off = x + (d.t_off - t_i)[:, None] * v
        x0 = torch.where(off[:, None], D(student, x_off, d.t_off, cond), x - t_i[:, None] * v)
        u = d.tau["fake"][:, None]
        assert_close(train["x"], (1 - u) * x0 + u * d.noise["fake"])
