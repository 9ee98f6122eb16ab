"""What the tests of the algorithm share: the paper's formulas again, and a small world to train in.

The formulas work in float64 and share no code with cdm.py. All draws have fixed seeds.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch

import cdm

# The 0.999 quantile of the chi-square distribution, by degrees of freedom.
CHI2 = {3: 16.27, 9: 27.88, 24: 51.18, 27: 55.48}


def float64(values, **options):
    return torch.tensor(values, dtype=torch.float64, **options)


def randn(*shape, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


def conditions(n, seed=0):
    """A cond like SD3's for n samples: 4 tokens of width 1, and a pooled vector of width 3."""
    return randn(n, 4, 1, seed=seed + 50), randn(n, 3, seed=seed + 51)


def parameters(net):
    """A copy of a network's parameters by name."""
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_close(got, want, tol=1e-12):
    """The largest error is at most tol times the largest entry."""
    got = torch.as_tensor(got, dtype=torch.float64).detach()
    want = torch.as_tensor(want, dtype=torch.float64).detach()
    assert got.shape == want.shape, (got.shape, want.shape)
    assert (got - want).abs().max() <= tol * want.abs().max(), (got, want)


def assert_uniform(cells, n):
    """The integers `cells` are uniform on 0..n-1, by a chi-square test at the 0.999 quantile."""
    expected = len(cells) / n
    assert expected >= 20
    counts = torch.bincount(cells, minlength=n)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < CHI2[n - 1], statistic


def by_name(d):
    """All the tensors of a Draw."""
    times = {f"tau {name}": tau for name, tau in d.tau.items()}
    noises = {f"noise {name}": noise for name, noise in d.noise.items()}
    return {"schedule": d.schedule, "index": d.index, "t_off": d.t_off, **times, **noises}


def differences(a, b):
    """The names of the tensors in which two Draws differ."""
    x, y = by_name(a), by_name(b)
    same = {name for name in x.keys() & y.keys() if torch.equal(x[name], y[name])}
    return (x.keys() | y.keys()) - same


# --- A network. ---


class Net(torch.nn.Module):
    """A nonlinear model(x_t, t, cond) -> v of few parameters, which logs its calls."""

    def __init__(self, shape, seed):
        super().__init__()
        self.log = []
        n = math.prod(shape)
        self.a = torch.nn.Linear(n + 5, 16).double()  # x_t, t, mean of cond[0], and cond[1]
        self.b = torch.nn.Linear(16, n).double()
        for i, p in enumerate(self.parameters()):
            p.data = 0.5 * randn(*p.shape, seed=100 * seed + i)

    def forward(self, x, t, cond):
        self.log.append(SimpleNamespace(x=x.detach(), t=t, grad=torch.is_grad_enabled()))
        tokens, pooled = cond
        h = torch.cat([x.flatten(1), t[:, None], tokens.mean(1), pooled], 1)
        return self.b(torch.tanh(self.a(h))).view(x.shape)

    def evaluations(self, grad):
        """Samples evaluated with gradients on, or off."""
        return sum(len(call.x) for call in self.log if call.grad == grad)


# --- The formulas. ---


def col(t, x):
    """Times (B,) as a column that multiplies x (B, ...)."""
    return t.view(len(t), *[1] * (x.dim() - 1))


def D(model, x, t, cond):
    """Eq. 1."""
    return x - col(t, x) * model(x, t, cond)


def noised(x0, t, noise):
    return (1 - col(t, x0)) * x0 + col(t, x0) * noise


@dataclass
class LossByHand:
    value: torch.Tensor
    gradient: torch.Tensor  # of the value, with respect to x0_hat
    w: torch.Tensor  # (B,)


def pseudo_target_by_hand(x0_hat, d_real, delta):
    """The mean over all entries of (w delta)^2, and its gradient -2 w delta / numel."""
    pairs = zip(d_real, x0_hat, strict=True)
    w = float64([1 / max(float((a - b).abs().sum() / a.numel()), 0.1) for a, b in pairs])
    step = torch.stack([w[b] * delta[b] for b in range(len(w))])
    numel = step.numel()
    return LossByHand((step**2).sum() / numel, -2 * step / numel, w)


@torch.no_grad()
def ca_by_hand(x0_hat, teacher, cond, uncond, tau, noise, alpha):
    """L_CA: delta = alpha [D_real(z, tau, c) - D_real(z, tau, (/))]."""
    z = noised(x0_hat, tau, noise)
    d_real = D(teacher, z, tau, cond)
    delta = alpha * (d_real - D(teacher, z, tau, uncond))
    return pseudo_target_by_hand(x0_hat, d_real, delta)


@torch.no_grad()
def dm_by_hand(x0_hat, teacher, fake, cond, tau, noise):
    """L_DM and L_CDM: delta = D_real(z, tau, c) - D_fake(z, tau, c)."""
    z = noised(x0_hat, tau, noise)
    d_real = D(teacher, z, tau, cond)
    return pseudo_target_by_hand(x0_hat, d_real, d_real - D(fake, z, tau, cond))


