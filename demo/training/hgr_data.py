"""Prompts as tensors and recorded runs for the demo's HGR."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hgr_models.losses import PredictWith
from hgr_models.recording import Points, Policy, Prompts, record_runs
from hgr_models.shards import Texts, write_runs, write_texts
from hgr_models.training import autocast

from .. import prompts as p
from .. import world
from ..pipeline import LATENT_SHAPE, DemoModel
from ..sampling import input_scaling, shifted_schedule

STEPS, BATCH = 8, 40  # of a recorded run; runs per batch
LOOKS, LOOK_SIGMAS = 2, (0.3, 2.5)  # how often, and at which noise levels, a finished run is looked at as a picture
ABOUT = {"model": "the demo's"}


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


def record_shards(
    model: DemoModel,
    prompts: Prompts,
    kind: str,
    follow: Callable[[int], str],
    policy: Policy | None,
    generator: torch.Generator,
    folder: Path,
    title: str,
) -> None:
    """Writes `runs` of all prompts as shards, one per batch."""
    for i, (points, chunk) in enumerate(runs(model, prompts, follow, policy, generator, title)):
        write_runs(folder / f"{title.replace(' ', '_')}-{i:03d}.safetensors", kind, points, chunk, ABOUT)


def runs(
    model: DemoModel,
    prompts: Prompts,
    follow: Callable[[int], str],
    policy: Policy | None,
    generator: torch.Generator,
    title: str,
    batch: int = BATCH,
) -> Iterator[tuple[Points, Prompts]]:
    """Recorded runs of all prompts, batch by batch, with the prompts of each; `follow(i)` says what batch i follows.

    In bf16: twice as fast, and its error in a direction (2 to 9 % of its rms) is noise that the next user's fp16 has too.
    """
    predict = autocast(model.device)(model.denoised)
    as_float = lambda *rows: predict(*rows).float()  # noqa: E731
    for i, start in enumerate(tqdm(range(0, len(prompts), batch), desc=title)):
        chunk = prompts[slice(start, start + batch)]
        sigmas = shifted_schedule(STEPS + 1, 0.5 * torch.rand(1, generator=generator).item())  # others in every batch
        noise = torch.randn(len(chunk), *LATENT_SHAPE, generator=generator).to(model.device)
        cond_scale = 3 + 4 * torch.rand(len(chunk), generator=generator).to(model.device)
        looks = []
        for _ in range(LOOKS):
            part = torch.rand(1, generator=generator).item()
            level = LOOK_SIGMAS[0] * (LOOK_SIGMAS[1] / LOOK_SIGMAS[0]) ** part
            looks.append((level, torch.randn(noise.shape, generator=generator).to(model.device)))
        points = record_runs(as_float, input_scaling, chunk, sigmas.to(model.device), noise, follow(i), cond_scale, policy, looks)
        yield points, chunk


def write_prompts(model: DemoModel, pairs: list[p.Pair], folder: Path, name: str) -> None:
    """Writes the encoded prompts of pairs, all of them harmful or all clean, as a shard."""
    harms = torch.stack([labels(pair.harms) for pair in pairs])
    tokens = model.encode([pair.prompt for pair in pairs])
    write_texts(folder / f"texts_{name}.safetensors", Texts(tokens, None, None, harms), ABOUT)


def frozen(device: torch.device) -> PredictWith:
    """The demo's denoiser for `python -m hgr_models.train --model demo.training.hgr_data:frozen`, in bf16."""
    denoise = autocast(device)(DemoModel.load(str(device)).denoised)
    return lambda points, prompts, tokens, pooled: denoise(points.x, points.sigma, tokens)
