"""The condition redirector in a run: rewrites the per-run copies of the conditions, never the user's CONDITIONING."""

import math
import uuid
from dataclasses import replace

import comfy.sampler_helpers
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider

from ... import hgr_models
from ..host.embedded import embedded
from ..host.families import POOLED, Text, read_text, rows_shown
from ..host.hooks import KEY, LENT, NEGATIVE_ROLES
from ..host.more_tokens import MORE, TOKENS, scatter
from ..host.settings import ApplySettings
from .nan_guard import unreadable_prompt
from .places import understood
from .runs import FlaggedPrompt, Run, Window

# What a condition says besides its text, and both directions of a guidance must share: Flux would guide a negative without a
# `guidance` of its own by another number, and a reference seen by one of them alone would be part of the guidance. An image
# prompt (unCLIP) is not among them: it is a prompt, whose harm the guidance must show.
SHARED = ("guidance", "reference_latents", "reference_latents_method", "concat_latent_image", "concat_mask")
ORIGINALS = f"{KEY}_originals"  # a role of our own: core encodes the original prompts of conditions that are split by time


def redirect_conditions(run: Run, patcher: ModelPatcher, conds: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """A run's conditions per role, every flagged positive one replaced by a redirected copy.

    Outside the run's window the original prompt applies: `split_by_time` finishes that when core has encoded both.
    In redirect mode concept they stay as they are. Where concepts act, the run takes down which ones are flagged.
    """
    run.saw_conditions = True
    given, conds = (
        conds,
        {
            role: [embedded(getattr(run.guider, "model_patcher", None), entry) for entry in entries]
            for role, entries in conds.items()
        },
    )
    found = [
        (role, index, _redirect(run, patcher, text, entry))
        for role, entries in conds.items()
        if role not in NEGATIVE_ROLES
        for index, entry in enumerate(entries)
        if (text := _text_of(run, entry)) is not None
    ]
    if not found:
        return given
    flags = _read_flags(run, [(role, result) for role, _, result in found])
    if run.settings.by_concept:
        flagged_ones = [one for one, flag in zip(found, flags, strict=True) if flag]
        run.concepts.prompts += [FlaggedPrompt(r, conds[r][i]["uuid"], result.weights) for r, i, result in flagged_ones]
    if run.settings.judges_only:
        return given
    read, conds = conds, {role: list(entries) for role, entries in given.items()}
    originals = []
    for (role, index, result), flagged in zip(found, flags, strict=True):
        if flagged:
            original = conds[role][index]
            conds[role][index] = _rewritten(read[role][index], result)
            if not run.window.full:
                run.split_roles.append((role, original["uuid"]))
                originals.append({"prompt_type": role, **original})  # core would name our role here
    if originals:
        conds[ORIGINALS] = originals
    return conds


def _text_of(run: Run, entry: dict) -> Text | None:
    width = run.settings.info.token_width
    text, problems = read_text({k: v for k, v in entry.items() if not understood(k, v, width)}, run.settings.info)
    for problem in problems:
        run.notice(f"{run.guider_name}: the condition redirector cannot redirect {problem}.")
    return text


def _redirect(run: Run, patcher: ModelPatcher, text: Text, entry: dict) -> hgr_models.ConditionResult:
    device = patcher.load_device
    tokens, pooled, mask = (None if t is None else t.to(device) for t in (text.tokens, text.pooled, text.mask))
    result = hgr_models.redirect_condition(patcher.model, tokens, pooled, run.settings.categories, mask)
    if (shown := rows_shown(entry, len(tokens))) is None:
        return result
    shown = shown.to(device)[:, None]
    return replace(result, harmfulness=result.harmfulness * shown, weights=result.weights * shown)


def _read_flags(run: Run, results: list[tuple[str, hgr_models.ConditionResult]]) -> list[bool]:
    """Per condition: is any of its rows flagged? The only time that the host waits for the condition redirector.

    The run's readings get what was read, with the condition's role. Raises SafeCFGError when it is not finite.
    """
    flat = torch.cat([_readable(result) for _, result in results]).cpu().numpy()
    ends = np.cumsum([2 * r.harmfulness.numel() + 1 for _, r in results])
    flags = []
    for (role, result), values in zip(results, np.split(flat, ends[:-1]), strict=True):
        harmfulness, weights = values[:-1].reshape(2, *result.harmfulness.shape)
        flags.append(bool((weights > 0).any()))
        if not np.isfinite(harmfulness).all():
            raise unreadable_prompt(run, role, "harmfulness")
        if flags[-1] and not values[-1]:
            raise unreadable_prompt(run, role, "redirection")
        run.readings.prompts.append((role, harmfulness.copy(), weights.copy()))
    run.meter.show_prompts()
    return flags


def _readable(result: hgr_models.ConditionResult) -> torch.Tensor:
    """Harmfulness, weights, and whether the text after redirection is finite, as one row for the host."""
    texts = [text for text in (result.tokens, result.pooled) if text is not None]
    finite = torch.stack([torch.isfinite(text).all() for text in texts]).all()
    return torch.cat([t.float().flatten() for t in (result.harmfulness, result.weights, finite)])


def _rewritten(original: dict, result: hgr_models.ConditionResult) -> dict:
    """A copy of a condition with redirected text, where and as the original was: core batches only conditions alike."""
    parts = scatter(original, result.tokens)
    copy = {**original, **{key: part.to(original[key]) for key, part in parts.items()}}
    if result.pooled is not None:
        copy[POOLED] = result.pooled.to(original[POOLED])
    return copy


def split_by_time(run: Run, conds: dict[str, list[dict]]) -> None:
    """Restricts redirected conditions to the run's window, and lets their originals act outside it; in place.

    Works on conditions that core has encoded: their areas, masks and bounds are resolved, and every one that core derived
    from a redirected condition (for an area of another role) shares its `model_conds`.
    """
    originals = conds.pop(ORIGINALS, [])
    for (role, name), original in zip(run.split_roles, originals, strict=False):
        entries = conds[role]
        redirected = next(entry["model_conds"] for entry in entries if entry["uuid"] == name)
        text = {key: original[key] for key in (TOKENS, POOLED, *MORE, "model_conds") if key in original}
        conds[role] = [
            part
            for entry in entries
            for part in (_split(entry, text, run.window) if _shares(entry["model_conds"], redirected) else [entry])
        ]


def _shares(encoded: dict, other: dict) -> bool:
    return bool(other) and encoded.keys() == other.keys() and all(encoded[key] is other[key] for key in other)


def _split(entry: dict, original_text: dict, window: Window) -> list[dict]:
    """Up to three copies with bounds that never meet: core averages conditions that are active at the same sigma."""
    start, end = float(entry.get("timestep_start", math.inf)), float(entry.get("timestep_end", -math.inf))
    ranges = [(True, min(start, window.high), max(end, _next_above(window.low)))]  # (redirected, start, end)
    if window.high < math.inf:
        ranges.insert(0, (False, start, max(end, _next_above(window.high))))
    if window.low >= 0:
        ranges.append((False, min(start, window.low), end))
    # A copy with the original prompt gets a name of its own: caches such as EasyCache keep results per name.
    text = {True: {}, False: {**original_text, "uuid": uuid.uuid4()}}
    return [{**entry, **text[redirected], **_bounds(s, e)} for redirected, s, e in ranges if e <= s]


def _bounds(start: float, end: float) -> dict:
    return {k: v for k, v in (("timestep_start", start), ("timestep_end", end)) if math.isfinite(v)}


def _next_above(sigma: float) -> float:
    """The next float32: core compares sigmas in that precision, so a double in between would be rounded away."""
    return -math.inf if sigma < 0 else float(np.nextafter(np.float32(sigma), np.float32(math.inf)))


def lend_negative(guider: CFGGuider, settings: ApplySettings) -> None:
    """Gives a guider without a negative (BasicGuider), for this run, the one that the node got: guidance is measured against it.

    It has a role of its own, which core encodes like the others and never evaluates: the sampled rows stay as they are, to the
    last bit, and only the probes of `guidance_hooks` ask the model for it.
    """
    conds = getattr(guider, "conds", None)
    if not settings.negative or not settings.sees_guidance or conds is None or any(conds.get(role) for role in NEGATIVE_ROLES):
        return
    positive: dict = next(iter(conds.get("positive") or ()), {})
    shared = {key: positive[key] for key in SHARED if key in positive}
    entries = comfy.sampler_helpers.convert_cond(settings.negative)
    conds[LENT] = [{"prompt_type": "negative", **shared, **entry} for entry in entries]