@torch.no_grad()
def rollout(model, noise, times, cond):
    """Euler's method for all samples. Returns x and v at each of the N times, (N, B, ...)."""
    xs, vs = [], []
    x = noise
    for t, s in zip(times, [*times[1:], 0.0], strict=True):
        v = model(x, torch.full((len(x),), float(t)).double(), cond)
        xs.append(x)
        vs.append(v)
        x = x + (float(s) - float(t)) * v
    return torch.stack(xs), torch.stack(vs)


def adamw_by_hand(params, gradients, lr, decay, clip, warmup):
    """Clipping, linear warm-up and AdamW with betas 0.9 and 0.999, from their definitions.

    params: tensors by name; gradients: a list of such dicts, one a step. Returns the parameters.
    """
    m, v = dict.fromkeys(params, 0), dict.fromkeys(params, 0)
    for n, step in enumerate(gradients, 1):
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in step.values()))
        rate = lr * min(1.0, n / warmup)
        for name, g in step.items():
            g = g * min(1.0, clip / (norm + 1e-6))  # the 1e-6 is torch's
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            change = m[name] / (1 - 0.9**n) / ((v[name] / (1 - 0.999**n)).sqrt() + 1e-8)
            params = params | {name: (1 - rate * decay) * params[name] - rate * change}
    return params


# --- The iteration on three such networks. ---

config = partial(
    cdm.CDMConfig, max_schedule_steps=6, student_lr=1e-2, fake_lr=1e-2, warmup=0, alpha=3.0
)


class World:
    """Three small networks in their roles, their conditions and draws, and the iteration."""

    def __init__(self, cfg, shape=(2,), batch=8):
        self.cfg = cfg
        self.shape = shape
        self.batch = batch
        self.teacher = Net(shape, 1)
        self.student = Net(shape, 2)
        self.fake = Net(shape, 3)
        self.nets = {"teacher": self.teacher, "student": self.student, "fake": self.fake}
        self.gradients = {}  # by network and parameter: what AdamW saw last
        self.student_learner = self.learner("student", cfg.student_lr)
        self.fake_learner = self.learner("fake", cfg.fake_lr)
        # Not the student's own, as they are in a run: nobody may take one for the other.
        self.ema = {name: 0.5 * p for name, p in parameters(self.student).items()}

    def learner(self, name, lr):
        params = dict(self.nets[name].named_parameters())
        learner = cdm.Learner(self.nets[name], params, lr, self.cfg)

        def note_gradients(optimizer, args, kwargs):
            self.gradients[name] = {key: p.grad.clone() for key, p in params.items()}

        learner.optimizer.register_step_pre_hook(note_gradients)
        return learner

    def draw(self, k):
        """cond, uncond (of one sample) and Draw of iteration k in float64."""
        d = cdm.draw_iteration(self.cfg, 0, k, self.batch, self.shape, 3.0)
        d = replace(
            d,
            t_off=d.t_off.double(),
            tau={name: tau.double() for name, tau in d.tau.items()},
            noise={name: noise.double() for name, noise in d.noise.items()},
        )
        return conditions(self.batch, k), conditions(1, 1000), d

    def iterate(self, k, micro_batch=0):
        """Run iteration k and return its log."""
        for net in self.nets.values():
            net.log.clear()
        roles = self.teacher, self.student_learner, self.fake_learner, self.ema
        return cdm.cdm_iteration(k, *self.draw(k), *roles, self.cfg, micro_batch)

    def anchors(self, k, student):
        """x_{t_i}, t_i and v of iteration k for a student, from a full rollout."""
        cond, _, d = self.draw(k)
        x, v = rollout(student, d.noise["start"], d.schedule, cond)
        rows = torch.arange(self.batch)
        return x[d.index, rows], d.schedule[d.index].double(), v[d.index, rows]

    def losses_by_hand(self, k, student):
        """By name of the loss: x0_hat with this student's gradient, and the loss by hand."""
        cond, uncond, d = self.draw(k)
        uncond = tuple(c.repeat(self.batch, *[1] * (c.ndim - 1)) for c in uncond)
        x, t, v = self.anchors(k, student)
        t_off = t if self.cfg.cdm_point == "anchor" else d.t_off
        x_off = x + col(t_off - t, x) * v  # Eq. 7
        if self.cfg.cdm_point == "renoise":
            x_off = noised(x - col(t, x) * v, t_off, d.noise["off"])

        x0_hat, x0_hat_off = D(student, x, t, cond), D(student, x_off, t_off, cond)
        at = {name: (d.tau[name], d.noise[name]) for name in d.tau}
        nets = self.teacher, self.fake
        ca = ca_by_hand(x0_hat, self.teacher, cond, uncond, *at["ca"], self.cfg.alpha)
        dm = dm_by_hand(x0_hat, *nets, cond, *at["dm"])
        off = dm_by_hand(x0_hat_off, *nets, cond, *at["cdm"])
        return {"ca": (x0_hat, ca), "dm": (x0_hat, dm), "cdm": (x0_hat_off, off)}

    def evaluations(self):
        """Samples evaluated in the last iteration, by network and by what for."""
        assert self.teacher.evaluations(grad=True) == 0
        return {
            "simulation": self.student.evaluations(grad=False),
            "student": self.student.evaluations(grad=True),
            "teacher": self.teacher.evaluations(grad=False),
            "fake, trained": self.fake.evaluations(grad=True),
            "fake, asked": self.fake.evaluations(grad=False),
        }
