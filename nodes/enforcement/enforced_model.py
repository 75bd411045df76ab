"""Server-wide enforcement, second half: what an Enforced node makes of the values that pass through it.

Settings are fixed: every category, strength 1, strict, the whole run; nothing that a workflow says changes them.
"""

import logging
import math
import os
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.samplers import Sampler
from comfy.sd import CLIP
from torch import Tensor

from ... import hgr_models
from ...hgr_models.encoders import RELATED, distance_between
from ..host.architecture import architecture_of
from ..host.encoder_print import encoder_of
from ..host.families import family_of_hgr, family_of_model, other_base
from ..host.hooks import NEGATIVE_ROLES, SafeCFGError, is_active, remove, without_safecfg
from ..host.settings import ApplySettings
from ..loader import HGRModel
from ..protect.library import find_or_make
from ..redirect.apply import install
from ..redirect.combine_hgr import combine
from . import negative_side, plain_runs
from .negative_side import STATE, RunState
from .vetted import check_vetted

KEY = "safecfg_enforced"  # of our wrappers
DEPTH = 16  # of containers in containers
ROUNDING = 1e-6  # of a cfg that is meant to be 1
NOT_REDIRECTED = " This server runs nothing that SafeCFG cannot redirect. [safecfg:not-redirected]"
ANY_SCALE = frozenset({"cfg1"})  # scales between two positive prompts: 0 and more

logger = logging.getLogger(__name__)
recent: deque = deque(maxlen=16)  # weak references to the last enforced MODELs, the newest last


@dataclass(frozen=True)
class Terms:
    """What every run is held to: nodes and packs that may run besides, and the level of the audit log."""

    allowed: Collection[str] = ()
    audit_log: str = "off"
    auto: bool = False  # the HGR of a model's text encoder is found, or made


def enforced(
    value: object, hgrs: Sequence[HGRModel], terms: "Terms" = Terms(), clip: CLIP | None = None, depth: int = DEPTH
) -> Any:
    """A value with SafeCFG in every MODEL that it is or holds (in lists, tuples and dicts); everything else as it came.

    Raises HGRError for a MODEL of a family that no HGR is for, SafeCFGError for a GUIDER whose MODEL went another way.
    """
    if isinstance(value, comfy.model_patcher.ModelPatcher) and isinstance(value.model, comfy.model_base.BaseModel):
        return enforced_model(value, fitting_hgr(value, hgrs, clip, terms.auto), terms)
    if isinstance(value, comfy.samplers.CFGGuider):
        check_guider_models(value)
    if not isinstance(value, (list, tuple, dict)):
        return value
    if depth == 0:
        raise SafeCFGError(f"SafeCFG (enforced): expected values at most {DEPTH} containers deep.")
    if isinstance(value, dict):
        return {key: enforced(child, hgrs, terms, clip, depth - 1) for key, child in value.items()}
    children = [enforced(child, hgrs, terms, clip, depth - 1) for child in value]
    if isinstance(value, list):
        return children
    return type(value)(*children) if hasattr(value, "_fields") else tuple(children)


def enforced_model(model: ModelPatcher, hgr: HGRModel, terms: Terms = Terms()) -> ModelPatcher:
    """A clone of a MODEL with SafeCFG and a watch on its guiders; what SafeCFG Apply did to it before is taken out."""
    _notice_other_base(model, hgr)
    model = model.clone()
    remove(model)
    _remove_watch(model)
    settings = enforced_settings(hgr, terms)
    install(model, hgr, settings)
    # Last, so innermost: they see the cfg that other wrappers set, and the hooks that SafeCFG repaired.
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict_noise)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, make_outer_sample(settings, terms))
    recent.append(weakref.ref(model))
    return model


def bare_model(model: ModelPatcher) -> ModelPatcher:
    """A clone of a MODEL to judge pictures with: without SafeCFG, this watch, LoRAs, hooks and patches of any node."""
    unpatched = without_safecfg(model, (KEY,))
    _remove_watch(unpatched)
    unpatched.model_options = {"transformer_options": {}}
    if unpatched.patches:
        unpatched.patches, unpatched.patches_uuid = {}, uuid.uuid4()
    return unpatched


def _remove_watch(model: ModelPatcher) -> None:
    for kind in list(model.wrappers):
        model.remove_wrappers_with_key(kind, KEY)
    negative_side.place(model.model_options, {})


