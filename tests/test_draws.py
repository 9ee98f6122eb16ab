"""Section 1 of cdm.py: schedules, backward simulation, sampling, and an iteration's randomness."""

import math
from dataclasses import fields
from functools import partial

import pytest
import torch
from reference import Net, assert_close, assert_uniform, conditions, randn, rollout

import cdm

LOSSES = {"ca", "dm", "cdm", "fake"}


# --- The schedule. ---


def test_number_of_steps_is_uniform():
    """N ~ U{1..28} in one stream of 2,800 draws."""
    gen = torch.Generator().manual_seed(0)
    schedules = [cdm.sample_schedule(28, 0.25, 0.95, generator=gen) for _ in range(2800)]
    assert_uniform(torch.tensor([len(times) - 1 for times in schedules]), 28)


def test_number_of_steps_is_uniform_over_iterations():
    """N ~ U{1..28} over iterations 1 to 2,800, each of which has a generator of its own."""
    draws = [cdm.draw_iteration(cdm.CDM(), 0, k, 1, (1,)) for k in range(1, 2801)]
    assert_uniform(torch.tensor([len(d.schedule) - 1 for d in draws]), 28)


# Inner times before the shift, the shift, and where the shift takes them.
RANGES = [
    (0.25, 0.95, 3, 0.5, 0.98276),
    (0.02, 0.98, 1, 0.02, 0.98),
]


def many_schedules(low, high, shift, stratified):
    gen = torch.Generator().manual_seed(1)
    for _ in range(300):
        yield cdm.sample_schedule(28, low, high, shift, stratified, gen).double()


def inner_in_unit_range(times, low, high, shift):
    """The inner times with the shift undone, [low, high] mapped to [0, 1], in ascending order."""
    unshifted = times[1:] / (shift - (shift - 1) * times[1:])
    return ((unshifted - low) / (high - low)).flip(0)


def one_per_bin(u):
    """Whether each of len(u) equal bins of [0, 1] holds exactly one of the ascending u."""
    return (u * len(u)).floor().tolist() == list(range(len(u)))


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("low, high, shift, least, most", RANGES)
def test_schedule_descends_from_1_within_its_range(low, high, shift, least, most, stratified):
    """The first time is 1; then they fall strictly, the inner ones in the shifted [low, high]."""
    for times in many_schedules(low, high, shift, stratified):
        assert times[0] == 1
        assert (times.diff() < 0).all()
        assert (times[1:] > least - 1e-5).all()
        assert (times[1:] < most + 1e-5).all()


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("low, high, shift, least, most", RANGES)
def test_inner_times_are_uniform_before_the_shift(low, high, shift, least, most, stratified):
    """With the shift undone, the inner times of many schedules are uniform on [low, high]."""
    schedules = many_schedules(low, high, shift, stratified)
    u = torch.cat([inner_in_unit_range(times, low, high, shift) for times in schedules])
    assert u.min() < 0.02
    assert u.max() > 0.98
    assert_uniform((u * 25).long().clamp(0, 24), 25)


@pytest.mark.parametrize("low, high, shift, least, most", RANGES)
def test_stratified_schedules_hold_one_time_in_each_bin(low, high, shift, least, most):
    """Each of N - 1 equal bins holds one inner time. Few unstratified schedules are like that."""

    def filled(stratified):
        schedules = many_schedules(low, high, shift, stratified)
        return sum(one_per_bin(inner_in_unit_range(x, low, high, shift)) for x in schedules)

    assert filled(stratified=True) == 300
    assert filled(stratified=False) < 60  # all of N = 1 and 2, and a few others


