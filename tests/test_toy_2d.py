"""The 2-D toy: closed forms, metrics of samples whose scores are known, training, the program."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import cdm
import toy_2d as toy

SCRIPT = Path(toy.__file__).resolve()
SMALL = {"iterations": 200, "fit_steps": 600, "samples": 2000, "frame_every": 1000}
every_mixture = pytest.mark.parametrize("name", toy.MIXTURES)


def exact_samples(name, n=200_000):
    mix = toy.MIXTURES[name]
    c = torch.arange(n) % mix.classes
    return mix, mix.sample(c, cdm.generator("test", 0)), c


# --- The closed forms. ---


def posterior_mean(mix, c, x_t, t, n=300_000):
    """E[noise - x0 | x_t] from data points weighted by N(x_t; (1 - t) x0, t^2), and its error."""
    x0 = mix.sample(torch.full((n,), c), cdm.generator("posterior", c)).double()
    noise = (x_t - (1 - t) * x0) / t
    weight = (-noise.square().sum(1) / 2).exp()
    weight = (weight / weight.sum())[:, None]
    mean = (weight * (noise - x0)).sum(0)
    error = (weight * (noise - x0 - mean)).square().sum(0).sqrt()
    return mean, error


@every_mixture
@pytest.mark.parametrize("t", [0.3, 0.6, 0.95])
def test_velocity_is_the_posterior_mean(name, t):
    mix = toy.MIXTURES[name]
    for c in range(mix.classes + 1):
        x_t = (1 - t) * mix.sample(torch.tensor([c]), cdm.generator("point", c))
        x_t = x_t + t * torch.tensor([[0.3, -0.4]])
        mean, error = posterior_mean(mix, c, x_t.double(), t)
        exact = mix.velocity(x_t, torch.tensor([t]), (torch.tensor([c]),))[0]
        assert (error < 0.02).all()
        assert ((exact - mean).abs() < 5 * error + 1e-5).all()


@every_mixture
def test_velocity_and_density_obey_the_continuity_equation(name):
    """d/dt log p + v . grad log p + div v = 0, by central differences in double precision."""
    mix = copy.deepcopy(toy.MIXTURES[name])
    mix.means = mix.means.double()
    mix.weights = mix.weights.double()
    h = 1e-5
    gen = cdm.generator("continuity")
    c = torch.randint(mix.classes + 1, (500,), generator=gen)
    t = 0.05 + 0.9 * torch.rand(500, generator=gen).double()
    x = cdm.add_noise(mix.sample(c, gen), t, torch.randn(500, 2, generator=gen).double())

    def log_p(x, t):
        return mix.modes_at(x, t, c)[0].logsumexp(1)

    v = mix.velocity(x, t, (c,))
    total = (log_p(x, t + h) - log_p(x, t - h)) / (2 * h)
    size = total.abs()
    for i, step in enumerate(h * torch.eye(2).double()):
        slope = (log_p(x + step, t) - log_p(x - step, t)) / (2 * h)
        change = mix.velocity(x + step, t, (c,)) - mix.velocity(x - step, t, (c,))
        divergence = change[:, i] / (2 * h)
        total = total + v[:, i] * slope + divergence
        size = size + (v[:, i] * slope).abs() + divergence.abs()
    assert (total.abs() < 1e-6 * size + 1e-6).all()


@every_mixture
def test_bin_masses_match_a_million_samples(name):
    mix, x, c = exact_samples(name, 1_000_000)
    masses = mix.bin_masses()
    for cls in range(mix.classes):
        expected = len(x) * masses[cls]
        counts = torch.histogramdd(x[c == cls], [toy.EDGES, toy.EDGES]).hist
        assert ((counts - expected).abs() < 5.5 * expected.sqrt() + 6).all()  # Poisson counts


@every_mixture
def test_bin_masses_are_of_equally_likely_classes(name):
    mix = toy.MIXTURES[name]
    of_class = mix.bin_masses().sum((1, 2))
    assert of_class.tolist() == pytest.approx([1 / mix.classes] * mix.classes, abs=1e-6)


@every_mixture
def test_integrating_the_exact_velocity_reproduces_the_mixture(name):
    mix, x, c = exact_samples(name, 6000)
    floor = toy.measure(mix, x, c)["tv"]  # what 6,000 exact samples score
    got = toy.evaluate(mix.velocity, mix, 6000, {"many": cdm.sampling_times(400)})["many"]
    assert got["tv"] < floor + 0.01
    assert got["artifacts"] < 0.001
    assert got["spread"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("scale, low, high", [(1, 0.46, 0.54), (2, 0.2, 0.35)])
def test_guidance_leaves_the_modes_that_both_classes_share(scale, low, high):
    mix = toy.MIXTURES["shared"]
    teacher = partial(mix.guided_velocity, scale)
    got = toy.evaluate(teacher, mix, 4000, {"many": cdm.sampling_times(200)})["many"]
    assert low < got["shared"] < high


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 8.0])
def test_guidance_moves_from_the_empty_class_to_the_class_and_beyond(scale):
    mix = toy.MIXTURES["shared"]
    gen = cdm.generator("guided")
    x = torch.randn(64, 2, generator=gen)
    t = torch.rand(64, generator=gen)
    c = torch.arange(64) % 2
    v = mix.velocity(x, t, (c,))
    v_empty = mix.velocity(x, t, (torch.full((64,), 2),))
    got = mix.guided_velocity(scale, x, t, (c,))
    assert torch.allclose(got, (1 - scale) * v_empty + scale * v, atol=1e-4)


# --- The metrics, of samples whose scores are known. ---


@every_mixture
def test_metrics_of_exact_samples(name):
    got = toy.measure(*exact_samples(name))
    assert got["tv"] < 0.03
    assert got["artifacts"] == pytest.approx(math.exp(-8), abs=2e-4)  # a 2-D Gaussian beyond 4 std
    assert got["spread"] == pytest.approx(1, abs=0.01)


def test_metrics_of_a_dropped_mode():
    """Mode 0 of class 0 (weight 1/4) moves to its other modes: TV 1/4 in one class of two."""
    mix, x, c = exact_samples("ring")
    others = mix.means[[2, 4, 6]][torch.randint(3, (len(x),), generator=cdm.generator("drop"))]
    gone = (c == 0) & ((x - mix.means[0]).norm(dim=1) < 0.75)
    x = torch.where(gone[:, None], x - mix.means[0] + others, x)
    got = toy.measure(mix, x, c)
    assert got["tv"] == pytest.approx(0.125, abs=0.02)
    assert got["spread"] == pytest.approx(1, abs=0.01)
    assert got["artifacts"] < 1e-3


def test_metrics_of_shrunken_modes():
    """All modes shrink to half: TV is that between two mixtures of different std."""
    mix, x, c = exact_samples("uneq")
    distances = (x[:, None] - mix.means).norm(dim=2)
    centre = mix.means[distances.masked_fill(mix.weights[c] == 0, math.inf).argmin(1)]
    got = toy.measure(mix, centre + 0.5 * (x - centre), c)
    narrow = copy.deepcopy(mix)
    narrow.std *= 0.5
    tv = float((narrow.bin_masses() - mix.bin_masses()).abs().sum() / 2)
    assert got["tv"] == pytest.approx(tv, abs=0.01)
    assert got["spread"] == pytest.approx(0.5, abs=0.01)
    assert got["artifacts"] == 0


def test_metrics_of_an_outlier_cloud():
    """A tenth of the samples move to the middle of the ring, far from all modes."""
    mix, x, c = exact_samples("ring")
    x[:20_000] = 0.1 * torch.randn(20_000, 2, generator=cdm.generator("cloud"))
    got = toy.measure(mix, x, c)
    assert got["artifacts"] == pytest.approx(0.1, abs=0.001)
    assert got["tv"] == pytest.approx(0.1, abs=0.02)


def test_metrics_of_a_moved_share():
    """Samples of the class's own modes move to the first shared mode."""
    mix, x, c = exact_samples("shared")
    x[:50_000] = mix.means[0]
    expected = 0.25 + 0.75 * float(mix.shared[[0, 3]].sum()) / 4  # two of each class's four modes
    assert toy.measure(mix, x, c)["shared"] == pytest.approx(expected, abs=0.01)


