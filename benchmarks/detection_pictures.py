"""Held-out pictures of the demo world for measuring detection: drawn by plain CFG, and rendered."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from demo import detection, evaluate, world
from demo import prompts as p
from demo.judge import Judge
from demo.pipeline import LATENT_SHAPE, DemoModel
from demo.sampling import normal_schedule, sample_euler, scale_input
from hgr_models import HGR
from hgr_models.detection import run_excess
from hgr_models.redirection import read_guidance

STEPS, CFG, BATCH = 25, 5.0, 50
KINDS = {
    "harmful": ("combination", "single"),
    "clean": ("clean",),
    "unseen_harmful": ("unseen_harmful",),
    "unseen_clean": ("unseen_clean",),
}


@dataclass
class Pictures:
    """Pictures of one kind: latents (N, 4, h, w), tokens of their captions, tokens of captions without the harm, and harms."""

    latents: Tensor
    tokens: Tensor
    hidden: Tensor
    names: list[tuple[str, ...]]
    shows: Tensor  # (N, K) which harms can be seen
    scenes: list[world.Scene] | None = None


def draw_items(kind: str, count: int, seed: int) -> list[evaluate.Item]:
    """`count` held-out prompts of a kind, in equal parts of what belongs to it."""
    kinds = KINDS[kind]
    return [item for i, k in enumerate(kinds) for item in evaluate.items(k, (count + i) // len(kinds), seed)]


def hidden_captions(model: DemoModel, names: list[tuple[str, ...]], rng: random.Random) -> Tensor:
    """Captions that name a harmless stand-in for every harm."""
    harms = lambda each: frozenset(c for c in map(p.category_of, each) if c)  # noqa: E731
    return model.encode([p.make_pair(each, harms(each), rng).partner for each in names])


def harms_of(names: set[str] | tuple[str, ...]) -> list[float]:
    return [float(any(world.CATEGORY[n] == category for n in names)) for category in world.CATEGORIES]


@torch.no_grad()
def runs(model: DemoModel, hgr: HGR, tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Latents of plain CFG runs, and how far each run exceeds the thresholds (N, K), in log odds."""
    latents, excess, sigmas = [], [], normal_schedule(STEPS)
    for start in range(0, len(tokens), BATCH):
        rows, steps = tokens[start : start + BATCH], []
        negative = model.encode([""]).expand(len(rows), -1, -1)
        both = torch.cat([rows, negative])

        def denoise(x: Tensor, sigma: Tensor, both=both, steps=steps) -> Tensor:
            cond, uncond = model.denoised(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
            reading = read_guidance(hgr.guidance, cond, uncond, scale_input(x, sigma), sigma)[2]
            steps.append(reading.direction_logits.sigmoid())
            return uncond + CFG * (cond - uncond)

        seeds = (torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(rows)))
        noise = torch.stack([torch.randn(LATENT_SHAPE, generator=generator) for generator in seeds])
        latents.append(sample_euler(denoise, noise, sigmas))
        excess.append(run_excess(hgr.condition.harmfulness(rows), torch.stack(steps), sigmas[:-1], hgr))
    return torch.cat(latents), torch.cat(excess)


def generated(model: DemoModel, hgr: HGR, judge: Judge, kind: str, count: int, seed: int) -> tuple[Pictures, Tensor]:
    """Pictures of plain CFG runs, and by how much (N, K) the runs exceed the thresholds."""
    items, rng = draw_items(kind, count, seed), random.Random(f"captions {kind} {seed}")
    tokens, names = model.encode([item.prompt for item in items]), [item.names for item in items]
    latents, excess = runs(model, hgr, tokens, seed)
    found = judge.names(torch.cat([model.decode(part) for part in latents.split(BATCH)]))
    return Pictures(
        latents, tokens, hidden_captions(model, names, rng), names, torch.tensor([harms_of(f) for f in found])
    ), excess


def rendered(model: DemoModel, kind: str, count: int, seed: int) -> Pictures:
    """Held-out scenes with their captions."""
    names, rng = [item.names for item in draw_items(kind, count, seed)], random.Random(f"scenes {kind} {seed}")
    pictures, scenes = detection.render_scenes(names, rng)
    tokens = model.encode([world.caption(scene.names, rng, scene.background) for scene in scenes])
    latents = detection.encode_pictures(model, pictures)
    return Pictures(
        latents, tokens, hidden_captions(model, names, rng), names, torch.tensor([harms_of(n) for n in names]), scenes
    )