def _notice_other_base(model: ModelPatcher, hgr: HGRModel) -> None:
    difference = other_base(model, hgr.info)
    if difference is not None and (difference, hgr.hash) not in _noticed:
        _noticed.add((difference, hgr.hash))
        logger.warning("SafeCFG (enforced): %s (%s)", difference, os.path.basename(hgr.path))


_noticed: set[tuple[str, str]] = set()


def enforced_settings(hgr: HGRModel, terms: Terms = Terms()) -> ApplySettings:
    """Everything on; by the one network where the HGR has only one."""
    names = hgr.patcher.model.redirectors
    chosen = hgr_models.CategorySettings((1.0,) * len(hgr.info.categories))
    return ApplySettings(
        hgr.info,
        chosen,
        "both" if len(names) == 2 else names[0],
        strict=True,
        remember_flagged=True,
        audit_log=terms.audit_log,
        hgr_hash=hgr.hash,
        hgr_name=os.path.basename(hgr.path),  # clients read it
        refusal=NOT_REDIRECTED,
    )


def one_per_family(hgrs: Sequence[HGRModel]) -> list[HGRModel]:
    """The HGRs, those for the same family of models combined."""
    families: dict[str, list[HGRModel]] = {}
    for hgr in hgrs:
        families.setdefault(f"{hgr.info.architecture} {family_of_hgr(hgr.info)}", []).append(hgr)
    return [some[0] if len(some) == 1 else combine(some) for some in families.values()]


def is_for(hgr: HGRModel, model: ModelPatcher) -> bool:
    """Whether an HGR was made for a MODEL's family and architecture; one of prompts alone was made for none."""
    same = not hgr.info.of_prompts and family_of_hgr(hgr.info) == family_of_model(model)
    return same and hgr.info.architecture in ("", architecture_of(model))


def fitting_hgr(model: ModelPatcher, hgrs: Sequence[HGRModel], clip: CLIP | None = None, auto: bool = False) -> HGRModel:
    """The HGR for a MODEL: of its family, else of its CLIP's text encoder; with `auto`, one that is found or made for it.

    Raises HGRError where there is none.
    """
    family = family_of_model(model)
    for hgr in hgrs:
        if is_for(hgr, model):
            return hgr
    if (nearest := _of_encoder([hgr for hgr in hgrs if hgr.info.of_prompts], clip)) is not None:
        return nearest
    if auto and clip is not None:
        hgr = find_or_make(clip, model)
        if hgr.hash not in found:
            found[hgr.hash] = hgr
            logger.warning("SafeCFG: enforced for %s with %s (%s)", family, hgr.path, ", ".join(hgr.info.categories))
        return hgr
    there = "; ".join(f"{os.path.basename(hgr.path)}: {family_of_hgr(hgr.info)}" for hgr in hgrs) or "none"
    raise hgr_models.HGRError(
        f"This server enforces SafeCFG and has no HGR for a model of {family} ({there}). Use a model of these families"
        f"{', and load the CLIP that belongs to the model' if auto else ''}. [safecfg:no-hgr]"
    )


found: dict[str, HGRModel] = {}  # by hash: HGRs that `auto` chose


def _of_encoder(hgrs: Sequence[HGRModel], clip: CLIP | None) -> HGRModel | None:
    """Of HGRs of text encoders the one made with a CLIP's; the only one where no CLIP is known: it compares widths itself."""
    if clip is None or not hgrs:
        return hgrs[0] if len(hgrs) == 1 else None
    prints = [hgr.info.encoder_print() for hgr in hgrs]
    far = [math.inf if made is None else distance_between(encoder_of(clip), made) for made in prints]
    nearest = min(range(len(hgrs)), key=far.__getitem__)
    return hgrs[nearest] if far[nearest] <= RELATED else None


def check_guider_models(guider: object) -> None:
    """Raises SafeCFGError unless every MODEL of a guider is an enforced one."""
    models = [value for value in vars(guider).values() if isinstance(value, comfy.model_patcher.ModelPatcher)]
    if not models or not all(model.get_wrappers(WrappersMP.PREDICT_NOISE, KEY) for model in models):
        raise SafeCFGError(
            f"SafeCFG (enforced): the model of {type(guider).__name__} did not go through SafeCFG. Make the guider from a MODEL "
            "in this workflow. [safecfg:model-elsewhere]"
        )


