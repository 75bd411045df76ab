"""Detecting harm in pictures of the demo world in plain torch: what `SafeCFG Detect Harm` does, without ComfyUI."""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hgr_models.detection import Detection, Looks, See, Seen, prompt_scores
from hgr_models.detection import detect as detect_in_latents

from . import world
from .autoencoder import LATENT_SCALE
from .files import pictures_to_tensor
from .pipeline import DemoModel
from .prompts import SEEN_CLEAN, held_out
from .sampling import scale_input, sigma_of

BATCH = 50


def encode_pictures(model: DemoModel, pictures: np.ndarray) -> Tensor:
    """Unit-variance latents (N, 4, h, w) of uint8 pictures (N, 8 h, 8 w, 3)."""
    parts = pictures_to_tensor(pictures).split(BATCH)
    with torch.no_grad():
        return torch.cat([model.autoencoder.encode(part.to(model.device)) * LATENT_SCALE for part in parts])


def see(model: DemoModel, latents: Tensor, tokens: Tensor | None) -> See:
    """What the demo model makes of noised latents (B, 4, h, w), with the prompts' tokens (B, T, D) or without."""
    negative = model.encode([""]).expand(len(latents), -1, -1)
    if tokens is not None:
        negative = negative.repeat(1, tokens.shape[1] // negative.shape[1], 1)  # as many chunks as the prompts

    def look(part: float, noise: Tensor) -> Seen:
        sigma = sigma_of(torch.tensor(999 * (1 - part))).to(latents).expand(len(latents))
        x = latents + sigma.view(-1, 1, 1, 1) * noise.to(latents)
        if tokens is None:
            return Seen(scale_input(x, sigma), sigma, model.denoised(x, sigma, negative))
        rows = (torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([negative, tokens]))
        return Seen(scale_input(x, sigma), sigma, *model.denoised(*rows).chunk(2))

    return look


@torch.no_grad()
def detect(model: DemoModel, hgr, latents: Tensor, tokens: Tensor | None = None, looks: Looks = Looks()) -> Detection:
    """What an HGR finds in unit-variance latents (N, 4, h, w), with the prompts' tokens (N, T, D) or without."""
    parts = []
    for start in range(0, len(latents), BATCH):
        rows = slice(start, start + BATCH)
        texts = None if tokens is None else tokens[rows]
        prompts = None if texts is None or hgr.condition is None else prompt_scores(hgr, texts)
        parts.append(detect_in_latents(hgr.guidance, see(model, latents[rows], texts), latents[rows].shape, looks, prompts))
    return Detection.cat(parts)


def render_scenes(names: Sequence[tuple[str, ...]], rng: random.Random) -> tuple[np.ndarray, list[world.Scene]]:
    """Random scenes of these pictograms: uint8 pictures (N, 128, 128, 3) and where everything stands in them."""
    scenes = [world.random_scene(each, rng) for each in names]
    return np.stack([world.render(scene) for scene in scenes]), scenes


def clean_renders(model: DemoModel, count: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Latents and tokens of rendered clean scenes with their captions, for calibration; none is held out."""
    names: list[tuple[str, ...]] = []
    while len(names) < count:
        drawn = tuple(rng.sample(SEEN_CLEAN, rng.choice((1, 2, 2))))
        names += [] if held_out(drawn) else [drawn]
    pictures, scenes = render_scenes(names, rng)
    captions = [world.caption(scene.names, rng, scene.background) for scene in scenes]
    return encode_pictures(model, pictures), model.encode(captions)
