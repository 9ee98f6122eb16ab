"""The paper's ablation in miniature, on emoji: each row is cdm.py with its flags.

    python tests/experiments/emoji_ablation.py                          # all rows, seeds 0, 1, 2
    python tests/experiments/emoji_ablation.py --rows CDM D-DMD --seeds 0
    python tests/experiments/emoji_ablation.py --report                 # tables and figure only

Rows named "rounded" and "stochastic" are the control rounded.py, with cdm.py's flags. A cell is a
row and a seed: one run of cdm.py, then measurements of its six exported students. It writes
`cells/ROW-SEED.json` into --output-dir, and `references.json` holds the data and the teacher. What
is there is not done again, so the script can be stopped at any time. --report uses the cells that
are there, also while others run. The measure is explained in emoji.py.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev

os.environ["OMP_NUM_THREADS"] = "1"  # One process on each core: threads that share cores are slow.

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from emoji import draw_data, load_emoji, measure, sample
from emoji import shifted_times as shifted

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "tests" / "emoji_sd3"

# --- 1. The plan. ---

D_DMD = "--schedule fixed --cdm-weight 0"
METHODS = {
    "CDM": "",
    "CDM without L_CDM": "--cdm-weight 0",
    "D-DMD": D_DMD,
    "CDM, fixed schedule": "--schedule fixed",
    "L_CA alone": "--dm-weight 0 --cdm-weight 0",
    "CDM, anchor-aware": "--anchor-aware-fake",
    "CDM, no guidance": "--ca-weight 0",
    "D-DMD, no guidance": f"{D_DMD} --ca-weight 0",
}
RATIO = ", released ratio"
RELEASED = "--student-lr 2e-4 --fake-lr 1e-4"  # 20 times the released rates
SLOW = {name: f"--student-lr 5e-5 --fake-lr 6e-4 {flags}" for name, flags in METHODS.items()}
FAST = {name + RATIO: f"{RELEASED} {flags}" for name, flags in METHODS.items()}
CONTROLS = {
    "CDM, released ratio, bf16": f"{RELEASED} --weights bfloat16",
    "CDM, released ratio, rounded": RELEASED,
    "CDM, released ratio, stochastic": f"--stochastic {RELEASED}",
    "CDM, released ratio, matched": "--student-lr 1.7e-4 --fake-lr 8.5e-5",  # as far as rounded
    "D-DMD, released ratio, bf16": f"{RELEASED} {D_DMD} --weights bfloat16",
    "D-DMD, released ratio, rounded": f"{RELEASED} {D_DMD}",
    "CDM, slower student": "--student-lr 2e-5 --fake-lr 1e-4",
}
ROWS = SLOW | FAST | CONTROLS
COMMON = (
    f"--teacher {TEACHER} --prompts {TEACHER}/prompts.txt --device cpu "
    "--iterations 300 --export-every 50 --batch-size 32 --max-schedule-steps 8 --alpha 1 "
    "--warmup 20 --ema-decay 0.98 --sample-every 0 --save-every 100000"
)
LAST = "students/step_000300"
GRIDS = {steps: shifted(int(steps)) for steps in ("1", "2", "4", "8")}
GRIDS["uneven"] = torch.tensor([1, 0.8, 0.33, 0.1, 0])
FEW = 100  # samples a group of every exported student, at 2 and 4 steps
MANY = 300  # samples a group of the last one, on every grid
MEMBERS = len(load_emoji()[1])
LOGGED = "loss_fake loss_ca loss_dm loss_cdm w_ca w_dm w_cdm grad_norm_student".split()

# --- 2. What is measured. ---


def scores(samples, asked):
    """The measure of samples (N, 3, 32, 32), means over the groups; members: the sum."""
    result = measure(samples, asked)
    result["blends"] = mean(result["blends"])
    result["members"] = sum(result["members"])
    result["variation"] = mean(result["variation"])
    return result


def load_pipeline():
    torch.set_num_threads(1)
    return StableDiffusion3Pipeline.from_pretrained(TEACHER, dtype=torch.float32)


def references(out):
    """Measure the data and the teacher; write references.json: {name: {grid: scores}}."""
    pipe = load_pipeline()
    with_28 = {**GRIDS, "28": shifted(28)}
    guided = {steps: shifted(int(steps)) for steps in ("4", "8", "28")}
    result = {"data": {"data": {count: scores(*draw_data(pipe, count)) for count in (FEW, MANY)}}}
    plan = {"teacher": (1.0, with_28), "teacher, guidance 2": (2.0, guided)}
    for name, (guidance, grids) in plan.items():
        result[name] = {}
        for grid, times in grids.items():
            result[name][grid] = {}
            for count in (FEW, MANY):
                drawn = sample(pipe, pipe.transformer, times, count, guidance)
                result[name][grid][count] = scores(*drawn)
    (out / "references.json").write_text(json.dumps(result))


def log_means(folder, until):
    """Means of what cdm.py logged in the 50 iterations up to this one; only what it logged."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if until - 50 < line["iteration"] <= until]
    return {key: mean(line[key] for line in lines) for key in LOGGED if key in lines[0]}


