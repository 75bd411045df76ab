"""Server-wide enforcement, second half: what an Enforced node makes of the values that pass through it.

Settings are fixed: every category, strength 1, strict, the whole run; nothing that a workflow says changes them.
"""

import math
from collections.abc import Sequence

import comfy.model_base
import comfy.model_patcher
import comfy.samplers
from comfy.patcher_extension import WrappersMP

from ... import hgr_models
from ..families import family_of_hgr, family_of_model
from ..loader import HGRModel
from ..redirect.apply import install, remove
from ..redirect.combine_hgr import combine
from ..redirect.runs import NEGATIVE_ROLES, ApplySettings, SafeCFGError, is_active

KEY = "safecfg_enforced"  # of our wrapper
DEPTH = 16  # of containers in containers
ROUNDING = 1e-6  # of a cfg that is meant to be 1


def enforced(value, hgrs: Sequence[HGRModel], depth: int = DEPTH):
    """A value with SafeCFG in every MODEL that it is or holds (in lists, tuples and dicts); everything else as it came.

    Raises HGRError for a MODEL of a family that no HGR is for, SafeCFGError for a GUIDER whose MODEL went another way.
    """
    if isinstance(value, comfy.model_patcher.ModelPatcher) and isinstance(value.model, comfy.model_base.BaseModel):
        return enforced_model(value, fitting_hgr(value, hgrs))
    if isinstance(value, comfy.samplers.CFGGuider):
        check_guider_models(value)
    if not isinstance(value, (list, tuple, dict)):
        return value
    if depth == 0:
        raise SafeCFGError(f"SafeCFG (enforced): expected values at most {DEPTH} containers deep.")
    if isinstance(value, dict):
        return {key: enforced(child, hgrs, depth - 1) for key, child in value.items()}
    children = [enforced(child, hgrs, depth - 1) for child in value]
    if isinstance(value, list):
        return children
    return type(value)(*children) if hasattr(value, "_fields") else tuple(children)


def enforced_model(model, hgr: HGRModel):
    """A clone of a MODEL with SafeCFG and a watch on its guiders; what SafeCFG Apply did to it before is taken out."""
    model = model.clone()
    remove(model)
    model.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, KEY)
    install(model, hgr.patcher, enforced_settings(hgr))
    # Last, so innermost: it sees the cfg that other wrappers set.
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict_noise)
    return model


def enforced_settings(hgr: HGRModel) -> ApplySettings:
    """Everything on; by the one network where the HGR has only one."""
    network = hgr.patcher.model
    names = [name for name in ("condition", "guidance") if getattr(network, name) is not None]
    chosen = hgr_models.CategorySettings((1.0,) * len(hgr.info.categories))
    return ApplySettings(
        hgr.info,
        chosen,
        "both" if len(names) == 2 else names[0],
        strict=True,
        remember_flagged=True,
        hgr_hash=hgr.hash,
        hgr_name=hgr.path,
    )


def one_per_family(hgrs: Sequence[HGRModel]) -> list[HGRModel]:
    """The HGRs, those for the same family of models combined."""
    families: dict[str, list[HGRModel]] = {}
    for hgr in hgrs:
        families.setdefault(family_of_hgr(hgr.info), []).append(hgr)
    return [some[0] if len(some) == 1 else combine(some) for some in families.values()]


def fitting_hgr(model, hgrs: Sequence[HGRModel]) -> HGRModel:
    """The HGR for a MODEL's family."""
    family = family_of_model(model)
    for hgr in hgrs:
        if family_of_hgr(hgr.info) == family:
            return hgr
    there = "; ".join(f"{hgr.path}: {family_of_hgr(hgr.info)}" for hgr in hgrs)
    raise hgr_models.HGRError(
        f"This server enforces SafeCFG and has no HGR for a model of {family} ({there}). Use a model of these families."
    )


def check_guider_models(guider) -> None:
    """Raises SafeCFGError unless every MODEL of a guider is an enforced one."""
    models = [value for value in vars(guider).values() if isinstance(value, comfy.model_patcher.ModelPatcher)]
    if not models or not all(model.get_wrappers(WrappersMP.PREDICT_NOISE, KEY) for model in models):
        raise SafeCFGError(
            f"SafeCFG (enforced): the model of {type(guider).__name__} did not go through SafeCFG. Make the guider from a MODEL "
            "in this workflow."
        )


def predict_noise(executor, x, timestep, *args, **kwargs):
    """PREDICT_NOISE wrapper: an evaluation that draws the negative prompt, which SafeCFG leaves alone, stops the run."""
    check_cfg(executor.class_obj)
    _check_positive(executor.class_obj, timestep)
    return executor(x, timestep, *args, **kwargs)


def check_cfg(guider) -> None:
    """Raises SafeCFGError where a guider's result contains its negative prompt: cfg below 1, or a negative scale."""
    name = type(guider).__name__
    cfg = guider.cfg2 if hasattr(guider, "cfg2") else guider.cfg
    if not (math.isfinite(cfg) and cfg >= 1 - ROUNDING):
        raise SafeCFGError(
            f"SafeCFG (enforced): {name} samples at cfg {cfg:g}. Below 1 it draws the negative prompt, which is not redirected. "
            "Use a cfg of at least 1."
        )
    scale = getattr(guider, "neg_scale", 0.0)
    if not scale >= 0:
        raise SafeCFGError(f"SafeCFG (enforced): expected neg_scale of {name} to be at least 0, but got {scale:g}.")


def _check_positive(guider, sigma) -> None:
    conds = getattr(guider, "conds", {})
    drawn = [entries for role, entries in conds.items() if role not in NEGATIVE_ROLES]
    if drawn and not any(is_active(entries, sigma) for entries in drawn):
        raise SafeCFGError(
            f"SafeCFG (enforced): {type(guider).__name__} has no prompt to draw in a part of the run, only a negative one. "
            "Let a positive prompt act all the time."
        )
