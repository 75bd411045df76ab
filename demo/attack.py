"""SafeCFG with gradients, for attacks on it (`benchmarks.attack`, hardening): hard gates become sigmoids around their thresholds.

A closed or an open gate then still tells an attack which way leads through it. A stand-in works at single steps of a recorded
run; what the defence remembers from earlier steps (flags) is taken from that run and constant.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hgr_models import redirect_guidance
from hgr_models.attack import GATE_TEMPERATURE, MARGIN
from hgr_models.attack import RADIUS as RADIUS  # benchmarks take it from here
from hgr_models.condition import robust_units
from hgr_models.redirection import limits, read_guidance
from hgr_models.shapes import per_row

from . import prompts as p
from .pipeline import DemoModel
from .safecfg import Redirection, Step
from .sampling import scale_input

Facts = Mapping[str, Tensor]  # per row (B, ...): what is known at a recorded step, besides what every arm knows


def spread_of(model: DemoModel) -> Tensor:
    """Robust standard deviations (D,) of the tokens' channels over training prompts: no defence's own units."""
    rng = random.Random(0)
    prompts = [p.harmful_pair(rng, words=0.0).prompt for _ in range(128)] + [
        p.clean_pair(rng, (), 0.0).prompt for _ in range(128)
    ]
    return robust_units(model.encode(prompts).flatten(0, 1))[1]


class Surrogate(Protocol):
    """A defence with gradients. `quiet` (B,) is 0 where no gate is open, and else grows with what would close them."""

    negative: str

    def facts(self, model: DemoModel, run: Sequence[Step], steps: int) -> dict[str, Tensor]:
        """What it needs to know about the first S of `steps` steps of a run: (S, N, ...)."""

    def rewrite(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (B, T, D) that the model gets, and `quiet`."""

    def steer(self, step: Step, facts: Facts, remember: bool) -> tuple[Tensor, Tensor]:
        """`cond_denoised` (B, C, h, w) as the defence leaves it, and `quiet`; `remember`: flags of earlier steps hold."""


class Plain:
    """Plain CFG, or a negative prompt in place of the empty one."""

    def __init__(self, negative: str = ""):
        self.negative = negative

    def facts(self, model: DemoModel, run: Sequence[Step], steps: int) -> dict[str, Tensor]:
        return {}

    def rewrite(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens, tokens.new_zeros(len(tokens))

    def steer(self, step: Step, facts: Facts, remember: bool) -> tuple[Tensor, Tensor]:
        return step.cond_denoised, step.x.new_zeros(len(step.x))


def soft_gate(logits: Tensor, thresholds: Tensor, strengths: Tensor) -> tuple[Tensor, Tensor]:
    """Category weights (B, K) of a smooth gate, and `quiet` (B,); logits (B, K), thresholds (K,) or (B, K) in [0, 1], the
    categories' strengths (K,)."""
    limit = torch.logit(thresholds, eps=1e-6)
    above = logits - limit
    quiet = ((above + MARGIN).clamp(min=0) * (strengths > 0)).sum(dim=1)
    return strengths * (above / GATE_TEMPERATURE).sigmoid(), quiet


class SafeCFG(Plain):
    """An HGR in mode "condition", "guidance" or "both"."""

    def __init__(self, redirection: Redirection):
        super().__init__()
        self.redirection, self.hgr, self.settings = redirection, redirection.hgr, redirection.settings
        self.strengths = torch.tensor(self.settings.strengths, device=self.hgr.guidance_thresholds.device)
        self.hgr.requires_grad_(False)

    @torch.no_grad()
    def facts(self, model: DemoModel, run: Sequence[Step], steps: int) -> dict[str, Tensor]:
        """`flagged`: category weights that the steps before this one leave in force."""
        flagged, weights = [], None
        if self.redirection.mode != "condition":
            for step in run:
                x_in, before = scale_input(step.x, step.sigma), weights
                found = redirect_guidance(
                    self.hgr, step.cond_denoised, step.uncond_denoised, x_in, step.sigma, self.settings, before
                )
                weights = found.weights if self.redirection.remember_flagged else torch.zeros_like(found.weights)
                flagged.append(torch.zeros_like(weights) if before is None else before)
        return {"flagged": torch.stack(flagged)} if flagged else {}

    def rewrite(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self.redirection.mode == "guidance":
            return super().rewrite(tokens)
        network = self.hgr.condition
        allowed = limits(self.hgr.condition_thresholds, self.settings.threshold_offset)
        weights, quiet = soft_gate(network.harmfulness_logits(tokens), allowed, self.strengths)
        return tokens + per_row(self._opened(weights), tokens) * network.delta(tokens, None, weights)[0], quiet

    def steer(self, step: Step, facts: Facts, remember: bool) -> tuple[Tensor, Tensor]:
        if self.redirection.mode == "condition":
            return super().steer(step, facts, remember)
        hgr, cond, uncond = self.hgr, step.cond_denoised, step.uncond_denoised
        x_in = scale_input(step.x, step.sigma)
        direction, n, reading = read_guidance(hgr.guidance, cond, uncond, x_in, step.sigma)
        allowed = limits(hgr.guidance_thresholds_at(step.sigma), self.settings.threshold_offset)
        weights, quiet = soft_gate(reading.direction_logits, allowed, self.strengths)
        if remember:
            weights = torch.maximum(weights, facts["flagged"])
        a, r = hgr.guidance.correct(reading, weights)
        change = per_row(n, r) * (r - a * direction)
        return cond + per_row(self._opened(weights), r) * change, quiet

    def _opened(self, weights: Tensor) -> Tensor:
        """How far the widest gate is open (B,), in [0, 1]."""
        return (weights / self.strengths.clamp(min=1e-6)).amax(dim=1)
