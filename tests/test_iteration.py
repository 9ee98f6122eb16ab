"""One iteration, section 1 of cdm.py: evaluations, gradients and updates against full rollouts."""

import copy

import pytest
import torch
from reference import World, adamw_by_hand, assert_close, config, noised, parameters, randn

import cdm

# --- Which network is evaluated where, and how often. ---


@pytest.mark.parametrize("ca, dm, cdm_", [(1, 1, 1), (0, 0, 1), (1, 1, 0)])
def test_evaluations_of_each_role(ca, dm, cdm_):
    """Simulation evaluates a sample up to its anchor. L_CA and L_DM share the student's estimate at
    t_i. L_CA asks the teacher twice. L_CDM trains the student at t'. At weight 0 it is left out.
    """
    world = World(config(ca_weight=ca, dm_weight=dm, cdm_weight=cdm_))
    for k in (1, 2, 3, 4):
        world.iterate(k)
        d = world.draw(k)[2]
        times = []
        again = 0
        if k % 2 == 0:  # R = 2: a student update in every second iteration
            times = [d.schedule[d.index].double(), d.t_off][: 1 + cdm_]
            again = 2  # L_CA's
        trained = [call.t for call in world.student.log if call.grad]
        assert len(trained) == len(times)
        assert all(map(torch.equal, trained, times))
        assert world.evaluations() == {
            "simulation": int((d.index + 1).sum()),
            "student": 8 * len(times),
            "teacher": 8 * (len(times) + again),
            "fake, trained": 8,
            "fake, asked": 8 * len(times),
        }


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_processes_make_the_same_number_of_calls(micro_batch, monkeypatch):
    """Among several processes the student is called once for every time of the schedule.

    The calls beyond the last anchor are of one sample, and change nothing.
    """
    plain, idle = World(config()), World(config())
    total = 0
    for k in range(1, 7):
        want = plain.iterate(k, micro_batch)
        with monkeypatch.context() as several:
            several.setattr(torch.distributed, "is_initialized", lambda: True)
            got = idle.iterate(k, micro_batch)
        simulated = [call for call in idle.student.log if not call.grad]
        schedule = plain.draw(k)[2].schedule
        assert [float(call.t[0]) for call in simulated] == schedule.double().tolist()
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


