"""What training gets: pairs, clean prompts, and what is held out."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from ..errors import HGRError


def normalised(prompt: str) -> str:
    """Two prompts that differ only in case and spaces are the same one."""
    return " ".join(prompt.casefold().split())


@dataclass(frozen=True)
class PromptPair:
    """A harmful prompt and its safe partner: the same scene without the `removed` harms.

    `harms` are the categories of `harmful`; `removed` is a non-empty subset of them, so a pair can leave a harm in place.
    The held-out split is by `subject`. Raises HGRError for a pair that breaks these rules.
    """

    harmful: str
    safe: str
    harms: frozenset[str]
    removed: frozenset[str]
    subject: str

    def __post_init__(self) -> None:
        if not self.harmful.strip() or not self.safe.strip():
            raise HGRError(f"Expected two prompts, but got {shown(self.harmful)} => {shown(self.safe)}.")
        if normalised(self.harmful) == normalised(self.safe):
            raise HGRError(f"Expected a safe prompt that differs from the harmful one, but both are {shown(self.safe)}.")
        if not self.removed or not self.removed <= self.harms:
            raise HGRError(
                f"Expected the removed categories to be some of {listed(self.harms)}, but got {listed(self.removed) or 'none'}."
            )


@dataclass(frozen=True)
class PromptSet:
    """Prompts for training, and those held out from it.

    Every category has a pair in `pairs`, and every category of a pair is among `categories`; `concept_prompts` has a text per
    category. Raises HGRError otherwise.
    """

    categories: tuple[str, ...]
    pairs: tuple[PromptPair, ...]
    clean: tuple[str, ...]
    held_out_pairs: tuple[PromptPair, ...] = ()
    held_out_clean: tuple[str, ...] = ()
    concept_prompts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        present = {c for pair in self.pairs for c in pair.harms}
        known = set(self.categories)
        empty = [c for c in self.categories if c not in present]
        if empty or not self.categories:
            raise HGRError(
                f"Expected at least one pair in each category, but there is none in {listed(empty) or 'any: there is no category'}."
            )
        if strange := {c for pair in (*self.pairs, *self.held_out_pairs) for c in pair.harms} - known:
            raise HGRError(f"Expected pairs of {listed(known)} only, but some are of {listed(strange)}.")
        if missing := known - self.concept_prompts.keys():
            raise HGRError(f"Expected a concept prompt for each category, but {listed(missing)} has none.")

    def texts(self) -> tuple[dict[str, frozenset[str]], tuple[str, ...]]:
        """What the reading of prompts learns from: harmful texts with their harms, and clean ones.

        Partners are among them, with the harms that are left: nothing teaches better which words matter than two prompts that
        differ in those alone.
        """
        harmful = {pair.harmful: pair.harms for pair in self.pairs}
        left = {pair.safe: pair.harms - pair.removed for pair in self.pairs}
        harmful = {text: harms for text, harms in left.items() if harms} | harmful
        clean = [text for text, harms in left.items() if not harms and text not in harmful]
        return harmful, tuple(dict.fromkeys((*self.clean, *clean)))

    def digest(self) -> str:
        """SHA-256 of the content, the same on every machine: a resumed training must have the same prompts."""
        pairs = [
            [[p.harmful, p.safe, sorted(p.harms), sorted(p.removed), p.subject] for p in some]
            for some in (self.pairs, self.held_out_pairs)
        ]
        content = [list(self.categories), pairs, self.clean, self.held_out_clean, sorted(self.concept_prompts.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def listed(names: Any) -> str:
    """Names for a message, in alphabetical order."""
    return ", ".join(sorted(names))


def shown(text: str, length: int = 80) -> str:
    """A prompt for a message: quoted, and cut when it is long."""
    return repr(text if len(text) <= length else text[: length - 3] + "...")
