"""The equations: hard gates and redirections that leave unflagged samples untouched to the last bit."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .errors import HGRError
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

    def __post_init__(self):
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
    """Strengths (K,) from a text such as `sexual = 1, hate = 0.5, violence = off`; categories not named keep `strength`.

    Commas, semicolons and new lines separate; `on` is 1 and `off` 0. Every value is multiplied by `strength`.
    Raises HGRError for an unknown category, a category named twice, or a value outside [0, 1].
    """
    values = dict.fromkeys(categories, 1.0)
    named = set()
    for entry in text.replace(";", ",").replace("\n", ",").split(","):
        if not entry.strip():
            continue
        name, equals, value = (part.strip() for part in entry.partition("="))
        if name not in values:
            raise HGRError(f"Unknown category {name!r} in {text!r}: this HGR has {', '.join(categories)}.")
        if name in named:
            raise HGRError(f"Category {name!r} is named twice in {text!r}; name it once.")
        named.add(name)
        values[name] = _strength(value if equals else "1", name)
    return tuple(values[c] * strength for c in categories)


def _strength(value: str, name: str) -> float:
    words = {"on": 1.0, "off": 0.0}
    try:
        number = words.get(value.lower())
        number = float(value) if number is None else number
    except ValueError:
        number = float("nan")
    if not 0 <= number <= 1:
        raise HGRError(f"Expected `{name} = ` on, off or a number from 0 to 1, but got {value!r}.")
    return number


@lru_cache(maxsize=64)
def _strengths(settings: CategorySettings, device: torch.device) -> Tensor:
    return torch.tensor(settings.strengths, device=device)  # cached: a copy to the GPU in every step would wait for it


def category_weights(harmfulness: Tensor, thresholds: Tensor, settings: CategorySettings) -> Tensor:
    """w = strength * (harmfulness > threshold): exactly 0 at and below the threshold. All (B, K); thresholds (K,) or (B, K).

    NaN counts as harmful: what nothing is known about must not pass as clean.
    """
    limit = (thresholds + settings.threshold_offset).clamp(0, 1).to(harmfulness.device)  # see ConditionRedirector.units
    return torch.where(harmfulness <= limit, 0.0, _strengths(settings, harmfulness.device))


@torch.no_grad()
def redirect_condition(
    hgr, tokens: Tensor, pooled: Tensor | None, settings: CategorySettings, mask: Tensor | None = None
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


def read_guidance(network, cond_denoised: Tensor, uncond_denoised: Tensor, x_in: Tensor, sigma: Tensor):
    """The direction g / n, its rms n and the network's reading of it."""
    return _read(network, cond_denoised, uncond_denoised, x_in, log_snr_of(sigma))


def _read(network, cond_denoised: Tensor, uncond_denoised: Tensor, x_in: Tensor, log_snr: Tensor):
    direction, n = guidance_units(cond_denoised, uncond_denoised)
    return direction, n, network.read(direction, x_in.float(), uncond_denoised.float(), log_snr, n.log())


@torch.no_grad()
def redirect_guidance(
    hgr,
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
    redirect: harmfulness 0.
    """
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
