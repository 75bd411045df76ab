"""What the redirectors cost beside denoisers of the real sizes: SD1.5 (64x64 latents), SDXL and SD3 medium (128x128).

    COMFYUI_PATH=~/comfy/ComfyUI ~/comfy/venv/bin/python -m benchmarks.overhead --json FILE
    python -m benchmarks.overhead --families sd15 --repeats 1     (without ComfyUI: SD1.5 in the demo's own class)

A CFG step is two rows of the denoiser, in ComfyUI's own class, with random weights: fp32 on a CPU, fp16 on a GPU. The guidance
redirector runs at every step on one picture, in fp32 as ComfyUI holds it, in Triton's kernels where the nodes take them (FLOPs,
operations and bytes are those of torch's layers all the same): `guidance` when something is flagged, the dearest case, `clean` when
nothing is (a CPU then skips the correction). The condition redirector runs once per sampling run on one prompt: its shares are
those of one evaluation, half a step. Left out of the step, and so against us: the sampler's own arithmetic.
FLOPs are counted on tensors without contents. Times are pairs: a step, and right after it the redirector. On a GPU: eager and as
a CUDA graph, blocks of steps with and without the redirector. `growth`: the guidance redirector at 32 to 256 latents a side.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hgr_models import HGR, CategorySettings, redirect_condition, redirect_guidance
from hgr_models.fused import without_fusing

from . import overhead_counting as counting
from .overhead_families import CATEGORIES, FAMILIES, Family, Host, HostError, fill, find_host, make_denoiser, make_hgr

STRENGTHS = (1.0,) * len(CATEGORIES)
ALARM = CategorySettings(STRENGTHS, threshold_offset=-1.0)  # everything is flagged
QUIET = CategorySettings(STRENGTHS, threshold_offset=1.0)  # nothing is
GROWTH, SIZES = "growth", (32, 64, 96, 128, 192, 256)
PARTS = (*FAMILIES, GROWTH)


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=PARTS, metavar="NAME", help=f"of {', '.join(PARTS)} (all that can run)")
    parser.add_argument("--comfyui", metavar="DIR", help="ComfyUI's checkout (COMFYUI_PATH); start with the Python that runs it")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed pairs, after a warm-up (%(default)s)")
    parser.add_argument("--no-time", action="store_true", help="counts only: seconds, whatever the size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures")
    args = parser.parse_args(line)
    if args.repeats < 1:
        parser.error(f"expected at least one repeat, but got {args.repeats}")
    return args


def guidance_run(hgr: HGR, channels: int, size: int, settings: CategorySettings) -> Callable[[], object]:
    """One call of the guidance redirector on random latents (1, channels, size, size)."""
    device = hgr.guidance_thresholds.device
    x, cond, uncond = torch.randn(3, 1, channels, size, size, device=device)
    sigma = torch.tensor([3.0], device=device)
    return lambda: redirect_guidance(hgr, cond, uncond, x, sigma, settings)


def hgr_runs(family: Family, hgr: HGR) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    device = hgr.guidance_thresholds.device
    tokens = torch.randn(1, family.tokens, family.token_width, device=device)
    pooled = torch.randn(1, family.pooled_width, device=device) if family.pooled_width else None
    runs = {"guidance": guidance_run(hgr, family.channels, family.size, ALARM)}
    if device.type == "cpu":
        runs["clean"] = guidance_run(hgr, family.channels, family.size, QUIET)
    return {**runs, "condition": lambda: redirect_condition(hgr, tokens, pooled, ALARM)}


def count_step(model: torch.nn.Module, family: Family, dtype: torch.dtype) -> dict[str, int]:
    """The counts of a step of a model without weights, on tensors that have a CPU's kernels but no contents."""
    cpu = torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        hollow = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in [*model.named_parameters(), *model.named_buffers()]}
        inputs = family.inputs(2, cpu, dtype)
        return counting.count(lambda: torch.func.functional_call(model, hollow, (), inputs))


def counted(run: Callable[[], object]) -> dict[str, int]:
    """The counts of a redirector in torch's operations, also where a GPU takes it in Triton's kernels."""
    with without_fusing():
        return counting.count(run)


@torch.no_grad()
def measure_family(name: str, host: Host | None, args: argparse.Namespace) -> dict:
    """Counts, shares and, unless --no-time, times of a family."""
    device, family = torch.device(args.device), FAMILIES[name]
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    model, hgr = make_denoiser(name, host, dtype), make_hgr(name, device)
    runs, size = hgr_runs(family, hgr), lambda module: sum(p.numel() for p in module.parameters())
    found = {"step": {"parameters": size(model), **count_step(model, family, dtype)}}
    for part, run in runs.items():
        found[part] = {**counted(run), "share_of": 0.5 if part == "condition" else 1.0}
        found[part]["parameters"] = size(hgr.condition if part == "condition" else hgr.guidance)
        found[part]["flops_ratio"] = found[part]["flops"] / found["step"]["flops"] / found[part]["share_of"]
    found["flops_ratio"] = found["guidance"]["flops_ratio"]
    if not args.no_time:
        model, inputs = fill(model, device), family.inputs(2, device, dtype)
        add_times(found, lambda: model(**inputs), runs, args)
    return found


