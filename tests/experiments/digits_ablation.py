"""The paper's ablation table for SD3-Medium in miniature: real digits, one command, some hours.

    python tests/experiments/digits_ablation.py           # about three hours on two cores
    python tests/experiments/digits_ablation.py --quick   # three minutes; too short to judge

Every row distils `tests/digits_sd3` with the program `cdm.py` by its flags, with the same
iterations, batch and seeds. Seed 0 runs at each learning rate of RATES. The rate with the smallest
distance to the row's target at 4 steps is kept for the row's other seeds. Rows of SAME_RATES also
run over three seeds at each of its rates, so that they differ in nothing else.

Writes into --output-dir a folder for each cell (its student and its measurements), `results.json`,
`table.md` and `figure.png`. It can be stopped: what is there is not done again. Not a test: pytest
does not collect it. README.md beside this file reports the results.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, lru_cache
from pathlib import Path
from statistics import mean, stdev

# One process on each core: threads that share cores are slow.
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # notices about optional packages
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from controls import CONTROLS
from digits import PROMPTS, frechet_distance, load_digits, to_pixels
from tqdm import tqdm

import cdm

ROOT = Path(__file__).resolve().parents[2]
TEACHER = str(ROOT / "tests" / "digits_sd3")

# --- 1. The plan. ---

NO_CA = "--ca-weight 0"
NO_DM = "--dm-weight 0"
NO_CDM = "--cdm-weight 0"
FIXED = "--schedule fixed"
AWARE = "--anchor-aware-fake"  # marked * in the rows' names; not in the paper
ROWS = {
    "CDM": "",
    "CDM without L_CA": NO_CA,
    "CDM without L_DM": NO_DM,
    "CDM without L_CDM": NO_CDM,
    "L_CA alone": f"{NO_DM} {NO_CDM}",
    "L_DM alone": f"{NO_CA} {NO_CDM}",
    "L_CDM alone": f"{NO_CA} {NO_DM}",
    "fixed schedule": FIXED,
    "L_CDM on the trajectory": "--cdm-point anchor",
    "L_CDM re-noised": "--cdm-point renoise",
    "D-DMD": f"{FIXED} {NO_CDM}",
    "L_DM alone, fixed": f"{FIXED} {NO_CA} {NO_CDM}",
    "CDM *": AWARE,
    "D-DMD *": f"{FIXED} {NO_CDM} {AWARE}",
    "L_DM alone, fixed *": f"{FIXED} {NO_CA} {NO_CDM} {AWARE}",
    "CDM without L_CA *": f"{NO_CA} {AWARE}",
    "CDM without L_CDM *": f"{NO_CDM} {AWARE}",
    **dict.fromkeys(CONTROLS, AWARE),
}
# These get five seeds, the others three.
CENTRAL = ("CDM", "D-DMD", "L_DM alone, fixed", "CDM *", "D-DMD *", "L_DM alone, fixed *")
RATES = {  # student, fake score
    "a": (2e-4, 1e-4),  # 20 times the released rates
    "b": (1e-4, 6e-4),
    "c": (3e-4, 9e-4),
    "d": (5e-5, 6e-4),
    "e": (2.5e-5, 6e-4),
}
SAME_RATES = {
    "rates": ("b", "d", "e"),
    "rows": (
        "CDM",
        "CDM, fake off the path",
        "CDM *, fed with noise",
        "CDM *",
        "CDM *, guided off the path",
        "CDM without L_CDM",
        "CDM without L_CDM *",
        "D-DMD",
        "D-DMD *",
        "L_DM alone",
        "CDM without L_CA",
        "CDM without L_CA *",
    ),
}
COMMON = (
    "--batch-size 16 --max-schedule-steps 8 --alpha 1 --warmup 20 --ema-decay 0.98 --sample-every 0"
)
SCALE = 2.0  # classifier-free guidance that L_CA + L_DM aim at: 1 + alpha
GRIDS = {  # numbers of steps on the released grid, or times
    "1": 1,
    "2": 2,
    "4": 4,
    "6": 6,
    "8": 8,
    "uneven": [1, 0.9, 0.6, 0.15],
}
TARGETS = {"guided": "with guidance 2", "plain": "without guidance"}
GUIDED_50 = "teacher, 50 steps, guided"
PLAIN_50 = "teacher, 50 steps"
UNDISTILLED = "teacher, undistilled"


def target_of(row):
    """Which of the teacher's samples a row is to reach."""
    return "plain" if NO_CA in ROWS[row] else "guided"


