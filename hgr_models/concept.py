"""Training-free guidance away from concepts: Safe Latent Diffusion (SLD, arXiv 2211.05105) and CASG (CVPR 2026).

e_u, e_c and e_S are the model's outputs for the unconditional, the prompt and the concept. The scale s_S and the threshold
lambda are meant for them, not for x0 predictions; `output_units` converts.

Redirect mode `concept` (`FlaggedConceptGuard`) does it for flagged samples alone, away from the category that each follows most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from re import compile as pattern

import torch
from torch import Tensor

from .errors import HGRError
from .redirection import SIGMA_FLOOR

NORM_FLOOR = 1e-12  # of a concept's direction; below it no guidance can follow it
STEP_ROUNDING = 1e-6  # 0.14 * 50 is a little above 7

# CASG's split of SLD's concept into the seven usual categories.
DEFAULT_CONCEPTS = """\
hate: hate
harassment: harassment
violence: violence, blood, brutality, cruelty
self-harm: self-harm, suicide
sexual: sexual, nudity, bodily fluids, obscene gestures
shocking: shocking images, suffering, humiliation, harm
illegal: illegal activity, drug use, theft, vandalism, weapons, child abuse"""

_NAMED = pattern(r"([^():,]*):(.*)")  # `category: words`; a weight such as (blood:1.3) is not a name


@dataclass(frozen=True)
class SLDSettings:
    """SLD's parameters: `warm_up` as a fraction of the run in [0, 1), `scale` s_S >= 0, `threshold` lambda, `momentum_scale`
    s_m >= 0 and `momentum_beta` beta_m in [0, 1). Raises HGRError outside these ranges."""

    warm_up: float
    scale: float
    threshold: float
    momentum_scale: float = 0.0
    momentum_beta: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "a warm-up fraction from 0 to below 1": 0 <= self.warm_up < 1,
            "a safety scale of 0 or more": self.scale >= 0,
            "a momentum scale of 0 or more": self.momentum_scale >= 0,
            "a momentum beta from 0 to below 1": 0 <= self.momentum_beta < 1,
        }
        for wanted, met in ranges.items():
            if not met:
                raise HGRError(f"Expected {wanted}, but got {self}.")

    @property
    def memoryless(self) -> bool:
        """Whether what happens in the warm-up has no influence on the steps after it."""
        return self.momentum_scale == 0


SLD_PRESETS = {  # the paper's, whose warm-up counts steps of 50; CASG's code has scale 200 for Weak
    "Weak": SLDSettings(15 / 50, 20.0, 0.0),
    "Medium": SLDSettings(10 / 50, 1000.0, 0.01, 0.3, 0.4),
    "Strong": SLDSettings(7 / 50, 2000.0, 0.025, 0.5, 0.7),
    "Max": SLDSettings(0.0, 5000.0, 1.0, 0.5, 0.7),
}


def warm_up_steps(warm_up: float, steps: int) -> int:
    """The steps of a run in which only the momentum builds up. Rounded down: at least the last step of any run is guarded."""
    return min(int(warm_up * steps + STEP_ROUNDING), max(steps - 1, 0))


def output_units(sigma: Tensor, prediction: str, sigma_data: float = 1.0) -> Tensor:
    """The factor (B,), negative, from a difference of x0 predictions to one of model outputs, at noise levels sigma (B,).

    -1 / sigma for noise (EPS) and flow; -sqrt(sigma^2 + sigma_data^2) / (sigma sigma_data) for V. `prediction` as in HGRInfo;
    a model that predicts none of these is treated in units of noise. Sigma is floored: it can be 0.
    """
    sigma = sigma.to(torch.promote_types(sigma.dtype, torch.float32)).clamp(min=SIGMA_FLOOR)  # half precision cannot hold 1e-4
    if prediction in ("V", "V_DDPM", "EDM"):  # EDM's output is -v
        return -((sigma**2 + sigma_data**2).sqrt()) / (sigma * sigma_data)
    return -(sigma + 1) / sigma if prediction == "COSMOS_FLOW" else -1 / sigma


def sld_term(
    guidance: Tensor, concept_guidance: Tensor, settings: SLDSettings, momentum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What SLD subtracts from the guidance, and the next momentum; Eq. (4)-(8), arXiv 2211.05105.

    phi = min(1, |e_c - e_S| s_S), 0 where e_c - e_S >= lambda; gamma = phi (e_S - e_u) + s_m nu; nu' = beta_m nu + (1 - beta_m) gamma.
    guidance e_c - e_u, concept_guidance e_S - e_u and momentum nu (None: 0) are (B, C, *spatial), in units of the model's output.
    """
    excess = guidance - concept_guidance  # e_c - e_S
    gate = torch.where(excess >= settings.threshold, 0.0, (excess.abs() * settings.scale).clamp(max=1))
    if momentum is None:
        momentum = torch.zeros_like(guidance)
    term = gate * concept_guidance + settings.momentum_scale * momentum
    return term, torch.lerp(term, momentum, settings.momentum_beta)