def test_metrics_survive_a_method_that_diverges():
    mix, x, c = exact_samples("shared", 1000)
    x[:500] = math.nan
    got = toy.measure(mix, x * torch.tensor([1e30]), c)
    assert got["artifacts"] == 1
    assert got["tv"] == pytest.approx(1, abs=1e-4)
    assert all(math.isfinite(value) for value in got.values())


def test_mean_and_standard_deviation_are_over_seeds():
    runs = [({"4 steps": {"tv": tv}}, [], {}) for tv in (0.1, 0.2, 0.6)]
    mean, std = toy.mean_and_std(runs, "tv", ["4 steps"])
    assert mean.tolist() == pytest.approx([0.3])
    assert std.tolist() == pytest.approx([math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2)])
    assert toy.text(runs[:1], "tv", "4 steps") == "0.10"  # one seed has no standard deviation


# --- Training. ---


def test_the_fitted_network_has_the_exact_velocity():
    mix, x0, c = exact_samples("uneq", 4000)
    gen = cdm.generator("fitted")
    t = torch.rand(len(x0), generator=gen)
    x_t = cdm.add_noise(x0, t, torch.randn(len(x0), 2, generator=gen))
    exact = mix.velocity(x_t, t, (c,))
    error = (toy.fit("uneq", 0, SMALL["fit_steps"])(x_t, t, (c,)) - exact).square().mean()
    assert error < 0.05 * exact.square().mean()