# --- 2. What is measured. ---


def features(model, family, times, count, seed):
    """`count` samples as features (count, 64); sample i has prompt i modulo 10."""
    gen = torch.Generator().manual_seed(seed)
    cond = family.encode(PROMPTS)
    vae = family.pipe.vae
    parts = []
    for i in range(0, count, 500):
        noise = torch.randn(min(500, count - i), *family.shape, generator=gen)
        rows = torch.arange(len(noise)) % len(PROMPTS)
        x0 = cdm.sample(model, noise, times, cdm.take(cond, rows))
        latents = x0 / vae.config.scaling_factor + vae.config.shift_factor
        with torch.no_grad():
            parts.append(to_pixels(vae.decode(latents).sample))
    return torch.cat(parts)


def classifier(x, y, held_out=500):
    """Kernel ridge regression on one-hot labels, trained on all but `held_out` digits.

    Returns predict(x) and the accuracy on the held-out digits.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test = order[:held_out]
    train = order[held_out:]

    def kernel(a):
        return (-torch.cdist(a, x[train]).square() / 30).exp()

    ridge = kernel(x[train]) + 0.01 * torch.eye(len(train))
    weights = torch.linalg.solve(ridge, F.one_hot(y[train], 10).double())

    def predict(a):
        return (kernel(a) @ weights).argmax(1)

    return predict, (predict(x[test]) == y[test]).double().mean().item()


def diversity(x, label):
    """Mean distance of two samples of the same prompt."""
    means = [torch.pdist(x[label == c]).mean() for c in range(10)]
    return torch.stack(means).mean().item()


def inside(x, other, k=3):
    """The share of x within the manifold of `other`: k-nearest-neighbour precision or recall.

    The manifold is the union of balls around the points of `other` up to their k-th neighbours.
    """
    radius = torch.cdist(other, other).kthvalue(k + 1, dim=1).values
    hits = [(torch.cdist(part, other) <= radius).any(1) for part in x.split(1000)]
    return torch.cat(hits).double().mean().item()


@cache
def digits():
    """The real digits as features (1797, 64), their labels, predict and its held-out accuracy."""
    images, y = load_digits()
    real = to_pixels(images)
    return real, y, *classifier(real, y)


def measure(x, out):
    """Everything that is measured of samples (N, 64) whose prompts come in turn."""
    real, y, predict, _ = digits()
    targets = torch.load(out / "targets.pt")
    label = torch.arange(len(x)) % len(PROMPTS)
    few = x[: len(real)]
    return {
        "real": frechet_distance(x, real),
        "plain": frechet_distance(x, targets["plain"]),
        "guided": frechet_distance(x, targets["guided"]),
        "accuracy": (predict(x) == label).double().mean().item(),
        "diversity": diversity(x, label) / diversity(real, y),
        "precision": inside(few, real),
        "recall": inside(real, few),
        "images": (127.5 * (x[:10] + 1)).round().int().tolist(),
    }


def times_of(grid, family):
    if isinstance(GRIDS[grid], int):
        return cdm.uniform_times(GRIDS[grid], family.shift)
    return torch.tensor(GRIDS[grid])


# --- 3. Jobs, each in a process. ---


@lru_cache(1)  # the cell in work
def load(student=None):
    """The family and its network as a model: the teacher's, or that of a student's folder."""
    torch.set_num_threads(1)
    args = cdm.parse_args(["--teacher", TEACHER, "--device", "cpu"])
    name, family = cdm.find_teacher(args.teacher)
    family = family(name, args, torch.device("cpu"), student)
    return family, cdm.Role(family.transformer, family)


def target(name, count):
    """The teacher's samples at 50 steps, from other noise than the rows'."""
    family, model = load()
    if name == "guided":
        model = family.guided(model, SCALE)
    return name, features(model, family, cdm.uniform_times(50, family.shift), count, seed=1)


def reference(out, name, count):
    """What is measured of the teacher."""
    family, model = load()
    if name == GUIDED_50:
        model = family.guided(model, SCALE)
    grids = {"50": cdm.uniform_times(50, family.shift)}
    if name == UNDISTILLED:
        grids = {grid: times_of(grid, family) for grid in GRIDS}
    return name, {
        grid: measure(features(model, family, times, count, seed=2), out)
        for grid, times in grids.items()
    }


def distil(folder, row, rate, seed, iterations):
    """Run cdm.py for one cell. Its checkpoints are not kept."""
    shutil.rmtree(folder, ignore_errors=True)
    program = ["cdm.py"]
    if row in CONTROLS:
        program = [str(Path(__file__).with_name("controls.py")), row]
    student_lr, fake_lr = RATES[rate]
    flags = {
        "teacher": TEACHER,
        "prompts": TEACHER + "/prompts.txt",
        "device": "cpu",
        "student-lr": student_lr,
        "fake-lr": fake_lr,
        "seed": seed,
        "save-every": iterations,
        "iterations": iterations,
        "output-dir": folder,
    }
    command = [sys.executable, *program, *COMMON.split(), *ROWS[row].split()]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{row}, rates {rate}, seed {seed}:\n{done.stderr[-2000:]}")
    for checkpoint in folder.glob("checkpoint_*"):
        shutil.rmtree(checkpoint)


def cell(out, row, rate, seed, iterations, count, grids):
    """Train one cell and measure it on each grid. What is there already is not done again."""
    name = row.replace(" ", "_").replace("*", "star").replace(",", "")
    folder = out / f"{name}-{rate}-{seed}-{iterations}"
    if not (folder / "student").exists():
        distil(folder, row, rate, seed, iterations)
    measured = {}
    for grid in grids:
        path = folder / f"{grid}.json"
        if not path.exists():
            family, model = load(folder / "student")
            x = features(model, family, times_of(grid, family), count, seed=2)
            tmp = path.with_suffix(".tmp")
            tmp.write_text(json.dumps(measure(x, out)))
            tmp.rename(path)
        measured[grid] = json.loads(path.read_text())
    return (row, rate, seed), measured


def in_parallel(function, jobs, what):
    """Run function(*job) for each job, a process a core. Its (key, value) pairs become a dict."""
    results = {}
    with ProcessPoolExecutor(os.cpu_count() or 2) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=what, smoothing=0):
                key, value = future.result()
                results[key] = value
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


# --- 4. Tables and figure. ---


def spread(values, digits=2):
    """Mean ± standard deviation."""
    values = list(values)
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text


def markdown(rows):
    """A table of rows of cells; the first is the heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines) + "\n"


