"""How often the judge of SAFECFG_ENFORCE holds a clean picture back: the demo's held-out prompts, seeds that chose no threshold.

    COMFYUI_PATH=~/comfy/ComfyUI OMP_NUM_THREADS=1 ~/comfy/venv/bin/python -m benchmarks.judge_alarms

Plain runs (an empty latent, text alone) of 2, 3, 5 and 25 steps, judged upright at the stored thresholds and at the 0.6 that such runs are
held to; finished pictures also as if no run had returned them: the other seven ways to turn and mirror them, at 0.6.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence

import torch

from .enforcement import CFG, SIZE, start_host

STEPS = (2, 3, 5, 25)
KINDS = ("clean", "unseen_clean")  # held-out pairs; pictograms that no training showed
BATCH = 25


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.judge_alarms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfyui", metavar="DIR", default=os.environ.get("COMFYUI_PATH"), help="its checkout (COMFYUI_PATH)")
    parser.add_argument("--pictures", type=int, default=200, metavar="N", help="of each kind and number of steps (200)")
    parser.add_argument("--seed", type=int, default=11, help="of prompts and noise (11)")
    args = parser.parse_args(line)
    if args.pictures < 1:
        parser.error("expected at least one picture")
    if not args.comfyui:
        parser.error("expected a ComfyUI checkout: give --comfyui or COMFYUI_PATH, and start with the Python that runs it")
    return args


def looker():
    """`latents(prompts, seed, steps)` and `scores(latents)` (B, K) of the demo under enforcement, and the judge's module and HGR."""
    import comfy.utils
    from safecfg.nodes.demo_world.demo_model import DemoModel
    from safecfg.nodes.enforcement import judge
    from safecfg.nodes.enforcement.enforced_model import bare_model, enforced
    from safecfg.nodes.enforcement.settings import enforcement

    import nodes

    comfy.utils.set_progress_bar_enabled(False)
    model, clip, _ = DemoModel.execute().result
    state = enforcement()
    if state.problem:
        raise SystemExit(state.problem)
    (hgr,) = state.hgrs
    guarded = enforced(model, state.hgrs, state.terms)

    def latents(prompts: Sequence[str], seed: int, steps: int) -> torch.Tensor:
        rows = [nodes.CLIPTextEncode().encode(clip, text)[0][0] for text in prompts]
        positive, (negative,) = [[torch.cat([row[0] for row in rows]), rows[0][1]]], nodes.CLIPTextEncode().encode(clip, "")
        empty = {"samples": torch.zeros(len(prompts), model.model.latent_format.latent_channels, SIZE, SIZE)}
        (drawn,) = nodes.common_ksampler(guarded, seed, steps, CFG, "euler", "normal", positive, negative, empty)
        return drawn["samples"]

    def scores(some: torch.Tensor) -> torch.Tensor:
        return judge.look(bare_model(guarded), hgr, some, judge.empty_prompt(hgr.info), looks=judge.Looks()).scores

    return latents, scores, judge, hgr.info


def alarms(scores: torch.Tensor, limits: torch.Tensor) -> int:
    """Pictures (N, K) above a limit (K,) in any category."""
    return int((scores > limits).any(dim=1).sum())


def share(found: int, of: int) -> str:
    """`3 of 200,  1.5 % [0.5, 4.3]`."""
    from demo.evaluate import Rate

    return f"{found} of {of},{Rate(found, of)}"


def main(line: Sequence[str] | None = None) -> int:
    args = arguments(line)
    os.environ["SAFECFG_ENFORCE"] = "demo"
    with tempfile.TemporaryDirectory() as base:
        start_host(args.comfyui, base)
        from demo import evaluate

        latents, scores, judge, info = looker()
        stored = torch.tensor(info.picture_thresholds)
        sure, turned = stored.clamp(min=judge.PLAIN_THRESHOLD), stored.clamp(min=judge.TURNED_THRESHOLD)
        print("| prompts | steps | stored thresholds | a plain run's | turned and mirrored |\n|---|---|---|---|---|")
        for kind in KINDS:
            prompts = [item.prompt for item in evaluate.items(kind, args.pictures, args.seed)]
            for steps in STEPS:
                parts = [latents(prompts[i : i + BATCH], args.seed * 1000 + i, steps) for i in range(0, args.pictures, BATCH)]
                drawn = torch.cat(parts)
                seen = torch.cat([scores(some) for some in drawn.split(BATCH)])
                others = "–"
                if steps == max(STEPS):
                    views = torch.stack([torch.cat([scores(v) for v in view.split(BATCH)]) for view in judge.views(drawn)])
                    others = share(alarms(views.amax(dim=0), turned), len(drawn))
                n = len(drawn)
                print(
                    f"| {kind} | {steps} | {share(alarms(seen, stored), n)} | {share(alarms(seen, sure), n)} | {others} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
