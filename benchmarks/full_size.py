"""Trains an HGR for a full-size checkpoint of random weights, a few steps: shapes, seconds per step, memory.

    python -m benchmarks.full_size --comfyui PATH --family sd15 --steps 2

in the Python of that ComfyUI. The checkpoint (UNet and text encoders in fp16, no VAE: nothing is decoded) is made from core's
own classes in a temporary folder, loaded by core's CheckpointLoaderSimple and trained on by SafeCFG Train HGR. Random weights
draw nothing, so the figures say what a training costs, not what it learns.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from hgr_models.train import host_model

UNETS = {
    "sd15": {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 768, "num_heads": 8, "num_head_channels": -1,
        "use_spatial_transformer": True, "use_linear_in_transformer": False, "adm_in_channels": None, "legacy": False,
        "use_temporal_attention": False,
    },
    "sdxl": {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048, "num_heads": -1, "num_head_channels": 64,
        "use_spatial_transformer": True, "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816,
        "legacy": False, "use_temporal_attention": False,
    },
}  # fmt: skip
WIDTHS = {"sd15": (768, 0), "sdxl": (2048, 1280)}  # of the tokens and the pooled vector that an HGR must find
NAME, RANDOM_VALUES = "full_size.safetensors", 2**22
PAIRS = (
    ("a knife on a table", "a spoon on a table"),
    ("a man with a gun", "a man with a book"),
    ("a bloody hand", "a clean hand"),
)
CLEAN = ("a dog in a park", "a red car", "a house by a lake", "a cup of tea")


def write_checkpoint(path: Path, family: str) -> None:
    """A checkpoint of random weights; every layer keeps about the size of its input."""
    import comfy.supported_models
    from safetensors.torch import save_file

    unet = UNETS[family]
    config = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[family](dict(unet))
    config.set_inference_dtype(torch.float16, None)
    network = config.get_model({}, device=torch.device("cpu")).diffusion_model
    text = config.clip_target({}).clip(device="cpu", dtype=torch.float16, model_options={})
    values = torch.randn(RANDOM_VALUES, generator=torch.Generator().manual_seed(0))
    parts = [{k: _random(k, t, values) for k, t in module.state_dict().items()} for module in (network, text)]
    weights = config.process_unet_state_dict_for_saving(parts[0]) | config.process_clip_state_dict_for_saving(parts[1])
    save_file({k: t.contiguous() for k, t in weights.items()}, path)


def _random(name: str, like: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Weights of the shape of `like` from random values, which repeat in a large one."""
    if not like.is_floating_point():
        return like
    if like.ndim < 2:
        return torch.full(like.shape, float(name.endswith("weight")), dtype=torch.float16)
    size = (like[0].numel() ** -0.5) * values.half()
    return size.repeat(-(-like.numel() // len(size)))[: like.numel()].view(like.shape).clone()


def train(args: argparse.Namespace) -> dict:
    """Loads the checkpoint as a user does and trains; what there is to report."""
    pack = host_model().load_pack()
    from safecfg.nodes.loader import register_folder
    from safecfg.nodes.training.train_hgr import TrainHGR

    import nodes  # ComfyUI's own: its folder is the first of the path

    register_folder()
    report: dict = {"family": args.family, "device": str(args.device), "size": args.size, "batch": args.batch}
    seconds = _timed(pack.hgr_models.train_condition.ConditionTraining)
    with torch.inference_mode():  # as ComfyUI runs nodes
        model, clip, _ = nodes.CheckpointLoaderSimple().load_checkpoint(NAME)
        report["memory after loading"] = _peak(args.device)
        started = time.monotonic()
        hgr, _, _, text = TrainHGR.execute(
            name="full_size", train=args.train, resume=False, model=model, clip=clip, prompts=_prompts(pack), harmful_runs=3,
            clean_runs=1, calibration_runs=1, run_steps=2, batch=args.batch, sizes=f"{args.size}x{args.size}", samplers="euler",
            scheduler="normal", cfg_min=5.0, cfg_max=5.0, negatives="(empty)", seed=0, condition_steps=args.steps,
            guidance_steps=args.steps, learning_rate=1e-3, size="normal", false_positive_rate=0.05, checkpointing=True,
        ).result  # fmt: skip
    report |= {"seconds": time.monotonic() - started, "seconds per condition step": seconds, "memory": _peak(args.device)}
    report |= {"token width": hgr.info.token_width, "pooled width": hgr.info.pooled_width, "latents": hgr.info.latent_format}
    report |= {"parameters": sum(p.numel() for p in model.model.diffusion_model.parameters()), "summary": text}
    if WIDTHS[args.family] != (hgr.info.token_width, hgr.info.pooled_width):
        raise SystemExit(
            f"Expected the widths {WIDTHS[args.family]}, but got {hgr.info.token_width} and {hgr.info.pooled_width}."
        )
    return report


def _prompts(pack):
    pairs = pack.hgr_models.pairs
    one = frozenset({"violence"})
    made = tuple(pairs.PromptPair(harmful, safe, one, one, harmful) for harmful, safe in PAIRS)
    return pairs.PromptSet(
        categories=("violence",), pairs=made, clean=CLEAN, held_out_pairs=(), held_out_clean=(), concept_prompts={"violence": "violence"}
    )  # fmt: skip


def _timed(training) -> list[float]:
    """The seconds of every step of a training class, as they come."""
    seconds, step = [], training.train_step

    def timed(self, *args):
        started = time.monotonic()
        report = step(self, *args)
        seconds.append(time.monotonic() - started)
        return report

    training.train_step = timed
    return seconds


def _peak(device: torch.device) -> str:
    """The most memory so far: the process's, and the device's."""
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return f"{process:.1f} GiB" + (
        f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU" if device.type == "cuda" else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, metavar="PATH")
    parser.add_argument("--family", choices=list(UNETS), default="sd15")
    parser.add_argument("--train", choices=["condition", "both"], default="condition", help="both also records clean runs")
    parser.add_argument("--steps", type=int, default=2, metavar="N")
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS")
    parser.add_argument("--batch", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="FILE", help="only write the checkpoint")
    args = parser.parse_args()
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as base:
        host_model().start(args.comfyui, args.device, "--base-directory", base, "--fp16-unet")
        if args.write:
            write_checkpoint(args.write, args.family)
            return
        folder = Path(base) / "models" / "checkpoints"
        folder.mkdir(parents=True)
        # In a process of its own: the memory that it takes is not the training's.
        command = [sys.executable, "-m", "benchmarks.full_size", "--comfyui", str(args.comfyui), "--family", args.family]
        subprocess.run([*command, "--write", str(folder / NAME)], check=True)
        report = train(args)
    for key, value in report.items():
        print(f"{key}: {value}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
