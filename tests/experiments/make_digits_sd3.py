"""The demo teacher: a complete but very small Stable Diffusion 3, trained here on digits.

    python tests/experiments/make_digits_sd3.py   # about three minutes on two cores

It rewrites `tests/digits_sd3/`. Every part has the class that it has in SD3-Medium, so what works
on this folder has met the code of the real model: `SD3Transformer2DModel`, `AutoencoderKL`, two
`CLIPTextModelWithProjection`, one `T5EncoderModel`, their tokenizers, and
`FlowMatchEulerDiscreteScheduler` with SD3's shift of 3. In the order of this file:

1. Text: encoders with random, frozen weights. Ten prompts need ten different embeddings and no
   language.
2. The autoencoder, trained for reconstruction. It has one block and so no downsampling: 8 x 8
   pixels, 8 x 8 latents.
3. The transformer, trained by flow matching on the latents. Its moving average is kept.
4. The folder is saved, loaded again as a user would load it, and measured by `tests/digits.py`.
"""

import argparse
import copy
import os
import string
import sys
import time
from pathlib import Path

# Their notices are about optional packages that are not needed here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from digits import PROMPTS, frechet_distance, load_digits, to_pixels
from tqdm import trange
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

# Loading shows no progress bar; training has its own.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

TOKENS = 8  # length of the CLIP and of the T5 sequence; in SD3-Medium 77 and 256
CLIP_DIM = 32
T5_DIM = 64  # the two CLIP embeddings side by side are as wide as T5's
LATENT_CHANNELS = 1  # in SD3-Medium 16
EMPTY = len(PROMPTS)  # row of the empty prompt in the table of embeddings


# --- 1. Text. ---


def make_tokenizers():
    """Two CLIP tokenizers (byte pairs) and T5's (unigrams).

    They know the words of the prompts and spell all others.
    """
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    letters = string.ascii_lowercase + string.digits + string.punctuation

    vocab = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in words:  # every word grows from its left end: z e, ze r, zer o</w>
        *head, last = word
        token, *rest = [*head, last + "</w>"]
        for part in rest:
            if (token, part) not in merges:
                merges.append((token, part))
                vocab.append(token + part)
            token += part
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocab)}
    clip = CLIPTokenizer(ids, merges, model_max_length=TOKENS)
    # As in SD3, the second one pads with "!".
    clip_2 = CLIPTokenizer(ids, merges, model_max_length=TOKENS, pad_token="!")

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -1.0) for word in words]
    pieces += [(letter, -10.0) for letter in "▁" + letters]
    return clip, clip_2, T5TokenizerFast(pieces, extra_ids=0, model_max_length=TOKENS)


@torch.no_grad()
def make_clip(tokenizer, activation):
    """A random CLIP text model whose pooled embeddings tell the prompts apart."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        hidden_size=CLIP_DIM,
        intermediate_size=2 * CLIP_DIM,
        projection_dim=CLIP_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # the pooled vector is the one at the first EOS
        pad_token_id=tokenizer.pad_token_id,
    )
    clip = CLIPTextModelWithProjection(config).eval()
    # The prompts differ in one word, so random weights make pooled vectors nearly parallel
    # (cosine 0.9). In SD3 only the pooled vector passes through the last layer norm. Here that norm
    # subtracts what the prompts share.
    norm = clip.text_model.final_layer_norm
    ids = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    pooled = clip.text_model(ids).pooler_output
    norm.weight.div_(pooled.std(dim=0))
    norm.bias.sub_(pooled.mean(dim=0) / pooled.std(dim=0))
    return clip


def make_t5(tokenizer):
    """A random T5 encoder."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_DIM,
        d_ff=T5_DIM,
        num_layers=1,
        num_heads=2,
        d_kv=T5_DIM // 2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


@torch.no_grad()
def embed_prompts(pipe):
    """The ten prompts and the empty one, as the pipeline embeds them.

    Returns embeddings (2, 11, 2 * TOKENS, T5_DIM) and pooled embeddings (11, 2 * CLIP_DIM). The
    first of the two has T5, the second has zeros in its place.
    """
    prompts = [*PROMPTS, ""]
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    without_t5 = embeds.clone()
    without_t5[:, TOKENS:] = 0
    return torch.stack([embeds, without_t5]), pooled


# --- 2. Autoencoder. ---


def train_vae(images, iterations, batch=64, lr=5e-3, kl_weight=1e-4):
    """Squared error plus a light KL term.

    SD3's shift and scale are then set so that the latents have mean 0 and standard deviation 1.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(16,),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=iterations, pct_start=0.05
    )
    bar = trange(iterations, desc="autoencoder", mininterval=1)
    for i in bar:
        x = images[torch.randint(len(images), (batch,))]
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(decoded, x) + kl_weight * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if i % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    with torch.no_grad():
        latents = vae.eval().encode(images).latent_dist.mode()
    vae.register_to_config(
        shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item()
    )
    return vae


# --- 3. Transformer. ---


def make_transformer(layers=3, heads=4, head_dim=14):
    """SD3's transformer with 3 blocks of width 56."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        pos_embed_max_size=8 // 2,  # no larger than needed, because the table is saved
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        caption_projection_dim=heads * head_dim,
        joint_attention_dim=T5_DIM,
        pooled_projection_dim=2 * CLIP_DIM,
    )


