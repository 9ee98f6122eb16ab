"""The 2-D toy: closed forms, metrics of samples whose scores are known, and the program."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import run_toy_quickly

import cdm
import toy_2d as toy

SCRIPT = Path(toy.__file__).resolve()
FIGURES = ("ideas", "samples", "steps", "anchors", "guidance")
FILES = {"metrics.json", "toy_training.gif"} | {f"toy_{name}.png" for name in FIGURES}
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
    v = mix.velocity(x, t, (c,))
    total = (mix.log_density(x, t + h, c) - mix.log_density(x, t - h, c)) / (2 * h)
    size = total.abs()
    for i, step in enumerate(h * torch.eye(2).double()):
        slope = (mix.log_density(x + step, t, c) - mix.log_density(x - step, t, c)) / (2 * h)
        change = mix.velocity(x + step, t, (c,)) - mix.velocity(x - step, t, (c,))
        divergence = change[:, i] / (2 * h)
        total = total + v[:, i] * slope + divergence
        size = size + (v[:, i] * slope).abs() + divergence.abs()
    assert (total.abs() < 1e-6 * size + 1e-6).all()


@every_mixture
def test_bin_masses_match_a_million_samples(name):
    mix, x, c = exact_samples(name, 1_000_000)
    p = mix.bin_masses().double()
    q = toy.histogram(x, c, mix.classes).double()
    # About 9,800 Poisson counts.
    assert ((q - p).abs() * len(x) < 5.5 * (len(x) * p).sqrt() + 6).all()


@every_mixture
def test_bin_masses_and_histogram_sum_to_one(name):
    mix, x, c = exact_samples(name)
    assert float(mix.bin_masses().double().sum()) == pytest.approx(1, abs=1e-6)
    assert float(toy.histogram(x, c, mix.classes).double().sum()) == pytest.approx(1, abs=1e-6)


@every_mixture
def test_classes_are_equally_likely(name):
    mix = toy.MIXTURES[name]
    of_class = mix.bin_masses()[:-1].view(mix.classes, -1).sum(1)
    assert of_class.tolist() == pytest.approx([1 / mix.classes] * mix.classes, abs=1e-6)


@every_mixture
def test_integrating_the_exact_velocity_reproduces_the_mixture(name):
    mix, x, c = exact_samples(name, 20_000)
    floor = toy.measure(mix, x, c)["tv"]  # what 20,000 exact samples score
    noise, c = toy.start(mix, 20_000, "integrate")
    got = toy.measure(mix, cdm.sample(mix.velocity, noise, cdm.uniform_times(200), (c,)), c)
    assert got["tv"] < floor + 0.01
    assert got["weights"] < 0.01
    assert got["artifacts"] < 0.001
    assert got["spread"] == pytest.approx(1, abs=0.02)


def share_in_shared_modes(scale):
    mix = toy.MIXTURES["shared"]
    noise, c = toy.start(mix, 4000, "guidance")
    teacher = partial(mix.guided_velocity, scale)
    x = cdm.sample(teacher, noise, cdm.uniform_times(200), (c,))
    return toy.measure(mix, x, c)["shared_modes"]


def test_without_guidance_half_of_each_class_is_in_shared_modes():
    assert share_in_shared_modes(1) == pytest.approx(0.5, abs=0.04)


def test_guidance_leaves_the_modes_that_both_classes_share():
    assert share_in_shared_modes(2) < 0.35


@pytest.mark.parametrize("class_", [0, 1])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 8.0])
def test_guidance_moves_from_the_empty_class_to_the_class_and_beyond(class_, scale):
    """v(empty) + scale (v(c) - v(empty)): the convention of cdm.py, scale 1 is without guidance."""
    mix = toy.MIXTURES["shared"]
    x, _ = toy.start(mix, 64, "guided")
    t = torch.rand(64, generator=cdm.generator("guided t"))
    c = torch.full((64,), class_)
    v = mix.velocity(x, t, (c,))
    v_empty = mix.velocity(x, t, (torch.full((64,), 2),))
    got = mix.guided_velocity(scale, x, t, (c,))
    assert torch.allclose(got, (1 - scale) * v_empty + scale * v, atol=1e-4)


# --- The metrics, of samples whose scores are known. ---


@every_mixture
def test_metrics_of_exact_samples(name):
    got = toy.measure(*exact_samples(name))
    assert got["tv"] < 0.03
    assert got["weights"] < 0.005
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
    assert got["weights"] == pytest.approx(0.125, abs=0.005)
    assert got["spread"] == pytest.approx(1, abs=0.01)
    assert got["artifacts"] < 1e-3


def test_metrics_of_shrunken_modes():
    """All modes shrink to half: TV is that between two mixtures of different std."""
    mix, x, c = exact_samples("uneq")
    centre = mix.means[mix.distances(x, c).argmin(1)]
    got = toy.measure(mix, centre + 0.5 * (x - centre), c)
    narrow = copy.deepcopy(mix)
    narrow.std *= 0.5
    tv = float((narrow.bin_masses() - mix.bin_masses()).abs().sum() / 2)
    assert got["tv"] == pytest.approx(tv, abs=0.01)
    assert got["spread"] == pytest.approx(0.5, abs=0.01)
    assert got["weights"] < 0.005
    assert got["artifacts"] == 0


def test_metrics_of_an_outlier_cloud():
    """A tenth of the samples move to the middle of the ring, far from all modes."""
    mix, x, c = exact_samples("ring")
    x[:20_000] = 0.1 * torch.randn(20_000, 2, generator=cdm.generator("cloud"))
    got = toy.measure(mix, x, c)
    assert got["artifacts"] == pytest.approx(0.1, abs=0.001)
    assert got["tv"] == pytest.approx(0.1, abs=0.02)
    assert got["weights"] < 0.02


def test_metrics_survive_a_method_that_diverges():
    mix, x, c = exact_samples("shared", 1000)
    x[:500] = math.nan
    got = toy.measure(mix, x * torch.tensor([1e30]), c)
    assert got["artifacts"] == 1
    assert all(math.isfinite(value) for value in got.values())


def test_mean_and_standard_deviation_are_over_seeds():
    runs = {}
    for seed, tv in enumerate((0.1, 0.2, 0.6)):
        runs[seed] = {"grids": {"4 steps": {"tv": tv}}}
    results = toy.Results("ring", {"ring": {"CDM": runs}}, {}, [], "")
    mean, std = results.values("ring", "CDM", "tv", ["4 steps"])
    assert mean.tolist() == pytest.approx([0.3])
    assert std.tolist() == pytest.approx([math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2)])


# --- The anchor-aware fake score. ---


def one_iteration(k, cfg, student, fake, student_lr=0.0, fake_lr=0.0):
    """Iteration k on the mixture "ring". Returns its statistics."""
    mix = toy.MIXTURES["ring"]
    fake_groups = [(fake.params(), fake_lr), (fake.params(anchor=True), cfg.anchor_lr)]
    learner = cdm.Learner(student, [(student.params(), student_lr)], cfg)
    fake_learner = cdm.Learner(fake, fake_groups, cfg)
    c = torch.arange(64) % mix.classes
    draw = cdm.draw_iteration(cfg, 0, k, 64, (2,), toy.SHIFT)
    ema = copy.deepcopy(student).params()
    batches = [((c,), (c,), draw)]
    return cdm.cdm_iteration(k, batches, mix.velocity, learner, fake_learner, ema, cfg)


def test_the_anchor_layer_starts_without_effect():
    net = toy.Net(2)
    x, c = toy.start(toy.MIXTURES["ring"], 64, "bits")
    t = torch.rand(64, generator=cdm.generator("bits t"))
    assert torch.equal(net(x, t, (c,)), net(x, t, (c,), made_at=t.flip(0)))


def test_an_anchor_aware_fake_score_starts_with_the_losses_of_a_plain_one():
    net = toy.Net(2)
    losses = []
    for aware in (False, True):
        settings = toy.METHODS["DM fixed"] | {"anchor_aware_fake": aware, "anchor_lr": 0.0}
        cfg = replace(toy.SETTINGS, **settings)
        stats = one_iteration(2, cfg, copy.deepcopy(net), copy.deepcopy(net))
        losses.append((float(stats["loss_fake"]), float(stats["loss_dm"])))
    assert losses[0] == losses[1]


def anchor_layers_after_training(method):
    """The anchor layers of student and fake score after two iterations."""
    cfg = replace(toy.SETTINGS, **toy.METHODS[method])
    student = toy.Net(2)
    fake = copy.deepcopy(student)
    for k in (1, 2):
        one_iteration(k, cfg, student, fake, cfg.student_lr, cfg.fake_lr)
    return student.anchor.weight, fake.anchor.weight


def test_the_anchor_layer_of_a_plain_fake_score_stays_zero():
    _, fake = anchor_layers_after_training("CDM")
    assert fake.eq(0).all()


def test_the_anchor_layer_of_an_anchor_aware_fake_score_learns():
    _, fake = anchor_layers_after_training("CDM *")
    assert fake.ne(0).any()


@pytest.mark.parametrize("method", ["CDM", "CDM *"])
def test_the_anchor_layer_of_the_student_stays_zero(method):
    student, _ = anchor_layers_after_training(method)
    assert student.eq(0).all()


# --- The program. ---


def start_program(*flags, cwd):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, flags)],
        cwd=cwd,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # several run at once on the same cores
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def quick_run(early):
    """The folder of a quick run, and what it printed."""
    return early["quick_run"].result()


@pytest.fixture
def report(quick_run):
    folder, _ = quick_run
    return json.loads((folder / "metrics.json").read_text())


def test_a_quick_run_writes_all_files(quick_run):
    folder, _ = quick_run
    assert {path.name for path in folder.iterdir()} == FILES


@pytest.mark.slow
def test_a_quick_run_is_deterministic(quick_run, tmp_path):
    folder, _ = quick_run
    run_toy_quickly(tmp_path / "again")
    again = (tmp_path / "again" / "metrics.json").read_bytes()
    assert (folder / "metrics.json").read_bytes() == again


def test_a_quick_run_says_that_it_is_too_short(quick_run):
    _, printed = quick_run
    assert "quick run: too short to conclude" in printed


def test_the_table_has_all_methods_and_fits_100_columns(quick_run):
    _, printed = quick_run
    for method in (*toy.METHODS, *toy.GUIDED):
        assert f"\n{method}  " in printed
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize("mixture, methods", [("uneq", toy.METHODS), ("shared", toy.GUIDED)])
def test_the_report_has_every_method_on_every_grid(report, mixture, methods):
    for method in methods:
        assert set(report["runs"][mixture][method]["3"]["grids"]) == set(toy.GRIDS)


def test_the_report_names_its_seeds(report):
    assert report["settings"]["seeds"] == [3]


MISTAKES = [
    "--iterations -5",
    "--iterations 0",
    "--iterations many",
    "--mixture swiss",
    "--seeds 0",
    "--seed -1",
    "--what",
    "--output-dir taken",
    "--output-dir taken/below",
]


def assert_one_sentence(code, out, err):
    assert code == 2
    assert out == ""
    assert err.startswith("toy_2d.py: ")
    assert err.count("\n") == 1, err
    assert os.listdir() == ["taken"]  # nothing was written


@pytest.fixture
def folder_with_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    return tmp_path


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_one_sentence(flags, folder_with_a_file, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["toy_2d.py", *flags.split()])
    with pytest.raises(SystemExit) as exit:
        toy.main()
    assert_one_sentence(exit.value.code, *capfd.readouterr())


def test_a_mistake_is_one_sentence_in_a_process_of_its_own(folder_with_a_file):
    program = start_program("--what", cwd=folder_with_a_file)
    out, err = program.communicate(timeout=60)
    assert_one_sentence(program.returncode, out, err)


def test_importing_the_toy_neither_trains_nor_draws(tmp_path):
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    run = [sys.executable, "-c", "import toy_2d"]
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == []
