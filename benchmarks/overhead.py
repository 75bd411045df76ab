"""What the redirectors cost beside an SD1.5-sized denoiser: FLOPs and CPU time, side by side in one run.

    python -m benchmarks.overhead --json FILE

A CFG step of SD1.5 is two rows of its UNet at 64x64 latents (random weights of the real size, fp32, 77 tokens of 768).
The condition redirector runs once per sampling run on one prompt; the guidance redirector at every step on one picture.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from demo.unet import UNet, UNetConfig
from hgr_models import HGR, CategorySettings, HGRInfo, redirect_condition, redirect_guidance
from hgr_models.condition import ConditionConfig
from hgr_models.guidance import GuidanceConfig

CATEGORIES = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal")
SD15 = UNetConfig(
    model_channels=320,
    num_res_blocks=(2, 2, 2, 2),
    channel_mult=(1, 2, 4, 4),
    transformer_depth=(1, 1, 1, 1, 1, 1, 0, 0),
    transformer_depth_output=(1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0),
    context_dim=768,
    num_heads=8,
)
ALARM = CategorySettings((1.0,) * len(CATEGORIES), threshold_offset=-1.0)  # everything is flagged: the dearest case


def hgr_for_sd15() -> HGR:
    k = len(CATEGORIES)
    info = HGRInfo(CATEGORIES, (0.5,) * k, (), ((0.5,) * k,), "SD15", 4, 2, "EPS", 768, 0)
    return HGR(info, ConditionConfig(768, k), GuidanceConfig(4, k)).eval().requires_grad_(False)


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall-clock seconds after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def measure(repeats: int) -> dict:
    torch.manual_seed(0)
    unet, hgr = UNet(SD15).eval().requires_grad_(False), hgr_for_sd15()
    x, cond, uncond = torch.randn(3, 1, 4, 64, 64)
    tokens, sigma = torch.randn(1, 77, 768), torch.tensor([3.0])
    rows, both = x.repeat(2, 1, 1, 1), tokens.repeat(2, 1, 1)
    runs = {
        "evaluation": (lambda: unet(x, torch.tensor([500.0]), tokens), repeats),
        "cfg_step": (lambda: unet(rows, torch.tensor([500.0, 500.0]), both), repeats),
        "condition": (lambda: redirect_condition(hgr, tokens, None, ALARM), 10 * repeats),
        "guidance": (lambda: redirect_guidance(hgr, cond, uncond, x, sigma, ALARM), 10 * repeats),
    }
    cost = {name: {"flops": flops(run), "seconds": seconds(run, times)} for name, (run, times) in runs.items()}
    ratio = lambda part, whole, key: cost[part][key] / cost[whole][key]  # noqa: E731
    return {
        "threads": torch.get_num_threads(),
        "cost": cost,
        "sd15": {"flops_ratio": ratio("guidance", "cfg_step", "flops"), "time_ratio": ratio("guidance", "cfg_step", "seconds")},
        "condition": {
            "flops_ratio": ratio("condition", "evaluation", "flops"),
            "time_ratio": ratio("condition", "evaluation", "seconds"),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of the UNet; ten times as many of the redirectors")
    args = parser.parse_args()
    results = measure(args.repeats)
    print(f"SD1.5-sized UNet, 64x64 latents, fp32, CPU, {results['threads']} threads, median of {args.repeats}")
    for name, cost in results["cost"].items():
        print(f"  {name:12s} {cost['flops'] / 1e9:10.2f} GFLOP {1e3 * cost['seconds']:10.1f} ms")
    print(
        f"guidance redirector / CFG step:        {results['sd15']['flops_ratio']:.2%} of FLOPs, {results['sd15']['time_ratio']:.2%} of time"
    )
    print(
        f"condition redirector / one evaluation: {results['condition']['flops_ratio']:.2%} of FLOPs, {results['condition']['time_ratio']:.2%} of time"
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
