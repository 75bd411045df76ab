"""Redirect mode `concept`: the HGR decides, and only flagged batches pay a row per flagged category.

The row predicts the category's concept prompt; Safe Latent Diffusion subtracts its direction from the guidance of the flagged
pictures, instead of what the two redirectors would have done; after it where the HGR is known to be weak.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from comfy.samplers import CFGGuider
from torch import Tensor

from ... import hgr_models
from ..host.concept_rows import encode_rows, past_warm_up, run_facts, units_of, warm_up_limit
from ..host.hooks import is_active
from .runs import Evaluation, FlaggedPrompt, Run

# The paper's Strong. Clean pictures are never touched here, so a weaker setting would spare nothing; Max keeps no composition,
# and what is not harmful in a flagged picture should stay.
SLD = hgr_models.SLD_PRESETS["Strong"]


def start(run: Run, sigmas: Tensor, kwargs: dict) -> None:
    """For OUTER_SAMPLE: the run's warm-up, and what its rows need besides the usual."""
    run.concepts.limit, run.concepts.facts = warm_up_limit(SLD, sigmas), run_facts(kwargs)


def encode(run: Run, guider: CFGGuider, noise: Tensor, **facts) -> None:
    """For SAMPLER_SAMPLE: makes the conditions of the concepts; none is evaluated before its category is flagged."""
    named = [(k, concept) for k, concept in enumerate(run.settings.concepts) if concept is not None]
    encoded = encode_rows(guider, [concept for _, concept in named], noise, {**facts, **run.concepts.facts})
    run.concepts.conditions = {k: condition for (k, _), condition in zip(named, encoded, strict=False)}


def redirect(
    run: Run,
    evaluation: Evaluation,
    guidance: tuple[Tensor, Tensor, Tensor],
    result: hgr_models.GuidanceResult,
    direction: str,
    extra_row: Callable[[list[dict]], Tensor],
) -> hgr_models.GuidanceResult:
    """The guidance redirector's `result`, with SLD's redirection of what it or a prompt flags.

    In redirect mode concept that is in place of its own, and its weights are joined by the prompts'. guidance: cond_denoised,
    uncond_denoised (B, C, *spatial) and sigmas (B,), on the HGR's device; `extra_row` evaluates conditions.
    """
    cond_denoised, uncond_denoised, sigmas = guidance
    weights = _with_prompts(run, result.weights, direction, evaluation.sigma)
    told = weights if run.settings.judges_only else result.weights
    # The one mode that reads flags within the step: whether a row is needed cannot wait, or the first flagged step goes unguarded.
    flagged = [k for k, found in enumerate((weights > 0).any(dim=0).tolist()) if found]
    if flagged and not run.concepts.conditions:
        if run.settings.judges_only:
            run.notice(
                f"{run.guider_name}: a flagged picture is not redirected, because its concept could not be encoded for this run."
            )
            told = torch.zeros_like(weights)
        flagged = []
    flagged = [k for k in flagged if k in run.concepts.conditions]
    if not flagged:
        return replace(result, cond_denoised=cond_denoised, weights=told)
    # One row at a time needs no more memory than plain CFG.
    concepts = [extra_row([run.concepts.conditions[k]]).to(cond_denoised) for k in flagged]
    guard = run.concepts.guards.setdefault(direction, hgr_models.FlaggedConceptGuard(SLD))
    units, active = units_of(evaluation.model, sigmas), past_warm_up(sigmas, run.concepts.limit)
    safe = guard.steer(cond_denoised, uncond_denoised, concepts, weights[:, flagged], units, active)
    return replace(result, cond_denoised=safe, weights=told)


def _with_prompts(run: Run, weights: Tensor, direction: str, sigma: Tensor) -> Tensor:
    """Category weights (B, K) with those of the prompts that core draws at this noise level; it repeats a prompt's rows over
    the batch."""
    for prompt in run.concepts.prompts:
        if (not run.is_dual or prompt.role == direction) and _is_drawn(run, prompt, sigma):
            rows = torch.arange(len(weights), device=weights.device) % len(prompt.weights)
            weights = torch.maximum(weights, prompt.weights.to(weights)[rows])
    return weights


def _is_drawn(run: Run, prompt: FlaggedPrompt, sigma: Tensor) -> bool:
    """Whether a prompt acts at a noise level; one that another node replaced counts as if it did."""
    entries = [entry for entry in run.guider.conds.get(prompt.role, []) if entry.get("uuid") == prompt.name]
    return not entries or is_active(entries, sigma)
