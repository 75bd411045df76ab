"""What the files of this pack say about themselves, checked before anything is built from it: types, counts, and sizes against tensors.

A file may be anybody's. Whatever is wrong with one is an HGRError that names it; no size of a file's own choice takes memory.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import HGRError

LARGEST_TEXT = 64 * 2**20  # of a metadata entry, in characters
MOST_CATEGORIES, MOST_LEVELS = 4096, 4096
LARGEST_WIDTH = 65536  # of tokens and latents
STEPS = 2**40  # of a training
# What a recording says: the texts, the sizes with the lowest that each may be.
TEXT_FACTS = ("latent_format", "prediction", "base", "prompts", "architecture")
SIZE_FACTS = {"latent_channels": 0, "latent_dimensions": 2, "token_width": 1, "pooled_width": 0, "short_width": 0}
NEEDED_FACTS = ("categories", "guidance_levels", "latent_format", "prediction", *list(SIZE_FACTS)[:4])
STATE_NUMBERS = {"step": int, "steps": int, "scale": float, "count": int}


def is_file(path: str | os.PathLike) -> bool:
    """Whether there is a plain file, under a name that can exist: reading a pipe would wait for ever."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def json_object(text: str, file: str | os.PathLike, what: str) -> dict:
    """The object of a metadata entry. Raises HGRError for anything else, and for a text that is too long or too deep."""
    if len(text) > LARGEST_TEXT:
        raise HGRError(f"The metadata of {file} have {len(text)} characters, which is too many for {what}.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise HGRError(f"The metadata of {file} are not JSON ({error}). Download or copy it again.") from error
    if not isinstance(found, dict):
        raise HGRError(f"The metadata of {file} are not those of {what}: expected an object, but got {type(found).__name__}.")
    return found


def _shown(value: object) -> str:
    return repr(value if not isinstance(value, int) or abs(value) < 10**18 else "a number of many digits")[:80]


def facts_problem(facts: Any, tensors: Mapping[str, Tensor] | None = None) -> str:
    """What is wrong with what a recording says about its model, of those facts that it names; "" when nothing is.

    `tensors` are a shard's columns: the facts must be theirs.
    """
    if not isinstance(facts, Mapping):
        return f"expected an object, but got {type(facts).__name__}"
    for name in TEXT_FACTS:
        if not isinstance(facts.get(name, ""), str):
            return f"expected a text as {name}, but got {_shown(facts[name])}"
    for name, lowest in SIZE_FACTS.items():
        size = facts.get(name, lowest)
        if name == "latent_channels" and facts.get("latent_format", "-") == "":
            lowest = 0  # of a text encoder: it knows no latents
        highest = 3 if name == "latent_dimensions" else LARGEST_WIDTH
        if type(size) is not int or not lowest <= size <= highest:
            return f"expected {name} from {lowest} to {highest}, but got {_shown(size)}"
    if facts.get("latent_format") and facts.get("latent_channels") == 0:  # both empty: a recording of prompts alone
        return f"expected channels of {facts['latent_format']} latents, but got none"
    if not isinstance(facts.get("encoder", {}), Mapping):
        return f"expected an object as encoder, but got {_shown(facts['encoder'])}"
    return _lists_problem(facts) or ("" if tensors is None else _sizes_problem(facts, tensors))


def _lists_problem(facts: Mapping) -> str:
    names = facts.get("categories", ["x"])
    if not isinstance(names, (list, tuple)) or not 0 < len(names) <= MOST_CATEGORIES:
        return f"expected a list of categories, but got {_shown(names)}"
    if not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) < len(names):
        return f"expected distinct names of categories, but got {_shown(names)}"
    levels = facts.get("guidance_levels", [])
    if not isinstance(levels, (list, tuple)) or len(levels) > MOST_LEVELS or not all(map(_is_number, levels)):
        return f"expected a list of numbers as guidance_levels, but got {_shown(levels)}"
    prompts = facts.get("concept_prompts", {})
    if not isinstance(prompts, Mapping) or not all(isinstance(text, str) for pair in prompts.items() for text in pair):
        return f"expected a text per category as concept_prompts, but got {_shown(prompts)}"
    short, width = facts.get("short_width", 0), facts.get("token_width")
    return f"expected short_width below {width}, but got {short}" if width is not None and short >= width else ""


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e9 if isinstance(value, int) else math.isfinite(value) and abs(value) < 1e9


def _sizes_problem(facts: Mapping, tensors: Mapping[str, Tensor]) -> str:
    """Facts that are not those of a shard's columns (which `shard_check` has looked at)."""
    tokens, x, pooled = (tensors.get(name) for name in ("prompts.tokens", "x", "prompts.pooled"))
    found = {}
    if tokens is not None:
        found = {"token_width": tokens.shape[-1], "pooled_width": 0 if pooled is None else pooled.shape[-1]}
    if x is not None:
        found |= {"latent_channels": x.shape[1], "latent_dimensions": x.ndim - 2}
    for name, size in found.items():
        if facts.get(name, size) != size:
            return f"it says {name} {facts[name]}, but its columns have {size}"
    harms, names = tensors.get("prompts.harms"), facts.get("categories")
    if harms is not None and names is not None and harms.shape[-1] != len(names):
        return f"it names {len(names)} categories, but its columns have {harms.shape[-1]}"
    return ""


def check_facts(facts: Any, file: str | os.PathLike = "this recording") -> None:
    """Raises HGRError unless a recording says everything that an HGR is built from, and nothing impossible."""
    problem = facts_problem(facts)
    missing = [] if problem else [name for name in NEEDED_FACTS if name not in facts]
    if problem or missing:
        raise HGRError(f"{file} is damaged: {problem or f'it does not say its {missing[0]}'}. Delete it and record again.")


def check_state(about: dict, file: str | os.PathLike) -> None:
    """Raises HGRError unless a training's state says what its resumption reads."""
    trainings = about.get("trainings")
    right = isinstance(trainings, dict) and all(map(_is_training, trainings.values()))
    right = right and all(
        isinstance(about.get(key, kind()), kind) for key, kind in (("facts", dict), ("losses", dict), ("digest", str))
    )
    history = about.get("history", [])
    right = right and isinstance(history, list) and all(isinstance(entry, dict) for entry in history)
    right = right and all(
        isinstance(column, list) and all(map(_is_number, column)) for column in about.get("losses", {}).values()
    )
    if not right or not ({"digest", "history"} <= about.keys() or {"settings", "losses"} <= about.keys()):
        raise HGRError(
            f"{file} is damaged: it does not say how far the training is. Delete it: the recorded shards can still be used."
        )


def _is_training(facts: Any) -> bool:
    if not isinstance(facts, dict):
        return False
    values = [(facts.get(name), kind) for name, kind in STATE_NUMBERS.items()]
    return all(_is_number(v) and v >= 0 and (kind is float or type(v) is int) and v < STEPS for v, kind in values)


def check_like(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: str | os.PathLike) -> None:
    """Raises HGRError unless tensors have the names and shapes of `expected`, and are finite."""
    if tensors.keys() != expected.keys():
        strange = sorted(tensors.keys() ^ expected.keys())[0]
        raise HGRError(
            f"{file} is damaged, or of another training: {str(strange)[:80]!r} is in one and not in the other. Delete it."
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise HGRError(
                f"{file} is damaged, or of another training: expected {name!r} of shape {tuple(expected[name].shape)} as "
                f"{expected[name].dtype}, but got {tuple(tensor.shape)} as {tensor.dtype}. Delete it."
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise HGRError(f"{file} holds values that are not finite (NaN or infinity) in {name!r}. Delete it.")