def distil(folder, row, seed):
    """Run cdm.py. Its checkpoint is not kept."""
    shutil.rmtree(folder, ignore_errors=True)
    control = row.endswith(("rounded", "stochastic"))
    script = "tests/experiments/rounded.py" if control else "cdm.py"
    command = [sys.executable, script, *COMMON.split(), *ROWS[row].split()]
    command += ["--seed", str(seed), "--output-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not (folder / LAST).exists():  # a signal ends a run early, with 0
        raise RuntimeError(f"{row}, seed {seed}:\n{done.stderr[-2000:]}")
    for checkpoint in folder.glob("checkpoint_*"):
        shutil.rmtree(checkpoint)


def cell(out, row, seed):
    """Distil one row with one seed and measure its students. What is there is not done again."""
    path = out / "cells" / f"{row.replace(', ', '_').replace(' ', '_')}-{seed}.json"
    if path.exists():
        return
    folder = out / "runs" / path.stem
    start = sum(os.times()[:4])
    if not (folder / LAST).exists():
        distil(folder, row, seed)

    pipe = load_pipeline()
    points = []
    for export in sorted((folder / "students").iterdir()):
        iteration = int(export.name.split("_")[1])
        student = SD3Transformer2DModel.from_pretrained(export, dtype=torch.float32)
        point = {"iteration": iteration, "log": log_means(folder, iteration), "grids": {}}
        for grid, times in GRIDS.items():
            counts = [FEW] if grid in ("2", "4") else []
            if export == folder / LAST:
                counts.append(MANY)
            if counts:
                drawn = {n: sample(pipe, student, times, n) for n in counts}
                point["grids"][grid] = {n: scores(*drawn[n]) for n in counts}
        points.append(point)
    used = sum(os.times()[:4]) - start
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps({"row": row, "seed": seed, "cpu_seconds": used, "points": points}))
    tmp.rename(path)


# --- 3. Tables and figure. ---


def over_seeds(cells, index, grid, key, count=FEW):
    """One score of each seed, at the export with this index."""
    return [cell["points"][index]["grids"][grid][str(count)][key] for cell in cells]


def spread(values, scale=1, digits=0):
    """Mean ± standard deviation."""
    text = f"{scale * mean(values):.{digits}f}"
    deviation = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return text + deviation


def wrong(cells, index):
    """Share of blends at 4 steps plus share of the members that do not appear, of each seed."""
    blends = over_seeds(cells, index, "4", "blends")
    members = over_seeds(cells, index, "4", "members")
    return [b + 1 - m / MEMBERS for b, m in zip(blends, members, strict=True)]


def tables(found, teacher):
    """Three tables of cells of text: the best and the last point; the last by steps; the log."""
    heading = ["4 steps", "seeds", "best at", "blends, %", "members", "wrong, %"]
    points = [[*heading, "last: blends, %", "members", "wrong, %", "Fréchet"]]
    ladder = [["last student: blends in %, members", *GRIDS, "28", "data"]]
    log = [["first → last export", *LOGGED]]
    for name, grids in teacher.items():
        ladder.append([name])
        for grid in ladder[0][1:]:
            x = grids.get(grid, {}).get(str(MANY))
            ladder[-1].append(f"{100 * x['blends']:.1f}, {x['members']}" if x else "")
    for row, cells in found.items():
        exports = cells[0]["points"]
        sums = [mean(wrong(cells, i)) for i in range(len(exports))]
        best = sums.index(min(sums))
        points.append([row, str(len(cells)), str(exports[best]["iteration"])])
        for index in (best, -1):
            points[-1].append(spread(over_seeds(cells, index, "4", "blends"), 100, 1))
            points[-1].append(spread(over_seeds(cells, index, "4", "members")))
            points[-1].append(spread(wrong(cells, index), 100, 1))
        points[-1].append(spread(over_seeds(cells, -1, "4", "frechet"), digits=1))
        ladder.append([row])
        for grid in GRIDS:
            blends = spread(over_seeds(cells, -1, grid, "blends", MANY), 100, 1)
            ladder[-1].append(blends + ", " + spread(over_seeds(cells, -1, grid, "members", MANY)))
        log.append([row])
        for key in LOGGED:
            values = [[cell["points"][i]["log"].get(key, 0) for cell in cells] for i in (0, -1)]
            log[-1].append(" → ".join(f"{mean(x):.2f}" for x in values) if values[0][0] else "")
    return points, ladder, log


