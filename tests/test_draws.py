"""Sec. 3.2 and the randomness of an iteration: schedules, backward simulation, sampling, draws."""

import math
import zlib
from dataclasses import fields
from functools import partial

import pytest
import torch
from reference import (
    Net,
    assert_close,
    assert_uniform,
    by_name,
    conditions,
    differences,
    randn,
    rollout,
)

import cdm

# --- Times in numbers. ---


def test_shift_in_numbers():
    """t <- 3 t / (1 + 2 t): DMD2's 1, 0.75, 0.5, 0.25 become 1, 0.9, 0.75, 0.5."""
    times = torch.tensor([1.0, 0.75, 0.5, 0.25])
    assert_close(cdm.shift_times(times, 3.0), [1.0, 0.9, 0.75, 0.5], 1e-6)
    assert torch.equal(cdm.shift_times(times, 1.0), times)


def test_sampling_times_in_numbers():
    """Equal steps before the shift: 1, 2/3, 1/3, and 1, 6/7, 3/5 at shift 3."""
    assert cdm.sampling_times(1).tolist() == [1]
    assert_close(cdm.sampling_times(3), [1, 2 / 3, 1 / 3], 1e-6)
    assert_close(cdm.sampling_times(3, 3.0), [1, 6 / 7, 3 / 5], 1e-6)


def test_sec_3_2_schedule_in_numbers():
    """With inner times of [0.25, 0.25] and shift 3, a schedule is 1, 0.5, 0.5, ..."""
    times = cdm.sample_schedule(28, 0.25, 0.25, 3.0)
    assert_close(times, [1, *[0.5] * (len(times) - 1)], 1e-6)


# --- Sec. 3.2: the schedule. ---


def test_sec_3_2_number_of_steps_is_uniform():
    """N ~ U{1..28}, in one stream and over iterations, each of which has its own generator."""
    gen = torch.Generator().manual_seed(0)
    stream = [cdm.sample_schedule(28, 0.25, 0.95, generator=gen) for _ in range(2800)]
    draws = [cdm.draw_iteration(cdm.CDMConfig(), 0, k, 1, (1,)) for k in range(1, 2801)]
    for schedules in (stream, [d.schedule for d in draws]):
        assert_uniform(torch.tensor([len(times) - 1 for times in schedules]), 28)


def many_schedules(low, high, shift, stratified):
    """300 schedules, and the inner times of each in [0, 1]: ascending, with the shift undone."""
    gen = torch.Generator().manual_seed(1)
    for _ in range(300):
        times = cdm.sample_schedule(28, low, high, shift, stratified, gen).double()
        inner = times[1:] / (shift - (shift - 1) * times[1:])
        yield times, ((inner - low) / (high - low)).flip(0)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("low, high, shift", [(0.25, 0.95, 3), (0.02, 0.98, 1)])
def test_sec_3_2_schedules_descend_from_1_and_are_uniform(low, high, shift, stratified):
    """The inner times fill the shifted [low, high], uniformly before the shift."""
    inner = []
    for times, u in many_schedules(low, high, shift, stratified):
        assert times[0] == 1
        assert (times.diff() < 0).all()
        inner.append(u)
    u = torch.cat(inner)
    assert -1e-5 < u.min() < 0.02
    assert 0.98 < u.max() < 1 + 1e-5
    assert_uniform((u * 25).long().clamp(0, 24), 25)


def test_stratified_schedules_hold_one_time_in_each_bin():
    """Each of N - 1 equal bins has one inner time, anywhere in it, whatever the others do."""

    def one_per_bin(u):
        return (u * len(u)).floor().tolist() == list(range(len(u)))

    plain = [one_per_bin(u) for _, u in many_schedules(0.25, 0.95, 3, stratified=False)]
    assert sum(plain) < 60  # all of N = 1 and 2, and a few others
    places, pairs = [], []
    for _, u in many_schedules(0.25, 0.95, 3, stratified=True):
        assert one_per_bin(u)
        bins = u * len(u)
        places.append(bins.frac())
        pairs.append(torch.stack([bins.frac()[1:], bins.frac()[:-1]]))
    assert_uniform((torch.cat(places) * 25).long(), 25)
    pairs = torch.cat(pairs, 1)
    assert torch.corrcoef(pairs)[0, 1].abs() < 4 / math.sqrt(pairs.shape[1])


# --- Sec. 3.2: backward simulation. And sampling. ---


def velocity_is_tx(x, t, cond):
    return t[:, None] * x


