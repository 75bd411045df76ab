"""How users write a prompt around what it shows: mediums, artists, comma lists, weights, tags, typing errors.

A style is drawn once and then written around a harmful core and its safe partner alike, and around clean cores: a style says
nothing about harm.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from .scenes import load_data, tag

ARTISTS = 0.7  # of the prompts in a form that takes them name artists
MISSPELT = 0.05  # of all prompts: some words in them
NOISE = 0.04  # of all prompts: syllables that mean nothing among the words
LEET = str.maketrans({"a": "4", "e": "3", "i": "1", "o": "0", "s": "5"})
SYLLABLES = "ba ce di fo gu ha ki lo mu ne pra qui ro sta tu ver wo xi yo zan tle ing ment ion ust ard eek oon ish".split()


@dataclass(frozen=True)
class UserStyle:
    """What is written around a core; `seed` fixes the random choices that depend on the core's length."""

    form: Callable[[str, "UserStyle"], str]
    medium: str
    finishes: tuple[str, ...]
    artists: str
    weight: float
    misspelt: bool
    noise: bool
    seed: int

    def write(self, core: str) -> str:
        """The prompt around a core such as `a man reading a book in Paris`."""
        rng = random.Random(self.seed)
        if self.misspelt:
            core = misspell(core, rng)
        text = self.form(core, self)
        return _noisy(text, rng) if self.noise else text


def misspell(text: str, rng: random.Random) -> str:
    """A text with one or two of its longer words written as those do who hide a word, or type fast."""
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    for i in rng.sample(places, min(len(places), rng.randint(1, 2))):
        words[i] = rng.choice((_leet, _swapped, _doubled, _dropped, _split))(words[i], rng)
    return " ".join(words)


def _leet(word: str, rng: random.Random) -> str:
    return word.translate(LEET)


def _swapped(word: str, rng: random.Random) -> str:
    i = rng.randint(1, len(word) - 2)
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def _doubled(word: str, rng: random.Random) -> str:
    i = rng.randint(1, len(word) - 1)
    return word[:i] + word[i - 1] + word[i:]


def _dropped(word: str, rng: random.Random) -> str:
    i = rng.randint(1, len(word) - 1)
    return word[:i] + word[i + 1 :]


def _split(word: str, rng: random.Random) -> str:
    return rng.choice(("-", ".", "_")).join(word)


def _noisy(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    for _ in range(rng.randint(2, 8)):
        words.insert(rng.randint(0, len(words)), "".join(rng.sample(SYLLABLES, rng.randint(1, 3))))
    return " ".join(words)


def _plain(core: str, style: UserStyle) -> str:
    return core


def _sentence(core: str, style: UserStyle) -> str:
    return f"{core[0].upper()}{core[1:]}."


def _medium(core: str, style: UserStyle) -> str:
    return f"{style.medium} {core}"


def _list(core: str, style: UserStyle) -> str:
    return ", ".join((core, *style.finishes, *filter(None, (style.artists,))))


def _medium_list(core: str, style: UserStyle) -> str:
    return _list(_medium(core, style), style)


def _leading(core: str, style: UserStyle) -> str:
    half = len(style.finishes) // 2
    return ", ".join((*style.finishes[:half], tag(core), *style.finishes[half:]))


def _artist_first(core: str, style: UserStyle) -> str:
    return ", ".join(filter(None, (_medium(core, style), style.artists, *style.finishes[:3])))


def _weighted(core: str, style: UserStyle) -> str:
    return f"({core}:{style.weight:.1f}), {', '.join(style.finishes)}"


def _weighted_finish(core: str, style: UserStyle) -> str:
    return f"{core}, ({style.finishes[0]}:{style.weight:.1f}), {', '.join(style.finishes[1:])}"


def _spaced(core: str, style: UserStyle) -> str:
    return " ".join((core, *style.finishes[:4])).replace(",", "")


def _piped(core: str, style: UserStyle) -> str:
    return " | ".join((_medium(core, style), *style.finishes[:5]))


def _asked(core: str, style: UserStyle) -> str:
    asks = ("draw {}", "show me {}", "I want to see {}", "imagine {}", "make a picture of {}", "can you paint {}?", "{} please")
    return asks[style.seed % len(asks)].format(core)


FORMS: tuple[tuple[Callable[[str, UserStyle], str], int], ...] = (
    (_plain, 14), (_sentence, 7), (_medium, 8), (_list, 24), (_medium_list, 26), (_leading, 7), (_artist_first, 12), (_weighted, 3),
    (_weighted_finish, 4), (_spaced, 4), (_piped, 2), (_asked, 3),
)  # fmt: skip


class Styles:
    """Draws styles; with one `random.Random` always the same ones."""

    def __init__(self, rng: random.Random):
        self._rng, self._words = rng, load_data("words/styles")

    def draw(self) -> UserStyle:
        rng, words = self._rng, self._words
        (form,) = rng.choices([form for form, _ in FORMS], [share for _, share in FORMS])
        count = min(len(words["finishes"]), 1 + int(rng.expovariate(1 / 6)))
        finishes = tuple(rng.sample(words["finishes"], min(max(2, count), 20)))
        artists = self._artists() if rng.random() < ARTISTS else ""
        medium = rng.choice(words["mediums"])
        chance = rng.random()
        return UserStyle(
            form, medium, finishes, artists, rng.uniform(0.7, 1.5), chance < MISSPELT, chance > 1 - NOISE, rng.getrandbits(32)
        )

    def _artists(self) -> str:
        """Names as users join them."""
        rng = self._rng
        names = rng.sample(self._words["artists"], rng.choices((1, 2, 3, 4), (5, 3, 3, 1))[0])
        start = rng.choice(("by", "by", "art by", "art by", "in the style of", "painted by", "style of"))
        return f"{start} {rng.choice((' and ', ' and ', ', ')).join(names)}"