def draw(found, teacher, path):
    """Blends against members along training, for both rates; blends of the last students by steps.

    Of all rows but the controls. A method has a colour; the released ratio is dashed.
    """
    import matplotlib.pyplot as plt

    shape = {"figsize": (15, 7), "width_ratios": (1, 1, 0.9), "layout": "constrained"}
    figure, (slow, fast, ladder) = plt.subplots(1, 3, **shape)
    start = teacher["teacher"]["4"][str(FEW)]
    for row, cells in found.items():
        if row in CONTROLS:
            continue
        method = row.removesuffix(RATIO)
        color = f"C{list(METHODS).index(method)}"
        panel, line, fill = (slow, "o-", "full") if row in SLOW else (fast, "o--", "none")
        x = [100 * start["blends"]]
        y = [start["members"]]
        for k in range(len(cells[0]["points"])):
            x.append(100 * mean(over_seeds(cells, k, "4", "blends")))
            y.append(mean(over_seeds(cells, k, "4", "members")))
        panel.plot(x, y, color + line, markersize=3, label=method)
        panel.plot(x[-1], y[-1], color + "o", markersize=9, fillstyle=fill)
        x = [100 * mean(over_seeds(cells, -1, grid, "blends", MANY)) for grid in GRIDS]
        ladder.plot(list(GRIDS)[:-1], x[:-1], color + line, fillstyle=fill)
        ladder.plot("uneven", x[-1], color + "o", fillstyle=fill)
    marks = {("", "4"): "k*", (", guidance 2", "4"): "kX", (", guidance 2", "28"): "kP"}
    for panel in (slow, fast):
        for (name, grid), mark in marks.items():
            point = teacher["teacher" + name][grid][str(FEW)]
            label = f"teacher{name}, {grid} steps"
            panel.plot(100 * point["blends"], point["members"], mark, markersize=11, label=label)
        panel.set(xlabel="blends at 4 steps, %", ylabel="members present, of 102")
    x = [100 * teacher["teacher"][grid][str(MANY)]["blends"] for grid in GRIDS]
    ladder.plot(list(GRIDS)[:-1], x[:-1], "k*-", markersize=11)
    ladder.plot("uneven", x[-1], "k*", markersize=11)
    ladder.set(xlabel="Euler steps", ylabel="blends, %", yscale="log", ylim=(1.5, 120))
    ladder.set_yticks([2, 5, 10, 20, 50, 100], [2, 5, 10, 20, 50, 100])
    slow.set_title("slow rates, along training")
    fast.set_title("released ratio, along training")
    ladder.set_title("the last students; dashed: released ratio")
    figure.legend(*slow.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)


def report(out):
    """Print the tables and draw the figure of the cells that are there."""
    teacher = json.loads((out / "references.json").read_text())
    cells = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]
    rows = [row for row in ROWS if any(cell["row"] == row for cell in cells)]
    found = {row: [cell for cell in cells if cell["row"] == row] for row in rows}
    for table in tables(found, teacher):
        table.insert(1, ["---"] * len(table[0]))
        for cells in table:
            print("| " + " | ".join(cells) + " |")
        print()
    draw(found, teacher, ROOT / "assets" / "emoji_ablation.png")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "emoji_ablation")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="tables and figure only")
    args = parser.parse_args()
    if args.report:
        return report(args.output_dir)
    (args.output_dir / "cells").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2) as pool:
        jobs = []
        if not (args.output_dir / "references.json").exists():
            jobs.append(pool.submit(references, args.output_dir))
        for seed in args.seeds:
            for row in args.rows:
                jobs.append(pool.submit(cell, args.output_dir, row, seed))
        for job in as_completed(jobs):
            job.result()


if __name__ == "__main__":
    main()