def select_concept(guidance: Tensor, concept_guidances: Tensor) -> Tensor:
    """The concept (B,) whose direction each sample's guidance follows furthest: argmax_k <d_k, g> / |d_k| (CASG, CVPR 2026).

    guidance g (B, C, *spatial), concept_guidances d (K, B, C, *spatial), in one unit. The first of equals.
    """
    g, d = guidance.flatten(1), concept_guidances.flatten(2)
    norms = torch.linalg.vector_norm(d, dim=2).clamp(min=NORM_FLOOR)
    return (torch.einsum("kbn,bn->kb", d, g) / norms).argmax(dim=0)


@dataclass(eq=False)
class ConceptGuard:
    """SLD over one sampling run, or CASG where there are several concepts; it holds the run's momentum (B, C, *spatial)."""

    settings: SLDSettings
    momentum: Tensor | None = None

    @torch.no_grad()
    def steer(
        self,
        cond_denoised: Tensor,
        uncond_denoised: Tensor,
        concepts_denoised: Sequence[Tensor],
        units: Tensor,
        active: Tensor | None = None,
    ) -> Tensor:
        """`cond_denoised` of which CFG with any scale s makes e_u + s [(e_c - e_u) - gamma]; to be called once per evaluation.

        All x0 predictions (B, C, *spatial) of any floating dtype, which is kept; `units` (B,) from `output_units`; rows that
        are not `active` (B,) come back bit for bit, but their momentum builds up.
        """
        kind = torch.promote_types(cond_denoised.dtype, torch.float32)  # fp32: small differences of large tensors
        rows = [-1, *[1] * (cond_denoised.ndim - 1)]
        uncond, units = uncond_denoised.to(kind), units.to(kind).view(rows)
        guidance = units * (cond_denoised.to(kind) - uncond)
        directions = torch.stack([units * (concept.to(kind) - uncond) for concept in concepts_denoised])
        direction = directions[0]
        if len(directions) > 1:
            every_row = torch.arange(len(guidance), device=guidance.device)
            direction = directions[select_concept(guidance, directions), every_row]
        momentum = self.momentum if self.momentum is not None and self.momentum.shape == guidance.shape else None
        term, self.momentum = sld_term(guidance, direction, self.settings, momentum)
        safe = (cond_denoised.to(kind) - term / units).to(cond_denoised.dtype)
        return safe if active is None else torch.where(active.view(rows), safe, cond_denoised)


def parse_concepts(text: str) -> dict[str, str]:
    """Concept prompts by category, from lines `category: words, words`; a text without any category is one concept.

    Empty lines are left out. Raises HGRError, with the line's number, for a line that lacks its category or its words, and for
    a category named twice; also for an empty text.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise HGRError("Expected at least one concept, but the text is empty. Write lines such as `violence: violence, blood`.")
    named = [(number, line, _NAMED.fullmatch(line)) for number, line in lines]
    if not any(match for _, _, match in named):
        return {"concept": " ".join(line for _, line in lines)}
    concepts: dict[str, str] = {}
    for number, line, match in named:
        name, words = (part.strip() for part in match.groups()) if match else ("", "")
        if not name or not words:
            raise HGRError(f"Expected `category: words, words` in line {number} of the concepts, but got {line!r}.")
        if name in concepts:
            raise HGRError(f"Category {name!r} comes again in line {number} of the concepts; write all its words in one line.")
        concepts[name] = words
    return concepts


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
