"""The small teacher: a complete but very small Stable Diffusion 3, trained here, on 102 emoji.

    OMP_NUM_THREADS=1 python tests/experiments/make_emoji_sd3.py      # rewrites tests/emoji_sd3/

It takes about 45 minutes of one core: 8 for the autoencoder, 32 for the transformer, 5 to measure.
Every part is of the class that SD3-Medium is made of, so what works on this folder has met the code
of the real model: `SD3Transformer2DModel`, `AutoencoderKL`, two `CLIPTextModelWithProjection`, one
`T5EncoderModel`, their tokenizers, and `FlowMatchEulerDiscreteScheduler` with SD3's shift of 3.

1. Pictures: drawn from Noto Color Emoji into `tests/emoji.npz`. Without the font that file is used.
2. Text: encoders with random, frozen weights. Five prompts need no language.
3. The autoencoder, trained for reconstruction: 32 x 32 pixels become 8 x 8 latents of 8 channels.
4. The transformer, trained by flow matching. The data is a finite set, so the velocity that flow
   matching learns on average is known exactly, and it is the target.
5. The folder is saved in half precision, loaded again as a user would load it, and measured.
"""

import argparse
import copy
import math
import string
from pathlib import Path

import diffusers
import emoji
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont
from tqdm import trange

TESTS = Path(__file__).parents[1]
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian: fonts-noto-color-emoji
TOKENS = 4  # Length of the CLIP and of the T5 sequence. SD3-Medium has 77 and 256.
CLIP_DIM = 32  # The two CLIP embeddings side by side are 64 wide, as T5's is.
T5_DIM = 64
LATENT_CHANNELS = 8  # SD3-Medium has 16.
PER_GROUP = 500  # samples for the figures

# In the order of PROMPTS. Left out is what 32 x 32 pixels cannot tell apart: two members of one
# group differ by .31 or more (rms, of pixels in [-1, 1]).
MEMBERS = [
    list("🐵🐶🦊🦝🐱🦁🐯🐴🦄🐮🐷🐭🐻🐼🐸🐔🐙🦉🐧🐦🐤🐢🦋🐞"),
    list("🍎🍏🍐🍊🍋🍌🍉🍇🍓🫐🍒🍑🥭🍍🥥🥝🍅🍆🥑🫒"),
    list("😀😇🥰😍🤣😂😋🤔😴😷🥵🥶🤯🤠🥳😎🤓😭😱😡🤡😈👽🤖"),
    list("🌸🌹🌺🌻🌼🌷🌲🌳🌴🌵🍀🍁🍂🍄🌱🌾💐🪴"),
    [*"💖💓💕💞❤💛💚💙💜🖤🤍💘💝💟❣", "❤\ufe0f\u200d🔥"],
]


# --- 1. Pictures. ---


def draw_members():
    """Draws all members on white into `tests/emoji.npz`: x (n, 32, 32, 3) uint8, y (n,) groups."""
    font = ImageFont.truetype(FONT, size=109)  # The one size that the font holds: 136 x 128 pixels.
    pictures = []
    groups = []
    for group, members in enumerate(MEMBERS):
        for member in members:
            picture = Image.new("RGBA", (136, 136), "white")
            ImageDraw.Draw(picture).text((0, 4), member, font=font, embedded_color=True)
            small = picture.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
            pictures.append(np.asarray(small))
            groups.append(group)
    np.savez_compressed(TESTS / "emoji.npz", x=np.stack(pictures), y=np.array(groups))


# --- 2. Text. ---


def merge(parts, pair):
    """The list of strings `parts` with every neighbouring `pair` put together."""
    merged = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def make_tokenizers():
    """Two CLIP tokenizers (byte pairs) and one T5 (unigrams).

    They know the words of the prompts and spell everything else. A sequence longer than TOKENS is
    cut off, as SD3 does.
    """
    words = sorted({word for prompt in emoji.PROMPTS for word in prompt.split()})
    letters = string.ascii_lowercase + string.digits + string.punctuation

    vocab = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:  # What earlier words merge is merged here first.
            parts = merge(parts, pair)
        while len(parts) > 1:  # The rest grows from its left end: f a, fa c, fac e</w>.
            merges.append((parts[0], parts[1]))
            vocab.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocab)}
    clip = transformers.CLIPTokenizer(ids, merges, model_max_length=TOKENS)
    # SD3's second tokenizer pads with "!", too.
    clip_2 = transformers.CLIPTokenizer(ids, merges, model_max_length=TOKENS, pad_token="!")

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -1.0) for word in words]
    pieces += [(letter, -10.0) for letter in "▁" + letters]
    t5 = transformers.T5TokenizerFast(pieces, extra_ids=0, model_max_length=TOKENS)
    return clip, clip_2, t5


