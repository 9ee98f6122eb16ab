"""Handwritten digits: the data, the prompts and the measure of the teacher `tests/digits_sd3`.

    images, labels = load_digits()                          # (1797, 1, 8, 8) in [-1, 1], (1797,)
    frechet_distance(to_pixels(generated), to_pixels(images))

Only torch and numpy. The data and its licence: `digits_SOURCE.md`.
"""

from pathlib import Path

import numpy as np
import torch

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = [f"a handwritten digit {word}" for word in WORDS]  # PROMPTS[label] names that label


def load_digits():
    """All 1,797 digits: images (1797, 1, 8, 8), float32 in [-1, 1] (-1 is paper), labels."""
    with np.load(Path(__file__).with_name("digits.npz")) as data:
        images = torch.from_numpy(data["images"]).float().unsqueeze(1) / 8 - 1
        return images, torch.from_numpy(data["labels"]).long()


def to_pixels(images):
    """Images as features of the Fréchet distance: (N, 64) float64, grey, in [-1, 1].

    images: a tensor (N, 3, 8, 8) or (N, 1, 8, 8) in [-1, 1], as `vae.decode` returns it, or a list
    of PIL images, as the pipeline returns them.
    """
    if not torch.is_tensor(images):
        images = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        images = images.permute(0, 3, 1, 2) / 127.5 - 1
    return images.detach().double().cpu().clamp(-1, 1).mean(dim=1).flatten(1)


def frechet_distance(a, b):
    """Fréchet distance of the Gaussians that fit the features a (N, D) and b (M, D), float64.

        |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    The last trace is that of the symmetric (C_a^(1/2) C_b C_a^(1/2))^(1/2), so two
    eigen-decompositions give it.

    For scale, on `to_pixels` features: two random halves of the real digits are 0.28 apart, and
    1,000 draws from the Gaussian that fits all of them are 0.13 from them. So a perfect generator
    does not reach 0.
    """
    mu_a, mu_b = a.mean(dim=0), b.mean(dim=0)
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace_root = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return ((mu_a - mu_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root).item()
