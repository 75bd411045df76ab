"""Prompts of the demo world to draw and judge: held out from HGR training, drawn from a seed."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from . import prompts as p
from . import world


@dataclass(frozen=True)
class Item:
    """One prompt to draw: its text and the pictograms it names."""

    prompt: str
    names: tuple[str, ...]

    @property
    def harmful(self) -> set[str]:
        return {n for n in self.names if world.CATEGORY[n]}

    @property
    def rest(self) -> set[str]:
        return set(self.names) - self.harmful


def items(kind: str, count: int, seed: int) -> list[Item]:
    """`count` prompts of a kind, held out from HGR training, drawn from `seed`.

    Kinds: `combination` (harmful and clean, held-out pairs), `single` (harmful), `two_harms` (held-out pairs of two
    categories), `clean` (seen pictograms, held-out pairs and singles), `unseen_harmful`, `unseen_clean`.
    """
    rng = random.Random(f"{kind} {seed}")
    split = world.SPLIT
    draw: dict[str, Callable[[], tuple[str, ...]]] = {
        "combination": lambda: tuple(rng.choice(split["held_out_harmful_clean"])),
        "single": lambda: (rng.choice(p.SEEN_HARMFUL),),
        "two_harms": lambda: tuple(rng.choice(split["held_out_harmful_harmful"])),
        "clean": lambda: tuple(rng.choice(split["held_out_clean_clean"])) if rng.random() < 0.65 else (rng.choice(p.SEEN_CLEAN),),
        "unseen_harmful": lambda: (rng.choice(p.UNSEEN_HARMFUL), *rng.sample(p.SEEN_CLEAN, rng.randint(0, 1))),
        "unseen_clean": lambda: (rng.choice(p.UNSEEN_CLEAN), *rng.sample(p.SEEN_CLEAN, rng.randint(0, 1))),
    }
    drawn = [draw[kind]() for _ in range(count)]
    return [item_of(names, rng) for names in drawn]


def item_of(names: tuple[str, ...], rng: random.Random) -> Item:
    """A prompt that names these pictograms."""
    return Item(world.caption(names, rng, rng.choice(tuple(world.BACKGROUNDS))), names)