def table(runs, rates, held_out):
    """Markdown, a part for each target. runs: {row: [{grid: measurements} of each seed]}."""
    parts = [f"Classifier's accuracy on held-out digits: {100 * held_out:.1f}%\n"]
    for target, words in TARGETS.items():
        heading = [f"target: the teacher {words}", "rates", "seeds", *GRIDS]
        heading += ["digits", "accuracy", "diversity", "precision", "recall"]
        lines = [heading]
        fifty = GUIDED_50 if target == "guided" else PLAIN_50
        chosen = [row for row in runs if row in ROWS and target_of(row) == target]
        for row in (fifty, UNDISTILLED, *chosen):
            seeds = runs[row]
            at = "50" if row == fifty else "4"
            if row == fifty:
                cells = [""] * len(GRIDS)
                cells[list(GRIDS).index("4")] = f"{seeds[0]['50'][target]:.2f} (50)"
            else:
                cells = [spread(s[grid][target] for s in seeds) for grid in GRIDS]
            cells.append(spread(s[at]["real"] for s in seeds))
            cells.append(spread((100 * s[at]["accuracy"] for s in seeds), 1))
            for key in ("diversity", "precision", "recall"):
                cells.append(spread(s[at][key] for s in seeds))
            lines.append([row, rates.get(row, ""), str(len(seeds)), *cells])
        parts.append(markdown(lines))
    return "\n".join(parts)


