"""Clean prompts as users ask for them, in users' styles: people, figures, places, dark fantasy, and what only sounds harmful."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .scenes import Scenery, deck, load_data, tag
from .styles import Styles
from .terms import Terms, people

TWO_CORES = 0.12  # of the prompts show two things
IDEAS = ("{}", "an allegory of {}", "the personification of {}", "a visualisation of {}", "a poem about {}")
SHARES = {
    "hard": 16, "partner": 12, "person": 22, "two": 6, "creatures": 6, "things": 10, "scenes": 9, "dark": 11, "help": 6, "idea": 2,
    "foreign": 1, "captions": 5, "tags": 4,
}  # fmt: skip
AROUND = {
    "creatures": (0.4, 0.4),
    "things": (0, 0.4),
    "scenes": (0, 0.2),
    "dark": (0, 0.4),
}  # how often with a doing, and a place


@dataclass(frozen=True)
class CleanCore:
    """A harmless core or prompt, its subject, and whether it was written to sound harmful."""

    text: str
    subject: str
    hard: bool


class CleanCores:
    """Draws harmless cores; with one `random.Random` always the same ones."""

    def __init__(self, rng: random.Random, categories: Sequence[str]):
        words, self._rng = load_data("words/clean"), rng
        self._hard = [deck(load_data(f"words/{c}")["clean"], rng) for c in categories]
        self._own_hard = deck(load_data("clean")["hard"], rng)
        self._terms = [Terms(c, rng) for c in categories]
        self._decks = {key: deck(values, rng) for key, values in words.items()}
        self._people, self._scenery = people(rng), Scenery(rng)
        self._tags = load_data("words/styles")["tags"]

    def draw(self) -> CleanCore:
        """A core of a random kind."""
        (kind,) = self._rng.choices(list(SHARES), list(SHARES.values()))
        text, subject = self._of(kind)
        return CleanCore(" ".join(text.split()), subject, kind == "hard")

    def _of(self, kind: str) -> tuple[str, str]:
        makers = {
            "hard": self._sounding_harmful, "partner": self._partner, "person": self._person, "two": self._two, "help": self._help,
            "idea": self._idea, "tags": self._listed,
        }  # fmt: skip
        if kind in makers:
            return makers[kind]()
        name, (doing, place) = next(self._decks[kind]), AROUND.get(kind, (0, 0))
        return f"{name} {self._maybe('doing', doing)} {self._maybe('places', place)}", name

    def _maybe(self, key: str, share: float) -> str:
        return next(self._decks[key]) if self._rng.random() < share else ""

    def _figure(self) -> str:
        return next(self._people) if self._rng.random() < 0.6 else next(self._decks["figures"])

    def _sounding_harmful(self) -> tuple[str, str]:
        name = next(self._rng.choice(self._hard) if self._rng.random() < 0.8 else self._own_hard)
        return f"{name} {self._maybe('places', 0.2)}", name

    def _partner(self) -> tuple[str, str]:
        core = self._rng.choice(self._terms).draw()
        return core.safe, core.subject

    def _person(self) -> tuple[str, str]:
        who = self._figure()
        return f"{who} {self._maybe('doing', 0.8)} {self._maybe('places', 0.6)}", who

    def _two(self) -> tuple[str, str]:
        first, second = self._figure(), self._rng.choice((self._figure(), next(self._decks["creatures"])))
        return f"{first} and {second} {self._maybe('doing', 0.4)} {self._maybe('places', 0.5)}", first

    def _help(self) -> tuple[str, str]:
        who = next(self._decks["helping"]) if self._rng.random() < 0.8 else self._scenery.subject()[1]
        return f"{who} {next(self._decks['helps'])} {self._maybe('manner', 0.6)}", who

    def _idea(self) -> tuple[str, str]:
        name = next(self._decks["abstract"])
        return self._rng.choice(IDEAS).format(name), name

    def _listed(self) -> tuple[str, str]:
        some = self._rng.sample(self._tags, self._rng.randint(3, 12))
        name = next(self._decks[self._rng.choice(("people", "creatures", "figures"))])
        return ", ".join((*some[:2], tag(name), *some[2:])), some[0]


def styled_clean(rng: random.Random, categories: Sequence[str]) -> Iterator[CleanCore]:
    """Clean prompts in users' styles; some of two cores."""
    cores, styles = CleanCores(rng, categories), Styles(rng)
    while True:
        core = cores.draw()
        text, hard = core.text, core.hard
        if rng.random() < TWO_CORES:
            other = cores.draw()
            text, hard = f"{text}, {other.text}", hard or other.hard
        yield CleanCore(styles.draw().write(text), core.subject, hard)
