"""The equations: hard gates and redirections that leave unflagged samples untouched to the last bit."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import category_list
from .errors import HGRError
from .guidance import Reading
from .shapes import per_row

RMS_FLOOR = 1e-6  # of the guidance; below it there is nothing to redirect
SIGMA_FLOOR = 1e-4  # core can call a model at sigma 0


@dataclass(frozen=True)
class CategorySettings:
    """What the user asked for: `strengths` (K,) in [0, 1], 0 = off; `threshold_offset` in [-1, 1] is added to every threshold.

    Raises HGRError for other values, NaN among them: it would compare as "flag nothing".
    """

    strengths: tuple[float, ...]
    threshold_offset: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= strength <= 1 for strength in self.strengths):
            raise HGRError(f"Expected strengths from 0 to 1, but got {self.strengths}. Set `strength` to a number in this range.")
        if not -1 <= self.threshold_offset <= 1:
            raise HGRError(f"Expected a threshold_offset from -1 to 1, but got {self.threshold_offset}. Set it to 0.")


@dataclass
class ConditionResult:
    """Tokens (B, T, D) and pooled (B, P) after redirection, harmfulness (B, K) and category weights (B, K)."""

    tokens: Tensor
    pooled: Tensor | None
    harmfulness: Tensor
    weights: Tensor


@dataclass
class GuidanceResult:
    """`cond_denoised` (B, C, *spatial) after redirection, harmfulness of the direction (B, K) and category weights (B, K)."""

    cond_denoised: Tensor
    harmfulness: Tensor
    weights: Tensor


def parse_categories(text: str, categories: Sequence[str], strength: float = 1.0) -> tuple[float, ...]:
    """Strengths (K,) from a text such as `sexual = 1, hate = 0.5, violence = off` (`category_list`); those not named keep `strength`.

    Every value is multiplied by `strength`. Raises HGRError for an unknown category, one named twice, or a value outside [0, 1].
    """
    return category_list.strengths(text, categories, strength)


@lru_cache(maxsize=64)
def _strengths(settings: CategorySettings, device: torch.device) -> Tensor:
    return torch.tensor(settings.strengths, device=device)  # cached: a copy to the GPU in every step would wait for it


def limits(thresholds: Tensor, offset: float) -> Tensor:
    """The harmfulness above which a category is flagged: stored thresholds with the user's offset, in [0, 1]."""
    return (thresholds + offset).clamp(0, 1)


def noise_level(log_snr: Tensor, levels: Tensor) -> Tensor:
    """Which row of the guidance thresholds holds at log_snr = -2 ln sigma; levels ascending (L - 1,), -> int64 in [0, L).

    Exactly at a level, the noisier side's row holds.
    """
    return torch.bucketize(log_snr, levels)


def category_weights(harmfulness: Tensor, thresholds: Tensor, settings: CategorySettings) -> Tensor:
    """w = strength * (harmfulness > threshold): exactly 0 at and below the threshold. All (B, K); thresholds (K,) or (B, K).

    NaN counts as harmful: what nothing is known about must not pass as clean.
    """
    limit = limits(thresholds, settings.threshold_offset).to(harmfulness.device)  # see ConditionRedirector.units
    return torch.where(harmfulness <= limit, 0.0, _strengths(settings, harmfulness.device))


class Networks(Protocol):
    """What redirects: `hgr.Redirectors`, which imports this module. Either network may be None."""

    info: Any
    condition: Any
    guidance: Any
    condition_thresholds: Tensor  # (K,)

    def guidance_thresholds_of(self, log_snr: Tensor) -> Tensor: ...


