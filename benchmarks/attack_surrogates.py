"""Smooth stand-ins of the defences, for `benchmarks.attack`: what a defended step makes of a prompt, with gradients.

They compute what the real samplers do, except that hard gates are sigmoids around their thresholds, so that a closed or
an open gate still tells an attack which way leads through it. A stand-in works at single steps of a recorded run; what
the defence remembers from earlier steps (flags, momentum) is taken from that run and constant.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from demo.attack import Facts, Plain, SafeCFG, Surrogate
from demo.pipeline import DemoModel
from demo.safecfg import Redirection, Step
from hgr_models import output_units, warm_up_steps
from hgr_models.concept import select_concept, sld_term
from hgr_models.shapes import per_row

from .safety_peers import ConceptPeer
from .safety_pictures import Arm

SLD_TEMPERATURE = 0.02  # of SLD's gate, in units of the model's output


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