@torch.no_grad()
def make_clip(tokenizer, activation):
    """A random CLIP text model whose pooled embeddings tell the prompts apart."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        hidden_size=CLIP_DIM,
        intermediate_size=2 * CLIP_DIM,
        projection_dim=CLIP_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # The pooled embedding is that of the first EOS.
        pad_token_id=tokenizer.pad_token_id,
    )
    clip = transformers.CLIPTextModelWithProjection(config).eval()
    # Of prompts that differ in one word, random weights make nearly parallel pooled vectors. Let
    # the last layer norm, which only the pooled vector passes through in SD3, subtract what they
    # share.
    norm = clip.text_model.final_layer_norm
    tokens = tokenizer(emoji.PROMPTS, padding="max_length", return_tensors="pt").input_ids
    pooled = clip.text_model(tokens).pooler_output
    norm.weight.div_(pooled.std(dim=0))
    norm.bias.sub_(pooled.mean(dim=0) / pooled.std(dim=0))
    return clip


def make_t5(tokenizer):
    """A random T5 encoder."""
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_DIM,
        d_ff=T5_DIM,
        num_layers=1,
        num_heads=2,
        d_kv=T5_DIM // 2,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config).eval()


# --- 3. Autoencoder. ---


def train_vae(images, iterations=5000, batch=8, lr=3e-3, kl_weight=2e-4):
    """Absolute error plus a light KL term.

    Then SD3's shift and scale, which bring the latents to mean 0 and standard deviation 1.
    """
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=iterations, pct_start=0.05
    )
    for _ in trange(iterations, desc="autoencoder"):
        x = images[torch.randint(len(images), (batch,))]
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(decoded, x) + kl_weight * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        latents = vae.eval().encode(images).latent_dist.mode()
    vae.register_to_config(
        shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item()
    )
    return vae


# --- 4. Transformer. ---


def make_transformer(layers=4, heads=4, head_dim=28):
    """SD3's transformer, 4 blocks of width 112. The table of positions is saved, so it is small."""
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        pos_embed_max_size=4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        caption_projection_dim=heads * head_dim,
        joint_attention_dim=T5_DIM,
        pooled_projection_dim=2 * CLIP_DIM,
    )


def log_shares(groups):
    """Log of each member's probability given the prompt: (6, n), the last row for the empty one."""
    sizes = groups.bincount()
    table = torch.full((len(emoji.PROMPTS) + 1, len(groups)), -torch.inf)
    for group, size in enumerate(sizes):
        table[group, groups == group] = -math.log(size)
    table[emoji.EMPTY] = -torch.log(len(emoji.PROMPTS) * sizes[groups])
    return table


def exact_velocity(x_t, t, latents, log_share):
    """E[eps - x_0 | x_t, prompt] = (x_t - E[x_0 | x_t, prompt]) / t, a sum over the n members.

    x_t (B, C, H, W), t (B,) in (0, 1], latents (n, C, H, W), log_share (B, n).
    """
    x, points = x_t.flatten(1), latents.flatten(1)
    t = t.unsqueeze(1)
    # The log density of x_t around (1 - t) x_0 with standard deviation t, up to a constant.
    overlap = (1 - t) * x @ points.T - (1 - t) ** 2 * points.square().sum(dim=1) / 2
    posterior = torch.softmax(overlap / t**2 + log_share, dim=1)
    return ((x - posterior @ points) / t).view_as(x_t)


def train_transformer(transformer, latents, groups, embeds, pooled, iterations, batch=32, lr=2e-3):
    """Flow matching, x_t = (1 - t) x_0 + t eps, on the exact velocity. Returns the moving average.

    The usual target, eps - x_0 of the sample at hand, has the same mean and a large variance.
    One prompt in ten is dropped, for guidance. T5 is dropped for one in ten, so that the teacher
    also works without. Half of the times are uniform, half have SD3's shift, as the sampler's have.
    """
    # Many of the exact posterior's probabilities are denormal numbers, which a CPU is slow with.
    torch.set_flush_denormal(True)
    ema = copy.deepcopy(transformer).eval()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=iterations, pct_start=0.02
    )
    log_share = log_shares(groups)
    for i in trange(iterations, desc="transformer"):
        pick = torch.multinomial(log_share[emoji.EMPTY].exp(), batch, replacement=True)
        prompt = torch.where(torch.rand(batch) < 0.1, emoji.EMPTY, groups[pick])
        no_t5 = (torch.rand(batch) < 0.1).long()
        u = (torch.arange(batch) + torch.rand(batch)) / batch  # One in each of equal bins.
        t = torch.where(torch.arange(batch) % 2 == 0, u, 3 * u / (1 + 2 * u)).clamp(min=1e-3)
        eps = torch.randn(batch, *latents.shape[1:])
        x_t = torch.lerp(latents[pick], eps, t.view(-1, 1, 1, 1))
        v = transformer(
            x_t,
            timestep=1000 * t,
            encoder_hidden_states=embeds[no_t5, prompt],
            pooled_projections=pooled[prompt],
        ).sample
        loss = F.mse_loss(v, exact_velocity(x_t, t, latents, log_share[prompt]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (1 + i) / (10 + i))
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), transformer.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
    return ema


