"""The condition redirector in a run: rewrites the per-run copies of the conditions, never the user's CONDITIONING."""

import math
import uuid

import numpy as np
import torch

from ... import hgr_models
from ..families import POOLED, TOKENS, Text, read_text
from .finite import unreadable_prompt
from .runs import KEY, NEGATIVE_ROLES, FlaggedPrompt, Run, Window

ORIGINALS = f"{KEY}_originals"  # a role of our own: core encodes the original prompts of conditions that are split by time


def redirect_conditions(run: Run, patcher, conds: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """A run's conditions per role, every flagged positive one replaced by a redirected copy.

    Outside the run's window the original prompt applies: `split_by_time` finishes that when core has encoded both.
    In redirect mode concept they stay as they are, and the run takes down which ones are flagged.
    """
    run.saw_conditions = True
    found = [
        (role, index, _redirect(run, patcher, text))
        for role, entries in conds.items()
        if role not in NEGATIVE_ROLES
        for index, entry in enumerate(entries)
        if (text := _text_of(run, entry)) is not None
    ]
    if not found:
        return conds
    flags = _read_flags(run, [(role, result) for role, _, result in found])
    if run.settings.by_concept:
        read = zip(found, flags, strict=True)
        run.concepts.prompts += [FlaggedPrompt(r, conds[r][i]["uuid"], result.weights) for (r, i, result), flag in read if flag]
        return conds
    conds = {role: list(entries) for role, entries in conds.items()}
    originals = []
    for (role, index, result), flagged in zip(found, flags, strict=True):
        if flagged:
            original = conds[role][index]
            conds[role][index] = _rewritten(original, result)
            if not run.window.full:
                run.split_roles.append((role, original["uuid"]))
                originals.append({"prompt_type": role, **original})  # core would name our role here
    if originals:
        conds[ORIGINALS] = originals
    return conds


def _text_of(run: Run, entry: dict) -> Text | None:
    text, problems = read_text(entry, run.settings.info)
    for problem in problems:
        run.notice(f"{run.guider_name}: the condition redirector cannot redirect {problem}.")
    return text


def _redirect(run: Run, patcher, text: Text) -> hgr_models.ConditionResult:
    device = patcher.load_device
    tokens, pooled, mask = (None if t is None else t.to(device) for t in (text.tokens, text.pooled, text.mask))
    return hgr_models.redirect_condition(patcher.model, tokens, pooled, run.settings.categories, mask)


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
    copy = {**original, TOKENS: result.tokens.to(original[TOKENS])}
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
        text = {key: original[key] for key in (TOKENS, POOLED, "model_conds") if key in original}
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