def table_at_same_rates(same):
    """Markdown: distance to the row's target at 4 and 8 steps.

    same: {row: {rate: [{grid: measurements} of each seed]}}.
    """
    rates = list(next(iter(same.values()), {}))
    if not rates:
        return ""
    lines = [["at the same rates"]]
    for rate in rates:
        lines[0] += [f"{rate}: 4", f"{rate}: 8"]
    for row, by_rate in same.items():
        cells = [row]
        for seeds in by_rate.values():
            for grid in ("4", "8"):
                cells.append(spread(s[grid][target_of(row)] for s in seeds))
        lines.append(cells)
    return markdown(lines)


def draw_samples(axes, runs):
    """Ten samples a row."""
    shown = {GUIDED_50: "50", UNDISTILLED: "4", "D-DMD": "4", "CDM": "4", "D-DMD *": "4"}
    shown["CDM *"] = "4"
    shown = {row: grid for row, grid in shown.items() if row in runs}
    sheet = torch.zeros(len(shown) * 10, 100, dtype=torch.int)
    labels = []
    for i, (row, grid) in enumerate(shown.items()):
        for j, image in enumerate(runs[row][0][grid]["images"]):
            top, left = 10 * i + 1, 10 * j + 1
            sheet[top : top + 8, left : left + 8] = torch.tensor(image).reshape(8, 8)
        label = f"{row},\n4 steps"
        if row == GUIDED_50:
            label = row.replace("50 steps, ", "50 steps,\n")
        labels.append(label)
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=255)
    axes.set_yticks([10 * i + 4.5 for i in range(len(shown))], labels)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("one sample for each prompt, zero to nine", fontsize=10)


def draw_ladder(axes, runs):
    """Distance by the number of steps; bars are one standard deviation."""
    styles = {
        UNDISTILLED: ("0.5", "--", "s"),
        "D-DMD": ("#D55E00", "-", "v"),
        "CDM": ("#E69F00", "-", "o"),
        "D-DMD *": ("#56B4E9", "-", "v"),
        "CDM *": ("#0072B2", "-", "o"),
    }
    steps = [grid for grid in GRIDS if grid.isdigit()]
    for row, (color, line, marker) in styles.items():
        if row not in runs:
            continue
        ys = [[s[grid]["guided"] for s in runs[row]] for grid in steps]
        axes.errorbar(
            [int(grid) for grid in steps],
            [mean(y) for y in ys],
            [stdev(y) if len(y) > 1 else 0 for y in ys],
            color=color,
            linestyle=line,
            marker=marker,
            capsize=3,
            label=row,
        )
    floor = runs[GUIDED_50][0]["50"]["guided"]
    axes.axhline(floor, color="k", linewidth=0.8, linestyle=":", label="guided teacher, 50 steps")
    axes.set(xlabel="Euler steps", ylabel="Fréchet distance to the guided teacher", yscale="log")
    axes.set_xticks([int(grid) for grid in steps])
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    axes.set_yticks(ticks, ticks)
    axes.minorticks_off()
    axes.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 0.08))
    axes.grid(alpha=0.3)