def test_distillation_improves_four_steps():
    metrics, models, _ = toy.train("uneq", toy.METHODS["CDM"], 0, SMALL)
    mix = toy.MIXTURES["uneq"]
    before = toy.evaluate(models[0], mix, SMALL["samples"], toy.GRIDS)
    assert metrics["4 steps"]["artifacts"] < 0.6 * before["4 steps"]["artifacts"]


def test_the_recorded_iteration_is_in_the_order_in_which_it_is_drawn():
    settings = toy.GUIDED["CA + DM + CDM"]
    _, _, asked = toy.train("shared", settings, 0, SMALL | {"iterations": 4, "fit_steps": 10})
    draw = asked["draw"]
    cfg = replace(toy.SETTINGS, **settings)
    assert torch.equal(draw.schedule, cdm.draw_iteration(cfg, 0, 4, 256, (2,), 3.0).schedule)
    *simulation, (x_t, x0_hat), (x_off, _) = asked["student"]
    assert [len(x) for x, _ in simulation] == [
        int((draw.index >= i).sum()) for i in range(int(draw.index.max()) + 1)
    ]
    t_i = draw.schedule[draw.index]
    anchor = cdm.Anchor(x_t, t_i, (x_t - x0_hat) / t_i[:, None])
    assert torch.allclose(cdm.off_trajectory_point(anchor, draw, cfg)[0], x_off, atol=1e-5)
    for name, (z, _) in zip(("ca", "ca", "dm"), asked["teacher"][:3], strict=True):
        assert torch.allclose(cdm.add_noise(x0_hat, draw.tau[name], draw.noise[name]), z)
    for (z, _), (z_fake, _) in zip(asked["teacher"][2:], asked["fake"][1:], strict=True):
        assert torch.equal(z, z_fake)  # L_DM and L_CDM


# --- The program. ---


def test_a_quick_run(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--output-dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    names = ("iteration", "ideas", "samples", "guidance")
    files = {"metrics.json", "toy_training.gif"} | {f"toy_{name}.png" for name in names}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert "quick run: too short to conclude" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    runs = json.loads((tmp_path / "out" / "metrics.json").read_text())["runs"]
    for key in [f"uneq, {name}" for name in toy.METHODS] + [
        f"shared, {name}" for name in toy.GUIDED
    ]:
        assert set(runs[key][0]) == set(toy.GRIDS)
