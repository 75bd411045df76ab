"""Where other nodes may keep prompts in a run, and what a search for them leaves out."""

import math
from collections.abc import Iterator

import comfy.controlnet
import comfy.hooks
import comfy.model_base
import comfy.model_patcher
import comfy.sd
import numpy as np
from torch import Tensor, nn

from ..host.families import NO_TEXT, OTHER_TEXT, POOLED
from ..host.hooks import KEY, NEGATIVE_ROLES
from ..host.more_tokens import MASK, MORE, TOKENS
from .runs import Run
from .search import Array, Search

OURS = __package__.removesuffix(".nodes.redirect")  # of the pack's modules
OWN_KEYS = frozenset({KEY, f"{KEY}_concept", "multigpu_clones"})  # of model_options: runs of ours, copies of the model
# Core's own objects that hold weights, pictures or a whole model, and no prompt.
NO_PROMPTS = (
    comfy.model_patcher.ModelPatcher,
    comfy.model_base.BaseModel,
    comfy.sd.CLIP,
    comfy.sd.VAE,
    comfy.controlnet.ControlBase,
    comfy.hooks.WeightHook,
)
CORE = ("torch.", "comfy.k_diffusion.")  # modules whose functions and objects hold no prompt
# Of a guider: what is looked at elsewhere.
KNOWN_PARTS = frozenset("model_patcher model_options inner_model conds original_conds loaded_models".split())
# Keys of a condition that are read elsewhere, or hold no text; hooks, and what is encoded already, may hold objects that do.
READ = (NO_TEXT | OTHER_TEXT.keys() | {TOKENS, POOLED, MASK, *MORE}) - {"hooks", "model_conds"}


def search_for(run: Run) -> Search:
    """A search for tensors of the HGR's token width."""
    width = run.settings.info.token_width
    return Search(lambda value: _has_width(value, width), _skip, OWN_KEYS)


def _has_width(value: Array, width: int) -> bool:
    """Whether a tensor can be tokens (..., T, D) of this width; a single vector is a pooled one."""
    return value.ndim >= 2 and value.shape[-1] == width and value.shape[-2] > 1 and 0 not in value.shape and _is_floating(value)


def _is_floating(value: Array) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else np.issubdtype(value.dtype, np.floating)


def _skip(value: object) -> bool:
    package = str(getattr(value, "__module__", None) or type(value).__module__)  # of a function: where it was written
    if isinstance(value, NO_PROMPTS) or (f"{package}.".startswith(f"{OURS}.") and not hasattr(value, "_safecfg_wraps")):
        return True
    if package.startswith(CORE):
        return True
    return isinstance(value, nn.Module) and package.startswith("comfy.")  # the model's own layers


def other_places(run: Run, conds: dict[str, list[dict]]) -> Iterator[tuple[str, object, object]]:
    """(name, value, setter) of everything in a run that other nodes may have made, besides the model's options."""
    guider = run.guider
    model = guider.model_patcher
    yield "an object patch", model.object_patches, None
    for name in ("injections", "attachments"):
        for key, value in list(getattr(model, name, {}).items()):
            if key not in OWN_KEYS:
                yield f"{name} {key}", value, None
    for role, entries in conds.items():
        if role not in NEGATIVE_ROLES and not role.startswith(KEY):
            yield from (place for entry in entries for place in _of_condition(entry))
    for owner in (guider, run.sampler):
        for name, value in list(vars(owner).items()) if hasattr(owner, "__dict__") else ():
            if name not in KNOWN_PARTS:
                yield f"{type(owner).__name__}.{name}", value, None


def options_of(model_options: dict) -> Iterator[tuple[str, object, object]]:
    """(name, value, setter) of everything in a run's model options but ours."""
    for key, value in list(model_options.items()):
        if key not in OWN_KEYS:
            yield "" if key == "transformer_options" else str(key), value, None


def understood(key: str, value: object, width: int) -> bool:
    """Whether a condition's unknown key holds tensors of the tokens' width alone: those the search finds."""
    if key in READ:
        return False
    search = Search(lambda tensor: True, _skip)
    search.look(value)
    return bool(search.finds) and all(_has_width(find.value, width) for find in search.finds)


def _of_condition(entry: dict) -> Iterator[tuple[str, object, object]]:
    for key, value in list(entry.items()):
        if key not in READ:
            yield f"a condition's {key}", value, lambda new, key=key: entry.__setitem__(key, new)


def identities_of(model_options: dict) -> tuple:
    """The patches of an evaluation, by identity: other ones may hold other prompts."""
    options = model_options.get("transformer_options", {})
    kinds = [options.get(name, {}) for name in ("patches", "patches_replace")]
    found = [id(model_options.get("model_function_wrapper"))]
    for by_name in kinds:
        for functions in by_name.values():
            found += [id(f) for f in (functions.values() if isinstance(functions, dict) else functions)]
    return tuple(found)


def lengths_of(shape: tuple[int, ...]) -> set[int]:
    """How many places a latent (B, C, *spatial) has at each level of a network: what patches keep of that length are features."""
    height, width = shape[-2:]
    return {math.ceil(height / scale) * math.ceil(width / scale) for scale in (1, 2, 4, 8, 16, 32)}
