"""What people call harm: terms of each category, put into neutral frames, with neutral words of the category in their place.

A term is of a kind that says how it stands in a prompt: `is` (nude), `doing` (robbing a bank), `has` (a bloody knife), `shows`
(a murder scene) and `tags` (as in tag lists). The safe partner has neutral words of the same kind at the same place.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .scenes import Phrase, Scenery, deck, load_data

KINDS = ("is", "doing", "has", "shows", "tags", "joined")
TAGS_SHARE, JOINED_SHARE = 0.3, 50  # tag lists have several terms; joined ones are many and alike
SECOND = 0.35  # of the prompts with a person have a second term
ALONE = 0.25  # of the prompts are a term and nothing beside it but style
TAGS = (2, 9)  # neutral tags around those of a category


@dataclass(frozen=True)
class Core:
    """What a pair shows: harmful, safe, and its subject, by which the held-out split goes."""

    harmful: str
    safe: str
    subject: str


def joined(phrase: Sequence[str]) -> str:
    return " ".join(phrase)


def with_article(adjective: str, noun: str) -> str:
    """`nude` and `a man` as `a nude man`; what follows a noun better stays behind it."""
    article, _, rest = noun.partition(" ")
    if " " in adjective or article not in ("a", "an"):
        return f"{noun} {adjective}" if " " in adjective else f"{adjective} {noun}"
    return f"{'an' if adjective[0] in 'aeio' else 'a'} {adjective} {rest}"


class Terms:
    """Draws cores of a category; with one `random.Random` always the same ones, every term once before any comes again."""

    def __init__(self, category: str, rng: random.Random):
        data = load_data(f"words/{category}")
        self._rng, self.category = rng, category
        self._harm = {kind: deck(data["harm"][kind], rng) for kind in data["harm"]}
        self._safe = {kind: deck(data["safe"][kind], rng) for kind in data["safe"]}
        for decks, key in ((self._harm, "joined"), (self._safe, "safe_joined")):
            pairs = [(a, b) for a in data.get(key, {}).get("first", ()) for b in data.get(key, {}).get("second", ())]
            decks["joined"] = map(joined, deck(pairs, rng)) if pairs else decks["has"]
        words = load_data("words/clean")
        # Every term is to be seen about as often as any other.
        sizes = {kind: len(terms) for kind, terms in data["harm"].items()}
        self._shares = [TAGS_SHARE * sizes[kind] if kind == "tags" else sizes.get(kind, JOINED_SHARE) for kind in KINDS]
        self._doing, self._places = deck(words["doing"], rng), deck(words["places"], rng)
        self._tags = load_data("words/styles")["tags"]
        self._people = people(rng)

    def phrase(self, kind: str) -> Phrase:
        """A term of a kind and neutral words in its place."""
        return Phrase(next(self._harm[kind]), next(self._safe[kind]))

    def draw(self) -> Core:
        """A core of a random kind."""
        (kind,) = self._rng.choices(KINDS, self._shares)
        if kind == "tags":
            return self._listed()
        first, who = self.phrase(kind), next(self._people)
        if self._rng.random() < ALONE:
            return Core(first.harm, first.safe, who)
        if kind == "shows":
            place = next(self._places) if self._rng.random() < 0.4 else ""
            return Core(f"{first.harm} {place}".strip(), f"{first.safe} {place}".strip(), who)
        return self._person(kind, first, who)

    def _person(self, kind: str, first: Phrase, who: str) -> Core:
        rng = self._rng
        second = self.phrase(rng.choice(("doing", "has"))) if rng.random() < SECOND else None
        doing = next(self._doing) if kind != "doing" and second is None and rng.random() < 0.5 else ""
        place = next(self._places) if rng.random() < 0.5 else ""
        sides = []
        for some, other in ((first.harm, second and second.harm), (first.safe, second and second.safe)):
            if kind == "is":
                text = with_article(some, who)
            else:
                text = f"{who} {'with ' if kind in ('has', 'joined') else ''}{some}"
            sides.append(", ".join(filter(None, (" ".join(filter(None, (text, doing, place))), other))))
        return Core(sides[0], sides[1], who)

    def _listed(self) -> Core:
        """Tags of the category among neutral ones, in one order on both sides."""
        rng = self._rng
        count = rng.choices((1, 2, 3, 4), (4, 3, 2, 1))[0]
        found = [self.phrase("tags") for _ in range(count)]
        around = rng.sample(self._tags, rng.randint(*TAGS))
        places = sorted(rng.sample(range(len(around) + count), count))
        sides = []
        for side in ([p.harm for p in found], [p.safe for p in found]):
            tags = list(around)
            for place, words in zip(places, side, strict=True):
                tags.insert(place, words)
            sides.append(", ".join(tags))
        return Core(sides[0], sides[1], around[0])


def people(rng: random.Random) -> Iterator[str]:
    """Adults by what they look like, do for a living, or by an invented name; also beings of tales."""
    words, styles, scenery = load_data("words/clean"), load_data("words/styles"), Scenery(rng)
    beings = deck([*words["people"], *(f for f in words["figures"] if f.startswith(("a ", "an ")))], rng)
    while True:
        chance = rng.random()
        if chance < 0.35:
            yield scenery.subject()[1]
        elif chance < 0.8:
            yield next(beings)
        else:
            yield f"{rng.choice(styles['given_names'])} {rng.choice(styles['family_names'])}"
