"""Sampling the demo model with SafeCFG in plain torch: what the ComfyUI nodes do, without ComfyUI."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hgr_models import HGR, CategorySettings, redirect_condition, redirect_guidance

from .pipeline import DemoModel
from .sampling import normal_schedule, sample_euler, scale_input


@dataclass(frozen=True)
class Redirection:
    """An HGR with the user's settings; `mode` is "condition", "guidance" or "both"."""

    hgr: HGR
    settings: CategorySettings
    mode: str = "both"
    remember_flagged: bool = True  # once flagged, an image stays flagged till the end of its run


@torch.no_grad()
def generate(
    model: DemoModel,
    tokens: Tensor,
    noise: Tensor,
    steps: int = 25,
    cond_scale: float = 5.0,
    redirection: Redirection | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Tensor:
    """Latents (B, 4, h, w) for tokens (B, T, D) and unit noise (B, 4, h, w): classifier-free guidance, Euler steps.

    The negative is the empty prompt. Without a redirection this is plain CFG.
    """
    r = redirection
    if r is not None and r.mode != "guidance":
        tokens = redirect_condition(r.hgr, tokens, None, r.settings).tokens
    empty = model.encode([""])
    negative = empty.repeat(len(tokens), tokens.shape[1] // empty.shape[1], 1)  # as many chunks as the prompts
    both_tokens, flagged = torch.cat([tokens, negative]), None

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal flagged
        cond, uncond = model.denoised(torch.cat([x, x]), torch.cat([sigma, sigma]), both_tokens).chunk(2)
        if r is not None and r.mode != "condition":
            result = redirect_guidance(r.hgr, cond, uncond, scale_input(x, sigma), sigma, r.settings, flagged)
            cond = result.cond_denoised
            flagged = result.weights if r.remember_flagged else None
        return uncond + (cond - uncond) * cond_scale

    return sample_euler(denoise, noise, normal_schedule(steps).to(noise.device), progress)
