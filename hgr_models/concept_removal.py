"""Concept Removal Guidance (CRG, arXiv 2606.29801): a negative prompt whose weight follows from the evidence that it is being drawn.

In units of noise, d_u, d_c and d_n are predictions for the unconditional, the prompt and the unwanted concept:

    e_k    = |d_c - d_u|^2 - |d_c - d_n|^2                       above 0: nearer to the concept than to nothing
    CP     = K / 2 e_k + sum over earlier steps of w_j e_j        w = beta / (2 alpha (1 - alpha_bar)), of the DDPM step
    d_safe = d_c - lambda omega (d_n - d_u),  omega = (CP - tau) / (K |d_n - d_u|^2) where CP > tau, else 0

The sum is the log-likelihood ratio of the path under the concept and under nothing. CP falls by K <delta, d_n - d_u> when d_c moves by
-delta, so lambda = 1 is the smallest change of d_c that brings CP down to tau. Written from a public restatement of the paper's equations
and checked by deriving both from DDPM's transitions; the paper gives no table of tau, and K is 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import HGRError
from .redirection import SIGMA_FLOOR

LARGEST_RATIO = 1e4  # of noise to signal; of flow models it is infinite where the run begins
NORM_FLOOR = 1e-12  # of the concept's direction, squared; below it nothing can be removed
PRESENT = 1.0  # K: what the present step counts
STEP_ROUNDING = 1e-4  # relative, of a ratio: samplers compute sigmas again


@dataclass(frozen=True)
class CRGSettings:
    """`threshold` tau: the evidence that is tolerated; `scale` lambda >= 0: 1 removes down to tau, 0 nothing. HGRError outside."""

    threshold: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (abs(self.threshold) < float("inf") and 0 <= self.scale < float("inf")):
            raise HGRError(f"Expected a finite presence threshold and a removal scale of 0 or more, but got {self}.")


def noise_ratio(sigma: Tensor, prediction: str) -> Tensor:
    """Noise in units of the signal at noise levels sigma (any shape), float32: core's sigma itself, s / (1 - s) of flow models."""
    sigma = sigma.float().clamp(min=0)
    ratio = sigma / (1 - sigma).clamp(min=1 / LARGEST_RATIO) if prediction == "FLOW" else sigma
    return ratio.clamp(max=LARGEST_RATIO)


def evidence_weight(ratio: Tensor, following: Tensor) -> Tensor:
    """w = beta / (2 alpha (1 - alpha_bar)) of DDPM's step between two ratios of noise to signal, the second one lower.

    With alpha_bar = 1 / (1 + r^2) of both ends: (r^2 - s^2) (1 + r^2) / (2 r^2 (1 + s^2)).
    """
    r, s = ratio.clamp(min=SIGMA_FLOOR) ** 2, following**2
    return (r - s).clamp(min=0) * (1 + r) / (2 * r * (1 + s))


@dataclass(eq=False)
class ConceptRemoval:
    """CRG over one sampling run whose schedule has the noise ratios `schedule` (S + 1,), falling; it holds every picture's evidence.

    A step that is evaluated twice (samplers of second order) counts once, by its last evaluation.
    """

    settings: CRGSettings
    schedule: Tensor
    earlier: Tensor | None = None  # (B,): the sum over the steps before
    present: Tensor | None = None  # (B,): what this step will add
    step: Tensor | None = None  # (B,)

    @torch.no_grad()
    def steer(self, cond_denoised: Tensor, uncond_denoised: Tensor, concept_denoised: Tensor, ratio: Tensor) -> Tensor:
        """The prompt's prediction without the concept, for CFG of any scale; bit for bit the same where CP <= tau.

        x0 predictions (B, C, *spatial) of any floating dtype, which is kept; `ratio` (B,) from `noise_ratio`.
        """
        rows = [-1, *[1] * (cond_denoised.ndim - 1)]
        kind = torch.promote_types(cond_denoised.dtype, torch.float32)  # fp32: small differences of large tensors
        cond, uncond, concept = (t.to(kind) for t in (cond_denoised, uncond_denoised, concept_denoised))
        unit = ratio.clamp(min=SIGMA_FLOOR) ** 2  # differences of noise are those of x0 divided by -ratio
        squared = lambda a, b: (a - b).flatten(1).square().sum(dim=1) / unit  # noqa: E731
        evidence, size = squared(cond, uncond) - squared(cond, concept), squared(concept, uncond)
        presence = PRESENT / 2 * evidence + self._before(ratio, evidence)
        omega = (presence - self.settings.threshold) / (PRESENT * size).clamp(min=NORM_FLOOR)
        acts = (presence > self.settings.threshold) & (size > NORM_FLOOR)
        safe = cond - self.settings.scale * omega.view(rows) * (concept - uncond)
        return torch.where(acts.view(rows), safe.to(cond_denoised.dtype), cond_denoised)

    def _before(self, ratio: Tensor, evidence: Tensor) -> Tensor:
        """The evidence (B,) of the steps before this one, and takes over this step's."""
        schedule = self.schedule.to(ratio)
        # The step that a ratio lies in: the last of the schedule that is not below it.
        at_least = schedule[None, :-1] * (1 + STEP_ROUNDING) >= ratio[:, None]
        step = (at_least.sum(dim=1) - 1).clamp(min=0)
        if self.earlier is None or len(self.earlier) != len(ratio):
            self.earlier, self.present, self.step = torch.zeros_like(evidence), torch.zeros_like(evidence), step
        self.earlier = torch.where(step == self.step, self.earlier, self.earlier + self.present)
        self.present, self.step = evidence * evidence_weight(schedule[step], schedule[step + 1]), step
        return self.earlier