def test_sec_3_2_simulation_in_numbers():
    """With v = t x, a sample goes from 8 at t = 1 to 8 - 1/2 8 = 4 at 1/2, and to 3.5 at 1/4.

    The anchors of three samples that start at 8 are the three points, each with its own v.
    """
    noise = torch.full((3, 1), 8.0)
    schedule, index = torch.tensor([1.0, 0.5, 0.25]), torch.tensor([2, 0, 1])
    anchor = cdm.backward_simulation(velocity_is_tx, noise, schedule, index, ())
    assert anchor.x_t.flatten().tolist() == [3.5, 8, 4]
    assert anchor.v.flatten().tolist() == [0.875, 8, 2]
    assert anchor.t.tolist() == [0.25, 1, 0.5]
    assert (noise == 8).all()


def test_sampling_in_numbers():
    """With v = t x and times 1, 1/2, a sample goes from 8 to 4 and to 4 - 1/2 2 = 3 at t = 0."""
    noise = torch.tensor([[8.0]], requires_grad=True)
    x0 = cdm.sample(velocity_is_tx, noise, torch.tensor([1.0, 0.5]), ())
    assert x0.item() == 3
    assert not x0.requires_grad


@pytest.mark.parametrize("n, shape", [(1, (4, 2)), (2, (1, 2)), (7, (16, 2)), (5, (6, 4, 8, 8))])
def test_sec_3_2_simulation_is_a_full_rollout_at_the_anchors(n, shape):
    """Anchors are the points of a rollout of all samples to t = 0, read off at each index.

    max(index) + 1 calls evaluate sum(index + 1) samples, without gradient.
    """
    student = Net(shape[1:], 1)
    noise, cond = randn(*shape), conditions(shape[0])
    schedule = torch.tensor([1.0, 0.93, 0.8, 0.55, 0.5, 0.21, 0.04])[:n]
    index = torch.randint(n, shape[:1], generator=torch.Generator().manual_seed(3))
    anchor = cdm.backward_simulation(student, noise.requires_grad_(), schedule, index, cond)
    assert len(student.log) == int(index.max()) + 1
    assert student.evaluations(grad=False) == int((index + 1).sum())
    assert student.evaluations(grad=True) == 0
    assert not any(getattr(anchor, f.name).requires_grad for f in fields(anchor))

    x, v = rollout(student, noise, schedule, cond)
    rows = torch.arange(len(index))
    assert_close(anchor.x_t, x[index, rows])
    assert_close(anchor.t, schedule[index])
    assert_close(anchor.v, v[index, rows])


# --- The randomness of an iteration: how it is keyed. ---

draw_8 = partial(cdm.draw_iteration, batch=8, shape=(4, 2), shift=3.0)


def test_generators_depend_on_all_of_their_key():
    """The seed is the CRC-32 of the key as it is printed, the same on every machine."""
    assert cdm.generator(0, 5, "schedule").initial_seed() == zlib.crc32(b"(0, 5, 'schedule')")


def test_draw_depends_on_seed_and_iteration_alone():
    """Another seed or another k changes t', every tau and every noise.

    The same give the same, whatever the state of torch's global generator, which is left alone.
    """
    a = draw_8(cdm.CDMConfig(), 0, 5)
    state = torch.manual_seed(1).get_state()
    assert differences(a, draw_8(cdm.CDMConfig(), 0, 5)) == set()
    assert torch.equal(torch.get_rng_state(), state)
    for seed, k in ((0, 6), (1, 5)):
        b = draw_8(cdm.CDMConfig(), seed, k)
        assert differences(a, b) >= by_name(a).keys() - {"schedule", "index"}


def test_a_rank_holds_its_rows_of_the_global_batch():
    """Rank 1 of 4 holds rows 2 and 3 of the very batch that a single process draws."""
    cfg = cdm.CDMConfig(cdm_point="renoise")
    a, b = (by_name(draw_8(cfg, 0, 5, rows=rows)) for rows in (slice(None), slice(2, 4)))
    assert torch.equal(a.pop("schedule"), b.pop("schedule"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name][2:4], b[name]) for name in a)


@pytest.mark.parametrize(
    "changes, changed",
    [
        ({"ca_weight": 0.0, "dm_weight": 0.0, "cdm_weight": 0.0}, set()),
        ({"cdm_point": "renoise"}, {"noise off"}),
        ({"cdm_point": "anchor"}, set()),
        ({"schedule": "fixed"}, {"schedule", "index", "tau ca"}),
    ],
)
def test_a_setting_changes_no_draw_but_its_own(changes, changed):
    """A fixed schedule also moves L_CA's tau ~ U(0, t_i). All else stays as it was to the bit."""
    base = draw_8(cdm.CDMConfig(), 0, 5)
    assert differences(base, draw_8(cdm.CDMConfig(**changes), 0, 5)) == changed


