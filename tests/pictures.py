"""Pictures: of sample grids, of student/README.md, of diffusers."""

import inspect
from functools import partial

import torch
from PIL import Image, ImageChops

import cdm

QUARTERS = [1.0, 0.75, 0.5, 0.25]  # diffusers' sigmas, which its scheduler shifts


def sample_noise(family, i=0):
    """The noise of the sample grid's i-th picture at seed 0."""
    return torch.randn(1, *family.shape, generator=cdm.generator(0, "sample", i))


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
    return max(most for _, most in ImageChops.difference(a, b).getextrema())


def draw_with(pipe, prompt, noise, side, **options):
    """What diffusers draws, without guidance unless options say so."""
    size = {"height": side, "width": side, "guidance_scale": 1.0}
    return pipe(prompt, latents=noise, **(size | options)).images[0]


@torch.no_grad()
def check_sampling(family, prompt, steps, draw):
    """Our sampling equals the pipeline's: latents to 1e-5, the picture byte for byte.

    The pipeline is given the times before their shift, such as 1, 0.75, 0.5, 0.25.
    """
    model = partial(family.predict, family.pipe.transformer)
    noise, cond = sample_noise(family), family.encode([prompt])
    sigmas = [1 - i / steps for i in range(steps)]
    latents = cdm.sample(model, noise, cdm.sampling_times(steps, family.shift), cond)
    expected = draw(sigmas=sigmas, output_type="latent")
    torch.testing.assert_close(latents, expected.view_as(latents), rtol=0, atol=1e-5)
    image = family.image(model, noise, steps, cond)
    assert image == draw(sigmas=sigmas)
    return image
