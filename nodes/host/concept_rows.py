"""The rows of concept prompts: encoded once, then conditions of a run that differ from its unconditional by the text alone."""

import math
import uuid

import comfy.samplers
from comfy.model_base import BaseModel
from comfy.samplers import CFGGuider
from comfy.sd import CLIP
from torch import Tensor

from ... import hgr_models
from .families import OTHER_TEXT, POOLED, prediction_of
from .more_tokens import MASK, MORE, TOKENS

SIGMA_ROUNDING = 1e-5  # relative; some samplers compute a step's sigma again
TEXT = frozenset({TOKENS, POOLED, MASK, *MORE, *MORE.values(), *OTHER_TEXT})
# Where and when a condition acts, and what core makes of it: the concept's row covers the whole picture at every step.
EXTENT = frozenset(
    """
    area clip_end_percent clip_start_percent default end_percent mask mask_strength model_conds set_area_to_bounds start_percent
    strength timestep_end timestep_start uuid
    """.split()
)


def encode_prompt(clip: CLIP | None, prompt: str) -> list:
    """[tokens, extras] of a prompt. Raises HGRError without a CLIP, or where it gives one prompt several encodings."""
    if clip is None:
        raise hgr_models.HGRError("Expected a CLIP, but this checkpoint has none. Connect the CLIP that belongs to the model.")
    entries = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    if len(entries) != 1:
        raise hgr_models.HGRError(
            "This CLIP has scheduled hooks, which give one prompt several encodings. Connect a CLIP without."
        )
    return entries[0]


def run_facts(kwargs: dict) -> dict:
    """What this host's core gives a condition's encoding besides the usual, from the arguments of OUTER_SAMPLE."""
    return {name: kwargs[name] for name in ("latent_shapes",) if name in kwargs}


def unconditional_of(guider: CFGGuider) -> dict | None:
    """The condition that the guidance starts from, at best one for the whole picture; PerpNegGuider's is the empty one."""
    conds = getattr(guider, "conds", {})
    entries = conds.get("empty_negative_prompt") or conds.get("negative") or []
    whole = [entry for entry in entries if not entry.keys() & {"area", "mask", "default"}]
    return next(iter([*whole, *entries]), None)


def encode_rows(guider: CFGGuider, concepts: list[list], noise: Tensor, facts: dict) -> list[dict]:
    """A condition per concept [tokens, extras], encoded for the model as core encodes the negative; [] without an unconditional.

    For SAMPLER_SAMPLE, where core has encoded the run's own. `facts`: core's latent_image, denoise_mask, seed and `run_facts`.
    """
    if (unconditional := unconditional_of(guider)) is None:
        return []
    conditions = [concept_condition(unconditional, concept) for concept in concepts]
    encode = guider.inner_model.extra_conds
    return comfy.samplers.encode_model_conds(encode, conditions, noise, noise.device, "negative", **facts)


def concept_condition(unconditional: dict, concept: list) -> dict:
    """The unconditional's condition with a concept's text: sizes, ControlNets, references and hooks stay, so that the two
    predictions differ by the text alone."""
    tokens, extras = concept
    kept = {key: value for key, value in unconditional.items() if key not in TEXT | EXTENT}
    return {**kept, **extras, TOKENS: tokens, "model_conds": {}, "uuid": uuid.uuid4()}


def warm_up_limit(sld: hgr_models.SLDSettings, sigmas: Tensor) -> float:
    """The highest sigma after the warm-up of a run over `sigmas` (S + 1,); infinite where there is none."""
    first = hgr_models.warm_up_steps(sld.warm_up, len(sigmas) - 1)
    return float(sigmas[first]) * (1 + SIGMA_ROUNDING) if first > 0 else math.inf


def past_warm_up(sigma: Tensor, limit: float) -> Tensor | None:
    """Rows (B,) that are past the warm-up, at noise levels sigma (B,); None: all."""
    return None if limit == math.inf else sigma.flatten() <= limit


def units_of(model: BaseModel, sigma: Tensor) -> Tensor:
    """`output_units` (B,) of a model at noise levels sigma (B,)."""
    sampling = model.model_sampling
    return hgr_models.output_units(sigma.flatten(), prediction_of(sampling), getattr(sampling, "sigma_data", 1.0))