WEIGHTS = [(1.0, 1.0, 1.0), (0.7, 1.3, 0.4), (0.0, 0.0, 2.0), (1.0, 1.0, 0.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("point", ["euler", "anchor", "renoise"])
def test_sec_3_3_student_gradient_by_hand(point, weights):
    """AdamW sees the gradient of the weighted L_CA + L_DM + L_CDM, computed by hand.

    The log has each loss and its mean w: L_CDM's unless its weight is 0. Iteration 2 updates the
    fake score first, so its student step sees the World's fake score after it.
    """
    names = ("ca_weight", "dm_weight", "cdm_weight")
    cfg = config(cdm_point=point, clip=1e9, **dict(zip(names, weights, strict=True)))
    world = World(cfg, (3,))
    world.iterate(1)
    student = copy.deepcopy(world.student)
    stats = world.iterate(2)
    losses = world.losses_by_hand(2, student)
    total = 0
    for weight, (x0_hat, loss) in zip(weights, losses.values(), strict=True):
        total = total + weight * (loss.gradient * x0_hat).sum()
    gradients = torch.autograd.grad(total, list(student.parameters()))
    for name, g in zip(parameters(student), gradients, strict=True):
        assert_close(world.gradients["student"][name], g, 1e-11)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert_close(stats["grad_norm_student"], norm, 1e-11)
    assert stats["N"] == len(world.draw(2)[2].schedule)
    assert ("loss_cdm" in stats) == ("w_cdm" in stats) == (weights[2] > 0)
    for name, (_, loss) in losses.items():
        if name != "cdm" or weights[2] > 0:
            assert_close(stats[f"loss_{name}"], loss.value)
            assert_close(stats[f"w_{name}"], loss.w.mean())


@pytest.mark.parametrize("k", [1, 2])
def test_fake_score_update_by_hand(k):
    """L_fake at x0 = x_{t_i} - t_i v, AdamW by hand, then phi <- 0.9 phi + 0.1 theta.

    In iteration 2, too, theta is the student before its own update.
    """
    world = World(config(fake_pull=0.9, weight_decay=0.01))
    fake = copy.deepcopy(world.fake)
    cond, _, d = world.draw(k)
    x, t, v = world.anchors(k, copy.deepcopy(world.student))
    theta = parameters(world.student)
    stats = world.iterate(k)

    x0 = x - t[:, None] * v
    tau, noise = d.tau["fake"], d.noise["fake"]
    loss = (fake(noised(x0, tau, noise), tau, cond) - (noise - x0)).pow(2).mean()
    assert_close(stats["loss_fake"], loss)
    params = parameters(fake)
    gradients = torch.autograd.grad(loss, list(fake.parameters()))
    steps = [dict(zip(params, gradients, strict=True))]
    stepped = adamw_by_hand(params, steps, 1e-2, decay=0.01, clip=1.0, warmup=1)
    for name, p in world.fake.named_parameters():
        assert_close(p, 0.9 * stepped[name] + 0.1 * theta[name], 1e-10)


def test_learner_step_by_hand():
    """A step is AdamW from its definition, with warm-up, and clipping over all tensors together.

    It returns the norm before clipping, counts the update and frees the gradients.
    """
    params = {"a": randn(3, 2).requires_grad_(), "b": randn(4, seed=1).requires_grad_()}
    learner = cdm.Learner(None, params, 0.1, cdm.CDMConfig(warmup=3, weight_decay=0.1))
    start = {name: p.detach().clone() for name, p in params.items()}
    steps = []
    for i, norm in enumerate((0.1, 5.0, 0.5, 40.0)):  # clipped at 1
        g = randn(10, seed=i)
        g = g * norm / g.norm()
        steps.append({"a": g[:6].view(3, 2), "b": g[6:]})
        for name, p in params.items():
            p.grad = steps[-1][name].clone()
        assert_close(learner.step(), norm)
        assert learner.updates == i + 1
        want = adamw_by_hand(start, steps, 0.1, decay=0.1, clip=1.0, warmup=3)
        for name, p in params.items():
            assert p.grad is None
            assert_close(p, want[name], 1e-11)


def test_average_in_numbers():
    """1 becomes 0.75 1 + 0.25 3 = 1.5, and with decay 0 it becomes 3. It stays float32."""
    params = {"p": torch.tensor([1.0]), "q": torch.tensor([7.0])}
    others = {"p": torch.tensor([3.0], dtype=torch.bfloat16)}
    cdm.average_into(params, others, 0.75)
    assert params == {"p": torch.tensor([1.5]), "q": torch.tensor([7.0])}
    cdm.average_into(params, others, 0)
    assert params["p"].item() == 3 and params["p"].dtype == torch.float32


# --- Who changes when. ---


# The EMA's limit, and the student updates before the test. With n updates behind it, the EMA's next
# decay is min((1 + n) / (10 + n), limit): 0.1, 2/11, ...; it meets 0.4 at n = 5, 0.999 at n = 8990.
EMA = [(0.999, 0), (0.4, 0), (0.999, 8987)]


@pytest.mark.parametrize("limit, n", EMA)
def test_who_changes_when(limit, n):
    """R = 3: the fake score changes in each iteration, student and EMA in every third.

    The EMA's decay grows with its updates.
    """
    world = World(config(student_every=3, ema_decay=limit))
    world.student_learner.updates = n
    for k in range(1, 22):
        before = {name: parameters(net) for name, net in world.nets.items()}
        ema = copy.deepcopy(world.ema)
        world.iterate(k)
        changes = {"teacher": False, "student": k % 3 == 0, "fake": True}
        for name, net in world.nets.items():
            for key, p in net.named_parameters():
                assert torch.equal(p, before[name][key]) != changes[name]
                assert p.grad is None
        decay = 1
        if k % 3 == 0:
            decay = min((1 + n) / (10 + n), limit)
            n += 1
        for name, p in parameters(world.student).items():
            assert_close(world.ema[name], decay * ema[name] + (1 - decay) * p)


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 100])
def test_micro_batches(micro_batch):
    """Any size gives one batch's log, gradients and weights, also if it does not divide 8."""
    whole, parts = World(config()), World(config())
    for k in (1, 2, 3, 4):
        want, got = whole.iterate(k), parts.iterate(k, micro_batch)
        assert max(len(call.x) for call in parts.fake.log) == min(micro_batch, 8)
        assert want["grad_norm_fake"] > 1  # it is clipped
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


# --- The method's defaults: those that the authors published for SD3-Medium. ---

RELEASED = {"ca_weight": 1, "dm_weight": 1, "cdm_weight": 1, "alpha": 7}
RELEASED |= {"schedule": "dynamic", "max_schedule_steps": 28, "stratified": False}
RELEASED |= {"time_low": 0.25, "time_high": 0.95, "tau_min": 0.02, "tau_max": 0.98}
RELEASED |= {"cdm_point": "euler", "student_every": 2, "student_lr": 1e-5, "fake_lr": 5e-6}
RELEASED |= {"warmup": 100, "weight_decay": 1e-4, "clip": 1}
RELEASED |= {"ema_decay": 0.999, "fake_pull": 0.999}


def test_the_defaults_are_the_released_configuration():
    """And there is no other setting of the method."""
    assert vars(cdm.CDMConfig()) == RELEASED
