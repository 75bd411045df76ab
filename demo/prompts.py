"""Prompt pairs and clean prompts of the demo world, for training, calibration and evaluation.

A pair's safe partner shows a harmless stand-in for each removed harm, in the same words otherwise. Pictograms and pairs
named in `data/split.json` are kept out of HGR training.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from . import world
from .words import Vocabulary

HARM_WORDS: dict[str, list[str]] = json.loads((world.DATA / "harm_words.json").read_text(encoding="utf-8"))
_UNSEEN = {*world.SPLIT["unseen_harmful"], *world.SPLIT["unseen_clean"]}
SEEN_CLEAN = tuple(n for n in world.CLEAN if n not in _UNSEEN)
SEEN_HARMFUL = tuple(n for n in world.HARMFUL if n not in _UNSEEN)
UNSEEN_CLEAN = tuple(world.SPLIT["unseen_clean"])
UNSEEN_HARMFUL = tuple(world.SPLIT["unseen_harmful"])
_HELD_OUT = {
    frozenset(pair)
    for key in ("held_out_harmful_clean", "held_out_harmful_harmful", "held_out_clean_clean")
    for pair in world.SPLIT[key]
}


@dataclass(frozen=True)
class Pair:
    """A prompt, its harms, the subset that its partner lacks, and the partner. A clean prompt is its own partner."""

    prompt: str
    partner: str
    harms: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()

    @property
    def clean(self) -> bool:
        return not self.harms


def held_out(names: Sequence[str]) -> bool:
    """Whether these pictograms, or this pair of them, are kept out of HGR training."""
    return bool(_UNSEEN & set(names)) or frozenset(names) in _HELD_OUT


def category_of(word: str) -> str | None:
    """The category of a pictogram or of a word of harm."""
    return world.CATEGORY.get(word) or next((c for c, words in HARM_WORDS.items() if word in words), None)


def make_pair(
    names: tuple[str, ...], removed: frozenset[str], rng: random.Random, background: bool = True, alone: bool = False
) -> Pair:
    """The pair of these names, without the `removed` categories in the partner.

    With `alone`, a harm that stays has no stand-in beside it.
    """
    safe = [world.STAND_IN[str(category_of(n))] if category_of(n) in removed else n for n in names]
    staying = [n for n in names if category_of(n) not in (None, *removed)]
    safe = staying if alone and staying else safe
    color = rng.choice(tuple(world.BACKGROUNDS)) if background else None
    seed = rng.random()  # the same words around both
    prompt = world.caption(names, random.Random(seed), color)
    partner = world.caption(tuple(dict.fromkeys(safe)), random.Random(seed), color)
    harms = frozenset(c for c in map(category_of, names) if c)
    return Pair(prompt, partner, harms, removed)


@cache
def harmless_words() -> tuple[list[str], list[str]]:
    """Words far from every category's words, for clean prompts: one half for training, the other for calibration."""
    vocabulary = Vocabulary.load()
    index = {w: i for i, w in enumerate(vocabulary.words)}
    unit = torch.nn.functional.normalize(vocabulary.vectors, dim=1)
    harm = [w for words in HARM_WORDS.values() for w in words] + list(SEEN_HARMFUL)
    nearness = (unit @ unit[[index[w] for w in harm]].T).amax(dim=1)
    order = nearness.argsort()[: int(0.7 * len(index))].tolist()
    words = [vocabulary.words[i] for i in order if vocabulary.words[i] not in world.CATEGORY and len(vocabulary.words[i]) > 2]
    random.Random(0).shuffle(words)
    return words[::2], words[1::2]


def harmful_pair(rng: random.Random, words: float = 0.25, two: float = 0.25, alone: bool = False) -> Pair:
    """A harmful training pair: alone, beside a clean pictogram, or two harms.

    `words` is the share of other words of harm, `two` that of two harms, `alone` as in `make_pair`.
    """
    while True:
        pick = lambda: rng.choice(SEEN_HARMFUL) if rng.random() > words else rng.choice(HARM_WORDS[rng.choice(world.CATEGORIES)])  # noqa: E731
        names = ((pick(),), (pick(), rng.choice(SEEN_CLEAN)), (pick(), pick()))[
            rng.choices((0, 1, 2), (0.4 * (1 - two), 0.6 * (1 - two), two))[0]
        ]
        if len(set(names)) == len(names) and not held_out(names):
            break
    harms = sorted({c for c in map(category_of, names) if c})
    removed = frozenset(rng.sample(harms, rng.randint(1, len(harms))))
    return make_pair(names, removed, rng, alone=alone)


def clean_pair(rng: random.Random, words: Sequence[str], share: float = 0.3) -> Pair:
    """A clean training prompt of seen pictograms; `share` of the names are replaced by `words`. Now and then empty."""
    if rng.random() < 0.02:
        return Pair("", "")
    while True:
        names = tuple(rng.sample(SEEN_CLEAN, rng.choice((1, 2, 2))))
        if not held_out(names):
            break
    names = tuple(rng.choice(words) if rng.random() < share else n for n in names)
    return make_pair(names, frozenset(), rng)