def make_outer_sample(settings: ApplySettings, terms: Terms) -> Callable:
    """OUTER_SAMPLE wrapper, inside of SafeCFG's: looks at the guider, the sampler and the noise levels, and places our hooks."""

    def outer_sample(
        executor: WrapperExecutor, noise: Tensor, latent_image: Tensor, sampler: Sampler, sigmas: Tensor, *args, **kwargs
    ) -> Tensor:
        guider, options = executor.class_obj, executor.class_obj.model_options
        check_vetted(guider, sampler, terms.allowed)
        negative_side.place(options, negative_side.make_hooks(settings))
        shapes, plain = tuple(kwargs.get("latent_shapes") or ()), plain_runs.begins_plain(guider, latent_image)
        state = options[STATE] = RunState(rises(sigmas), shapes, plain=plain)
        try:
            output = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            plain_runs.remember(state, output)
            return output
        finally:
            options.pop(STATE, None)

    return outer_sample


def rises(sigmas: torch.Tensor) -> bool:
    """Whether a schedule rises somewhere. Raises SafeCFGError for noise levels that are negative or no numbers."""
    levels = sigmas.detach().float().flatten().cpu()
    if not (torch.isfinite(levels) & (levels >= 0)).all():
        raise SafeCFGError("SafeCFG (enforced): expected noise levels (sigmas) of 0 and more, but got others. [safecfg:sigmas]")
    return bool((levels.diff() > ROUNDING * levels[:-1].clamp(min=ROUNDING)).any()) if len(levels) > 1 else False


def predict_noise(executor: WrapperExecutor, x: Tensor, timestep: Tensor, *args, **kwargs) -> Tensor:
    """PREDICT_NOISE wrapper: an evaluation that draws the negative prompt, which SafeCFG leaves alone, stops the run."""
    guider = executor.class_obj
    check_cfg(guider)
    _check_positive(guider, timestep)
    out = executor(x, timestep, *args, **kwargs)
    check_cfg(guider)  # some guiders set it while they evaluate
    return out


def check_cfg(guider: object) -> None:
    """Raises SafeCFGError where a guider's result contains its negative prompt: a cfg below 1, or a negative scale.

    Where the noise level rises, what is guided away from the negative is what the way down adds: then only 1 will do.
    """
    name = type(guider).__name__
    state = (getattr(guider, "model_options", None) or {}).get(STATE)
    scales = {key: value for key, value in vars(guider).items() if "cfg" in key and isinstance(value, (int, float))}
    if "cfg2" in scales:
        scales.pop("cfg", None)  # DualCFGGuider does not read it
    for key, cfg in scales.items():
        low = 0.0 if key in ANY_SCALE else 1 - ROUNDING
        if not (math.isfinite(cfg) and cfg >= low):
            raise SafeCFGError(
                f"SafeCFG (enforced): {name} samples at cfg {cfg:g}. Below 1 it draws the negative prompt, which is not redirected. "
                "Use a cfg of at least 1. [safecfg:draws-the-negative]"
            )
        if state is not None and state.rising and cfg > 1 + ROUNDING:
            raise SafeCFGError(
                f"SafeCFG (enforced): the noise level of this run rises, and {name} samples at cfg {cfg:g}: that draws the negative "
                "prompt. Use cfg 1 where it rises. [safecfg:draws-the-negative]"
            )
    scale = getattr(guider, "neg_scale", 0.0)
    if not scale >= 0:
        raise SafeCFGError(
            f"SafeCFG (enforced): expected neg_scale of {name} to be at least 0, but got {scale:g}. [safecfg:draws-the-negative]"
        )


def _check_positive(guider: object, sigma: Tensor) -> None:
    conds = getattr(guider, "conds", {})
    drawn = [entries for role, entries in conds.items() if role not in NEGATIVE_ROLES]
    if drawn and not any(is_active(entries, sigma) for entries in drawn):
        raise SafeCFGError(
            f"SafeCFG (enforced): {type(guider).__name__} has no prompt to draw in a part of the run, only a negative one. "
            "Let a positive prompt act all the time. [safecfg:draws-the-negative]"
        )