# --- The randomness of an iteration: how it is distributed. ---


def fixed_draw(**settings):
    """20,000 samples of the fixed schedule."""
    cfg = cdm.CDMConfig(schedule="fixed", **settings)
    return cdm.draw_iteration(cfg, 0, 1, 20_000, (1,), 3.0)


def test_fixed_schedule():
    """At shift 3 it is 1, 0.9, 0.75, 0.5. Its anchors are uniform on it."""
    d = fixed_draw()
    assert_close(d.schedule, [1.0, 0.9, 0.75, 0.5], 1e-6)
    assert_uniform(d.index, 4)


def test_sec_3_2_anchors_are_uniform_on_the_steps():
    """In a dynamic schedule of 28 steps, the anchor index is uniform on 0..27."""
    draws = (cdm.draw_iteration(cdm.CDMConfig(), 0, k, 4000, (1,), 3.0) for k in range(1, 150))
    assert_uniform(next(d.index for d in draws if len(d.schedule) == 28), 28)


def test_draws_are_uniform_normal_and_independent():
    """t' and the tau of L_DM, L_CDM, L_fake are uniform on (0, 1], L_CA's on (0, t_i].

    Noises are normal. No two of them, or of them and t_i, are correlated: |r| < 4 / sqrt(20000).
    """
    d = fixed_draw(cdm_point="renoise")
    assert d.tau.keys() == {"ca", "dm", "cdm", "fake"}
    assert d.noise.keys() == {"ca", "dm", "cdm", "fake", "start", "off"}
    t_i = d.schedule[d.index]
    values = [d.t_off, d.tau["ca"] / t_i, d.tau["dm"], d.tau["cdm"], d.tau["fake"]]
    for noise in d.noise.values():
        values.append(torch.distributions.Normal(0, 1).cdf(noise[:, 0]))
    for u in values:
        assert_uniform((u * 10).long().clamp(max=9), 10)
    r = torch.corrcoef(torch.stack([t_i, *values]))
    assert (r - torch.eye(12)).abs().max() < 4 / math.sqrt(20_000)


def test_times_fill_the_clamped_range():
    """t' and every tau reach from 0.02 to 0.98 and not further, but L_CA's tau stays below t_i."""
    d = fixed_draw()
    for u in (d.t_off, d.tau["dm"], d.tau["cdm"], d.tau["fake"]):
        assert (float(u.min()), float(u.max())) == pytest.approx((0.02, 0.98))
    assert (d.tau["ca"] <= d.schedule[d.index]).all()
    assert d.tau["ca"].max() > 0.97


def test_times_are_never_0(monkeypatch):
    """U(0, 1]: where torch draws 0, as it can, the time is 1 and not 0."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(size))
    d = draw_8(cdm.CDMConfig(schedule="fixed", tau_min=0.0, tau_max=1.0), 0, 1)
    for u in (d.t_off, d.tau["dm"], d.tau["cdm"], d.tau["fake"]):
        assert (u == 1).all()
    assert torch.equal(d.tau["ca"], d.schedule[d.index])


def test_draws_follow_the_settings():
    """At most 3 steps, one inner time in each half of [0.01, 0.05], clamps of 0.1 and 0.6.

    At shift 3, the ends and the middle of that range are at 0.0294, 0.0849 and 0.1364. For anchors
    below 0.1 the clamp alone is left of L_CA's tau. t' does not care.
    """
    times = {"max_schedule_steps": 3, "time_low": 0.01, "time_high": 0.05, "stratified": True}
    cfg = cdm.CDMConfig(tau_min=0.1, tau_max=0.6, **times)
    lengths = set()
    for k in range(1, 60):
        d = cdm.draw_iteration(cfg, 0, k, 100, (1,), 3.0)
        for u in (d.t_off, d.tau["dm"], d.tau["cdm"], d.tau["fake"]):
            assert (float(u.min()), float(u.max())) == pytest.approx((0.1, 0.6))
        t_i = d.schedule[d.index]
        assert (d.tau["ca"] >= 0.1).all()
        assert (d.tau["ca"] <= t_i.clamp(0.1, 0.6)).all()
        lengths.add(len(d.schedule))
        if len(d.schedule) == 3:
            assert 0.1364 > d.schedule[1] > 0.0849 > d.schedule[2] > 0.0294
    assert lengths == {1, 2, 3}
