"""What the training scripts share: random scenes, averaged weights, a learning-rate curve."""

import copy
import math
import random

import torch
from torch import nn

from .. import world


def random_names(rng: random.Random) -> tuple[str, ...]:
    """One pictogram (35 %) or two different ones, all equally likely."""
    return tuple(rng.sample(world.NAMES, 1 if rng.random() < 0.35 else 2))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


class Averaged:
    """An exponential moving average of a module's parameters, with a warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float = 0.999):
        self.module, self.decay, self.count = copy.deepcopy(module).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)
