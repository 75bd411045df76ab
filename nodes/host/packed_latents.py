"""Latents that core packs for sampling: of audio and video together, an HGR sees the part that it was made for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import hgr_models
from .families import LatentFacts


@dataclass(frozen=True)
class Part:
    """Where a packed latent (B, 1, N) holds values of shape (C, *spatial); `shape` None: the latent is not packed, all of it."""

    start: int = 0
    shape: tuple[int, ...] | None = None

    def take(self, latent: Tensor) -> Tensor:
        """The part (B, C, *spatial)."""
        if self.shape is None:
            return latent
        return latent[:, 0, self.start : self.start + math.prod(self.shape)].unflatten(1, self.shape)

    def put(self, latent: Tensor, part: Tensor) -> Tensor:
        """The latent with another part; the rest stays to the last bit."""
        if self.shape is None:
            return part
        end = self.start + math.prod(self.shape)
        return torch.cat([latent[..., : self.start], part.flatten(1)[:, None], latent[..., end:]], dim=-1)

    def rest(self, latent: Tensor) -> Tensor | None:
        """What is packed beside the part, (B, M); None: the latent is not packed."""
        if self.shape is None:
            return None
        return torch.cat([latent[:, 0, : self.start], latent[:, 0, self.start + math.prod(self.shape) :]], dim=-1)

    def join(self, part: Tensor, rest: Tensor | None) -> Tensor:
        """The latent of a part (B, C, *spatial) and the rest of it."""
        if rest is None:
            return part
        return torch.cat([rest[:, : self.start], part.flatten(1), rest[:, self.start :]], dim=-1)[:, None]


def part_for(x: Tensor, shapes: Sequence[Sequence[int]], info: hgr_models.HGRInfo | LatentFacts) -> Part | None:
    """Where a latent x holds what an HGR was made for; None: nowhere. `shapes` are those of the latents that core packed into x."""
    if info.of_prompts or _fits(x.shape, info):  # an HGR of prompts reads no latents
        return Part()
    if x.ndim != 3 or x.shape[1] != 1 or sum(math.prod(shape[1:]) for shape in shapes) != x.shape[2]:
        return None
    start = 0
    for shape in shapes:
        if _fits(shape, info):
            return Part(start, tuple(shape[1:]))
        start += math.prod(shape[1:])
    return None


def _fits(shape: Sequence[int], info: hgr_models.HGRInfo | LatentFacts) -> bool:
    return len(shape) == info.latent_dimensions + 2 and shape[1] == info.latent_channels
