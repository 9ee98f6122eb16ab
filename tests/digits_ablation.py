"""The paper's ablation table for SD3-Medium in miniature: real digits, one command, some hours.

    python tests/digits_ablation.py              # a process a core; some hours on two; stop and rerun at will
    python tests/digits_ablation.py --quick      # three minutes: the same path, too short to conclude anything

Every row distils `tests/digits_sd3` with the program `cdm.py`, by its flags: same iterations, batch and seeds. Seed 0 runs
at each learning rate of RATES; the best one of each row (4 steps, distance to the row's aim) goes on over the other seeds.
Rows of SAME_RATES also run over three seeds at each of its rates, so that rows differ in nothing else.
Writes into --output-dir a folder for each cell (student, measurements; what is there is not done again), `results.json`,
`table.md` and `figure.png`. Not a test: pytest does not collect it. Needs nothing that the project does not.
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

os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # a process a core; threads that share cores crawl
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from tqdm import tqdm

import cdm
from digits import PROMPTS, frechet_distance, load_digits, to_pixels

TEACHER = str(ROOT / "tests" / "digits_sd3")

# ---------------------------------------------------------------------------------------------------------- 1. the plan

# Rows of the paper's table that flags reach, then DM alone on the fixed schedule; * is --anchor-aware-fake, not in the paper.
NO_CA, NO_DM, NO_CDM, FIXED = "--ca-weight 0", "--dm-weight 0", "--cdm-weight 0", "--schedule fixed"
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
    "CDM *": "--anchor-aware-fake",
    "D-DMD *": f"{FIXED} {NO_CDM} --anchor-aware-fake",
    "L_DM alone, fixed *": f"{FIXED} {NO_CA} {NO_CDM} --anchor-aware-fake",
    "CDM without L_CA *": f"{NO_CA} --anchor-aware-fake",
    "CDM without L_CDM *": f"{NO_CDM} --anchor-aware-fake",
    "CDM, fake off the path": "--anchor-aware-fake",
    "CDM *, fed with noise": "--anchor-aware-fake",
    "CDM *, guided off the path": "--anchor-aware-fake",
}
# Controls: cdm.py with a function replaced. Two for what else changes with *: the paper's fake score, trained off the
# trajectory as well; the same additional parameters, fed with noise instead of the time. And one for what L_CDM lacks:
# L_CA, with tau ~ U(0, t'), at the off-trajectory estimate too, added to the second dm_loss of a student update.
CONTROLS = {
    "CDM, fake off the path": "cdm.AnchorTime.forward = lambda self, t: 0 * forward(self, t)",
    "CDM *, fed with noise": "cdm.AnchorTime.forward = lambda self, t: forward(self, torch.rand_like(t))",
    "CDM *, guided off the path": """
ca, dm, seen = cdm.ca_loss, cdm.dm_loss, []
def ca_loss(x0_hat, teacher, cond, uncond, *rest):
    seen[:] = [uncond]
    return ca(x0_hat, teacher, cond, uncond, *rest)
def dm_loss(x0_hat, teacher, fake_score, cond, tau, noise, log):
    seen.append("L_DM" if len(seen) == 1 else "L_CDM")
    loss = dm(x0_hat, teacher, fake_score, cond, tau, noise, log)
    if seen[-1] == "L_CDM":
        below = (torch.rand_like(tau) * fake_score.keywords["anchor_t"]).clamp(0.02, 0.98)
        loss = loss + ca(x0_hat, teacher, cond, seen[0], below, torch.randn_like(noise), 1.0)
    return loss
