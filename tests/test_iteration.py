"""One iteration, section 1 of cdm.py: evaluations, gradients and updates against full rollouts."""

import copy
import itertools
import math

import pytest
import torch
from reference import (
    AdamW,
    D,
    Net,
    Settings,
    World,
    assert_close,
    ca_by_hand,
    col,
    conditions,
    dm_by_hand,
    noised,
    parameters,
    randn,
)

import cdm

# --- Which network is evaluated where, and how often. ---

SOME_LOSSES = [on for on in itertools.product((0, 1), repeat=3) if any(on)]


@pytest.mark.parametrize("ca, dm, cdm_", SOME_LOSSES)
def test_evaluations_of_each_role(ca, dm, cdm_):
    """Each loss costs its own evaluations, in student updates only; a weight of 0 removes them.

    L_CA and L_DM share the student's at the anchor. L_CA asks the teacher with the prompt and
    without.
    """
    world = World(Settings(ca_weight=ca, dm_weight=dm, cdm_weight=cdm_))
    for k in (1, 2, 3, 4):
        world.iterate(k)
        n = 8 if k % 2 == 0 else 0  # R = 2: a student update in every second iteration
        assert world.evaluations() == {
            "simulation": int((world.draw(k)[2].index + 1).sum()),
            "student": n * (max(ca, dm) + cdm_),
            "teacher": n * (2 * ca + dm + cdm_),
            "fake, trained": 8,
            "fake, asked": n * (dm + cdm_),
        }


@pytest.mark.parametrize("ca, dm, cdm_", SOME_LOSSES)
def test_student_trains_at_the_anchors_and_at_t_off(ca, dm, cdm_):
    """With gradient, the student is evaluated at t_i for L_CA and L_DM, at t' for L_CDM."""
    world = World(Settings(ca_weight=ca, dm_weight=dm, cdm_weight=cdm_))
    for k in (1, 2, 3, 4):
        world.iterate(k)
        _, _, d = world.draw(k)
        want = []
        if k % 2 == 0 and (ca or dm):
            want.append(d.schedule[d.index].double())
        if k % 2 == 0 and cdm_:
            want.append(d.t_off)
        got = [call.t for call in world.student.log if call.grad]
        assert len(got) == len(want)
        assert all(map(torch.equal, got, want))


def test_evaluations_per_student_update():
    """The mean count of 400 iterations agrees with 25.5 per sample and student update.

    The released code, which integrates all samples to the end, needs 40.
    """
    N_max, R = 28, 2
    batch, iterations = 16, 400
    steps = range(1, N_max + 1)

    # E[N] = (N_max + 1) / 2 = 14.5, and i + 1 is uniform on 1..N: E[i + 1 | N] = (N + 1) / 2.
    mean_steps = sum(steps) / N_max
    mean_anchor = sum((n + 1) / 2 for n in steps) / N_max
    assert mean_steps == (N_max + 1) / 2 == 14.5
    assert mean_anchor == (N_max + 3) / 4 == 7.75

    expected = R * mean_anchor  # backward simulation, each sample to its anchor
    expected += 2  # student with gradient: at the anchor, and at t'
    expected += 4  # teacher: 2 for L_CA, 1 for L_DM, 1 for L_CDM
    expected += R  # fake score in training
    expected += 2  # fake score in L_DM and in L_CDM
    released = R * mean_steps + 3 + 4 + R + 2  # all to the end; L_CA and L_DM do not share
    assert (expected, released) == (25.5, 40)

    world = World(cdm.CDM(), batch=batch)
    counts = dict.fromkeys(world.evaluations(), 0)
    for k in range(1, iterations + 1):
        world.iterate(k)
        for name, n in world.evaluations().items():
            counts[name] += n * R / (batch * iterations)
    counted = sum(counts.values())
    print(f"\n{expected} evaluations expected, {counted:.2f} counted, {released} released")
    del counts["simulation"]
    exact = {"student": 2, "teacher": 4, "fake, trained": R, "fake, asked": 2}
    assert counts == pytest.approx(exact)

    # The standard error of the count is that of R times a mean of i + 1. Its variance is
    # between iterations, of (N + 1) / 2:      Var[N] / 4 = (N_max^2 - 1) / 12 / 4,
    # and within one, of a mean over a batch:  E[Var[i | N]] / batch = E[N^2 - 1] / 12 / batch.
    between = (N_max**2 - 1) / 12 / 4
    within = (sum(n**2 for n in steps) / N_max - 1) / 12 / batch
    error = R * math.sqrt((between + within) / iterations)
    assert abs(counted - expected) < 3.3 * error < 1.5