def add_times(found: dict, step: Callable[[], object], runs: dict, args: argparse.Namespace) -> None:
    """Times, and on a GPU what else only it can tell, into a family's figures."""
    gpu = args.device != "cpu"
    timed = counting.beside(step, runs, args.repeats, gpu)
    found["step"]["seconds"] = statistics.median(alone for alone, _ in timed["guidance"])
    for part, pairs in timed.items():
        share = found[part]["share_of"]
        found[part] |= counting.describe([(alone * share, extra) for alone, extra in pairs])
    found["time_ratio"] = found["guidance"]["time_ratio"]
    if not gpu:
        return
    for part, run in {"step": step, **runs}.items():
        found[part] |= {"kernels": counting.kernels(run), "peak_bytes": counting.gpu_peak_bytes(run)}
    try:
        graphs = [counting.graphed(run) for run in (step, runs["guidance"])]
    except RuntimeError as error:  # a host's class that waits for the GPU
        found["graph"] = {"error": str(error)}
        return
    pairs = counting.beside(graphs[0], {"guidance": graphs[1]}, args.repeats, gpu)["guidance"]
    found["graph"] = {"step_seconds": statistics.median(alone for alone, _ in pairs), **counting.describe(pairs)}
    found["graph_time_ratio"] = found["graph"]["time_ratio"]


@torch.no_grad()
def measure_growth(args: argparse.Namespace) -> dict:
    """The guidance redirector's cost by latent size, and the power of the number of pixels that it grows with (1: linear)."""
    hgr, gpu, sizes = make_hgr("sd15", torch.device(args.device)), args.device != "cpu", []
    for size in SIZES:
        run = guidance_run(hgr, FAMILIES["sd15"].channels, size, ALARM)
        sizes.append({"size": size, "pixels": size * size, **counted(run)})
        if not args.no_time:
            run()  # the warm-up
            sizes[-1]["seconds"] = statistics.median(counting.seconds(run, 20 if gpu else 1, gpu) for _ in range(args.repeats))
    keys = ("flops", "peak_bytes") if args.no_time else ("flops", "peak_bytes", "seconds")
    return {"sizes": sizes, **{f"{key}_exponent": exponent([(s["pixels"], s[key]) for s in sizes]) for key in keys}}


def exponent(points: list[tuple[float, float]]) -> float:
    """e of the best fit y = c x^e."""
    x, y = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope


def report_family(name: str, found: dict) -> str:
    """A family's figures as a table."""
    lines = [f"{FAMILIES[name].title}, {FAMILIES[name].size}x{FAMILIES[name].size} latents"]
    for part in ("step", "guidance", "clean", "condition"):
        if of := found.get(part):
            line = (
                f"  {part:10s} {of['parameters'] / 1e6:9.2f} M {of['flops'] / 1e9:12.2f} GFLOP {of['operations']:6d} operations"
            )
            line += f" {of['kernels']:6d} kernels" if "kernels" in of else ""
            line += f" {of['peak_bytes'] / 1e6:8.1f} MB" + (f" {1e3 * of['seconds']:10.2f} ms" if "seconds" in of else "")
            lines.append(line + _shares(of))
    if graph := found.get("graph"):
        lines.append(f"  CUDA graph: {graph.get('error') or _shares(graph)}")
    return "\n".join(lines)


def _shares(of: dict) -> str:
    text = f"   {of['flops_ratio']:.3%} of FLOPs" if "flops_ratio" in of else ""
    if "time_ratio" in of:
        low, high = of["time_ratio_range"]
        text += f"   {of['time_ratio']:.3%} of time [{low:.3%}, {high:.3%}]"
    return text


def report_growth(found: dict) -> str:
    lines = ["Guidance redirector by latent size"]
    for of in found["sizes"]:
        line = f"  {of['size']:4d}x{of['size']:<4d} {of['flops'] / 1e9:9.2f} GFLOP {of['peak_bytes'] / 1e6:8.1f} MB"
        lines.append(line + (f" {1e3 * of['seconds']:10.2f} ms" if "seconds" in of else ""))
    powers = ", ".join(f"{key.removesuffix('_exponent')} {value:.3f}" for key, value in found.items() if key != "sizes")
    return "\n".join([*lines, f"  grows with this power of the pixels: {powers}"])


def run(args: argparse.Namespace) -> dict:
    """The figures, printed as they come."""
    torch.manual_seed(0)
    host = find_host(args.comfyui)
    parts = args.families or [part for part in PARTS if host or part in ("sd15", GROWTH)]
    results = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", "threads": torch.get_num_threads(),
        "torch": torch.__version__, "host": host.name if host else None, "repeats": args.repeats,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in results.items()))
    if not host and not args.families:
        print("Without ComfyUI (--comfyui or COMFYUI_PATH): SD1.5 in the demo's own class, and neither SDXL nor SD3")
    for part in parts:
        results[part] = measure_growth(args) if part == GROWTH else measure_family(part, host, args)
        print(report_growth(results[part]) if part == GROWTH else report_family(part, results[part]), flush=True)
    return results


def main() -> None:
    args = arguments()
    try:
        results = run(args)
    except HostError as error:
        raise SystemExit(f"error: {error}") from None
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
