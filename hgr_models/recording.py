"""Recording guidance: sampling runs from which an HGR learns, as tensors; nothing is ever decoded.

A run follows the harmful prompt, its safe partner or the HGR in training (on-policy). At every step the same noisy
latent is evaluated with the negative, the prompt and the partner, which is all that both networks need.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .shapes import per_row

# (x, sigma (B,), tokens (B, T, D)) -> x0 prediction
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
# (x, sigma, uncond_denoised, cond_denoised) -> the cond_denoised to follow
Policy = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Prompts:
    """A batch of prompts for recording. A clean prompt is its own partner and has no harms."""

    tokens: Tensor  # (B, T, D)
    partner_tokens: Tensor  # (B, T, D): the same without the removed harms
    negative_tokens: Tensor  # (B, T, D)
    harms: Tensor  # (B, K) 1 where the prompt is harmful
    removed: Tensor  # (B, K) the subset of `harms` that the partner lacks
    pooled: Tensor | None = None  # (B, P), of the prompt
    mask: Tensor | None = None  # (B, T) attention mask of the prompt
    lengths: Tensor | None = None  # (B,) tokens of each prompt, where shorter ones were padded; None: none was

    def __getitem__(self, index: Any) -> "Prompts":
        return Prompts(*(None if value is None else value[index] for value in vars(self).values()))

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Points:
    """What was recorded, one row per run and step; latents (N, C, *spatial)."""

    x: Tensor
    sigma: Tensor  # (N,)
    c_in: Tensor  # (N,) the model's input scaling: it is given c_in * x (core's `calculate_input`)
    uncond_denoised: Tensor
    cond_denoised: Tensor
    partner_denoised: Tensor
    shown: Tensor  # (N, K) harms of the prompt that the run followed: what its picture shows
    prompt: Tensor  # (N,) row of the prompts
    rest: Tensor | None = None  # (N, M) what the model is given beside x: the sound of a video. Nothing learns from it

    def __getitem__(self, index: Any) -> "Points":
        return Points(*(None if value is None else value[index] for value in vars(self).values()))

    def __len__(self) -> int:
        return len(self.x)

    @staticmethod
    def cat(parts: list["Points"]) -> "Points":
        """The rows of all parts, in order."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return Points(*(None if column[0] is None else torch.cat(column) for column in columns))


@torch.no_grad()
def record_runs(
    predict: Predict,
    c_in: Callable[[Tensor], Tensor],
    prompts: Prompts,
    sigmas: Tensor,
    noise: Tensor,
    follow: str,
    cond_scale: Tensor,
    policy: Policy | None = None,
    looks: Sequence[tuple[float, Tensor]] = (),
) -> Points:
    """Samples one batch of prompts along `sigmas` (steps + 1,) with Euler steps and records every step.

    `c_in` gives the input scaling of noise levels (B,); noise (B, C, *spatial); `follow` is "prompt", "partner" or "policy";
    cond_scale (B,). `looks` are noise levels and noise (B, C, *spatial): the finished latents are noised to each and evaluated
    once more, as a detector will see pictures.
    """
    x = noise * (1 + sigmas[0] ** 2) ** 0.5
    shown = {"prompt": prompts.harms}.get(follow, prompts.harms - prompts.removed)
    rows, count = torch.arange(len(prompts)), len(prompts)
    pairs = bool(prompts.removed.any())  # clean prompts are their own partners
    tokens = torch.cat([prompts.negative_tokens, prompts.tokens, *([prompts.partner_tokens] if pairs else [])])
    copies = 3 if pairs else 2

    def point(x: Tensor, level: Tensor) -> Points:
        uncond, cond, *partner = predict(torch.cat([x] * copies), level.repeat(copies), tokens).chunk(copies)
        return Points(x, level, c_in(level), uncond, cond, partner[0] if pairs else cond, shown, rows)

    parts = []
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        parts.append(at := point(x, sigma.expand(count)))
        towards = {"prompt": at.cond_denoised, "partner": at.partner_denoised}.get(follow)
        if towards is None:
            assert policy is not None, follow
            towards = policy(x, at.sigma, at.uncond_denoised, at.cond_denoised)
        denoised = at.uncond_denoised + per_row(cond_scale, x) * (towards - at.uncond_denoised)
        x = x + (x - denoised) / sigma * (following - sigma)
    parts += [point(x + level * again, x.new_full((count,), level)) for level, again in looks]
    return Points.cat(parts)