@pytest.mark.parametrize("micro", [1, 2])
def test_processes_make_the_same_number_of_calls(micro, monkeypatch):
    """Among several processes each micro-batch calls the student once for every time of the
    schedule. The calls beyond its last anchor are of one sample, and change nothing.
    """
    plain, idle = World(Settings()), World(Settings())
    total = 0
    for k in range(1, 7):
        want = plain.iterate(k, micro)
        with monkeypatch.context() as several:
            several.setattr(torch.distributed, "is_initialized", lambda: True)
            got = idle.iterate(k, micro)
        simulated = [call for call in idle.student.log if not call.grad]
        assert len(simulated) == micro * len(plain.draw(k)[2].schedule)
        extra = len(idle.student.log) - len(plain.student.log)
        total += extra
        more = {"simulation": plain.evaluations()["simulation"] + extra}
        assert idle.evaluations() == plain.evaluations() | more
        assert got == want
    assert total > 0
    for name, net in plain.nets.items():
        for key, p in parameters(net).items():
            assert torch.equal(parameters(idle.nets[name])[key], p)


# --- The student's and the fake score's update. ---


def second_iteration(point, weights):
    """A World after iterations 1 and 2, the student as it was between them, and iteration 2's log.

    Iteration 2 updates the fake score first, so its student step sees the World's fake score.
    """
    names = ("ca_weight", "dm_weight", "cdm_weight")
    cfg = Settings(cdm_point=point, clip=1e9, **dict(zip(names, weights, strict=True)))
    world = World(cfg, (3,))
    world.iterate(1)
    student = copy.deepcopy(world.student)
    return world, student, world.iterate(2)


def student_losses_by_hand(world, student, k):
    """By name of the loss: x0_hat with the student's gradient, and the loss by hand."""
    cond, uncond, d = world.draw(k)
    x, t, v = world.anchors(k, student)
    t_off = t if world.cfg.cdm_point == "anchor" else d.t_off
    x_off = x + (t_off - t)[:, None] * v  # Eq. 7
    if world.cfg.cdm_point == "renoise":
        x_off = noised(x - t[:, None] * v, t_off, d.noise["off"])

    teacher, fake = world.teacher, world.fake
    tau, noise = d.tau, d.noise
    x0_hat = D(student, x, t, cond)
    ca = ca_by_hand(x0_hat, teacher, cond, uncond, tau["ca"], noise["ca"], alpha=3.0)
    dm = dm_by_hand(x0_hat, teacher, fake, cond, tau["dm"], noise["dm"])
    x0_hat_off = D(student, x_off, t_off, cond)
    off = dm_by_hand(x0_hat_off, teacher, fake, cond, tau["cdm"], noise["cdm"])
    return {"ca": (x0_hat, ca), "dm": (x0_hat, dm), "cdm": (x0_hat_off, off)}


