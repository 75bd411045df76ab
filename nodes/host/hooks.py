"""What SafeCFG's parts share of ComfyUI's hooks: keys, roles, and putting hooks in and taking them out."""

from collections.abc import Iterable

import comfy.model_management
import numpy as np
from comfy.model_patcher import ModelPatcher
from comfy.samplers import Sampler
from torch import Tensor

PRE_CFG, CFG, POST_CFG = "sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function"
CACHES = frozenset({"easycache", "lazycache"})  # wrappers that count evaluations; a probe must not advance them
KEY = "safecfg"  # of wrappers, additional models and the run in model_options
LENT = f"{KEY}_negative"  # a role of our own: the negative that the node lends a guider without one (`conditions.lend_negative`)
NEGATIVE_ROLES = ("negative", "empty_negative_prompt", LENT)  # every other role of a guider's conditions is a prompt to draw


def without_safecfg(model: ModelPatcher, also: Iterable[str] = ()) -> ModelPatcher:
    """A clone of a MODEL without SafeCFG Apply, and without wrappers of the keys in `also`."""
    model = model.clone()
    model.remove_additional_models(KEY)
    for kind in list(model.wrappers):
        for key in (KEY, *also):
            model.remove_wrappers_with_key(kind, key)
    put_hooks(model.model_options, {})
    return model


def remove(model: ModelPatcher) -> bool:
    """Takes SafeCFG out of a MODEL that the caller owns; whether it was there."""
    was_there = KEY in model.additional_models
    model.remove_additional_models(KEY)
    model.remove_attachments(KEY)
    for kind in list(model.wrappers):
        model.remove_wrappers_with_key(kind, KEY)
    if was_there:
        put_hooks(model.model_options, {})
    return was_there


def put_hooks(model_options: dict, hooks: dict) -> None:
    """Makes our hooks the first of their lists, once, whatever another node made of the lists; {} removes them."""
    for name in (PRE_CFG, POST_CFG):
        others = model_options.get(name, [])
        others = list(others) if isinstance(others, (list, tuple)) else [others]
        ours = [hooks[name]] if name in hooks else []
        model_options[name] = ours + [f for f in others if not getattr(f, "_safecfg", False)]


def is_training(sampler: Sampler) -> bool:
    """Whether core trains a LoRA with this sampler."""
    return bool(getattr(comfy.model_management, "in_training", False)) or type(sampler).__name__ == "TrainSampler"


def without_caches(model_options: dict) -> dict:
    """Model options for an extra evaluation, which caches must neither count nor answer."""
    transformer_options = dict(model_options.get("transformer_options", {}))
    wrappers = transformer_options.get("wrappers", {})
    transformer_options["wrappers"] = {
        kind: {key: list(functions) for key, functions in by_key.items() if key not in CACHES}
        for kind, by_key in wrappers.items()
    }
    return {**model_options, "transformer_options": transformer_options}


class SafeCFGError(RuntimeError):
    """Raised when an HGR's readings are not finite, and in strict mode when something cannot be redirected; the model stays usable."""

    __module__ = "safecfg"  # ComfyUI tells clients an exception's module, and the pack's is its path on the server


def as_float32(value: float | Tensor) -> float:
    return float(np.float32(float(value)))


def is_active(conditions: list[dict] | None, sigma: Tensor) -> bool:
    """Whether core evaluates any of these conditions at a noise level; of the others its output is zeros."""
    if not conditions:
        return False
    bounds = [(c.get("timestep_start"), c.get("timestep_end")) for c in conditions]
    if any(start is None and end is None for start, end in bounds):
        return True
    now = float(sigma.flatten()[0])  # core reads it too where a condition has bounds
    return any((start is None or now <= as_float32(start)) and (end is None or now >= as_float32(end)) for start, end in bounds)
