"""The animation of README: a student's 2-step samples over training, beside the teacher's.

    python tests/experiments/emoji_animation.py     # writes assets/emoji_training.gif, 4 minutes

It runs README's first command with a student kept every 20 iterations, and draws each of them from
the same noise.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from emoji import sample, shifted_times
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
SIDE = 64  # pixels of an image in the animation, twice its own
LABEL = 18  # pixels above each row for its label


def first_command():
    """The flags of README's first command."""
    (command,) = re.findall(r"&& python cdm\.py (--teacher .*)", (ROOT / "README.md").read_text())
    return command.split()


def strip(images, label):
    """One row: a label above images (N, 3, 32, 32) in [-1, 1], as a PIL image."""
    row = Image.new("RGB", (SIDE * len(images), SIDE + LABEL), "white")
    ImageDraw.Draw(row).text((2, 2), label, fill="black", font_size=13)
    for i, image in enumerate(images):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        small = Image.fromarray(pixels)
        row.paste(small.resize((SIDE, SIDE), Image.Resampling.BOX), (i * SIDE, LABEL))
    return row


def stack(rows):
    """Rows under each other."""
    frame = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        frame.paste(row, (0, top))
        top += row.height
    return frame


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "assets" / "emoji_training.gif")
    args = parser.parse_args()

    pipe = StableDiffusion3Pipeline.from_pretrained(ROOT / "tests" / "emoji_sd3")
    guided, _ = sample(pipe, pipe.transformer, shifted_times(28), 3, guidance=2.0)
    plain, _ = sample(pipe, pipe.transformer, shifted_times(2), 3)
    teacher = [
        strip(guided, "teacher, 28 steps, guidance 2"),
        strip(plain, "teacher, 2 steps"),
    ]
    frames = []
    with tempfile.TemporaryDirectory() as folder:
        more = ["--output-dir", f"{folder}/run", "--export-every", "20", "--sample-every", "0"]
        subprocess.run([sys.executable, "cdm.py", *first_command(), *more], cwd=ROOT, check=True)
        for student in sorted(Path(folder, "run", "students").iterdir()):
            net = SD3Transformer2DModel.from_pretrained(student)
            images, _ = sample(pipe, net, shifted_times(2), 3)
            k = int(student.name.removeprefix("step_"))
            frames.append(stack([*teacher, strip(images, f"student, 2 steps, iteration {k}")]))
    first = stack([*teacher, strip(plain, "student, 2 steps, iteration 0: the teacher")])
    durations = [1200, *[350] * (len(frames) - 1), 2500]
    first.save(
        args.output, save_all=True, append_images=frames, duration=durations, loop=0, optimize=True
    )


if __name__ == "__main__":
    main()