def diffusers_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def test_uniform_times_are_the_schedulers():
    """At shift 3 the grid 1, 0.75, 0.5, 0.25 becomes 1, 0.9, 0.75, 0.5, as in diffusers."""
    scheduler = diffusers_scheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert_close(cdm.uniform_times(4, 3.0), scheduler.sigmas[:-1], 1e-6)
    assert_close(cdm.uniform_times(4, 3.0), [1.0, 0.9, 0.75, 0.5], 1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_drawn_schedules_are_shifted_as_by_the_scheduler(seed):
    """A schedule drawn at shift 3 is what diffusers makes of the one drawn at shift 1."""

    def drawn(shift):
        gen = torch.Generator().manual_seed(seed)
        return cdm.sample_schedule(28, 0.02, 0.98, shift, generator=gen)

    scheduler = diffusers_scheduler()
    scheduler.set_timesteps(sigmas=drawn(1.0).tolist())
    assert_close(drawn(3.0), scheduler.sigmas[:-1], 1e-6)


# --- Backward simulation and sampling. ---


def simulation(n, shape):
    """A student, and the arguments of backward_simulation for a schedule of n steps."""
    schedule = torch.tensor([1.0, 0.93, 0.8, 0.55, 0.5, 0.21, 0.04])[:n]
    index = torch.randint(n, shape[:1], generator=torch.Generator().manual_seed(3))
    return Net(shape[1:], 1), randn(*shape), schedule, index, conditions(shape[0])


SIMULATIONS = [(1, (4, 2)), (2, (1, 2)), (7, (16, 2)), (5, (6, 4, 8, 8))]


@pytest.mark.parametrize("n, shape", SIMULATIONS)
def test_backward_simulation_is_a_full_rollout_at_the_anchors(n, shape):
    """Anchors are the points of a rollout of all samples to t = 0, read off at each index."""
    student, noise, schedule, index, cond = simulation(n, shape)
    anchor = cdm.backward_simulation(student, noise, schedule, index, cond)
    x, v, _ = rollout(student, noise, schedule, cond)
    rows = torch.arange(len(index))
    assert_close(anchor.x_t, x[index, rows])
    assert_close(anchor.t, schedule[index])
    assert_close(anchor.v, v[index, rows])


@pytest.mark.parametrize("n, shape", SIMULATIONS)
def test_backward_simulation_evaluates_each_sample_up_to_its_anchor(n, shape):
    """max(index) + 1 calls evaluate sum(index + 1) samples, without gradient."""
    student, noise, schedule, index, cond = simulation(n, shape)
    anchor = cdm.backward_simulation(student, noise.requires_grad_(), schedule, index, cond)
    assert len(student.log) == int(index.max()) + 1
    assert student.evaluations(grad=False) == int((index + 1).sum())
    assert student.evaluations(grad=True) == 0
    assert not any(getattr(anchor, f.name).requires_grad for f in fields(anchor))


def test_sampling_by_hand():
    """At 1, 0.9, 0.75, 0.5, sample() is Euler's method to 0: 4 calls, without gradient."""
    model = Net((4, 8, 8), 1)
    noise, cond = randn(3, 4, 8, 8), conditions(3)
    times = torch.tensor([1.0, 0.9, 0.75, 0.5])
    x0 = cdm.sample(model, noise, times, cond)
    assert len(model.log) == 4
    assert not x0.requires_grad
    assert_close(x0, rollout(model, noise, times, cond)[2])


@pytest.mark.parametrize("times", [[1.0], [1.0, 0.5], [1.0, 0.75, 0.25]])
def test_sampling_is_exact_on_a_straight_path(times):
    """With the velocity noise - x0, one step gives x0, and so does any number."""
    noise, x0 = torch.tensor([[8.0, -4.0]]), torch.tensor([[2.0, 6.0]])

    def straight(x, t, cond):
        return noise - x0

    assert torch.equal(cdm.sample(straight, noise, torch.tensor(times), ()), x0)


# --- The randomness of an iteration: how it is keyed. ---

draw_8 = partial(cdm.draw_iteration, batch=8, shape=(4, 2), shift=3.0)


def by_name(d):
    """All the tensors of a Draw but the schedule, each with rows of samples."""
    times = {f"tau {name}": tau for name, tau in d.tau.items()}
    noises = {f"noise {name}": noise for name, noise in d.noise.items()}
    return {"index": d.index, "t_off": d.t_off, **times, **noises}


def differences(a, b):
    """The names of the tensors, the schedule included, in which two Draws differ."""
    x = {"schedule": a.schedule, **by_name(a)}
    y = {"schedule": b.schedule, **by_name(b)}
    same = {name for name in x.keys() & y.keys() if torch.equal(x[name], y[name])}
    return (x.keys() | y.keys()) - same


def test_draw_has_a_time_and_a_noise_for_each_loss():
    """tau has the four losses, noise also "start", and each draw differs from all others."""
    d = draw_8(cdm.CDM(), 0, 5)
    assert d.tau.keys() == LOSSES
    assert d.noise.keys() == LOSSES | {"start"}
    for group in (d.tau, d.noise):
        values = list(group.values())
        assert not any(torch.equal(x, y) for i, x in enumerate(values) for y in values[:i])


def test_draw_repeats_and_leaves_the_global_generator_alone():
    """Twice the same for (seed, k), whatever the state of torch's global generator."""
    a = draw_8(cdm.CDM(), 0, 5)
    state = torch.manual_seed(1).get_state()
    b = draw_8(cdm.CDM(), 0, 5)
    assert differences(a, b) == set()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed, k", [(0, 6), (1, 5)])
def test_draw_differs_by_seed_and_by_iteration(seed, k):
    """Another seed or another k changes t', every tau and every noise."""
    a, b = draw_8(cdm.CDM(), 0, 5), draw_8(cdm.CDM(), seed, k)
    assert differences(a, b) >= by_name(a).keys() - {"index"}


@pytest.mark.parametrize("rows", [slice(None), slice(2, 4)])
def test_a_rank_holds_its_rows_of_the_global_batch(rows):
    """Rank 1 of 4 holds rows 2 and 3 of the very batch that a single process draws."""
    a, b = draw_8(cdm.CDM(), 0, 5), draw_8(cdm.CDM(), 0, 5, rows=rows)
    assert torch.equal(a.schedule, b.schedule)
    assert by_name(a).keys() == by_name(b).keys()
    for name, x in by_name(a).items():
        assert torch.equal(x[rows], by_name(b)[name])


def test_each_time_and_noise_depends_on_its_own_name_alone():
    """Each is drawn first from generator(seed, k, kind, name), so that a new name changes none."""

    def uniform(name):
        return 1 - torch.rand(8, generator=cdm.generator(0, 5, "time", name))

    d = draw_8(cdm.CDM(cdm_point="renoise"), 0, 5)
    t_i = d.schedule[d.index]
    assert torch.equal(d.t_off, uniform("off").clamp(0.02, 0.98))
    for name, tau in d.tau.items():
        top = t_i if name == "ca" else 1
        assert torch.equal(tau, (uniform(name) * top).clamp(0.02, 0.98))
    for name, noise in d.noise.items():
        gen = cdm.generator(0, 5, "noise", name)
        assert torch.equal(noise, torch.randn(8, 4, 2, generator=gen))


@pytest.mark.parametrize(
    "changes, changed",
    [
        ({"ca_weight": 0.0}, set()),
        ({"dm_weight": 0.0}, set()),
        ({"cdm_weight": 0.0}, set()),
        ({"anchor_aware_fake": True}, set()),
        ({"cdm_point": "renoise"}, {"noise off"}),
        ({"cdm_point": "anchor"}, {"t_off"}),
        ({"schedule": "fixed"}, {"schedule", "index", "tau ca"}),
    ],
)
def test_a_setting_changes_no_draw_but_its_own(changes, changed):
    """Leaving out a loss, or adding a noise, leaves all other draws as they were to the bit.

    A fixed schedule also moves L_CA's tau ~ U(0, t_i).
    """
    assert differences(draw_8(cdm.CDM(), 0, 5), draw_8(cdm.CDM(**changes), 0, 5)) == changed


# --- The randomness of an iteration: how it is distributed. ---


def standardised(d):
    """All times and noises of a Draw by name, each (B,); L_CA's time relative to its bound t_i."""
    values = by_name(d)
    del values["index"]
    values["tau ca"] = values["tau ca"] / d.schedule[d.index]
    return {name: x[:, 0] if x.ndim > 1 else x for name, x in values.items()}


def test_schedule_and_noise_are_independent():
    """A schedule's mean inner time is not correlated with any time or noise.

    Over 600 schedules of 2 or 3 steps and a batch of 4: |r| < 4 / sqrt(600) for the times and
    noises of the same iteration, and for those of the iteration before.
    """
    cfg = cdm.CDM(max_schedule_steps=3)
    draws = [cdm.draw_iteration(cfg, 0, k, 4, (1,)) for k in range(1, 1000)]
    rows = []
    for before, d in zip(draws, draws[1:], strict=False):
        if len(d.schedule) > 1:
            row = {"schedule": d.schedule[1:].mean()[None]}
            row |= {f"{name}, same": x for name, x in standardised(d).items()}
            row |= {f"{name}, before": x for name, x in standardised(before).items()}
            rows.append(torch.cat(list(row.values())))
    rows = torch.stack(rows[:600])
    # 5 times and 5 noises, of this iteration and of the one before, for each of 4 samples.
    assert rows.shape == (600, 1 + (5 + 5) * 2 * 4)
    r = torch.corrcoef(rows.T)[0, 1:]
    assert r.abs().max() < 4 / math.sqrt(600)


def fixed_draw():
    return cdm.draw_iteration(cdm.CDM(schedule="fixed"), 0, 1, 20_000, (1,), 3.0)


def test_times_are_uniform():
    """20,000 samples: t' and the tau of L_DM, L_CDM, L_fake on (0, 1], L_CA's on (0, t_i]."""
    times = {name: u for name, u in standardised(fixed_draw()).items() if "noise" not in name}
    assert times.keys() == {"t_off", "tau ca", "tau dm", "tau cdm", "tau fake"}
    for u in times.values():
        assert_uniform((u * 10).long().clamp(max=9), 10)


def test_times_fill_the_clamped_range():
    """t' and the tau of L_DM, L_CDM, L_fake reach from 0.02 to 0.98, and not further."""
    d = fixed_draw()
    for u in (d.t_off, d.tau["dm"], d.tau["cdm"], d.tau["fake"]):
        assert (float(u.min()), float(u.max())) == pytest.approx((0.02, 0.98))


def test_ca_time_is_bounded_by_the_anchors():
    """L_CA's tau stays at or below t_i, and comes near its largest value."""
    d = fixed_draw()
    assert (d.tau["ca"] <= d.schedule[d.index]).all()
    assert d.tau["ca"].max() > 0.97


def test_ca_time_is_the_clamp_where_the_anchor_is_below_it():
    """For anchors t_i < 0.02, the clamp alone is left: L_CA's tau is 0.02."""
    d = cdm.draw_iteration(cdm.CDM(time_low=0.005, time_high=0.05), 0, 3, 1000, (1,))
    t_i = d.schedule[d.index]
    assert t_i.min() < 0.01
    assert (d.tau["ca"] >= 0.02).all()
    assert (d.tau["ca"] <= t_i.clamp(0.02, 0.98)).all()


def test_t_off_ignores_the_schedule():
    """t' is above 0.5 for some samples even where all inner times are below 0.05."""
    d = cdm.draw_iteration(cdm.CDM(time_low=0.005, time_high=0.05), 0, 3, 1000, (1,))
    assert (d.t_off > 0.5).any()


def test_times_anchors_and_noises_are_uncorrelated():
    """For any two of 5 times, t_i and 5 noises of 20,000 samples: |r| < 4 / sqrt(20000)."""
    d = fixed_draw()
    r = torch.corrcoef(torch.stack([d.schedule[d.index], *standardised(d).values()]))
    assert len(r) == 1 + 5 + 5
    assert (r - torch.eye(11)).abs().max() < 4 / math.sqrt(20_000)


def test_fixed_schedule():
    """The fixed schedule at shift 3 is 1, 0.9, 0.75, 0.5, and its anchors are uniform on it."""
    d = cdm.draw_iteration(cdm.CDM(schedule="fixed"), 0, 1, 4000, (1,), 3.0)
    assert_close(d.schedule, [1.0, 0.9, 0.75, 0.5], 1e-6)
    assert_uniform(d.index, 4)


@pytest.mark.parametrize("n", [10, 28])
def test_anchors_are_uniform_on_the_steps(n):
    """In a dynamic schedule of n steps, the anchor index is uniform on 0..n-1."""
    draws = (cdm.draw_iteration(cdm.CDM(), 0, k, 4000, (1,), 3.0) for k in range(1, 150))
    assert_uniform(next(d.index for d in draws if len(d.schedule) == n), n)


def test_cdm_point_anchor_looks_at_the_anchor():
    """With cdm_point "anchor", t' is t_i."""
    d = draw_8(cdm.CDM(cdm_point="anchor"), 0, 1)
    assert torch.equal(d.t_off, d.schedule[d.index])


def test_clamps_follow_the_settings():
    """t' and every tau of 100 samples reach from tau_min to tau_max."""
    d = cdm.draw_iteration(cdm.CDM(tau_min=0.4, tau_max=0.6), 0, 3, 100, (1,))
    for u in (d.t_off, *d.tau.values()):
        assert u.min() == u.new_tensor(0.4)
        assert u.max() == u.new_tensor(0.6)


def test_stratified_times_follow_the_settings():
    """Stratified, [time_low, time_high] has one inner time in each of N - 1 bins."""
    cfg = cdm.CDM(stratified=True, time_low=0.5, time_high=0.75)
    d = cdm.draw_iteration(cfg, 0, 3, 100, (1,))
    assert len(d.schedule) > 3
    assert one_per_bin(inner_in_unit_range(d.schedule, 0.5, 0.75, 1))
