"""Pictures: of sample grids, of student/README.md, of diffusers."""

import inspect

import torch
from PIL import Image

import cdm

QUARTERS = [1.0, 0.75, 0.5, 0.25]  # diffusers' sigmas, which its scheduler shifts


def sample_noise(family, i=0, seed=0):
    """The noise of the sample grid's i-th picture."""
    gen = cdm.generator(seed, "sample", i)
    return torch.randn(1, *family.shape, generator=gen)


def grid(folder, k, rows, count, side):
    """The pictures of samples/step_NNNNNN.png, rows of them, at the size of the teacher's own."""
    image = Image.open(folder / "samples" / f"step_{k:06d}.png")
    width = image.width // count
    height = image.height // rows
    found = []
    for y in range(rows):
        bottom = (y + 1) * height  # a label is above each picture
        boxes = [(x * width, bottom - width, (x + 1) * width, bottom) for x in range(count)]
        found.append([image.resize((side, side), Image.Resampling.BOX, box) for box in boxes])
    return found


def readme_picture(folder, noise):
    """The picture that student/README.md's own code draws, in float32 and from this noise."""
    readme = (folder / "student" / "README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if line.startswith("    ") or not line.strip()]
    code = inspect.cleandoc("\n".join(lines))
    for old, new in {
        "torch.bfloat16": "torch.float32",
        "num_inference_steps": "latents=noise, num_inference_steps",
        "image.png": f"{folder}.png",
    }.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    exec(code, {"noise": noise})
    return Image.open(f"{folder}.png")


def levels(a, b):
    """The largest difference of two pictures' colours, of 256 levels."""
    a, b = (torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8).int() for x in (a, b))
    return int((a - b).abs().max())


def pipeline_picture(pipe, prompt, noise, side, output_type="pil", **options):
    """What diffusers draws without guidance, or its latents."""
    (found,) = pipe(
        prompt,
        height=side,
        width=side,
        latents=noise,
        output_type=output_type,
        **{"guidance_scale": 1.0, **options},
    ).images
    return found
