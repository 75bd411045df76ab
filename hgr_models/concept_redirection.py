"""Redirect mode `concept`: Safe Latent Diffusion for flagged samples alone, away from the category that each follows most."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .concept import ConceptGuard, SLDSettings, select_concept


def select_flagged(guidance: Tensor, concept_guidances: Tensor, weights: Tensor) -> Tensor:
    """The concept (B,) of every sample: CASG's choice (`select_concept`) among those whose weight is above 0.

    guidance (B, C, *spatial), concept_guidances (K, B, C, *spatial), in one unit; weights (B, K) in [0, 1]. 0 where none is.
    """
    flagged, samples = weights > 0, torch.arange(len(weights), device=weights.device)
    first = flagged.to(torch.uint8).argmax(dim=1, keepdim=True)
    # A concept that is not flagged gives its place to one that is, so that the choice is among flagged ones only.
    own = torch.where(flagged, torch.arange(weights.shape[1], device=weights.device), first)  # (B, K)
    return own[samples, select_concept(guidance, concept_guidances[own.T, samples])]


@dataclass(eq=False)
class FlaggedConceptGuard:
    """SLD over one sampling run for the samples that an HGR flags; it holds their momentum (B, C, *spatial)."""

    settings: SLDSettings
    momentum: Tensor | None = None

    @torch.no_grad()
    def steer(
        self,
        cond_denoised: Tensor,
        uncond_denoised: Tensor,
        concepts_denoised: Sequence[Tensor],
        weights: Tensor,
        units: Tensor,
        active: Tensor | None = None,
    ) -> Tensor:
        """cond_safe = where(any_k w_k > 0, cond_denoised - w_k* gamma / units, cond_denoised), per sample; k* by alignment.

        All x0 predictions (B, C, *spatial) of any floating dtype, which is kept; weights w (B, K) in [0, 1], a column per
        concept; `units` (B,) and `active` (B,) as for `ConceptGuard.steer`. A sample without a weight comes back bit for bit,
        and its momentum stays: what becomes of it later does not depend on the rest of its batch.
        """
        rows = [-1, *[1] * (cond_denoised.ndim - 1)]
        samples = torch.arange(len(weights), device=weights.device)
        concepts = torch.stack(list(concepts_denoised))
        uncond = uncond_denoised.float()  # fp32: small differences of large tensors
        chosen = select_flagged(cond_denoised.float() - uncond, concepts.float() - uncond, weights)
        before = self.momentum
        if before is None or before.shape != cond_denoised.shape:  # a sampler may change the latent's size
            before = torch.zeros_like(cond_denoised, dtype=torch.promote_types(cond_denoised.dtype, torch.float32))
        guard = ConceptGuard(self.settings, before)
        safe = guard.steer(cond_denoised, uncond_denoised, [concepts[chosen, samples]], units, active)
        flagged = (weights > 0).any(dim=1).view(rows)
        self.momentum = torch.where(flagged, guard.momentum, before)
        strength = weights[samples, chosen].to(safe.dtype).view(rows)
        return torch.where(flagged, torch.lerp(cond_denoised, safe, strength), cond_denoised)  # strength 1 is exactly `safe`