cdm.ca_loss, cdm.dm_loss = ca_loss, dm_loss"""}
CENTRAL = ("CDM", "D-DMD", "L_DM alone, fixed", "CDM *", "D-DMD *", "L_DM alone, fixed *")  # five seeds, the others three
SAME_RATES = {"rates": ("b", "d", "e"), "rows": (
    "CDM", "CDM, fake off the path", "CDM *, fed with noise", "CDM *", "CDM *, guided off the path", "CDM without L_CDM",
    "CDM without L_CDM *", "D-DMD", "D-DMD *", "L_DM alone", "CDM without L_CA", "CDM without L_CA *")}
RATES = {"a": (2e-4, 1e-4), "b": (1e-4, 6e-4), "c": (3e-4, 9e-4),  # student, fake score; a: 20 times the released rates
         "d": (5e-5, 6e-4), "e": (2.5e-5, 6e-4)}
COMMON = "--batch-size 16 --max-schedule-steps 8 --guidance 1 --warmup 20 --ema-decay 0.98 --sample-every 0"
GRIDS = {"1": 1, "2": 2, "4": 4, "6": 6, "8": 8, "uneven": [1, 0.9, 0.6, 0.15]}  # steps of the released grid, or times

# ----------------------------------------------------------------------------------------------------- 2. what is measured

def features(model, sd3, times, count, seed):
    """`count` samples, a tenth for each prompt in turn: (count, 64) pixels."""
    gen, cond, out = torch.Generator().manual_seed(seed), sd3.encode(PROMPTS), []
    for i in range(0, count, 500):
        noise = torch.randn(min(500, count - i), *sd3.shape, generator=gen)
        x0 = cdm.sample(model, noise, times, tuple(c[torch.arange(len(noise)) % 10] for c in cond))
        vae = sd3.pipe.vae
        with torch.no_grad():
            out.append(to_pixels(vae.decode(x0 / vae.config.scaling_factor + vae.config.shift_factor).sample))
    return torch.cat(out)

def classifier(x, y, held_out=500):
    """Kernel ridge regression on one-hot labels, trained on all but 500 digits. Returns predict(x), held-out accuracy."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[:held_out], order[held_out:]
    def kernel(a):
        return (-torch.cdist(a, x[train]).square() / 30).exp()
    k = kernel(x[train]) + 0.01 * torch.eye(len(train))
    weights = torch.linalg.solve(k, torch.nn.functional.one_hot(y[train], 10).double())
    def predict(a):
        return (kernel(a) @ weights).argmax(1)
    return predict, (predict(x[test]) == y[test]).double().mean().item()

def diversity(x, label):
    """Mean distance of two samples of the same prompt."""
    sums = [torch.pdist(x[label == c]).mean() for c in range(10)]
    return torch.stack(sums).mean().item()

def inside(x, of, k=3):
    """Share of x within the manifold of `of`: some point's ball up to its k-th neighbour (k-NN precision and recall)."""
    radius = torch.cdist(of, of).kthvalue(k + 1, dim=1).values
    return torch.cat([(torch.cdist(part, of) <= radius).any(1) for part in x.split(1000)]).double().mean().item()

@cache
def digits():
    """The real digits as features (1797, 64), their labels, and classifier's two."""
    images, y = load_digits()
    return to_pixels(images), y, *classifier(to_pixels(images), y)

def figures(x, out):
    """Everything that is measured of (N, 64) samples, prompts in turn."""
    (real, y, predict, _), aims = digits(), torch.load(out / "aims.pt")
    label = torch.arange(len(x)) % 10
    few = x[:len(real)]
    return {"real": frechet_distance(x, real), "plain": frechet_distance(x, aims["plain"]),
            "guided": frechet_distance(x, aims["guided"]), "accuracy": (predict(x) == label).double().mean().item(),
            "diversity": diversity(x, label) / diversity(real, y), "precision": inside(few, real),
            "recall": inside(real, few), "images": (127.5 * (x[:10] + 1)).round().int().tolist()}

def times_of(grid, sd3):
    return cdm.uniform_times(GRIDS[grid], sd3.shift) if isinstance(GRIDS[grid], int) else torch.tensor(GRIDS[grid])

# ------------------------------------------------------------------------------------------- 3. jobs, each in a process

@lru_cache(1)  # of the cell at hand
def load(student=None):
    torch.set_num_threads(1)
    args = cdm.parse_args(["--teacher", TEACHER, "--device", "cpu"])
    sd3 = cdm.SD3(args, torch.device("cpu"), student and str(student))
    return sd3, cdm.Role(sd3.transformer, sd3.timesteps)

def reference(out, name, count):
    """Teacher rows, and the aims: 50-step samples of the teacher with guidance 2 and without, other noise than the rows'."""
    sd3, role = load()
    model, fifty = sd3.guided(role, 2.0) if "guided" in name else role, cdm.uniform_times(50, sd3.shift)
    if name.startswith("aim"):
        return name, features(model, sd3, fifty, count, seed=1)
    if "50" in name:
        return name, {"50": figures(features(model, sd3, fifty, count, seed=2), out)}
    return name, {grid: figures(features(model, sd3, times_of(grid, sd3), count, seed=2), out) for grid in GRIDS}