@torch.no_grad()
def redirect_condition(
    hgr: Networks, tokens: Tensor, pooled: Tensor | None, settings: CategorySettings, mask: Tensor | None = None
) -> ConditionResult:
    """tokens_safe = where(any_k w_k > 0, tokens + D, tokens), per sample; pooled likewise.

    tokens (B, T, D), pooled (B, P) or None, attention mask (B, T) or None, any floating dtype, which is kept.
    """
    network = hgr.condition
    p = network.harmfulness(tokens, pooled, mask)
    weights = category_weights(p, hgr.condition_thresholds, settings)
    flagged = (weights > 0).any(dim=1)
    d_tokens, d_pooled = network.delta(tokens, pooled, weights, mask)
    safe = torch.where(per_row(flagged, tokens), tokens + d_tokens.to(tokens.dtype), tokens)
    if pooled is not None and d_pooled is not None:
        pooled = torch.where(per_row(flagged, pooled), pooled + d_pooled.to(pooled.dtype), pooled)
    return ConditionResult(safe, pooled, p, weights)


def guidance_units(cond_denoised: Tensor, uncond_denoised: Tensor) -> tuple[Tensor, Tensor]:
    """Direction of unit rms (B, C, *spatial) and its floored rms n (B,), float32."""
    g = cond_denoised.float() - uncond_denoised.float()  # fp32: a small difference of two large tensors
    n = g.flatten(1).square().mean(dim=1).sqrt().clamp(min=RMS_FLOOR)
    return g / per_row(n, g), n


def log_snr_of(sigma: Tensor) -> Tensor:
    """-2 ln sigma (B,), with sigma floored."""
    return -2 * sigma.float().clamp(min=SIGMA_FLOOR).log()


def read_guidance(
    network: nn.Module, cond_denoised: Tensor, uncond_denoised: Tensor, x_in: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Reading]:
    """The direction g / n, its rms n and the network's reading of it."""
    return _read(network, cond_denoised, uncond_denoised, x_in, log_snr_of(sigma))


def _read(
    network: nn.Module, cond_denoised: Tensor, uncond_denoised: Tensor, x_in: Tensor, log_snr: Tensor
) -> tuple[Tensor, Tensor, Reading]:
    direction, n = guidance_units(cond_denoised, uncond_denoised)
    return direction, n, network.read(direction, x_in.float(), uncond_denoised.float(), log_snr, n.log())


@torch.no_grad()
def redirect_guidance(
    hgr: Networks,
    cond_denoised: Tensor,
    uncond_denoised: Tensor,
    x_in: Tensor,
    sigma: Tensor,
    settings: CategorySettings,
    flagged: Tensor | None = None,
) -> GuidanceResult:
    """cond_safe = where(any_k w_k > 0, cond_denoised + n (r - a g / n), cond_denoised), per sample.

    cond_denoised, uncond_denoised, x_in (core's `calculate_input`): (B, C, *spatial), any floating dtype, which is kept;
    sigma (B,). `flagged` (B, K): category weights of earlier steps that stay in force. Where g = 0 there is nothing to
    redirect: harmfulness 0. An HGR without a guidance redirector flags nothing.
    """
    if hgr.guidance is None:
        nothing = torch.zeros(len(cond_denoised), len(hgr.info.categories), device=cond_denoised.device)
        return GuidanceResult(cond_denoised, nothing, nothing.clone())
    log_snr = log_snr_of(sigma)
    direction, n, reading = _read(hgr.guidance, cond_denoised, uncond_denoised, x_in, log_snr)
    something = (n != RMS_FLOOR)[:, None]  # n is floored; of NaN, too, there is something to redirect
    b = reading.direction_logits.sigmoid() * something
    weights = category_weights(b, hgr.guidance_thresholds_of(log_snr), settings)
    if flagged is not None:
        weights = torch.maximum(weights, flagged.to(weights.dtype)) * something
    if weights.device.type == "cpu" and not weights.any():  # elsewhere, looking would wait for the device
        return GuidanceResult(cond_denoised, b, weights)
    a, r = hgr.guidance.correct(reading, weights)
    change = per_row(n, r) * torch.addcmul(r, a, direction, value=-1)
    active = per_row((weights > 0).any(dim=1), r)
    safe = torch.where(active, cond_denoised + change.to(cond_denoised.dtype), cond_denoised)
    return GuidanceResult(safe, b, weights)
