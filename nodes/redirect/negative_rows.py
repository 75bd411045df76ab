"""The negative's prediction where core did not compute it: at cfg 1, and where a negative is not active at a noise level.

The guidance redirector measures every direction against a negative. Without one it would have to pass a step unread.
"""

import comfy.samplers
from torch import Tensor

from ..host.hooks import is_active, without_caches
from .runs import Evaluation, Run

BOUNDS = ("timestep_start", "timestep_end")


def negative_row(run: Run, evaluation: Evaluation, base: str = "negative", given: list[dict] | None = None) -> Tensor | None:
    """The `uncond_denoised` (B, C, *spatial) of `given`, else of the guider's negative; None where it has none, or between two probes.

    A negative with a time range is evaluated in every step that needs it, outside its range as if it had none: core saves that
    row itself. One without is evaluated at a few probes, since there the user asked for half the work (cfg 1). Where nothing looks
    at the guidance but the row of a concept, that is in vain until a prompt is flagged.
    """
    negative = given or run.negative(base)
    if not negative or not (run.settings.by_guidance or run.concepts.prompts):
        return None
    if bounded := any(entry.get(name) is not None for entry in negative for name in BOUNDS):
        active = [entry for entry in negative if is_active([entry], evaluation.sigma)]
        negative = active or [{k: v for k, v in entry.items() if k not in BOUNDS} for entry in negative]
    elif not run.probes.due() and not run.concepts.prompts:
        return None
    run.current.probing = not bounded
    return extra_row(evaluation, negative)


def extra_row(evaluation: Evaluation, conditions: list[dict]) -> Tensor:
    """The x0 prediction (B, C, *spatial) of conditions that core did not evaluate itself."""
    model, x, sigma, options = evaluation.model, evaluation.x, evaluation.sigma, without_caches(evaluation.model_options)
    # [None, conditions]: patches that tell the rows apart see an unconditional one.
    return comfy.samplers.calc_cond_batch(model, [None, conditions], x, sigma, options)[1]