def cell(out, row, rate, seed, iterations, count, grids):
    """Trains one cell, unless its student is there, and measures it on each grid, unless that is there."""
    folder = out / f"{row.replace(' ', '_').replace('*', 'star').replace(',', '')}-{rate}-{seed}-{iterations}"
    if not (folder / "student").exists():
        shutil.rmtree(folder, ignore_errors=True)
        control = (f"import sys, torch, cdm\nforward = cdm.AnchorTime.forward\ntorch.manual_seed({seed})\n"
                   f"{CONTROLS.get(row)}\nsys.exit(cdm.main())")
        student_lr, fake_lr = RATES[rate]
        subprocess.run([sys.executable, *(["-c", control] if row in CONTROLS else ["cdm.py"]), *COMMON.split(),
                        *ROWS[row].split(), "--teacher", TEACHER, "--prompts", TEACHER + "/prompts.txt", "--device", "cpu",
                        "--student-lr", str(student_lr), "--fake-lr", str(fake_lr), "--seed", str(seed), "--save-every",
                        str(iterations), "--iterations", str(iterations), "--output-dir", str(folder)],
                       cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for checkpoint in folder.glob("checkpoint_*"):
            shutil.rmtree(checkpoint)
    for grid in grids:
        path = folder / f"{grid}.json"
        if not path.exists():
            sd3, role = load(folder / "student")
            measured = figures(features(role, sd3, times_of(grid, sd3), count, seed=2), out)
            path.with_suffix(".tmp").write_text(json.dumps(measured))
            path.with_suffix(".tmp").rename(path)
    return (row, rate, seed), {grid: json.loads((folder / f"{grid}.json").read_text()) for grid in grids}

def in_parallel(function, jobs, what):
    """Runs function(*job) for each job in this order, a process a core. Returns its (key, value) pairs as a dict."""
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

# ------------------------------------------------------------------------------------------------- 4. table and figure

def spread(values, digits=2):
    values = list(values)
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

def aim_of(row):
    return "plain" if NO_CA in ROWS[row] else "guided"

def table(runs, rates, held_out):
    """Markdown, a part for each aim. runs: {row: [{grid: figures} of each seed]}."""
    lines = [f"Classifier's accuracy on held-out digits: {100 * held_out:.1f}%"]
    for aim, name in {"guided": "with guidance 2", "plain": "without guidance"}.items():
        fifty = "teacher, 50 steps" + ", guided" * (aim == "guided")
        lines += ["", f"| aim: the teacher {name} | rates | seeds | " + " | ".join(GRIDS) + " | digits | accuracy | diversity | "
                  "precision | recall |", "|---" * (len(GRIDS) + 8) + "|"]
        for row in (fifty, "teacher, undistilled", *(row for row in runs if row in ROWS and aim_of(row) == aim)):
            seeds, at = runs[row], "50" if row == fifty else "4"
            cells = [spread(s[g][aim] for s in seeds) if g in seeds[0] else "" for g in GRIDS]
            cells += [spread(s[at]["real"] for s in seeds), spread((100 * s[at]["accuracy"] for s in seeds), 1)]
            cells += [spread(s[at][key] for s in seeds) for key in ("diversity", "precision", "recall")]
            cells[2] = cells[2] or f"{seeds[0][at][aim]:.2f} (50)"
            lines.append(f"| {row} | {rates.get(row, '')} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"

def table_at_same_rates(same):
    """Markdown: distance to the row's aim at 4 and 8 steps. same: {row: {rate: [{grid: figures} of each seed]}}."""
    rates = list(next(iter(same.values()), {}))
    lines = ["| at the same rates | " + " | ".join(f"{r}: 4 | {r}: 8" for r in rates) + " |", "|---" * (2 * len(rates) + 1) + "|"]
    for row, of in same.items():
        cells = [spread(s[g][aim_of(row)] for s in seeds) for seeds in of.values() for g in ("4", "8")]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" if rates else ""

def figure(runs, path):
    """Left, ten samples a row; right, the step ladder."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(1.6, 1), layout="constrained")
    shown = {"teacher, 50 steps, guided": "50", "teacher, undistilled": "4", "D-DMD": "4", "CDM": "4", "D-DMD *": "4", "CDM *": "4"}
    shown = {row: grid for row, grid in shown.items() if row in runs}
    sheet = torch.full((len(shown) * 10, 100), 0)
    for i, (row, grid) in enumerate(shown.items()):
        for j, image in enumerate(runs[row][0][grid]["images"]):
            sheet[10 * i + 1:10 * i + 9, 10 * j + 1:10 * j + 9] = torch.tensor(image).reshape(8, 8)
    left.imshow(sheet, cmap="gray_r", vmin=0, vmax=255)
    names = [row.replace("50 steps, ", "50 steps,\n") if grid == "50" else f"{row},\n4 steps" for row, grid in shown.items()]
    left.set_yticks([10 * i + 4.5 for i in range(len(shown))], names)
    left.set_xticks([]), left.spines[:].set_visible(False), left.tick_params(length=0)
    left.set_title("one sample for each prompt, zero to nine", fontsize=10)
    styles = {"teacher, undistilled": ("0.5", "--", "s"), "D-DMD": ("#D55E00", "-", "v"), "CDM": ("#E69F00", "-", "o"),
              "D-DMD *": ("#56B4E9", "-", "v"), "CDM *": ("#0072B2", "-", "o")}
    steps = [g for g in GRIDS if g.isdigit()]
    for row, (color, line, marker) in styles.items():
        ys = [[s[g]["guided"] for s in runs.get(row, [])] for g in steps]
        if ys[0]:
            right.errorbar([int(g) for g in steps], [mean(y) for y in ys], [stdev(y) if len(y) > 1 else 0 for y in ys],
                           color=color, linestyle=line, marker=marker, capsize=3, label=row)
    floor = runs["teacher, 50 steps, guided"][0]["50"]["guided"]
    right.axhline(floor, color="k", linewidth=0.8, linestyle=":", label="guided teacher, 50 steps")
    right.set(xlabel="Euler steps", ylabel="Fréchet distance to the guided teacher", yscale="log", xticks=[1, 2, 4, 6, 8])
    right.set_yticks(ticks := [0.05, 0.1, 0.2, 0.5, 1, 2, 5], ticks), right.minorticks_off()
    right.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 0.08)), right.grid(alpha=0.3)
    fig.savefig(path, dpi=110)

# ---------------------------------------------------------------------------------------------------------- 5. the run

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--iterations", type=int, default=500, help="of each cell")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--rates", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 6), help="of the central rows; others: up to 3")
    parser.add_argument("--quick", action="store_true", help="40 iterations, 500 samples, four rows, one rate, one seed")
    args = parser.parse_args()
    rows, rates, seeds, iterations, count = args.rows, args.rates, args.seeds, args.iterations, 5000
    if args.quick:
        rows, rates, seeds, iterations, count = ["CDM", "D-DMD", "CDM *", "CDM *, fed with noise"], ["c"], 1, 40, 500
    out = args.output_dir or ROOT / "runs" / ("ablation_quick" if args.quick else "ablation")
    out.mkdir(parents=True, exist_ok=True)

    aims = ["aim guided", "aim plain"]
    if not (out / "aims.pt").exists():
        found = in_parallel(reference, [(out, name, count) for name in aims], "aims")
        torch.save({name.split()[1]: found[name] for name in aims}, out / "aims.pt")
    if not (out / "references.json").exists():
        names = ["teacher, 50 steps, guided", "teacher, 50 steps", "teacher, undistilled"]
        (out / "references.json").write_text(json.dumps(in_parallel(reference, [(out, n, count) for n in names], "teacher")))
    runs = {row: [seeds] for row, seeds in json.loads((out / "references.json").read_text()).items()}

    tuning = in_parallel(cell, [(out, row, rate, 0, iterations, count, ["4"]) for row in rows
                                for rate in rates], "seed 0 at every rate")
    grid = {row: {rate: tuning[row, rate, 0]["4"][aim_of(row)] for rate in rates} for row in rows}
    best = {row: min(grid[row], key=grid[row].get) for row in rows}
    jobs = [(out, row, best[row], seed, iterations, count, list(GRIDS)) for seed in range(seeds) for row in rows
            if seed < (5 if row in CENTRAL else 3)]
    cells = in_parallel(cell, jobs, "all seeds")
    runs |= {row: [value for key, value in sorted(cells.items()) if key[0] == row] for row in rows}
    same_rows, same_rates = ([x for x in SAME_RATES[kind] if x in asked] for kind, asked in (("rows", rows), ("rates", rates)))
    few = range(min(seeds, 3))
    jobs = [(out, row, rate, seed, iterations, count, ["4", "8"]) for seed in few for row in same_rows for rate in same_rates]
    cells = in_parallel(cell, jobs, "same rates")
    same = {row: {rate: [cells[row, rate, seed] for seed in few] for rate in same_rates} for row in same_rows}

    real, y, _, held_out = digits()
    half = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    a, b = half[::2], half[1::2]
    own = {"distance": frechet_distance(real[a], real[b]), "precision": inside(real[a], real[b]), "diversity": 1.0}
    def slim(of):  # without images
        return [{g: {k: v for k, v in f.items() if k != "images"} for g, f in s.items()} for s in of]
    (out / "results.json").write_text(json.dumps({
        "real against real, halves": own, "tuning": grid, "best": best, "runs": {row: slim(of) for row, of in runs.items()},
        "same rates": {row: {rate: slim(s) for rate, s in of.items()} for row, of in same.items()}}, indent=1))
    (out / "table.md").write_text(table(runs, best, held_out) + "\n" + table_at_same_rates(same))
    figure(runs, out / "figure.png")
    print((out / "table.md").read_text(), f"real against real, two halves: {own}", "tuning, to the aim at 4 steps:",
          *(f"  {row}: {values}" for row, values in grid.items()), sep="\n")

if __name__ == "__main__":
    main()
