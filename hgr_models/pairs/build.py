"""Prompts of several sources become one `PromptSet`: checked, without duplicates, split, and summed up."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .. import category_list
from ..errors import HGRError
from .split import CLEAN, Part, split
from .types import PromptPair, PromptSet, listed, normalised, shown

SHOWN = 20  # problems in one message

FUNCTION_WORDS = frozenset(
    "a about above after against all an and are as at be before behind beside between but by for from has have her his in into is "
    "it its near next no not of off on one or out over she he some than that the their them they this three to two under up very "
    "was while who with without".split()
)


class Sourced(NamedTuple):
    """A pair and where it was written, for messages. `held_out` is None where the split decides."""

    pair: PromptPair
    origin: str
    held_out: bool | None = None


class Clean(NamedTuple):
    """A clean prompt and its subject. `held_out` is None where the split decides."""

    prompt: str
    subject: str
    held_out: bool | None = None


@dataclass
class Material:
    """What one source gives; `notes` go into the summary."""

    pairs: list[Sourced] = field(default_factory=list)
    clean: list[Clean] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __add__(self, other: "Material") -> "Material":
        return Material(self.pairs + other.pairs, self.clean + other.clean, self.notes + other.notes)


@dataclass(frozen=True)
class Built:
    """The prompts, a summary of them for people, and what they should be warned of (part of the summary)."""

    prompts: PromptSet
    summary: str
    warnings: tuple[str, ...]


def words_of(text: str) -> set[str]:
    """The lower-case words of a text."""
    return set(re.findall(r"[^\W\d_]+", text.casefold()))


def keep_categories(text: str, available: Sequence[str]) -> tuple[str, ...]:
    """The categories that a text such as `sexual, violence` or `violence = off` keeps (`category_list`); all of them for an empty text.

    Raises HGRError for a name that is not available.
    """
    return category_list.chosen(text, available)


def clean_words_to_avoid(pairs: Sequence[Sourced], known: Collection[str]) -> frozenset[str]:
    """Words that stand for the categories outside `known`: most of a category's harmful prompts have them, and no safe one.

    Built-in clean prompts know nothing of such a category: one that shows it would be learnt as harmless.
    """
    found: set[str] = set()
    for category in {c for item in pairs for c in item.pair.harms} - set(known):
        own = [item.pair for item in pairs if category in item.pair.removed]
        counts = Counter(word for pair in own for word in words_of(pair.harmful))
        safe = {word for pair in own for word in words_of(pair.safe)}
        found |= {word for word, count in counts.items() if 2 * count > len(own)} - safe - FUNCTION_WORDS
    return frozenset(found)


def build(
    material: Material, categories: Sequence[str], concepts: Mapping[str, str], held_out: float, seed: int, calibration: int = 0
) -> Built:
    """One set of the material's prompts of these categories, a share `held_out` of them (in [0, 0.5]) kept from training.

    Of the clean prompts at least `calibration` are held out (no more than half of them), unless nothing is to be held out.

    A category without a text in `concepts` gets its own name as concept prompt. Raises HGRError for prompts that contradict
    each other and for a category without any pair.
    """
    kept = [item for item in material.pairs if item.pair.harms <= set(categories)]
    _check_categories(categories, kept, material.pairs)
    _check_contradictions(kept)
    pairs = _first({(normalised(s.pair.harmful), normalised(s.pair.safe)): s for s in reversed(kept)})
    harmful = {normalised(item.pair.harmful) for item in pairs}
    different = _first({normalised(item.prompt): item for item in reversed(material.clean)})
    clean = [item for item in different if normalised(item.prompt) not in harmful]
    dropped = {
        "pairs of categories that are not kept": len(material.pairs) - len(kept),
        "duplicate pairs": len(kept) - len(pairs),
        "duplicate clean prompts": len(material.clean) - len(different),
        "clean prompts that a pair calls harmful": len(different) - len(clean),
    }
    free = sum(item.held_out is None for item in clean)  # the split decides
    shares = (held_out, max(held_out, min(0.5, calibration / max(1, free))) if held_out else 0.0)
    prompts, alone = _split(pairs, clean, tuple(categories), concepts, shares, seed)
    warnings = tuple(
        f"{c}: all its pairs are of one subject, so none of them is held out" for c in categories if c in alone and held_out
    )
    return Built(prompts, _summary(prompts, dropped, (*material.notes, *warnings)), warnings)


def _first(reversed_items: Mapping) -> list:
    return list(reversed_items.values())[::-1]


def _split(
    pairs: list[Sourced],
    clean: list[Clean],
    categories: tuple[str, ...],
    concepts: Mapping[str, str],
    shares: tuple[float, float],
    seed: int,
) -> tuple[PromptSet, set[str]]:
    """The set, and the categories of one subject only; `shares` of pairs and of clean prompts are held out."""
    parts = [Part(s.pair.harms, s.pair.subject, (s.pair.harmful, s.pair.safe), s.held_out) for s in pairs]
    parts += [Part(frozenset((CLEAN,)), item.subject, (item.prompt,), item.held_out) for item in clean]
    out, alone = split(parts, *shares, seed)
    sides: tuple[list, ...] = [], [], [], []  # pairs, clean, and both held out
    item: Any
    for i, item in enumerate((*pairs, *clean)):
        is_pair = i < len(pairs)
        sides[2 * out[i] + (not is_pair)].append(item.pair if is_pair else item.prompt)
    of_concepts = {c: concepts.get(c, c) for c in categories}
    return PromptSet(categories, *map(tuple, sides), of_concepts), alone  # type: ignore[call-arg]  # a starred tuple


def _check_contradictions(pairs: Sequence[Sourced]) -> None:
    """One prompt cannot be of different categories in two places, nor harmful in one and safe in the other."""
    harmful: dict[str, Sourced] = {}
    same: dict[tuple[str, str], Sourced] = {}
    problems = []
    for item in pairs:
        pair, key = item.pair, normalised(item.pair.harmful)
        other, twin = harmful.setdefault(key, item), same.setdefault((key, normalised(pair.safe)), item)
        if other.pair.harms != pair.harms:
            theirs = f"but {other.origin} calls it {listed(other.pair.harms)}"
            problems.append(f"{item.origin} calls {shown(pair.harmful)} {listed(pair.harms)}, {theirs}")
        elif twin.pair.removed != pair.removed:
            theirs = f"but {twin.origin} says {listed(twin.pair.removed)}"
            problems.append(f"{item.origin} says that {shown(pair.safe)} lacks {listed(pair.removed)}, {theirs}")
    for item in pairs:
        left, known = item.pair.harms - item.pair.removed, harmful.get(normalised(item.pair.safe))
        if known and not known.pair.harms <= left:
            theirs = f"but {known.origin} calls it {listed(known.pair.harms)}"
            problems.append(f"{item.origin} calls {shown(item.pair.safe)} safe, {theirs}")
    if problems:
        raise HGRError(problem_list("Pairs contradict each other; say the same of a prompt wherever it stands:", problems))


def _check_categories(categories: Sequence[str], kept: Sequence[Sourced], everything: Sequence[Sourced]) -> None:
    present = {c for item in kept for c in item.pair.harms}
    for category in categories:
        if category not in present:
            lost = [item.pair.harms for item in everything if category in item.pair.harms]
            others = listed({c for harms in lost for c in harms} - set(categories))
            why = f": all of its {len(lost)} also show {others}, which is not kept" if lost else ""
            raise HGRError(
                f"Expected pairs of {category}, but there is none{why}. Add some, or take {category} out of the categories."
            )


def problem_list(head: str, problems: Sequence[str]) -> str:
    """A message that names the first problems, one per line, and counts the rest."""
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n".join([head, *(f"  {problem}" for problem in (*problems[:SHOWN], *more))])


def _summary(prompts: PromptSet, dropped: Mapping[str, int], notes: Sequence[str]) -> str:
    lines = [
        f"{len(prompts.pairs)} pairs and {len(prompts.clean)} clean prompts for training; "
        f"{len(prompts.held_out_pairs)} pairs and {len(prompts.held_out_clean)} clean prompts held out"
    ]
    for category in prompts.categories:
        train, out = ([p for p in some if category in p.harms] for some in (prompts.pairs, prompts.held_out_pairs))
        several = sum(len(pair.harms) > 1 for pair in train + out)
        second = f" ({several} of them with a second harm)" if several else ""
        lines.append(f"{category}: {len(train)} pairs, {len(out)} held out{second}")
    lines += [f"dropped: {count} {what}" for what, count in dropped.items() if count]
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])
