"""Sampling the demo model with SafeCFG in plain torch: what the ComfyUI nodes do, without ComfyUI.

Other methods can stand in SafeCFG's place, to be compared with it: see `Guard`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from hgr_models import (
    HGR,
    SLD_PRESETS,
    CategorySettings,
    FlaggedConceptGuard,
    GuidanceResult,
    HGRError,
    output_units,
    redirect_condition,
    redirect_guidance,
    warm_up_steps,
)

from .pipeline import DemoModel
from .sampling import normal_schedule, sample_euler, scale_input

CONCEPT_SLD = SLD_PRESETS["Strong"]  # of mode "concept", as in the node


@dataclass(frozen=True)
class Step:
    """One evaluation of a run: x, cond_denoised, uncond_denoised (B, 4, h, w), noise levels sigma (B,), its number from 0."""

    x: Tensor
    sigma: Tensor
    cond_denoised: Tensor
    uncond_denoised: Tensor
    number: int

    def predict(self, model: DemoModel, tokens: Tensor) -> Tensor:
        """The x0 prediction (B, 4, h, w) of one more prompt, tokens (1, T, D): an extra model row per picture."""
        return model.denoised(self.x, self.sigma, tokens.expand(len(self.x), -1, -1))

    def past(self, warm_up: int) -> Tensor:
        """Whether each picture (B,) is past a warm-up of so many steps."""
        return torch.full((len(self.x),), self.number >= warm_up, device=self.x.device)


Steer = Callable[[Step], Tensor]  # -> cond_denoised (B, 4, h, w)


class Guard(Protocol):
    """What makes runs safe: a `Redirection`, or another method."""

    def start(self, model: DemoModel, tokens: Tensor, steps: int) -> tuple[Tensor, Steer]:
        """Of one run: the tokens (B, T, D) that the model gets, and what makes `cond_denoised` safe in every step."""


@dataclass(frozen=True)
class Redirection:
    """An HGR with the user's settings; `mode` is "condition", "guidance", "both" (whatever there is of the two) or "concept"."""

    hgr: HGR
    settings: CategorySettings
    mode: str = "both"
    remember_flagged: bool = True  # once flagged, an image stays flagged till the end of its run

    def start(self, model: DemoModel, tokens: Tensor, steps: int) -> tuple[Tensor, Steer]:
        if self.mode == "guidance":
            return tokens, _GuidanceRun(self).steer
        found = redirect_condition(self.hgr, tokens, None, self.settings)
        if self.mode == "concept":
            return tokens, _ConceptRun(self, model, found.weights, warm_up_steps(CONCEPT_SLD.warm_up, steps)).steer
        by_guidance = self.mode == "both" and self.hgr.guidance is not None
        return found.tokens, _GuidanceRun(self).steer if by_guidance else untouched


def untouched(step: Step) -> Tensor:
    """Plain CFG."""
    return step.cond_denoised


class _GuidanceRun:
    """The guidance redirector over one run."""

    def __init__(self, redirection: Redirection):
        self.redirection, self.flagged = redirection, None

    def read(self, step: Step) -> GuidanceResult:
        r, x_in = self.redirection, scale_input(step.x, step.sigma)
        result = redirect_guidance(r.hgr, step.cond_denoised, step.uncond_denoised, x_in, step.sigma, r.settings, self.flagged)
        self.flagged = result.weights if r.remember_flagged else None
        return result

    def steer(self, step: Step) -> Tensor:
        return self.read(step).cond_denoised


class _ConceptRun(_GuidanceRun):
    """Mode "concept" over one run: both networks judge, and SLD acts on what they flag.

    weights (B, K): of the prompts. A flagged picture costs a model row per flagged category and step; others cost nothing.
    """

    def __init__(self, redirection: Redirection, model: DemoModel, weights: Tensor, warm_up: int):
        super().__init__(redirection)
        info = redirection.hgr.info
        self.model, self.weights, self.warm_up, self.prediction = model, weights, warm_up, info.prediction
        if missing := [c for c in info.categories if c not in info.concept_prompts]:
            raise HGRError(f"Mode 'concept' needs a concept prompt for {', '.join(missing)}, but this HGR has none.")
        self.concepts = [model.encode([info.concept_prompts[c]]) for c in info.categories]
        self.guard = FlaggedConceptGuard(CONCEPT_SLD)

    def steer(self, step: Step) -> Tensor:
        weights = torch.maximum(self.read(step).weights, self.weights)
        flagged = [k for k, found in enumerate((weights > 0).any(dim=0).tolist()) if found]
        if not flagged:
            return step.cond_denoised
        predicted = [self._predict(step, self.concepts[k], weights[:, k] > 0) for k in flagged]
        units, active = output_units(step.sigma, self.prediction), step.past(self.warm_up)
        return self.guard.steer(step.cond_denoised, step.uncond_denoised, predicted, weights[:, flagged], units, active)

    def _predict(self, step: Step, tokens: Tensor, rows: Tensor) -> Tensor:
        """A concept's x0 prediction for some rows (B,); the others hold what nobody reads."""
        predicted, some = step.cond_denoised.clone(), int(rows.sum())
        predicted[rows] = self.model.denoised(step.x[rows], step.sigma[rows], tokens.expand(some, -1, -1))
        return predicted


@torch.no_grad()
def generate(
    model: DemoModel,
    tokens: Tensor,
    noise: Tensor,
    steps: int = 25,
    cond_scale: float = 5.0,
    guard: Guard | None = None,
    progress: Callable[[], object] = lambda: None,
    negative: str = "",
) -> Tensor:
    """Latents (B, 4, h, w) for tokens (B, T, D) and unit noise (B, 4, h, w): classifier-free guidance, Euler steps.

    Without a guard this is plain CFG.
    """
    steer, numbers = untouched, count()
    if guard is not None:
        tokens, steer = guard.start(model, tokens, steps)
    none = model.encode([negative])
    length = math.lcm(tokens.shape[1], none.shape[1])  # as core does: both repeated until they are equally long
    both_tokens = torch.cat(
        [tokens.repeat(1, length // tokens.shape[1], 1), none.repeat(len(tokens), length // none.shape[1], 1)]
    )

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        cond, uncond = model.denoised(torch.cat([x, x]), torch.cat([sigma, sigma]), both_tokens).chunk(2)
        cond = steer(Step(x, sigma, cond, uncond, next(numbers)))
        return uncond + (cond - uncond) * cond_scale

    return sample_euler(denoise, noise, normal_schedule(steps).to(noise.device), progress)
