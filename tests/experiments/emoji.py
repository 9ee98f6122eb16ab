"""Emoji: the data and the prompts of the small teacher `tests/emoji_sd3`, its sampler, the measure.

    images, groups = load_emoji()      # (102, 3, 32, 32) in [-1, 1], (102,) in 0..4
    samples, asked = sample(pipe, pipe.transformer, shifted_times(4), per_group=500)
    result = measure(samples, asked)   # blends, members, evenness, agreement, Fréchet distance

A prompt names a group only ("an animal"). Which member of it appears is a hidden mode of known
probability, so what a model blends or drops can be counted. The source: `../emoji_SOURCE.md`.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

PROMPTS = ["an animal", "a fruit", "a face", "a plant", "a heart"]  # PROMPTS[group]
EMPTY = len(PROMPTS)  # The row of the empty prompt in the tables of `embed_prompts`.


def load_emoji():
    """All members: images (n, 3, 32, 32), float32 in [-1, 1], and groups (n,), long."""
    with np.load(Path(__file__).parents[1] / "emoji.npz") as data:
        images = torch.from_numpy(data["x"]).permute(0, 3, 1, 2).float() / 127.5 - 1
        return images, torch.from_numpy(data["y"]).long()


def rms_distances(a, b):
    """Root mean square difference of each image of a (N, 3, H, W) to each of b: (N, M)."""
    return torch.cdist(a.flatten(1), b.flatten(1)) / a[0].numel() ** 0.5


def blend_threshold(images, groups):
    """Half the smallest distance between two members of one group: 0.157 in units of [-1, 1].

    So no image is closer than this to two members of a group, nor the average of two to either.
    The autoencoder's own error must be well below it; `emoji_sd3/README.md` has both.
    """
    distances = rms_distances(images, images)
    distances[groups[:, None] != groups] = torch.inf
    distances.fill_diagonal_(torch.inf)
    return distances.min().item() / 2


def shifted_times(steps, shift=3.0):
    """The times of a sampler of so many steps, (steps + 1,), from 1 to 0, with SD3's shift."""
    u = torch.linspace(1, 0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


@torch.no_grad()
def embed_prompts(pipe):
    """The five prompts, then the empty one: embeddings (6, L, D) and pooled embeddings (6, P)."""
    tokens = pipe.tokenizer.model_max_length
    embeds, _, pooled, _ = pipe.encode_prompt(
        [*PROMPTS, ""], None, None, do_classifier_free_guidance=False, max_sequence_length=tokens
    )
    return embeds, pooled


@torch.no_grad()
def decode(pipe, latents):
    """Images (N, 3, 32, 32) in [-1, 1] of latents (N, 8, 8, 8)."""
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.vae.decode(latents).sample.clamp(-1, 1)


@torch.no_grad()
def sample(pipe, transformer, times, per_group, guidance=1.0, seed=0, batch=250):
    """Euler steps along `times` from noise: images (5 * per_group, 3, 32, 32) in [-1, 1], groups.

    `transformer` is called as SD3's is. It may be the one of `pipe`, or a student.
    The noise depends on seed and per_group only, so models can be compared in pairs.
    """
    embeds, pooled = embed_prompts(pipe)

    def velocity(x_t, t, row):
        timestep = 1000 * t.expand(len(x_t))
        return transformer(x_t, embeds[row], pooled[row], timestep).sample

    groups = torch.arange(len(PROMPTS)).repeat_interleave(per_group)
    noise = torch.randn(len(groups), 8, 8, 8, generator=torch.Generator().manual_seed(seed))
    images = []
    for x_t, group in zip(noise.split(batch), groups.split(batch), strict=True):
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            v = velocity(x_t, t, group)
            if guidance != 1.0:
                v_empty = velocity(x_t, t, torch.full_like(group, EMPTY))
                v = v_empty + guidance * (v - v_empty)
            x_t = x_t + (t_next - t) * v
        images.append(decode(pipe, x_t))
    return torch.cat(images), groups


@torch.no_grad()
def draw_data(pipe, per_group):
    """Real draws through the autoencoder: images (5 * per_group, 3, 32, 32), groups."""
    images, groups = load_emoji()
    gen = torch.Generator().manual_seed(0)
    picked = []
    for group in range(len(PROMPTS)):
        members = (groups == group).nonzero().flatten()
        picked.append(members[torch.randint(len(members), (per_group,), generator=gen)])
    picked = torch.cat(picked)
    decoded = pipe.vae.decode(pipe.vae.encode(images).latent_dist.mode()).sample
    return decoded.clamp(-1, 1)[picked], groups[picked]


def frechet_distance(a, b, weights_b):
    """Fréchet distance of Gaussians fitted to images a, and to b with weights (M,) of sum 1.

    The features are the images averaged to 8 x 8 pixels: 192 numbers in [-1, 1].
    """
    a, b = (F.avg_pool2d(images, 4).flatten(1).double() for images in (a, b))
    shift = a.mean(dim=0) - weights_b.double() @ b
    cov_a = a.T.cov(correction=0)
    cov_b = b.T.cov(correction=0, aweights=weights_b.double())
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace_root = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return (shift.square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root).item()


def measure(samples, asked):
    """What became of samples (N, 3, 32, 32) of the groups `asked` (N,). The first three a group:

    blends     share of samples farther than the threshold from every member of their group
    members    how many members of the group appear among the samples that are not blends
    variation  total variation distance of those samples' shares from 1/n (1 if there are none)
    found      the members that appear, as indices into all of them
    agreement  share of all samples whose nearest member of all groups is in the group asked for
    frechet    distance to all members, each group with the same weight
    """
    images, groups = load_emoji()
    distances = rms_distances(samples, images)
    result = {"blends": [], "members": [], "variation": [], "found": []}
    for group, size in enumerate(groups.bincount().tolist()):
        nearest, member = distances[asked == group][:, groups == group].min(dim=1)
        clean = nearest <= blend_threshold(images, groups)
        counts = member[clean].bincount(minlength=size)
        shares = counts / counts.sum().clamp(min=1)
        variation = (shares - 1 / size).abs().sum().item() / 2
        result["blends"].append(1 - clean.float().mean().item())
        result["members"].append((counts > 0).sum().item())
        result["variation"].append(variation if clean.any() else 1.0)
        result["found"] += (groups == group).nonzero().flatten()[counts > 0].tolist()
    result["agreement"] = (groups[distances.argmin(dim=1)] == asked).float().mean().item()
    weights = 1 / (len(PROMPTS) * groups.bincount()[groups])
    result["frechet"] = frechet_distance(samples, images, weights)
    return result
