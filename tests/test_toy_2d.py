"""The two-dimensional toy: closed forms against independent computations, metrics at known values, the program."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cdm  # noqa: E402
import toy_2d as toy  # noqa: E402

FILES = {"metrics.json", "toy_ideas.png", "toy_samples.png", "toy_steps.png", "toy_closeup.png", "toy_anchors.png",
         "toy_guidance.png", "toy_training.gif"}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def exact_samples(name, n, seed=0):
    mix = toy.MIXTURES[name]
    c = torch.arange(n) % mix.classes
    return mix, mix.sample(c, cdm.generator("test", seed)), c


@pytest.mark.parametrize("name", toy.MIXTURES)
@pytest.mark.parametrize("t", [0.3, 0.6, 0.95])
def test_velocity_is_the_posterior_mean(name, t):
    """E[noise - x0 | x_t] estimated by weighting data points with N(x_t; (1 - t) x0, t^2), and its own error."""
    mix, n = toy.MIXTURES[name], 300_000
    for c in range(mix.classes + 1):
        x0 = mix.sample(torch.full((n,), c), cdm.generator("posterior", c)).double()
        x_t = (1 - t) * x0[0] + t * torch.tensor([0.3, -0.4]).double()
        noise = (x_t - (1 - t) * x0) / t
        weight = (-noise.square().sum(1) / 2).exp()
        weight = (weight / weight.sum())[:, None]
        mean = (weight * (noise - x0)).sum(0)
        error = (weight * (noise - x0 - mean)).square().sum(0).sqrt()
        exact = mix.velocity(x_t[None].float(), torch.tensor([t]), (torch.tensor([c]),))[0]
        assert ((exact - mean).abs() < 5 * error + 1e-5).all() and (error < 0.02).all()


@pytest.mark.parametrize("name", toy.MIXTURES)
def test_velocity_and_density_obey_the_continuity_equation(name):
    """d/dt log p + v . grad log p + div v = 0, all derivatives by central differences in double precision."""
    mix = copy.deepcopy(toy.MIXTURES[name])
    mix.means, mix.weights = mix.means.double(), mix.weights.double()
    n, h = 500, 1e-5
    gen = cdm.generator("continuity")
    c = torch.randint(mix.classes + 1, (n,), generator=gen)
    t = 0.05 + 0.9 * torch.rand(n, generator=gen).double()
    x = cdm.add_noise(mix.sample(c, gen), t, torch.randn(n, 2, generator=gen).double())
    v = mix.velocity(x, t, (c,))
    total = (mix.log_density(x, t + h, c) - mix.log_density(x, t - h, c)) / (2 * h)
    size = total.abs()
    for i, step in enumerate(h * torch.eye(2).double()):
        slope = (mix.log_density(x + step, t, c) - mix.log_density(x - step, t, c)) / (2 * h)
        stretch = (mix.velocity(x + step, t, (c,)) - mix.velocity(x - step, t, (c,)))[:, i] / (2 * h)
        total, size = total + v[:, i] * slope + stretch, size + (v[:, i] * slope).abs() + stretch.abs()
    assert (total.abs() < 1e-6 * size + 1e-6).all()


@pytest.mark.parametrize("name", toy.MIXTURES)
def test_bin_masses_sum_to_one_and_match_a_million_samples(name):
    mix, x, c = exact_samples(name, 1_000_000)
    p, q = mix.bin_masses().double(), toy.histogram(x, c, mix.classes).double()
    assert abs(float(p.sum()) - 1) < 1e-6 and abs(float(q.sum()) - 1) < 1e-6
    assert ((q - p).abs() * len(x) < 5.5 * (len(x) * p).sqrt() + 6).all()  # about 9,800 Poisson counts
    half = mix.bin_masses().view(-1)[:-1].view(mix.classes, -1).sum(1)
    assert torch.allclose(half, torch.full_like(half, 1 / mix.classes), atol=1e-6)  # classes are equally likely


@pytest.mark.parametrize("name", toy.MIXTURES)
def test_integrating_the_exact_velocity_reproduces_the_mixture(name):
    mix, x, c = exact_samples(name, 20_000)
    floor = toy.measure(mix, x, c)["tv"]  # what 20,000 exact samples score
    noise, c = toy.start(mix, 20_000, "integrate")
    got = toy.measure(mix, cdm.sample(mix.velocity, noise, cdm.uniform_times(200), (c,)), c)
    assert got["tv"] < floor + 0.01 and got["weights"] < 0.01 and got["artifacts"] < 0.001
    assert got["spread"] == pytest.approx(1, abs=0.02)


def test_metrics_of_exact_samples():
    for name in toy.MIXTURES:
        mix, x, c = exact_samples(name, 200_000)
        got = toy.measure(mix, x, c)
        assert got["tv"] < 0.03 and got["kl_data"] < 0.01 and got["kl_samples"] < 0.01 and got["weights"] < 0.005
        assert got["artifacts"] == pytest.approx(math.exp(-8), abs=2e-4)  # a 2-D Gaussian beyond 4 std
        assert got["spread"] == pytest.approx(1, abs=0.01)


def test_metrics_of_a_dropped_mode():
    """Mode 0 of class 0 (weight 1/4) moves to its other modes: a total variation of 1/4 in one class of two."""
    mix, x, c = exact_samples("ring", 200_000)
    own = mix.means[[2, 4, 6]][torch.randint(3, (len(x),), generator=cdm.generator("drop"))]
    gone = (c == 0) & ((x - mix.means[0]).norm(dim=1) < 0.75)
    x = torch.where(gone[:, None], x - mix.means[0] + own, x)
    got = toy.measure(mix, x, c)
    assert got["tv"] == pytest.approx(0.125, abs=0.02) and got["weights"] == pytest.approx(0.125, abs=0.005)
    assert got["spread"] == pytest.approx(1, abs=0.01) and got["artifacts"] < 1e-3
    assert got["kl_samples"] == pytest.approx(math.log(4 / 3) / 2, abs=0.02)  # each sample of class 0 is 4/3 too likely
    assert got["kl_data"] > 0.5  # what is missing costs the other divergence far more


def test_metrics_of_shrunken_modes():
    mix, x, c = exact_samples("uneq", 200_000)
    centre = mix.means[mix.distances(x, c).argmin(1)]
    got = toy.measure(mix, centre + 0.5 * (x - centre), c)
    assert got["spread"] == pytest.approx(0.5, abs=0.01) and got["weights"] < 0.005 and got["artifacts"] == 0
    narrow = copy.deepcopy(mix)
    narrow.std *= 0.5
    assert got["tv"] == pytest.approx(float((narrow.bin_masses() - mix.bin_masses()).abs().sum() / 2), abs=0.01)


def test_metrics_of_an_outlier_cloud():
    mix, x, c = exact_samples("ring", 200_000)
    x[:20_000] = 0.1 * torch.randn(20_000, 2, generator=cdm.generator("cloud"))  # in the middle of the ring
    got = toy.measure(mix, x, c)
    assert got["artifacts"] == pytest.approx(0.1, abs=0.001) and got["tv"] == pytest.approx(0.1, abs=0.02)
    assert got["kl_samples"] > 5 * got["kl_data"] and got["weights"] < 0.02


def test_metrics_survive_a_method_that_diverges():
    mix, x, c = exact_samples("shared", 1000)
    x[:500] = math.nan
    got = toy.measure(mix, x * torch.tensor([1e30]), c)
    assert got["artifacts"] == 1 and all(math.isfinite(value) for value in got.values())


def test_guidance_leaves_the_modes_that_both_classes_share():
    """Without guidance the teacher gives shared modes half of each class; with guidance clearly less."""
    mix = toy.MIXTURES["shared"]
    x, c = toy.teacher_samples(mix, 4000, 0)
    assert toy.measure(mix, x, c, mix.bin_masses())["shared_modes"] == pytest.approx(0.5, abs=0.04)
    x, c = toy.teacher_samples(mix, 4000, 1)
    assert toy.measure(mix, x, c, mix.bin_masses())["shared_modes"] < 0.35


def test_anchor_aware_fake_score_starts_as_the_plain_one_to_the_last_bit():
    mix, net = toy.MIXTURES["ring"], toy.Net(2)
    (x, c), t = toy.start(mix, 64, "bits"), torch.rand(64, generator=cdm.generator("bits t"))
    assert torch.equal(net(x, t, (c,)), net(x, t, (c,), anchor_t=t.flip(0)))
    losses = []
    for aware in (False, True):
        cfg = replace(toy.SETTINGS, **toy.METHODS["DM fixed"], anchor_aware_fake=aware)
        learners = [cdm.Learner(copy.deepcopy(net), [(net.params(), 0.0)], cfg) for _ in range(2)]
        draw = cdm.draw_iteration(cfg, 0, 2, 64, (2,), toy.SHIFT)
        stats = cdm.cdm_iteration(2, [((c,), (c,), draw)], mix.velocity, *learners, copy.deepcopy(net.params()), cfg)
        losses.append((float(stats["loss_fake"]), float(stats["loss_dm"])))
    assert losses[0] == losses[1]


def test_the_anchor_layer_learns_only_when_it_is_asked_to():
    mix, net = toy.MIXTURES["ring"], toy.Net(2)
    fakes = {}
    for method in ("CDM", "CDM *"):
        cfg = replace(toy.SETTINGS, **toy.METHODS[method])
        fake = copy.deepcopy(net)
        student = copy.deepcopy(net)
        groups = [(fake.params(), cfg.fake_lr), (fake.params(anchor=True), cfg.anchor_lr)]
        learners = cdm.Learner(student, [(student.params(), cfg.student_lr)], cfg), cdm.Learner(fake, groups, cfg)
        _, c = toy.start(mix, 32, "learn")
        for k in (1, 2):
            draw = cdm.draw_iteration(cfg, 0, k, 32, (2,), toy.SHIFT)
            cdm.cdm_iteration(k, [((c,), (c,), draw)], mix.velocity, *learners, copy.deepcopy(net).params(), cfg)
        fakes[method] = fake
        assert student.anchor.weight.eq(0).all()
    assert fakes["CDM"].anchor.weight.eq(0).all() and fakes["CDM *"].anchor.weight.ne(0).any()


def run(*flags, cwd):
    return subprocess.Popen([sys.executable, str(ROOT / "toy_2d.py"), *map(str, flags)], cwd=cwd, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"},  # several at once; threads that share cores crawl
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_quick_run_writes_everything_and_is_deterministic(tmp_path):
    runs = [run("--quick", "--seed", 3, "--output-dir", tmp_path / name, cwd=tmp_path) for name in "ab"]
    out, err = zip(*(process.communicate(timeout=300) for process in runs))
    assert [process.returncode for process in runs] == [0, 0], err
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES
    assert (tmp_path / "a/metrics.json").read_bytes() == (tmp_path / "b/metrics.json").read_bytes()
    report = json.loads((tmp_path / "a/metrics.json").read_text())
    for mixture, methods in (("uneq", toy.METHODS), ("shared", toy.GUIDED)):
        for method in methods:
            assert method in out[0]
            grids = report["runs"][mixture][method]["3"]["grids"]
            assert set(grids) == set(toy.GRIDS)
            assert report["summary"][mixture][method]["grids"]["4 steps"]["tv"] == [grids["4 steps"]["tv"], 0.0]
    assert report["settings"]["seeds"] == [3]


@pytest.mark.parametrize("flags", ["--iterations -5", "--iterations 0", "--iterations many", "--mixture swiss", "--seeds 0",
                                   "--seed -1", "--what", "--output-dir taken", "--output-dir taken/below"])
def test_bad_input_is_one_sentence_and_writes_nothing(flags, tmp_path, monkeypatch, capfd):
    """In this process; `--what` in one of its own, too."""
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    monkeypatch.setattr(sys, "argv", ["toy_2d.py", *flags.split()])
    with pytest.raises(SystemExit) as exit:
        toy.main()
    results = [(exit.value.code, *capfd.readouterr())]
    if flags == "--what":
        process = run(flags, cwd=tmp_path)
        results.append((process.wait(60), *process.communicate()))
    for code, out, err in results:
        assert code == 2 and out == "" and err.startswith("toy_2d.py: ") and err.count("\n") == 1, err
    assert os.listdir() == ["taken"]
