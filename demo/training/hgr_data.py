"""Prompts as tensors and recorded runs for the demo's HGR."""

import random
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from hgr_models.recording import Points, Policy, Prompts, record_runs

from .. import prompts as p
from .. import world
from ..pipeline import LATENT_SHAPE, DemoModel
from ..sampling import normal_schedule

STEPS, BATCH = 8, 40  # of a recorded run; runs per batch


def labels(categories: frozenset[str]) -> Tensor:
    """1 per category, (K,)."""
    return torch.tensor([float(c in categories) for c in world.CATEGORIES])


def prompt_tensors(model: DemoModel, pairs: list[p.Pair], rng: random.Random) -> Prompts:
    """Encoded pairs with varied negatives: three quarters empty, the others a clean prompt or words of harm."""
    negatives = ["" if rng.random() < 0.75 else _negative(rng) for _ in pairs]
    return Prompts(
        model.encode([pair.prompt for pair in pairs]),
        model.encode([pair.partner for pair in pairs]),
        model.encode(negatives),
        torch.stack([labels(pair.harms) for pair in pairs]).to(model.device),
        torch.stack([labels(pair.removed) for pair in pairs]).to(model.device),
    )


def _negative(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return p.clean_pair(rng, (), 0.0).prompt
    return ", ".join(rng.choice((*p.HARM_WORDS[c], *world.CATEGORIES)) for c in rng.sample(world.CATEGORIES, 2))


def disguise(tokens: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Tokens (B, T, D) of which `share` are perturbed: what text no longer shows, the direction still must."""
    size = tokens.std() * torch.rand(len(tokens), 1, 1, generator=generator).to(tokens.device) * 0.5
    hit = (torch.rand(len(tokens), 1, 1, generator=generator) < share).to(tokens.device)
    return torch.where(hit, tokens + size * torch.randn(tokens.shape, generator=generator).to(tokens.device), tokens)


def record(
    model: DemoModel,
    prompts: Prompts,
    follow: Callable[[int], str],
    policy: Policy | None,
    generator: torch.Generator,
    title: str,
) -> Points:
    """Runs of all prompts in batches of BATCH; `follow(i)` says what batch i follows. `Points.prompt` indexes `prompts`."""
    parts = []
    for i, start in enumerate(tqdm(range(0, len(prompts), BATCH), desc=title)):
        chunk = prompts[slice(start, start + BATCH)]
        shift = torch.rand(1, generator=generator).item()  # other noise levels in every batch
        sigmas = normal_schedule(STEPS + 1)
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1] ** (1 - shift / 2) * sigmas[:-2] ** (shift / 2), sigmas[-1:]]).to(
            model.device
        )
        noise = torch.randn(len(chunk), *LATENT_SHAPE, generator=generator).to(model.device)
        cond_scale = 3 + 4 * torch.rand(len(chunk), generator=generator).to(model.device)
        points = record_runs(model.denoised, chunk, sigmas, noise, follow(i), cond_scale, policy)
        points.prompt = points.prompt + start
        parts.append(points)
    return Points.cat(parts)
