"""What SAFECFG_ENFORCE costs: CPU seconds per picture of the demo, plain beside enforced, in one process.

    COMFYUI_PATH=~/comfy/ComfyUI OMP_NUM_THREADS=1 ~/comfy/venv/bin/python -m benchmarks.enforcement --json FILE

Each round draws the same picture plain, enforced (SafeCFG in the MODEL, as the server puts it there), and enforced with the judge
that looks at every finished latent; the order turns round by round. The demo's denoiser is tiny, so the shares are far above those
of real models. The latents of clean pictures must be the same to the last bit, else nothing is written and the status is 1.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
WORDS = ("a frog and a strawberry", "an apple", "a cat and a car", "a flower")  # clean ones
KINDS = ("plain", "enforced", "enforced and judged")
SIZE, CFG = 16, 5.0  # the demo's latents a side: 128 pixels


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.enforcement", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfyui", metavar="DIR", default=os.environ.get("COMFYUI_PATH"), help="its checkout (COMFYUI_PATH)")
    parser.add_argument(
        "--rounds", type=int, default=4, metavar="N", help="pictures of each kind, after one of each to warm up (4)"
    )
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="of sampling (25)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures")
    args = parser.parse_args(line)
    if args.rounds < 1 or args.steps < 1:
        parser.error("expected at least one round and one step")
    if not args.comfyui or not (Path(args.comfyui).expanduser() / "main.py").is_file():
        parser.error("expected a ComfyUI checkout: give --comfyui or COMFYUI_PATH, and start with the Python that runs it")
    return args


def start_host(root: str, base: str) -> None:
    """Makes this process a ComfyUI on the CPU with the pack as `safecfg`, which ComfyUI would load from its path as well."""
    sys.path.insert(0, str(Path(root).expanduser().resolve()))
    line, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", base]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # parses
    finally:
        sys.argv = line
    spec = importlib.util.spec_from_file_location("safecfg", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules["safecfg"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def drawers(steps: int) -> dict[str, Callable[[int], torch.Tensor]]:
    """By kind, what draws the latents (1, C, 16, 16) of a round."""
    import comfy.utils
    from safecfg.nodes.demo_world.demo_model import DemoModel
    from safecfg.nodes.enforcement.enforced_model import enforced
    from safecfg.nodes.enforcement.judge import judge_latent
    from safecfg.nodes.enforcement.settings import enforcement

    import nodes

    comfy.utils.set_progress_bar_enabled(False)
    model, clip, _ = DemoModel.execute().result
    state = enforcement()
    if state.problem:
        raise SystemExit(state.problem)
    guarded = enforced(model, state.hgrs, state.terms)

    def draw(round_number: int, with_model, judged: bool = False) -> torch.Tensor:
        encode = nodes.CLIPTextEncode().encode
        (positive,), (negative,) = encode(clip, WORDS[round_number % len(WORDS)]), encode(clip, "")
        empty = {"samples": torch.zeros(1, model.model.latent_format.latent_channels, SIZE, SIZE)}
        (latent,) = nodes.common_ksampler(with_model, round_number, steps, CFG, "euler", "normal", positive, negative, empty)
        return (judge_latent(latent, [guarded], state.hgrs)[0] if judged else latent)["samples"]

    return dict(
        zip(KINDS, (lambda n: draw(n, model), lambda n: draw(n, guarded), lambda n: draw(n, guarded, judged=True)), strict=True)
    )


def measure(draw: dict[str, Callable[[int], torch.Tensor]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of this process per round and kind; raises ValueError when a kind's latents are not those of plain sampling."""
    seconds: dict[str, list[float]] = {kind: [] for kind in draw}
    for number in range(-1, rounds):
        kinds = list(draw)
        turn = number % len(kinds)
        latents = {}
        for kind in kinds[turn:] + kinds[:turn]:
            before = time.process_time()
            latents[kind] = draw[kind](max(number, 0))
            if number >= 0:
                seconds[kind].append(time.process_time() - before)
        first = latents[kinds[0]]
        if changed := [kind for kind, found in latents.items() if not torch.equal(found, first)]:
            raise ValueError(f"Expected the latents of {kinds[0]}, but they changed with: {', '.join(changed)}.")
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Median, least and most per kind, and the median of what a kind costs beyond the first one, round by round."""
    first = next(iter(seconds.values()))
    rows = ["| | CPU seconds per picture | beyond plain |", "|---|---|---|"]
    for kind, found in seconds.items():
        more = statistics.median(b - a for a, b in zip(first, found, strict=True))
        rows.append(f"| {kind} | {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}) | {more:+.2f} |")
    return "\n".join(rows)


def main(line: Sequence[str] | None = None) -> int:
    args = arguments(line)
    os.environ["SAFECFG_ENFORCE"] = "demo"
    with tempfile.TemporaryDirectory() as base:
        start_host(args.comfyui, base)
        try:
            seconds = measure(drawers(args.steps), args.rounds)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
    print(table(seconds))
    if args.json:
        args.json.write_text(json.dumps({"steps": args.steps, "threads": torch.get_num_threads(), "seconds": seconds}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
