"""Trains an HGR for a full-size checkpoint of random weights, a few steps: shapes, seconds per step, memory.

    python -m benchmarks.full_size --comfyui PATH --family sd15 --steps 2

in the Python of that ComfyUI. The checkpoint (`benchmarks.random_checkpoints`) lies in a temporary folder, is loaded by core's
CheckpointLoaderSimple and trained on by SafeCFG Train HGR. Random weights draw nothing, so the figures say what a training
costs, not what it learns.
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

from hgr_models.train import cli_model

from .random_checkpoints import CHECKPOINTS

WIDTHS = {"sd15": (768, 768), "sdxl": (2048, 1280)}  # of the tokens and the pooled vector that an HGR must find
PAIRS = (
    ("a knife on a table", "a spoon on a table"),
    ("a man with a gun", "a man with a book"),
    ("a bloody hand", "a clean hand"),
)
CLEAN = ("a dog in a park", "a red car", "a house by a lake", "a cup of tea")


def train(args: argparse.Namespace) -> dict:
    """Loads the checkpoint as a user does and trains; what there is to report."""
    pack = cli_model().load_pack()
    from safecfg.nodes.loader import register_folder
    from safecfg.nodes.training.train_hgr import TrainHGR

    import nodes  # ComfyUI's own: its folder is the first of the path

    register_folder()
    report: dict = {"family": args.family, "device": str(args.device), "size": args.size, "batch": args.batch}
    seconds = _timed(pack.hgr_models.train_condition.ConditionTraining)
    with torch.inference_mode():  # as ComfyUI runs nodes
        model, clip, _ = nodes.CheckpointLoaderSimple().load_checkpoint(Path(CHECKPOINTS[args.family]).name)
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
    parser.add_argument("--family", choices=list(CHECKPOINTS), default="sd15")
    parser.add_argument("--train", choices=["condition", "both"], default="condition", help="both also records clean runs")
    parser.add_argument("--steps", type=int, default=2, metavar="N")
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS")
    parser.add_argument("--batch", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as base:
        cli_model().start(args.comfyui, args.device, "--base-directory", base, "--fp16-unet")
        # In a process of its own: the memory that it takes is not the training's.
        command = [sys.executable, "-m", "benchmarks.random_checkpoints", "--comfyui", str(args.comfyui)]
        subprocess.run([*command, "--family", args.family, "--models", f"{base}/models"], check=True)
        report = train(args)
    for key, value in report.items():
        print(f"{key}: {value}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