# --- 5. The folder and its figures. ---


def save_teacher(pipe, transformer, folder):
    """The complete pipeline with this transformer. What was trained is saved as float16."""
    pipe.transformer = transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(folder)
    (folder / "prompts.txt").write_text("\n".join(emoji.PROMPTS) + "\n")


def table_of_measures(pipe):
    """Markdown rows: blends and members of each group, agreement, Fréchet distance."""
    rows = ["| " + " | ".join(["sampler", *emoji.PROMPTS, "agreement", "Fréchet"]) + " |"]
    rows.append("|---" * (len(emoji.PROMPTS) + 3) + "|")
    sizes = emoji.load_emoji()[1].bincount().tolist()
    for steps, guidance in [(28, 2.0), (28, 1.0), (8, 1.0), (4, 1.0), (2, 1.0), (1, 1.0)]:
        times = emoji.shifted_times(steps)
        samples, asked = emoji.sample(pipe, pipe.transformer, times, PER_GROUP, guidance)
        result = emoji.measure(samples, asked)
        name = f"{steps} steps, guidance {guidance:g}"
        if guidance == 1.0:
            name = f"{steps} steps, no guidance"
        cells = [name.replace("1 steps", "1 step")]
        for blends, members, size in zip(result["blends"], result["members"], sizes, strict=True):
            cells.append(f"{blends:.1%}, {members} of {size}")
        cells.append(f"{result['agreement']:.1%}")
        cells.append(f"{result['frechet']:.2f}")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


README = """# Small teacher: Stable Diffusion 3 for emoji

A complete `StableDiffusion3Pipeline` folder of {size:.1f} MB: 32 x 32 pixels, 8 x 8 latents of
{channels} channels, transformer of {parameters:,} parameters (float16), text encoders random and
frozen. Trained on 102 emoji by

    OMP_NUM_THREADS=1 python tests/experiments/make_emoji_sd3.py{arguments}

It knows the five prompts of `prompts.txt` and the empty one, and nothing else. A prompt names the
group only. Every text sequence is {tokens} tokens long, so give the pipeline
`max_sequence_length={tokens}`.

Per group: share of blends among {per_group} samples, and how many of the members appear. A sample
is a blend if it is farther than {threshold:.3f} (rms, of pixels in [-1, 1]) from every member of
its group; that is half the smallest distance between two members of a group. The autoencoder alone
is off by {mean_error:.3f} on average and by {max_error:.3f} at most.

{table}

Agreement is the share whose nearest member of all groups is in the group asked for. The Fréchet
distance is on pixels averaged to 8 x 8. `../experiments/emoji.py` has the measure.

Data: Noto Color Emoji, Google, SIL Open Font License 1.1; see `../emoji_SOURCE.md`.
"""


@torch.no_grad()
def write_readme(folder, args, images, groups):
    """Measures the teacher in `folder` as a user would load it, into its README.md."""
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    decoded = pipe.vae.decode(pipe.vae.encode(images).latent_dist.mode()).sample
    errors = (decoded - images).square().mean(dim=(1, 2, 3)).sqrt()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    text = README.format(
        size=size,
        parameters=pipe.transformer.num_parameters(),
        arguments=f" --seed {args.seed} --iterations {args.iterations}",
        channels=LATENT_CHANNELS,
        tokens=TOKENS,
        per_group=PER_GROUP,
        threshold=emoji.blend_threshold(images, groups),
        mean_error=errors.mean().item(),
        max_error=errors.max().item(),
        table=table_of_measures(pipe),
    )
    (folder / "README.md").write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=TESTS / "emoji_sd3", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=20000, help="of the transformer")
    args = parser.parse_args()

    if FONT.exists():
        draw_members()
    images, groups = emoji.load_emoji()

    # Every stage starts from the seed, so that one can be changed without changing the others.
    torch.manual_seed(args.seed)
    vae = train_vae(images)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor

    torch.manual_seed(args.seed)
    tokenizers = make_tokenizers()
    clip = make_clip(tokenizers[0], "quick_gelu")
    clip_2 = make_clip(tokenizers[1], "gelu")
    t5 = make_t5(tokenizers[2])

    torch.manual_seed(args.seed)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=make_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizers[0],
        text_encoder_2=clip_2,
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5,
        tokenizer_3=tokenizers[2],
    )
    embeds, pooled = emoji.embed_prompts(pipe)
    without_t5 = embeds.clone()
    without_t5[:, TOKENS:] = 0  # What the pipeline has in the place of a T5 that is not there.
    embeds = torch.stack([embeds, without_t5])
    ema = train_transformer(pipe.transformer, latents, groups, embeds, pooled, args.iterations)
    save_teacher(pipe, ema, args.output)
    write_readme(args.output, args, images, groups)


if __name__ == "__main__":
    main()
