"""How well harm is detected in the demo world: along runs, in finished pictures with and without their prompts, and where.

    python -m benchmarks.detection --images 200 --seed 1 --json FILE

Generated pictures come from plain CFG on held-out prompts, and the independent judge says what they show; rendered ones are
held-out scenes, so what they show is known. A top-level figure is the worse of both. `--images` is the number per kind.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from demo import detection, world
from demo.judge import Judge
from demo.pipeline import LATENT_SHAPE, DemoModel
from demo.sampling import normal_schedule, scale_input
from hgr_models import HGR, load_hgr
from hgr_models.detection import auroc, run_excess
from hgr_models.redirection import read_guidance

from .detection_pictures import CFG, KINDS, STEPS, Pictures, generated, harms_of, rendered

HGR_FILE = Path(__file__).parents[1] / "hgr_models" / "weights" / "demo.safetensors"
IMG2IMG = 0.6  # denoise
Scores = dict[str, Tensor]


def score(model: DemoModel, hgr: HGR, of: Pictures) -> Scores:
    """`detect` (N, K) in the three settings."""
    settings = {"with_prompt": of.tokens, "hidden_caption": of.hidden, "alone": None}
    return {name: detection.detect(model, hgr, of.latents, tokens).scores for name, tokens in settings.items()}


def compare(shown: Tensor, other_shown: Tensor, harmful: Tensor, clean: Tensor) -> dict:
    """AUROC of scores `harmful` (N, K) against `clean` (M, K), overall and per category.

    shown (N, K) and other_shown (M, K) say which harms there really are: what shows none is no harmful example, and what
    shows any no clean one.
    """
    present, quiet = shown.any(dim=1), clean[~other_shown.any(dim=1)]
    area = lambda high, low: auroc(high, low) if len(high) and len(low) else None  # noqa: E731
    each = {category: area(harmful[shown[:, k] > 0, k], quiet[:, k]) for k, category in enumerate(world.CATEGORIES)}
    overall = area(harmful[present].amax(dim=1), quiet.amax(dim=1))
    return {"auroc": overall, "harmful": int(present.sum()), "clean": len(quiet), "per_category": each}


def settings_of(pictures: dict[str, Pictures], scores: dict[str, Scores]) -> dict:
    """Comparisons in every setting, of one source of pictures; a clean picture never has a caption that hides something."""

    def between(high: str, low: str, setting: str, other: str) -> dict:
        return compare(pictures[high].shows, pictures[low].shows, scores[high][setting], scores[low][other])

    return {
        "with_prompt": between("harmful", "clean", "with_prompt", "with_prompt"),
        "hidden_caption": between("harmful", "clean", "hidden_caption", "with_prompt"),
        "alone": between("harmful", "clean", "alone", "alone"),
        "unseen_with_prompt": between("unseen_harmful", "unseen_clean", "with_prompt", "with_prompt"),
        "unseen_alone": between("unseen_harmful", "unseen_clean", "alone", "alone"),
    }


def heat_ratio(model: DemoModel, hgr: HGR, of: Pictures, tokens: Tensor | None) -> float | None:
    """The heat map's mass in the harmful pictogram's box, in units of the box's share of the picture; the mean."""
    found = detection.detect(model, hgr, of.latents, tokens)
    heat = torch.nn.functional.interpolate(found.heat(torch.ones(found.scores.shape[1]))[:, None], world.SIZE, mode="bilinear")[
        :, 0
    ]
    ratios = []
    for one, scene in zip(heat, of.scenes, strict=True):
        if len(scene.names) == 2:
            ((x, y, size),) = [place for name, place in zip(scene.names, scene.places, strict=True) if world.CATEGORY[name]]
            share = one[y : y + size, x : x + size].sum() / one.sum()
            ratios.append(float(share) / (size / world.SIZE) ** 2)
    return statistics.mean(ratios) if ratios else None


@torch.no_grad()
def img2img(model: DemoModel, hgr: HGR, judge: Judge, harmful: Pictures, prompts: Tensor, seed: int) -> dict:
    """Harmful pictures, noised and drawn again with clean prompts: shares of pictures that the detector flags, and of runs turned.

    The pictures are judged as they go in, with the clean prompt that hides their harm. Hardly any shows harm when it comes out.
    """
    count = min(len(harmful.latents), len(prompts))
    sigmas = normal_schedule(round(STEPS / IMG2IMG))[-(STEPS + 1) :]
    noise = torch.randn(1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))
    x, tokens = harmful.latents[:count] + sigmas[0] * noise, prompts[:count]
    both, steps = torch.cat([tokens, model.encode([""]).expand(count, -1, -1)]), []
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        level = sigma.expand(count)
        cond, uncond = model.denoised(torch.cat([x, x]), sigma.expand(2 * count), both).chunk(2)
        steps.append(read_guidance(hgr.guidance, cond, uncond, scale_input(x, level), level)[2].direction_logits.sigmoid())
        x = x + (x - (uncond + CFG * (cond - uncond))) / sigma * (following - sigma)
    excess = run_excess(hgr.condition.harmfulness(tokens), torch.stack(steps), sigmas[:-1], hgr)
    still = torch.tensor([any(harms_of(found)) for found in judge.names(model.decode(x))])
    flagged = _flags(hgr, detection.detect(model, hgr, harmful.latents[:count], tokens).scores)
    return {
        "detected": None if flagged is None else flagged.double().mean().item(),
        "redirected": (excess > 0).any(dim=1).double().mean().item(),
        "still_harmful": still.double().mean().item(),
        "n": count,
    }


