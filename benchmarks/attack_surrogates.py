"""Smooth stand-ins of the defences, for `benchmarks.attack`: what a defended step makes of a prompt, with gradients.

They compute what the real samplers do, except that hard gates are sigmoids around their thresholds, so that a closed or
an open gate still tells an attack which way leads through it. A stand-in works at single steps of a recorded run; what
the defence remembers from earlier steps (flags, momentum) is taken from that run and constant.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from demo.pipeline import DemoModel
from demo.safecfg import Redirection, Step
from demo.sampling import scale_input
from hgr_models import output_units, redirect_guidance, warm_up_steps
from hgr_models.concept import select_concept, sld_term
from hgr_models.redirection import read_guidance
from hgr_models.shapes import per_row

from .safety_peers import ConceptPeer
from .safety_pictures import Arm

GATE_TEMPERATURE = 2.0  # of an HGR's gates, in logits
SLD_TEMPERATURE = 0.02  # of SLD's gate, in units of the model's output
MARGIN = 0.5  # logits below its threshold that an attack wants a gate to be

Facts = Mapping[str, Tensor]  # per row (B, ...): what is known at a recorded step, besides what every arm knows


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
    limit = torch.logit(thresholds.clamp(0, 1), eps=1e-6)
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
        limits = self.hgr.condition_thresholds + self.settings.threshold_offset
        weights, quiet = soft_gate(network.harmfulness_logits(tokens), limits, self.strengths)
        return tokens + per_row(self._opened(weights), tokens) * network.delta(tokens, None, weights)[0], quiet

    def steer(self, step: Step, facts: Facts, remember: bool) -> tuple[Tensor, Tensor]:
        if self.redirection.mode == "condition":
            return super().steer(step, facts, remember)
        hgr, cond, uncond = self.hgr, step.cond_denoised, step.uncond_denoised
        x_in = scale_input(step.x, step.sigma)
        direction, n, reading = read_guidance(hgr.guidance, cond, uncond, x_in, step.sigma)
        limits = hgr.guidance_thresholds_at(step.sigma) + self.settings.threshold_offset
        weights, quiet = soft_gate(reading.direction_logits, limits, self.strengths)
        if remember:
            weights = torch.maximum(weights, facts["flagged"])
        a, r = hgr.guidance.correct(reading, weights)
        change = per_row(n, r) * (r - a * direction)
        return cond + per_row(self._opened(weights), r) * change, quiet

    def _opened(self, weights: Tensor) -> Tensor:
        """How far the widest gate is open (B,), in [0, 1]."""
        return (weights / self.strengths.clamp(min=1e-6)).amax(dim=1)


class SoftConcepts(Plain):
    """SLD or CASG: the gate that leaves single elements alone is smooth."""

    def __init__(self, concepts: ConceptPeer):
        super().__init__()
        self.prompts, self.settings = concepts.prompts, concepts.settings

    @torch.no_grad()
    def facts(self, model: DemoModel, run: Sequence[Step], steps: int) -> dict[str, Tensor]:
        """`concepts` (S, N, K, C, h, w): directions of the concepts; `momentum`; `active`: past the warm-up."""
        encoded = [model.encode([prompt]) for prompt in self.prompts]
        warm_up = warm_up_steps(self.settings.warm_up, steps)
        momentum, found = None, []
        for step in run:
            units = per_row(output_units(step.sigma, "EPS"), step.x)
            directions = torch.stack([units * (step.predict(model, each) - step.uncond_denoised) for each in encoded])
            guidance = units * (step.cond_denoised - step.uncond_denoised)
            before = torch.zeros_like(step.x) if momentum is None else momentum
            momentum = sld_term(guidance, _chosen(guidance, directions), self.settings, before)[1]
            found.append({"concepts": directions.transpose(0, 1), "momentum": before, "active": step.past(warm_up)})
        return {key: torch.stack([each[key] for each in found]) for key in found[0]}

    def steer(self, step: Step, facts: Facts, remember: bool) -> tuple[Tensor, Tensor]:
        units, s = per_row(output_units(step.sigma, "EPS"), step.x), self.settings
        guidance = units * (step.cond_denoised - step.uncond_denoised)
        direction = _chosen(guidance, facts["concepts"].transpose(0, 1))
        excess = guidance - direction
        below = ((s.threshold - excess) / SLD_TEMPERATURE).sigmoid()
        term = below * (excess.abs() * s.scale).clamp(max=1) * direction + s.momentum_scale * facts["momentum"]
        safe = step.cond_denoised - term / units
        return torch.where(per_row(facts["active"], safe), safe, step.cond_denoised), safe.new_zeros(len(safe))


def _chosen(guidance: Tensor, directions: Tensor) -> Tensor:
    """Of concept directions (K, B, C, h, w) the one that each sample follows furthest, as CASG chooses."""
    return directions[select_concept(guidance, directions), torch.arange(len(guidance), device=guidance.device)]


def surrogate(arm: Arm) -> Surrogate:
    """The smooth stand-in of an arm without a LoRA."""
    if isinstance(arm.guard, Redirection):
        return SafeCFG(arm.guard)
    return SoftConcepts(arm.guard) if isinstance(arm.guard, ConceptPeer) else Plain(arm.negative)
