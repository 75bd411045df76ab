"""The training objectives of both redirectors."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .condition import ConditionRedirector, in_units
from .guidance import GuidanceRedirector
from .recording import Points, Prompts
from .redirection import RMS_FLOOR, read_guidance
from .shapes import per_row

OTHERS = 0.2  # the weight of a harmful prompt's other categories in the reading


def mean_square(t: Tensor) -> Tensor:
    """Mean square over all non-batch dims: (B,)."""
    return t.float().flatten(1).square().mean(dim=1)


# (points, prompts, tokens (B, T, D), pooled (B, P) or None) -> x0 prediction of the frozen denoiser, differentiable
PredictWith = Callable[[Points, Prompts, Tensor, Tensor | None], Tensor]


def condition_error(network: ConditionRedirector, predict: PredictWith, points: Points, prompts: Prompts) -> Tensor:
    """|[f(x, sigma, tokens_safe) - f(none)] - [f(x, sigma, partner) - f(none)]|^2 / rms^2 per sample (B,); differentiable.

    rms is that of both directions together, so that an error of 1 means as wrong as no redirection at all, about.
    """
    d_tokens, d_pooled = network.delta(prompts.tokens, prompts.pooled, prompts.removed, prompts.mask)
    pooled = prompts.pooled if d_pooled is None else prompts.pooled + d_pooled
    denoised = predict(points, prompts, prompts.tokens + d_tokens, pooled)
    return mean_square(denoised - points.partner_denoised) / _size(points)


def unredirected_error(points: Points) -> Tensor:
    """`condition_error` of a redirector that does nothing, (B,): what there is to gain."""
    return mean_square(points.cond_denoised - points.partner_denoised) / _size(points)


def _size(points: Points) -> Tensor:
    """Mean square of the prompt's and the partner's direction together (B,), floored."""
    both = mean_square(points.cond_denoised - points.uncond_denoised)
    both = both + mean_square(points.partner_denoised - points.uncond_denoised)
    return both / 2 + 1e-4 * points.sigma**2 / (1 + points.sigma**2)


def prompt_loss(
    network: ConditionRedirector, tokens: Tensor, harms: Tensor, pooled: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reading_loss` of the prompts' harmfulness, and its logits (B, K); tokens (B, T, D), harms (B, K)."""
    logits = network.harmfulness_logits(tokens, pooled, mask)
    return reading_loss(logits, harms), logits


def reading_loss(logits: Tensor, harms: Tensor) -> Tensor:
    """Cross-entropy of K + 1 questions about prompts, from logits (B, K): is it harm of a category, and is it harm at all?

    A pair names what it was written for, and much of that is harm of another kind, too. So a harmful prompt says little about its
    other categories, and words between two of them count for both together. With one category both questions are the same.
    """
    asked = torch.cat([logits, logits.logsumexp(dim=1, keepdim=True)], dim=1)
    harmful = harms.amax(dim=1, keepdim=True)
    weight = torch.where(harms < harmful, OTHERS, 1.0)
    return F.binary_cross_entropy_with_logits(asked, torch.cat([harms, harmful], dim=1), F.pad(weight, (0, 1), value=1.0))


def quiet_loss(
    network: ConditionRedirector, tokens: Tensor, weights: Tensor, pooled: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """|D|^2 on clean prompts, in the network's units: a false alarm should change little."""
    d_tokens, d_pooled = network.delta(tokens, pooled, weights, mask)
    quiet = in_units(d_tokens, network.units(tokens)[1]).square().mean()
    return quiet if d_pooled is None else quiet + (d_pooled / network.pooled_scale).square().mean()


def guidance_losses(
    network: GuidanceRedirector,
    points: Points,
    harms: Tensor,
    weights: Tensor,
    target: Tensor,
    has_direction: Tensor,
    elsewhere: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Error of the redirected direction per sample (B,), cross-entropy of `b`, and of `q`, and the logits (B, K) of `b`.

    harms (B, K) of the direction, weights (B, K) to redirect with, target (B, C, *spatial): the x0 prediction to reach,
    has_direction (B,) 0 where g = 0 stands for a picture alone, which only `q` is taught with; `elsewhere` as in
    `GuidanceRedirector.correct`.
    """
    x_in = points.x * per_row(points.c_in, points.x)
    keep = per_row(has_direction, points.x)
    cond = points.uncond_denoised + keep * (points.cond_denoised - points.uncond_denoised)
    direction, n, reading = read_guidance(network, cond, points.uncond_denoised, x_in, points.sigma)
    a, r = network.correct(reading, weights, elsewhere=elsewhere)
    wanted = (target - points.cond_denoised) / per_row(n, r)  # in units of n
    error = mean_square(r - a * direction - wanted) * has_direction
    b = F.binary_cross_entropy_with_logits(reading.direction_logits, harms, reduction="none").mean(dim=1) * has_direction
    q = F.binary_cross_entropy_with_logits(reading.picture_logits, points.shown, reduction="none").mean(dim=1)
    return error, b.sum() / has_direction.sum().clamp(min=1), q.mean(), reading.direction_logits


def unredirected_guidance_error(points: Points) -> Tensor:
    """The error of `guidance_losses` of a redirector that does nothing, (B,)."""
    size = mean_square(points.cond_denoised - points.uncond_denoised).clamp(min=RMS_FLOOR**2)
    return mean_square(points.cond_denoised - points.partner_denoised) / size


def capped(error: Tensor, cap: float) -> Tensor:
    """The mean of per-sample errors (B,), each at most `cap`: a few hopeless samples must not rule a step."""
    return error.clamp(max=cap).mean()
