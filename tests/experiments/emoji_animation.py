"""The animation of README: a student's 2-step samples over training, beside the teacher's.

    python tests/experiments/emoji_animation.py     # writes assets/emoji_training.gif, 4 minutes

It runs README's first command with a student kept every 20 iterations, and draws each of them from
the same noise.
"""

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
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    return re.search(r"python cdm\.py (--teacher tests/emoji_sd3 .*)", readme)[1].split()


def draw_frame(rows):
    """Labels above rows of images (N, 3, 32, 32) in [-1, 1], as a PIL image."""
    columns = max(len(images) for images in rows.values())
    frame = Image.new("RGB", (SIDE * columns, (SIDE + LABEL) * len(rows)), "white")
    for y, (label, images) in enumerate(rows.items()):
        top = y * (SIDE + LABEL)
        ImageDraw.Draw(frame).text((2, top + 2), label, fill="black", font_size=13)
        for x, image in enumerate(images):
            pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)
            frame.paste(small, (x * SIDE, top + LABEL))
    return frame


@torch.no_grad()
def main():
    pipe = StableDiffusion3Pipeline.from_pretrained(ROOT / "tests" / "emoji_sd3")
    guided, _ = sample(pipe, pipe.transformer, shifted_times(28), 3, guidance=2.0)
    plain, _ = sample(pipe, pipe.transformer, shifted_times(2), 3)
    teacher = {"teacher, 28 steps, guidance 2": guided, "teacher, 2 steps": plain}
    frames = [draw_frame(teacher | {"student, 2 steps, iteration 0: the teacher": plain})]
    with tempfile.TemporaryDirectory() as folder:
        more = ["--output-dir", f"{folder}/run", "--export-every", "20", "--sample-every", "0"]
        subprocess.run([sys.executable, "cdm.py", *first_command(), *more], cwd=ROOT, check=True)
        for student in sorted(Path(folder, "run", "students").iterdir()):
            net = SD3Transformer2DModel.from_pretrained(student)
            images, _ = sample(pipe, net, shifted_times(2), 3)
            k = int(student.name.removeprefix("step_"))
            frames.append(draw_frame(teacher | {f"student, 2 steps, iteration {k}": images}))
    path = ROOT / "assets" / "emoji_training.gif"
    durations = [1200, *[350] * (len(frames) - 2), 2500]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True
    )


if __name__ == "__main__":
    main()
