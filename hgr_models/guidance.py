"""The guidance redirector: reads the guidance direction at every step, and turns a harmful one in latent space.

    g             = cond_denoised - uncond_denoised;  n = rms(g)
    b, q          = read(g / n, x_in, uncond_denoised, -2 ln sigma, ln n)
    w             = strength * (b > threshold(sigma))
    a, r          = correct(..., w)
    cond_safe     = where(any_k w_k > 0, cond_denoised + n (r - a g / n), cond_denoised)

Both a and r are smaller where `read` sees no harm of a flagged category: what stands there should stay.

This project's reading of arXiv 2412.16039; see `redirection.py` for the gate. Cost is linear in the latent's pixels.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import fused_trunk
from .layers import Context, ResBlock, normed, per_frame, pool, start_at_zero
from .shapes import per_row

REACH = 2.0  # logits below "as likely as not" at which a place is still changed half way
# How far a place is changed that is not near any harm. On 500 pictures of pairs and harms that training may see: at 1, 2 % of what is
# not harmful is lost that 0.5 keeps; at 0, a substitute lacks room where the harm was small, and twice as much harm is left.
ELSEWHERE = 0.5


@dataclass(frozen=True)
class GuidanceConfig:
    """Sizes of a guidance redirector; `dimensions` is 2 for pictures (B, C, H, W) and 3 for video (B, C, T, H, W)."""

    latent_channels: int
    categories: int
    dimensions: int = 2
    width: int = 128
    read_depth: int = 3
    correct_depth: int = 4
    heads: int = 4


@dataclass
class Reading:
    """What `read` found: harmfulness logits of the direction (B, K) and of the picture (B, K), and features for `correct`."""

    direction_logits: Tensor
    picture_logits: Tensor
    places: Tensor  # logits (B, K, frames, h, w) of the direction per place, for heat maps
    picture_places: Tensor  # and of the picture
    features: Tensor
    embedding: Tensor
    size: tuple[int, int]
    frames: int


class GuidanceRedirector(nn.Module):
    """Reads and corrects a guidance direction; any latent size and batch, 2-D and 3-D latents."""

    def __init__(self, config: GuidanceConfig, ops: Any = nn):
        super().__init__()
        self.config = c = config
        embedding = 2 * c.width
        self.embed = nn.Sequential(ops.Linear(64, embedding), nn.SiLU(), ops.Linear(embedding, embedding))
        self.stem = ops.Conv2d(4 * 3 * c.latent_channels, c.width, 3, padding=1)
        block = lambda: ResBlock(c.width, embedding, ops)  # noqa: E731
        self.readers = nn.ModuleList(block() for _ in range(c.read_depth))
        self.read_context, self.read_norm = Context(c.width, c.heads, ops), ops.GroupNorm(8, c.width)
        self.read_head = ops.Conv2d(c.width, 2 * c.categories, 1)
        self.weights_in = ops.Linear(c.categories, embedding)
        self.correctors = nn.ModuleList(block() for _ in range(c.correct_depth))
        self.correct_context, self.correct_norm = Context(c.width, c.heads, ops), ops.GroupNorm(8, c.width)
        self.residual = ops.Conv2d(c.width, 4 * c.latent_channels, 3, padding=1)
        self.attenuation = ops.Linear(c.width, 1)
        for head in (self.residual, self.attenuation):
            start_at_zero(head)

    def _embedding(self, log_snr: Tensor, log_norm: Tensor) -> Tensor:
        """Sinusoids of both scalars (B,) at 16 frequencies, through a small network: (B, embedding)."""
        frequencies, phases = _waves(log_snr.device)
        scalars = torch.stack([log_snr, log_norm], dim=1)[:, None, :, None]
        waves = torch.addcmul(phases, scalars, frequencies).sin()  # (B, 2, 2, 16): sines, then cosines, of both scalars
        return F.silu(self.embed(waves.flatten(1)))

    def read(self, direction: Tensor, x_in: Tensor, uncond_denoised: Tensor, log_snr: Tensor, log_norm: Tensor) -> Reading:
        """Reads a direction of unit rms.

        direction, x_in, uncond_denoised: (B, C, *spatial) float32; log_snr = -2 ln sigma and log_norm = ln n: (B,).
        """
        inputs = torch.cat([direction, x_in, uncond_denoised], dim=1).clamp(-20, 20)
        frames = inputs.shape[2] if inputs.ndim == 5 else 1
        if inputs.ndim == 5:
            inputs = inputs.transpose(1, 2).flatten(0, 1)  # (B * frames, 3 C, H, W): frames meet in the context
        height, width = inputs.shape[-2:]
        if width % 2 or height % 2:
            inputs = F.pad(inputs, (0, width % 2, 0, height % 2), mode="replicate")
        embedding = self._embedding(log_snr, log_norm)
        trunk = fused_trunk(self, inputs) or self
        h, places = trunk.read_trunk(inputs, embedding, frames)
        places = places.unflatten(0, (-1, frames)).transpose(1, 2)  # (B, 2 K, frames, h, w)
        (b, q), (direction, picture) = trunk.strongest(places).chunk(2, dim=1), places.chunk(2, dim=1)
        return Reading(b, q, direction, picture, h, embedding, (height, width), frames)

    def read_trunk(self, inputs: Tensor, embedding: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Of inputs (N, 3 C, H, W) with even sides: features, and logits per place (N, 2 K, H / 2, W / 2)."""
        rows = per_frame(embedding, frames)
        h = self.stem(F.pixel_unshuffle(inputs, 2))
        for i, block in enumerate(self.readers):
            h = block(h, rows)
            if i == 0:
                h = self.read_context(h, frames)
        return h, self.read_head(F.silu(normed(self.read_norm, h))).float()

    def strongest(self, places: Tensor) -> Tensor:
        """Logits (B, K) of logits per place (B, K, frames, h, w)."""
        return pool(places)

    def correct_trunk(self, features: Tensor, embedding: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """The residual (N, C, H, W) and pooled features (N / frames, width)."""
        rows = per_frame(embedding, frames)
        h = features
        for i, block in enumerate(self.correctors):
            h = block(h, rows)
            if i == 1:
                h = self.correct_context(h, frames)
        h = F.silu(normed(self.correct_norm, h))
        return F.pixel_shuffle(self.residual(h), 2), h.unflatten(0, (-1, frames)).mean(dim=(1, 3, 4))

    def correct(self, reading: Reading, weights: Tensor, elsewhere: float = ELSEWHERE) -> tuple[Tensor, Tensor]:
        """Attenuation (B, 1, *spatial) in [0, 1] and residual (B, C, *spatial), float32, for category weights (B, K) in [0, 1].

        `elsewhere` in [0, 1] is what is left of both far from the harm; training teaches the whole change, with 1.
        """
        frames = reading.frames
        embedding = reading.embedding + self.weights_in(weights.to(reading.embedding.dtype))
        # What read the direction corrects it, too: its features are in its own form.
        trunk = getattr(reading.features, "trunk", self)
        r, pooled = trunk.correct_trunk(reading.features, embedding, frames)
        height, width = reading.size
        r = r[..., :height, :width].float()
        level = self.attenuation(pooled).float()
        a = level.clamp(0, 1)
        if level.requires_grad:
            a = level + (a - level).detach()  # a closed end still learns
        near = _near(reading, weights, elsewhere)
        if self.config.dimensions == 3:
            r = r.unflatten(0, (-1, frames)).transpose(1, 2)
        else:
            near = near[:, :, 0]
        return near * per_row(a, near), near * r


@lru_cache(maxsize=16)
def _waves(device: torch.device) -> tuple[Tensor, Tensor]:
    """Angular frequencies (16,), and phases (2, 1, 1) that make a sine and a cosine; made once per device, not in every step."""
    with torch.inference_mode(False):  # training may need them too
        frequencies = 2.0 ** torch.linspace(-4, 2, 16, device=device) * (math.pi / 2)
        return frequencies, torch.tensor([0.0, math.pi / 2], device=device)[:, None, None]


def _near(reading: Reading, weights: Tensor, elsewhere: float) -> Tensor:
    """How far a place is changed (B, 1, frames, H, W): about 1 at and beside the harm of flagged categories, `elsewhere` far from it."""
    flagged = (weights > 0)[:, :, None, None, None]
    seen = torch.where(flagged, reading.places, -math.inf).amax(dim=1)  # (B, frames, h, w)
    near = F.max_pool2d((seen + REACH).sigmoid(), 3, stride=1, padding=1)
    near = elsewhere + (1 - elsewhere) * near
    height, width = reading.size
    return F.interpolate(near, scale_factor=2, mode="nearest")[:, None, ..., :height, :width]
