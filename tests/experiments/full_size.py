"""cdm.py at SD3-Medium's size with random weights: memory, computed and measured, and seconds.

    python tests/experiments/full_size.py -- --lora-rank 64 --iterations 4 --sample-every 0
    python tests/experiments/full_size.py --table -- --lora-rank 64 --micro-batch-size 4

What follows -- are cdm.py's flags. Random weights are written to runs/full_size, 15 GB, with
--no-t5 6 GB. They are deleted at the end, unless --keep is given, and kept ones are used again.
An iteration's first `step` is the fake score's, its second the student's. 1 GB = 10^9 bytes.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import cdm

EMOJI = Path(cdm.__file__).parent / "tests" / "emoji_sd3"


def make_parts(no_t5):
    """(name, network) of SD3-Medium's parts, one at a time."""
    sizes = {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}
    yield "transformer", SD3Transformer2DModel(**sizes, caption_projection_dim=1536)
    sizes = {"latent_channels": 16, "block_out_channels": (128, 256, 512, 512)}
    sizes |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "scaling_factor": 1.5305}
    sizes |= {"up_block_types": ["UpDecoderBlock2D"] * 4, "shift_factor": 0.0609}
    sizes |= {"use_quant_conv": False, "use_post_quant_conv": False, "layers_per_block": 2}
    yield "vae", AutoencoderKL(**sizes)
    clips = (("text_encoder", 768, 12, "quick_gelu"), ("text_encoder_2", 1280, 32, "gelu"))
    for name, width, depth, act in clips:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
        sizes |= {"num_hidden_layers": depth, "num_attention_heads": width // 64}
        config = CLIPTextConfig(**sizes, hidden_act=act, eos_token_id=157)  # the tokenizers'
        yield name, CLIPTextModelWithProjection(config)
    if not no_t5:
        sizes = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
        yield "text_encoder_3", T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def write_pipeline(folder, no_t5):
    """In bf16, with the tokenizers and the scheduler of the shipped teacher."""
    shutil.copytree(EMOJI, folder, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    for name, length in (("tokenizer", 77), ("tokenizer_2", 77), ("tokenizer_3", 256)):
        file = folder / name / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(cdm.DEVICE):  # a GPU draws faster
        for name, part in make_parts(no_t5):
            print(f"{name}: {part.num_parameters():,} parameters", flush=True)
            part.save_pretrained(folder / name)
    torch.cuda.empty_cache()


def compute(args, gpu):
    """{term: bytes} of training with all on one device, from shapes alone."""
    size = 2 if gpu or args.weights == "bfloat16" else 4  # of what does not train
    with torch.device("meta"):
        parts = dict(make_parts(args.no_t5))
        net = parts.pop("transformer").requires_grad_(False)
        family = SimpleNamespace(pipe=SimpleNamespace(transformer=net), predict=print)
        params = cdm.make_learner(family, 0, args).params.values()
    assert net.num_parameters() == 2_028_328_000
    weights = sum(p.nbytes for p in params)
    tokens = ((args.resolution or 1024) // 16) ** 2 + 77 + 256
    entries = tokens * net.inner_dim * (args.micro_batch_size or args.batch_size)
    x = {
        "teacher, base of all LoRA": size * net.num_parameters(),
        "position embeddings": size * 3 * sum(x.numel() for x in net.buffers()),
        "student and fake score": 2 * weights,
        "AdamW": 4 * weights,
        "EMA": 4 * sum(p.numel() for p in params),
        "VAE": size * parts.pop("vae").num_parameters(),
        "text encoders": size * sum(part.num_parameters() for part in parts.values()),
        "gradients": weights,
        # The inputs of 24 blocks, and 32 times as much in the block whose backward pass runs: 62 to
        # 64 bytes an entry, counted with FakeTensors under bf16 autocast.
        "activations": size * (24 + 32) * entries,
    }
    x["sum"] = sum(x.values())
    # Text encoders work while there are no gradients and no activations.
    less = min(x["text encoders"], x["gradients"] + x["activations"])
    return x | {"sum with --offload-text-encoders": x["sum"] - less}


def run_cdm(flags):
    """cdm.main, with seconds and peak memory (a CPU's: of the process) at the end of each stage."""
    since = time.perf_counter()

    def marked(function):
        def call(*values):
            nonlocal since
            result = function(*values)
            if cdm.DEVICE == "cuda":
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            else:
                status = Path("/proc/self/status").read_text()
                peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
            seconds = time.perf_counter() - since
            print(f"{function.__name__:20}{seconds:9.2f} s{peak / 1e9:9.2f} GB", flush=True)
            since += seconds
            return result

        return call

    stages = "load_family make_learner draw_iteration backward_simulation save sample_grid export"
    for name in stages.split():
        setattr(cdm, name, marked(getattr(cdm, name)))
    cdm.Learner.step = marked(cdm.Learner.step)
    cdm.main(flags)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true", help="compute the memory of a GPU, no run")
    parser.add_argument("--keep", action="store_true", help="keep runs/full_size")
    parser.add_argument("flags", nargs="*", help="of cdm.py")
    own = parser.parse_args()
    folder = Path("runs", "full_size")
    flags = ["--teacher", f"{folder}/teacher", "--output-dir", f"{folder}/run", *own.flags]
    args = cdm.parse_args(flags)
    for name, size in compute(args, own.table or cdm.DEVICE == "cuda").items():
        print(f"{name:33}{size / 1e9:6.2f} GB, computed")
    if own.table:
        return
    if not (folder / "teacher").exists():
        write_pipeline(folder / "teacher", args.no_t5)
    process = multiprocessing.get_context("spawn").Process(target=run_cdm, args=(flags,))
    process.start()
    process.join()
    if not own.keep:
        shutil.rmtree(folder)
    sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