def draw(runs, path):
    """Left, samples; right, the step ladder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.4), width_ratios=(1.6, 1), layout="constrained"
    )
    draw_samples(left, runs)
    draw_ladder(right, runs)
    figure.savefig(path, dpi=110)


# --- 5. The run. ---


def parse():
    """The plan that the command line asks for, as argparse's namespace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--iterations", type=int, default=500, help="of each cell")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--rates", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument(
        "--seeds", type=int, default=5, choices=range(1, 6), help="of the central rows; others: 3"
    )
    parser.add_argument(
        "--quick", action="store_true", help="40 iterations, 500 samples, four rows, one rate"
    )
    args = parser.parse_args()
    args.count = 5000
    folder = "ablation"
    if args.quick:
        args.rows = ["CDM", "D-DMD", "CDM *", "CDM *, fed with noise"]
        args.rates = ["c"]
        args.seeds = 1
        args.iterations = 40
        args.count = 500
        folder = "ablation_quick"
    args.output_dir = args.output_dir or ROOT / "runs" / folder
    return args


def teacher_rows(out, count):
    """The targets, saved for `measure`; then what is measured of the teacher, by row."""
    if not (out / "targets.pt").exists():
        jobs = [(name, count) for name in TARGETS]
        torch.save(in_parallel(target, jobs, "targets"), out / "targets.pt")
    path = out / "references.json"
    if not path.exists():
        jobs = [(out, name, count) for name in (GUIDED_50, PLAIN_50, UNDISTILLED)]
        path.write_text(json.dumps(in_parallel(reference, jobs, "teacher")))
    return {row: [measured] for row, measured in json.loads(path.read_text()).items()}


def without_images(seeds):
    """[{grid: measurements}] without the images."""
    return [
        {
            grid: {key: x for key, x in measured.items() if key != "images"}
            for grid, measured in grids.items()
        }
        for grids in seeds
    ]


def real_against_real():
    """The same measurements of two halves of the real digits."""
    real, y, _, _ = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    a = real[order[::2]]
    b = real[order[1::2]]
    return {"distance": frechet_distance(a, b), "precision": inside(a, b), "diversity": 1.0}


def main():
    args = parse()
    out = args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    budget = (args.iterations, args.count)
    runs = teacher_rows(out, args.count)

    jobs = [(out, row, rate, 0, *budget, ["4"]) for row in args.rows for rate in args.rates]
    cells = in_parallel(cell, jobs, "seed 0 at every rate")
    tuning = {}
    best = {}
    for row in args.rows:
        tuning[row] = {rate: cells[row, rate, 0]["4"][target_of(row)] for rate in args.rates}
        best[row] = min(tuning[row], key=tuning[row].get)

    jobs = []
    for seed in range(args.seeds):
        for row in args.rows:
            if seed < 3 or row in CENTRAL:
                jobs.append((out, row, best[row], seed, *budget, list(GRIDS)))
    cells = in_parallel(cell, jobs, "all seeds")
    for row in args.rows:
        runs[row] = [cells[key] for key in sorted(cells) if key[0] == row]

    rows = [row for row in SAME_RATES["rows"] if row in args.rows]
    rates = [rate for rate in SAME_RATES["rates"] if rate in args.rates]
    seeds = range(min(args.seeds, 3))
    jobs = []
    for seed in seeds:
        for row in rows:
            for rate in rates:
                jobs.append((out, row, rate, seed, *budget, ["4", "8"]))
    cells = in_parallel(cell, jobs, "same rates")
    same = {
        row: {rate: [cells[row, rate, seed] for seed in seeds] for rate in rates} for row in rows
    }

    real = real_against_real()
    results = {
        "real against real, halves": real,
        "tuning": tuning,
        "best": best,
        "runs": {row: without_images(seeds) for row, seeds in runs.items()},
        "same rates": {
            row: {rate: without_images(seeds) for rate, seeds in by_rate.items()}
            for row, by_rate in same.items()
        },
    }
    (out / "results.json").write_text(json.dumps(results, indent=1))
    held_out = digits()[3]
    text = table(runs, best, held_out) + "\n" + table_at_same_rates(same)
    (out / "table.md").write_text(text, encoding="utf-8")
    draw(runs, out / "figure.png")
    print(text)
    print(f"real against real, two halves: {real}")
    print("tuning, distance to the target at 4 steps:")
    for row, values in tuning.items():
        print(f"  {row}: {values}")


if __name__ == "__main__":
    main()
