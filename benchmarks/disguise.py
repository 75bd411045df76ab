"""Disguised prompts: tokens perturbed against the HGR under test until its prompt reading falls below the threshold."""

import torch
from torch import Tensor

from hgr_models import HGR


def disguise(hgr: HGR, tokens: Tensor, rounds: int = 200, step: float = 0.02) -> tuple[Tensor, Tensor]:
    """Moves tokens (B, T, D) down the gradient of the prompt's harmfulness; stops row by row at 0.8 of every threshold.

    Returns the tokens and which rows (B,) got below. `step` is in units of the tokens' standard deviation per round, in
    the direction of the gradient's sign, so that every channel moves a little and the prompt's meaning stays.
    """
    limit = torch.logit(0.8 * hgr.condition_thresholds)
    moved, size = tokens.clone(), step * tokens.std()
    for _ in range(rounds):
        moved.requires_grad_(True)
        logits = hgr.condition.harmfulness_logits(moved)
        above = (logits > limit).any(dim=1)
        if not above.any():
            break
        (gradient,) = torch.autograd.grad((logits - limit).clamp(min=0).sum(), moved)
        moved = (moved - size * gradient.sign() * above.view(-1, 1, 1)).detach()
    return moved.detach(), (hgr.condition.harmfulness_logits(moved.detach()) <= limit).all(dim=1)