def train_transformer(
    transformer, latents, labels, embeds, pooled, iterations, batch=64, lr=8e-3, ema_decay=0.998
):
    """Flow matching: x_t = (1 - t) x_0 + t noise, target v = noise - x_0, t ~ U(0, 1).

    One prompt in ten is dropped, for guidance. T5 is dropped for one sample in ten, so that the
    teacher also works without it. Returns the model's moving average.
    """
    ema = copy.deepcopy(transformer)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=iterations, pct_start=0.05
    )
    bar = trange(iterations, desc="transformer", mininterval=1)
    for i in bar:
        pick = torch.randint(len(latents), (batch,))
        prompt = torch.where(torch.rand(batch) < 0.1, EMPTY, labels[pick])
        no_t5 = (torch.rand(batch) < 0.1).long()
        x_0 = latents[pick]
        noise = torch.randn(batch, *latents.shape[1:])
        # One time in each of equal bins: uniform, with less variance.
        t = (torch.arange(batch) + torch.rand(batch)) / batch
        x_t = torch.lerp(x_0, noise, t.view(-1, 1, 1, 1))
        v = transformer(
            x_t,
            timestep=1000 * t,
            encoder_hidden_states=embeds[no_t5, prompt],
            pooled_projections=pooled[prompt],
        ).sample
        loss = F.mse_loss(v, noise - x_0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(ema_decay, (1 + i) / (10 + i))
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), transformer.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
        if i % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return ema.eval()


# --- 4. The folder and its measurements. ---


def sample(pipe, **options):
    """1,000 images (PIL), 100 of each prompt, by the pipeline's own sampler, 250 at a time."""
    options["max_sequence_length"] = TOKENS
    options["generator"] = torch.Generator().manual_seed(0)
    images = []
    for _ in range(4):
        images += pipe(25 * PROMPTS, **options).images
    return images


def load(folder, **options):
    """The folder's pipeline, as a user loads it."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(folder, images):
    """Rows of (what, Fréchet distance to all digits): the autoencoder, then samples."""
    real = to_pixels(images)
    pipe = load(folder)
    rgb = images.repeat(1, 3, 1, 1)
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(rgb).latent_dist.mode()).sample
    rmse = (to_pixels(decoded) - real).square().mean().sqrt()
    rows = [(f"autoencoder alone, all digits (rmse {rmse:.3f})", decoded)]
    for steps in (50, 28):
        for scale, words in ((1.0, "no guidance"), (2.0, "guidance 2")):
            pictures = sample(pipe, num_inference_steps=steps, guidance_scale=scale)
            rows.append((f"{steps} steps, {words}", pictures))
    for steps in (8, 6, 4, 2, 1):
        # The scheduler shifts these: 4 steps are at t = 1, 0.9, 0.75, 0.5.
        sigmas = [1 - i / steps for i in range(steps)]
        words = "1 step" if steps == 1 else f"{steps} steps"
        rows.append((f"{words}, no guidance", sample(pipe, sigmas=sigmas, guidance_scale=1.0)))
    pipe = load(folder, text_encoder_3=None, tokenizer_3=None)
    pictures = sample(pipe, num_inference_steps=50, guidance_scale=1.0)
    rows.append(("50 steps, no guidance, loaded without T5", pictures))
    return [(what, frechet_distance(to_pixels(pictures), real)) for what, pictures in rows]


README = """# Demo teacher: Stable Diffusion 3 for handwritten digits

A complete `StableDiffusion3Pipeline` folder of {size:.1f} MB for images of 8 × 8 pixels. The
transformer has {parameters:,} parameters, the text encoders are random and frozen, and the
autoencoder has no downsampling and {channels} latent channel(s). It was trained on 1,797 digits by

    python tests/experiments/make_digits_sd3.py{arguments}

It knows the ten prompts of `prompts.txt` and the empty one, and nothing else. Every text sequence
is {tokens} tokens long, so give the pipeline `max_sequence_length={tokens}`.

Fréchet distance in pixels ([-1, 1]) of 1,000 samples, 100 of each prompt, to all 1,797 digits. Two
random halves of the digits are 0.28 apart.

| | Fréchet distance |
|---|---|
{table}

Data: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits* (1998), UCI Machine
Learning Repository, <https://doi.org/10.24432/C50P49>,
[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/); see `../digits_SOURCE.md`.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    folder = Path(__file__).parents[1] / "digits_sd3"
    parser.add_argument("--output", type=Path, default=folder, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--iterations", type=int, default=3000, help="of the transformer; the autoencoder: a fifth"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    start = time.time()

    images, labels = load_digits()
    rgb = images.repeat(1, 3, 1, 1)
    clip_tokens, clip_2_tokens, t5_tokens = make_tokenizers()
    pipe = StableDiffusion3Pipeline(
        tokenizer=clip_tokens,
        tokenizer_2=clip_2_tokens,
        tokenizer_3=t5_tokens,
        text_encoder=make_clip(clip_tokens, "quick_gelu"),
        text_encoder_2=make_clip(clip_2_tokens, "gelu"),
        text_encoder_3=make_t5(t5_tokens),
        vae=train_vae(rgb, args.iterations // 5),
        transformer=make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )

    vae = pipe.vae
    with torch.no_grad():
        latents = vae.encode(rgb).latent_dist.mode()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    pipe.transformer = train_transformer(
        pipe.transformer, latents, labels, *embed_prompts(pipe), args.iterations
    )
    pipe.save_pretrained(args.output)
    (args.output / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    print(f"built in {time.time() - start:.0f} s; measuring")

    lines = [f"| {what} | {distance:.3f} |" for what, distance in measure(args.output, images)]
    table = "\n".join(lines)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file()) / 1e6
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    text = README.format(
        size=size,
        parameters=parameters,
        arguments=f" --seed {args.seed} --iterations {args.iterations}",
        channels=LATENT_CHANNELS,
        tokens=TOKENS,
        table=table,
    )
    (args.output / "README.md").write_text(text, encoding="utf-8")
    print(table)
    print(f"{args.output}: {size:.2f} MB, {parameters:,} parameters, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