WEIGHTS = [(1.0, 1.0, 1.0), (0.7, 1.3, 0.4), (0.0, 0.0, 2.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("point", ["euler", "anchor", "renoise"])
def test_student_gradient_by_hand(point, weights):
    """AdamW sees the gradient of the weighted L_CA + L_DM + L_CDM, computed by hand."""
    world, student, stats = second_iteration(point, weights)
    losses = student_losses_by_hand(world, student, 2).values()
    total = 0
    for weight, (x0_hat, loss) in zip(weights, losses, strict=True):
        total = total + weight * (loss.gradient * x0_hat).sum()
    gradients = torch.autograd.grad(total, list(student.parameters()))
    for name, g in zip(parameters(student), gradients, strict=True):
        assert_close(world.gradients["student"][name], g, 1e-11)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert_close(stats["grad_norm_student"], norm, 1e-11)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("point", ["euler", "anchor", "renoise"])
def test_student_log_by_hand(point, weights):
    """The log has each loss in use and its mean w."""
    world, student, stats = second_iteration(point, weights)
    losses = {name: x[1] for name, x in student_losses_by_hand(world, student, 2).items()}
    for weight, (name, loss) in zip(weights, losses.items(), strict=True):
        assert (f"loss_{name}" in stats) == (f"w_{name}" in stats) == (weight > 0)
        if weight:
            assert_close(stats[f"loss_{name}"], loss.value)
            assert_close(stats[f"w_{name}"], loss.w.mean())


def test_fake_score_update_by_hand():
    """L_fake at x0 = x_{t_i} - t_i v, AdamW by hand, then phi <- 0.9 phi + 0.1 theta."""
    world = World(Settings(fake_pull=0.9, weight_decay=0.01))
    fake = copy.deepcopy(world.fake)
    cond, _, d = world.draw(1)
    x, t, v = world.anchors(1, copy.deepcopy(world.student))
    theta = parameters(world.student)
    stats = world.iterate(1)

    x0 = x - t[:, None] * v
    tau, noise = d.tau["fake"], d.noise["fake"]
    loss = (fake(noised(x0, tau, noise), tau, cond) - (noise - x0)).pow(2).mean()
    assert_close(stats["loss_fake"], loss)
    params = parameters(fake)
    gradients = torch.autograd.grad(loss, list(fake.parameters()))
    by_hand = AdamW(params, dict.fromkeys(params, 1e-2), decay=0.01, clip=1.0, warmup=1)
    stepped = by_hand.step(dict(zip(params, gradients, strict=True)))
    for name, p in world.fake.named_parameters():
        assert_close(p, 0.9 * stepped[name] + 0.1 * theta[name], 1e-10)


def test_learner_step_by_hand():
    """A step is AdamW from its definition, with warm-up, and clipping over all groups together.

    It returns the norm before clipping, counts the update and frees the gradients.
    """
    params = {"a": randn(3, 2).requires_grad_(), "b": randn(4, seed=1).requires_grad_()}
    lr = {"a": 0.1, "b": 0.03}
    groups = [({name: p}, lr[name]) for name, p in params.items()]
    learner = cdm.Learner(None, groups, cdm.CDM(warmup=3, weight_decay=0.1))
    copies = {name: p.detach().clone() for name, p in params.items()}
    by_hand = AdamW(copies, lr, decay=0.1, clip=1.0, warmup=3)
    for i, norm in enumerate((0.1, 5.0, 0.5, 40.0)):  # clipped at 1
        g = randn(10, seed=i)
        g = g * norm / g.norm()
        params["a"].grad = g[:6].view(3, 2).clone()
        params["b"].grad = g[6:].clone()
        want = by_hand.step({name: p.grad.clone() for name, p in params.items()})
        assert_close(learner.step(), norm)
        assert learner.updates == i + 1
        for name, p in params.items():
            assert p.grad is None
            assert_close(p, want[name], 1e-11)


# --- Who changes when. ---


# The EMA's limit, and the student updates before the test. With n updates behind it, the EMA's next
# decay is min((1 + n) / (10 + n), limit): 0.1, 2/11, ...; it meets 0.4 at n = 5, 0.999 at n = 8990.
EMA = [(0.999, 0), (0.4, 0), (0.999, 8987)]


@pytest.mark.parametrize("limit, n", EMA)
def test_who_changes_when(limit, n):
    """R = 3: the fake score changes in each iteration, the student in every third."""
    world = World(Settings(student_every=3, ema_decay=limit))
    world.student_learner.updates = n
    for k in range(1, 22):
        before = {name: parameters(net) for name, net in world.nets.items()}
        world.iterate(k)
        changes = {"teacher": False, "student": k % 3 == 0, "fake": True}
        for name, net in world.nets.items():
            for key, p in net.named_parameters():
                assert torch.equal(p, before[name][key]) != changes[name]
                assert p.grad is None


@pytest.mark.parametrize("limit, n", EMA)
def test_ema_follows_the_student(limit, n):
    """R = 3: the EMA moves in iterations 3, 6, ..., with a decay that grows with its updates."""
    world = World(Settings(student_every=3, ema_decay=limit))
    world.student_learner.updates = n
    for k in range(1, 22):
        before = copy.deepcopy(world.ema)
        world.iterate(k)
        decay = 1
        if k % 3 == 0:
            decay = min((1 + n) / (10 + n), limit)
            n += 1
        for name, p in parameters(world.student).items():
            assert_close(world.ema[name], decay * before[name] + (1 - decay) * p)


@pytest.mark.parametrize("aware, micro", [(False, 2), (False, 8), (True, 2)])
def test_micro_batches(aware, micro):
    """2 micro-batches of 4, or 8 of 1, give one batch of 8's log, gradients and weights."""
    cfg = Settings(anchor_aware_fake=aware)
    whole, parts = World(cfg), World(cfg)
    for k in (1, 2, 3, 4):
        want, got = whole.iterate(k), parts.iterate(k, micro)
        assert want.keys() == got.keys()
        for name in want:
            assert_close(got[name], want[name], 1e-8)
        for name in ("student", "fake"):
            weights = parameters(parts.nets[name])
            for key, p in whole.nets[name].named_parameters():
                assert_close(weights[key], p, 1e-8)
        assert whole.gradients.keys() == parts.gradients.keys()
        for name, gradients in whole.gradients.items():
            for key, g in gradients.items():
                assert_close(parts.gradients[name][key], g, 1e-8)


# --- Not in the paper: the anchor-aware fake score. ---


def test_anchor_time_starts_at_zero():
    """The layer that tells the time gives 0 at first, so the fake score is the paper's."""
    assert (cdm.AnchorTime(5)(torch.rand(7)) == 0).all()
    t, cond = torch.linspace(0.02, 1, 6).double(), conditions(6)
    aware, plain = Net((2,), 3, aware=True), Net((2,), 3)
    told = aware(randn(6, 2), t, cond, made_at=t.flip(0))
    assert torch.equal(told, plain(randn(6, 2), t, cond))


def test_anchor_aware_fake_starts_as_the_papers():
    """Without L_CDM, the first iteration has the paper's L_fake and gradients to the last bit.

    After it the layer has learnt something.
    """
    aware, plain = (
        World(Settings(anchor_aware_fake=on, cdm_weight=0, clip=1e9)) for on in (True, False)
    )
    assert torch.equal(aware.iterate(1)["loss_fake"], plain.iterate(1)["loss_fake"])
    for name, g in plain.gradients["fake"].items():
        assert torch.equal(aware.gradients["fake"][name], g)
    assert aware.fake.anchor_time.linear.weight.abs().max() > 0


def test_the_papers_fake_score_is_told_no_time():
    """By default no call of the fake score has an anchor's time."""
    world = World(Settings())
    for k in (1, 2):
        world.iterate(k)
        assert all(call.made_at is None for call in world.fake.log)


@pytest.mark.parametrize("cdm_weight", [0.0, 1.0])
def test_anchor_aware_fake_is_told_the_time_of_each_loss(cdm_weight):
    """L_DM tells it t_i, L_CDM t'."""
    world = World(Settings(anchor_aware_fake=True, cdm_weight=cdm_weight, student_every=1))
    for k in (1, 2):
        t_i = world.anchors(k, world.student)[1]
        world.iterate(k)
        want = [t_i]
        if cdm_weight:
            want.append(world.draw(k)[2].t_off)
        asked = world.fake.log[1:]  # the first call trains it
        assert len(asked) == len(want)
        assert all(torch.equal(call.made_at, t) for call, t in zip(asked, want, strict=True))


@pytest.mark.parametrize("cdm_weight", [0.0, 1.0])
def test_anchor_aware_fake_also_trains_off_the_trajectory(cdm_weight):
    """With L_CDM, half of its training rows are clean estimates at x_{t'}, and it is told t'.

    These are rows 1, 3, 5, 7 in odd iterations and 0, 2, 4, 6 in even ones. Without L_CDM it
    trains at anchors alone.
    """
    world = World(Settings(anchor_aware_fake=True, cdm_weight=cdm_weight, student_every=1))
    for k in (1, 2):
        student = copy.deepcopy(world.student)
        cond, _, d = world.draw(k)
        x, t_i, v = world.anchors(k, student)
        world.iterate(k)
        off = torch.arange(8) % 2 == k % 2
        if not cdm_weight:
            off = torch.zeros(8, dtype=torch.bool)
        train = world.fake.log[0]
        assert torch.equal(train.made_at, torch.where(off, d.t_off, t_i))
        x_off = x + (d.t_off - t_i)[:, None] * v
        x0 = torch.where(col(off, x), D(student, x_off, d.t_off, cond), x - t_i[:, None] * v)
        assert_close(train.x, noised(x0, d.tau["fake"], d.noise["fake"]))


@pytest.mark.parametrize("cdm_weight, more", [(0.0, 0), (1.0, 1)])
def test_evaluations_of_the_anchor_aware_fake(cdm_weight, more):
    """Training it off the trajectory takes 4 more student evaluations, for half of 8 samples."""
    world = World(Settings(anchor_aware_fake=True, cdm_weight=cdm_weight, student_every=1))
    for k in (1, 2):
        world.iterate(k)
        assert world.evaluations() == {
            "simulation": int((world.draw(k)[2].index + 1).sum()) + 4 * more,
            "student": 8 + 8 * more,
            "teacher": 24 + 8 * more,
            "fake, trained": 8,
            "fake, asked": 8 + 8 * more,
        }