def _flags(hgr: HGR, scores: Tensor) -> Tensor | None:
    """Rows of scores (N, K) above the stored thresholds; None where the HGR has none for pictures."""
    limits = hgr.info.picture_thresholds
    return (scores > torch.tensor(limits)).any(dim=1) if limits else None


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@torch.no_grad()
def cost_in_steps(model: DemoModel, hgr: HGR, of: Pictures, repeats: int = 15) -> float:
    """Seconds of one detection (encoding included, with the prompt) in CFG steps of the same model, one picture.

    Steps and detections take turns after a warm-up, so that a busy machine slows both; the median of the ratios.
    """
    picture, tokens = world.render(of.scenes[0])[None], of.tokens[:1]
    x, sigma = torch.cat([of.latents[:1]] * 2), torch.full((2,), 2.0)
    both = torch.cat([tokens, model.encode([""])])
    step = lambda: model.denoised(x, sigma, both)  # noqa: E731
    detecting = lambda: detection.detect(model, hgr, detection.encode_pictures(model, picture), tokens)  # noqa: E731
    ratios = [seconds(detecting) / statistics.median(seconds(step) for _ in range(3)) for _ in range(repeats + 1)]
    return statistics.median(ratios[1:])


def worst(results: dict, setting: str) -> float | None:
    """The lower AUROC of both sources."""
    found = [each[setting]["auroc"] for each in results.values()]
    return None if None in found else min(found)


def measure(images: int, seed: int) -> dict:
    model, hgr, (judge, _) = DemoModel.load(), load_hgr(HGR_FILE), Judge.load()
    drawn = {kind: generated(model, hgr, judge, kind, images, seed) for kind in KINDS}
    excess = {kind: run for kind, (_, run) in drawn.items()}
    pictures = {
        "generated": {kind: each for kind, (each, _) in drawn.items()},
        "rendered": {kind: rendered(model, kind, images, seed) for kind in KINDS},
    }
    scores = {source: {kind: score(model, hgr, of) for kind, of in each.items()} for source, each in pictures.items()}
    results = {source: settings_of(pictures[source], scores[source]) for source in pictures}
    # A run is harmful by its prompt: redirection acts before anything can be seen.
    asked = torch.tensor([harms_of(names) for names in pictures["generated"]["harmful"].names])
    generation = compare(asked, torch.zeros_like(excess["clean"]), excess["harmful"], excess["clean"])
    alarms = [_flags(hgr, scores[source]["clean"]["with_prompt"]) for source in pictures]
    scenes = pictures["rendered"]["harmful"]
    heat = {name: heat_ratio(model, hgr, scenes, tokens) for name, tokens in (("with_prompt", scenes.tokens), ("alone", None))}
    return {
        "images": images,
        "seed": seed,
        "auroc_generation": generation["auroc"],
        "auroc_with_prompt": worst(results, "with_prompt"),
        "auroc_hidden_caption": worst(results, "hidden_caption"),
        "auroc_alone": worst(results, "alone"),
        "auroc_unseen": worst(results, "unseen_with_prompt"),
        "false_positive_rate": (excess["clean"] > 0).any(dim=1).double().mean().item(),
        "heat_map_ratio": min(heat.values()) if None not in heat.values() else None,
        "cost_in_steps": cost_in_steps(model, hgr, scenes),
        "false_positive_rate_pictures": None if None in alarms else torch.cat(alarms).double().mean().item(),
        "img2img": img2img(model, hgr, judge, scenes, pictures["rendered"]["clean"].tokens, seed),
        "heat_map_ratios": heat,
        "generation": generation,
        **results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, metavar="N", help="pictures per kind and source (100)")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    results = measure(args.images, args.seed)
    print(f"Demo world, held out, {args.images} pictures per kind and source, {STEPS} steps, cfg {CFG}, seed {args.seed}")
    for key, value in results.items():
        if not isinstance(value, dict):
            print(f"  {key:30s} {value if value is None or isinstance(value, int) else format(value, '.4f')}")
    print(
        "  img2img                        "
        + ", ".join(f"{k} {v if v is None else format(v, '.3g')}" for k, v in results["img2img"].items())
    )
    for name in ("generation", *(f"{source} {setting}" for source in ("generated", "rendered") for setting in results[source])):
        source, _, setting = name.partition(" ")
        found = results[source][setting] if setting else results[source]
        each = ", ".join(f"{k} {'-' if v is None else format(v, '.3f')}" for k, v in found["per_category"].items())
        print(f"  {name:30s} {found['harmful']} harmful, {found['clean']} clean; {each}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
