"""The paper's ablation in miniature, on emoji: each row is cdm.py with its flags.

    python tests/experiments/emoji_ablation.py                          # all rows, seeds 0, 1, 2
    python tests/experiments/emoji_ablation.py --rows CDM D-DMD --seeds 0

A cell is a row and a seed: one run of cdm.py, then measurements of its exported students. It is
written to `cells/` in --output-dir, and what is there is not done again, so the script can be
stopped at any time. At the end `emoji.csv` there has the mean and the standard deviation over the
seeds of all cells that are there. The measure is explained in emoji.py.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, stdev

os.environ["OMP_NUM_THREADS"] = "1"  # One process on each core: threads that share cores are slow.
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from emoji import PROMPTS, decode, draw_data, embed_prompts, measure, sample, shifted_times

import cdm

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
    "CDM, no guidance": "--ca-weight 0",
    "D-DMD, no guidance": f"{D_DMD} --ca-weight 0",
}
ROWS = {}
for name, flags in METHODS.items():
    ROWS[name] = f"--student-lr 5e-5 --fake-lr 6e-4 {flags}"  # the slow rates
for name, flags in METHODS.items():  # 20 times the released rates
    ROWS[f"{name}, released ratio"] = f"--student-lr 2e-4 --fake-lr 1e-4 {flags}"
COMMON = (
    f"--teacher {TEACHER} --prompts {TEACHER}/prompts.txt --iterations 300 --export-every 50 "
    "--batch-size 32 --max-schedule-steps 8 --alpha 1 --warmup 20 --ema-decay 0.98 "
    "--sample-every 0 --save-every 100000"
)
LAST = 300
GRIDS = {steps: shifted_times(int(steps)) for steps in ("1", "2", "4", "8")}
GRIDS["uneven"] = torch.tensor([1, 0.8, 0.33, 0.1, 0])
FEW = 100  # samples a group of every exported student, at 2 and 4 steps
MANY = 300  # samples a group of the last one, on every grid and of its clean estimates
# Clean estimates: the schedule, the anchor (None: drawn for each sample) and the seed. Those of the
# last of four fixed anchors are 4-step samples. With other noise they are a control.
POOLS = {
    "fixed, last anchor": ("fixed", -1, 0),
    "fixed, last anchor, other noise": ("fixed", -1, 1),
    "fixed, anchor 1": ("fixed", 0, 0),
    "fixed, anchor 2": ("fixed", 1, 0),
    "fixed, anchor 3": ("fixed", 2, 0),
    "fixed, pool": ("fixed", None, 0),
    "dynamic, last anchor": ("dynamic", -1, 0),
    "dynamic, pool": ("dynamic", None, 0),
}

# --- 2. What is measured. ---


def score(samples, asked, row, seed, iteration, grid):
    """One line of results: what was measured, and the measure, a mean or a sum over the groups."""
    result = measure(samples, asked)
    line = {"row": row, "seed": seed, "iteration": iteration, "grid": grid}
    line["per_group"] = len(samples) // len(PROMPTS)
    line["blends"] = 100 * mean(result["blends"])
    line["members"] = sum(result["members"])
    line["variation"] = mean(result["variation"])
    line["frechet"] = result["frechet"]
    line["found"] = result["found"]
    return line


def load_pipeline():
    torch.set_num_threads(1)
    return StableDiffusion3Pipeline.from_pretrained(TEACHER, dtype=torch.float32)


def references():
    """Lines of the data and of the teacher."""
    pipe = load_pipeline()
    lines = []
    for count in (FEW, MANY):
        lines.append(score(*draw_data(pipe, count), "data", 0, 0, "data"))
        for grid, times in (GRIDS | {"28": shifted_times(28)}).items():
            for name, guidance in (("teacher", 1.0), ("teacher, guidance 2", 2.0)):
                drawn = sample(pipe, pipe.transformer, times, count, guidance)
                lines.append(score(*drawn, name, 0, 0, grid))
    return lines + pools(pipe, pipe.transformer, "teacher", 0, 0)


@torch.no_grad()
def clean_estimates(pipe, transformer, schedule, anchor, seed):
    """Images of clean estimates, drawn as in training, and their groups: MANY of each.

    anchor: the index of the one anchor that all samples have, or None, as in training.
    """
    cfg = cdm.CDMConfig(schedule=schedule, max_schedule_steps=8)
    batch = 6 * len(PROMPTS)
    asked = torch.arange(batch) % len(PROMPTS)
    cond = tuple(table[asked] for table in embed_prompts(pipe))

    def student(x_t, t, cond):
        return transformer(x_t, *cond, 1000 * t).sample

    images = []
    for k in range(1, MANY // 6 + 1):
        draw = cdm.draw_iteration(cfg, seed, k, batch, (8, 8, 8), shift=3.0)
        index = draw.index
        if anchor is not None:
            index = torch.full_like(index, anchor % len(draw.schedule))
        point = cdm.backward_simulation(student, draw.noise["start"], draw.schedule, index, cond)
        images.append(decode(pipe, cdm.clean_estimate(point.x_t, point.t, point.v)))
    return torch.cat(images), asked.repeat(len(images))


def pools(pipe, transformer, row, seed, iteration):
    """Lines of clean estimates. `again`: members that appear, but not among 4-step samples."""
    lines = []
    for grid, plan in POOLS.items():
        drawn = clean_estimates(pipe, transformer, *plan)
        lines.append(score(*drawn, row, seed, iteration, grid))
        lines[-1]["again"] = len(set(lines[-1]["found"]) - set(lines[0]["found"]))
    return lines


def student_lines(folder, row, seed):
    """Run cdm.py, if it was not run, and measure the students that it exported."""
    last = folder / "students" / f"step_{LAST:06d}"
    if not last.exists():
        command = [sys.executable, "cdm.py", *COMMON.split(), *ROWS[row].split()]
        command += ["--seed", str(seed), "--output-dir", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True)
    pipe = load_pipeline()
    lines = []
    for export in sorted((folder / "students").iterdir()):
        iteration = int(export.name.removeprefix("step_"))
        student = SD3Transformer2DModel.from_pretrained(export, dtype=torch.float32)
        for grid in ("2", "4"):
            drawn = sample(pipe, student, GRIDS[grid], FEW)
            lines.append(score(*drawn, row, seed, iteration, grid))
    for grid, times in GRIDS.items():
        lines.append(score(*sample(pipe, student, times, MANY), row, seed, LAST, grid))
    return lines + pools(pipe, student, row, seed, LAST)


def cell(job, out):
    """Measure one row with one seed, or the references. What is there is not done again."""
    row, seed = job
    name = f"{row.replace(', ', '_').replace(' ', '_')}-{seed}"
    path = out / "cells" / f"{name}.json"
    if path.exists():
        return
    lines = student_lines(out / "runs" / name, row, seed) if row in ROWS else references()
    path.write_text(json.dumps(lines))


# --- 3. The table. ---


def write_table(out):
    """emoji.csv: the mean and the standard deviation over seeds of each line."""
    found = {}
    for path in sorted((out / "cells").glob("*.json")):
        for line in json.loads(path.read_text()):
            key = (line["row"], line["iteration"], line["grid"], line["per_group"])
            found.setdefault(key, []).append(line)
    scores = ("blends", "members", "frechet", "variation", "again")
    heading = ["row", "iteration", "grid", "per_group", "seeds"]
    for name in scores:
        heading += [name, f"{name}_std"]
    with open(out / "emoji.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(heading)
        for key, lines in found.items():
            cells = [*key, len(lines)]
            for name in scores:
                values = [line[name] for line in lines if name in line]
                cells.append(f"{mean(values):.4g}" if values else "")
                cells.append(f"{stdev(values):.2g}" if len(values) > 1 else "")
            table.writerow(cells)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "emoji_ablation")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="cells at a time, a core each")
    args = parser.parse_args()
    (args.output_dir / "cells").mkdir(parents=True, exist_ok=True)
    jobs = [("references", 0)]
    for seed in args.seeds:
        jobs += [(row, seed) for row in args.rows]
    with ProcessPoolExecutor(args.processes) as pool:
        for _ in pool.map(partial(cell, out=args.output_dir), jobs):
            write_table(args.output_dir)


if __name__ == "__main__":
    main()
