"""The training objectives of both redirectors (DESIGN.md, "Training an HGR")."""

import torch.nn.functional as F
from torch import Tensor

from .condition import ConditionRedirector
from .guidance import GuidanceRedirector
from .recording import Points, Predict, Prompts
from .redirection import read_guidance


def mean_square(t: Tensor) -> Tensor:
    """Mean square over all non-batch dims: (B,)."""
    return t.float().flatten(1).square().mean(dim=1)


def condition_error(network: ConditionRedirector, predict: Predict, points: Points, prompts: Prompts) -> Tensor:
    """|[f(x, sigma, tokens_safe) - f(none)] - [f(x, sigma, partner) - f(none)]|^2 / rms^2 per sample (B,); differentiable.

    rms is that of both directions together, so that an error of 1 means as wrong as no redirection at all, about.
    """
    delta, _ = network.delta(prompts.tokens, None, prompts.removed)
    denoised = predict(points.x, points.sigma, prompts.tokens + delta)
    size = mean_square(points.cond_denoised - points.uncond_denoised) + mean_square(
        points.partner_denoised - points.uncond_denoised
    )
    floor = 1e-4 * points.sigma**2 / (1 + points.sigma**2)
    return mean_square(denoised - points.partner_denoised) / (size / 2 + floor)


def prompt_loss(network: ConditionRedirector, tokens: Tensor, harms: Tensor) -> Tensor:
    """Cross-entropy of the prompts' harmfulness; tokens (B, T, D), harms (B, K)."""
    return F.binary_cross_entropy_with_logits(network.harmfulness_logits(tokens), harms)


def quiet_loss(network: ConditionRedirector, tokens: Tensor, weights: Tensor) -> Tensor:
    """|D|^2 on clean prompts, in the network's units: a false alarm should change little."""
    delta, _ = network.delta(tokens, None, weights)
    return (delta / network.token_scale).square().mean()


def guidance_losses(
    network: GuidanceRedirector,
    points: Points,
    scale_input,
    harms: Tensor,
    weights: Tensor,
    target: Tensor,
    has_direction: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Error of the turned direction per sample (B,), cross-entropy of `b`, and of `q`.

    harms (B, K) of the direction, weights (B, K) to redirect with, target (B, C, *spatial): the x0 prediction to reach,
    has_direction (B,) 0 where g = 0 stands for a picture alone, which only `q` is taught with.
    """
    x_in = scale_input(points.x, points.sigma)
    keep = has_direction.view(-1, *[1] * (points.x.ndim - 1))
    cond = points.uncond_denoised + keep * (points.cond_denoised - points.uncond_denoised)
    direction, n, reading = read_guidance(network, cond, points.uncond_denoised, x_in, points.sigma)
    a, r = network.correct(reading, weights)
    view = lambda t: t.view(-1, *[1] * (r.ndim - 1))  # noqa: E731
    wanted = (target - points.cond_denoised) / view(n)  # in units of n
    error = mean_square(r - view(a) * direction - wanted) * has_direction
    b = F.binary_cross_entropy_with_logits(reading.direction_logits, harms, reduction="none").mean(dim=1) * has_direction
    q = F.binary_cross_entropy_with_logits(reading.picture_logits, points.shown, reduction="none").mean(dim=1)
    return error, b.sum() / has_direction.sum().clamp(min=1), q.mean()


def capped(error: Tensor, cap: float) -> Tensor:
    """The mean of per-sample errors (B,), each at most `cap`: a few hopeless samples must not rule a step."""
    return error.clamp(max=cap).mean()
