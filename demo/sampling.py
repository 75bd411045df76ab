"""Stable Diffusion's noise schedule and an Euler sampler in plain torch, in core's x0 space.

ComfyUI's KSampler (euler, normal) with the same weights and noise gives the same latents; a host test holds it to that.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def training_sigmas() -> Tensor:
    """Noise levels (1000,) of Stable Diffusion's schedule, ascending, float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


SIGMAS = training_sigmas().float()
# As in core, the logarithm is taken before rounding: a schedule has noise levels half-way between two timesteps, and there
# the last bit decides which of them the model is told.
LOG_SIGMAS = training_sigmas().log().float()


def timestep_of(sigma: Tensor) -> Tensor:
    """The nearest timestep (B,) in [0, 999], float32, of noise levels (B,)."""
    return (sigma.log()[:, None] - _log_sigmas(sigma.device)).abs().argmin(dim=1).float()


@cache
def _log_sigmas(device: torch.device) -> Tensor:
    return LOG_SIGMAS.to(device)  # kept: a copy to a GPU in every step would wait for it


def sigma_of(timestep: Tensor) -> Tensor:
    """Noise levels of timesteps in [0, 999], interpolated in log sigma."""
    low = timestep.floor().long().clamp(0, 999)
    high = timestep.ceil().long().clamp(0, 999)
    fraction = timestep.frac()
    return ((1 - fraction) * LOG_SIGMAS[low] + fraction * LOG_SIGMAS[high]).exp()


def normal_schedule(steps: int) -> Tensor:
    """Core's scheduler `normal`: (steps + 1,) noise levels, descending, the last one 0."""
    return torch.cat([sigma_of(torch.linspace(999, 0, steps)), torch.zeros(1)])


def shifted_schedule(steps: int, part: float) -> Tensor:
    """`normal_schedule` whose inner noise levels are moved back by `part` (0 to 1) of a step, in log sigma: (steps + 1,)."""
    sigmas = normal_schedule(steps)
    return torch.cat([sigmas[:1], sigmas[1:-1] ** (1 - part) * sigmas[:-2] ** part, sigmas[-1:]])


def input_scaling(sigma: Tensor) -> Tensor:
    """1 / sqrt(sigma^2 + 1): what the input of a model with epsilon prediction is scaled by; sigma (B,)."""
    return 1 / (sigma**2 + 1) ** 0.5


def scale_input(x: Tensor, sigma: Tensor) -> Tensor:
    """x / sqrt(sigma^2 + 1): core's `calculate_input` for epsilon prediction; sigma (B,)."""
    return x / (sigma.view(-1, *[1] * (x.ndim - 1)) ** 2 + 1) ** 0.5


Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x, sigma (B,)) -> guided x0 prediction


def sample_euler(denoise: Denoiser, noise: Tensor, sigmas: Tensor, progress: Callable[[], object] = lambda: None) -> Tensor:
    """Euler sampling from pure noise (B, C, H, W) of unit variance along `sigmas`; returns the latent at sigma 0."""
    x = noise * (1 + sigmas[0] ** 2) ** 0.5
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        denoised = denoise(x, sigma.expand(len(x)))
        x = x + (x - denoised) / sigma * (following - sigma)
        progress()
    return x
