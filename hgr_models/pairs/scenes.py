"""Composed prompts: subject x harm x scene x style. A pair's two prompts share all but the harm."""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"


@cache
def load_data(name: str) -> dict:
    """A file of `hgr_models/data`."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Phrase:
    """A harm and what stands in its place; `where` is indoor, outdoor or anywhere (None)."""

    harm: str
    safe: str
    where: str | None = None


@dataclass(frozen=True)
class Words:
    """What one prompt says: who, doing what, with which detail around (either may be empty), and where."""

    who: str
    doing: str
    detail: str
    place: str


def deck(cards: Sequence, rng: random.Random) -> Iterator:
    """Endless draws in which every card comes once before any comes again."""
    while True:
        yield from rng.sample(cards, len(cards))


def tag(phrase: str) -> str:
    """A phrase as tag lists write it: without articles and without the word that joins it to a sentence."""
    phrase = re.sub(r"^(with|in front of|in the shade of|in|on|at|under|beside) ", "", phrase)
    return re.sub(r"\b(a|an|the) ", "", phrase)


def _join(*parts: str, by: str = " ") -> str:
    return by.join(part for part in parts if part)


@dataclass(frozen=True)
class Style:
    """Everything a prompt and its partners share beside the scene: the form, and the words of style it may use."""

    form: Callable[[Words, "Style"], str]
    look: str
    finishes: tuple[str, ...]
    remarks: tuple[str, ...]

    def write(self, words: Words) -> str:
        return self.form(words, self)


def _sentence(words: Words) -> str:
    return _join(_join(words.who, words.doing, words.place), words.detail, by=", ")


def _short(words: Words, style: Style) -> str:
    return _join(_join(words.who, words.doing), words.detail, by=", ")


def _plain(words: Words, style: Style) -> str:
    return _sentence(words)


def _styled(words: Words, style: Style) -> str:
    return f"{style.look} {_sentence(words)}"


def _finished(words: Words, style: Style) -> str:
    return _join(_sentence(words), *style.finishes[:2], by=", ")


def story(words: Words, style: Style) -> str:
    """The one form with a verb: in a kitchen, a chef is doing something."""
    text = _join(f"{words.place}, {words.who} is {words.doing}", words.detail, by=", ")
    return f"{text[0].upper()}{text[1:]}."


def _long(words: Words, style: Style) -> str:
    text = f"{style.look} {_sentence(words)}. {' '.join(style.remarks)}"
    return text[0].upper() + text[1:]


def _tags(words: Words, style: Style) -> str:
    scene = map(tag, (words.who, words.doing, words.detail, words.place))
    return _join(*scene, *style.finishes[:2], by=", ")


def _many_tags(words: Words, style: Style) -> str:
    return f"masterpiece, best quality, {_tags(words, style)}, {', '.join(style.finishes[2:])}"


# Short ones appear once, sentences and tag lists, as users type them, more often.
FORMS = (_short, _plain, _styled, _styled, _finished, _finished, story, _long, _tags, _tags, _many_tags)


class Scenery:
    """Draws subjects, places and styles; with one `random.Random` always the same ones."""

    def __init__(self, rng: random.Random):
        words = load_data("scenery")
        self._rng = rng
        self._subjects = deck([(s["name"], s["text"]) for s in words["subjects"]], rng)
        self._places = {k: deck(words[k], rng) for k in ("indoor", "outdoor")}
        self._neutral = deck(words["neutral"], rng)
        self._looks, self._remarks = deck(words["styles"], rng), deck(words["remarks"], rng)
        self._finishes, self._forms = words["finishes"], deck(FORMS, rng)

    def subject(self) -> tuple[str, str]:
        """Its name, by which the held-out split goes, and its words."""
        return next(self._subjects)

    def place(self, where: str | None) -> str:
        return next(self._places[where or self._rng.choice(("indoor", "outdoor"))])

    def neutral(self) -> Phrase:
        """Something harmless to do, the same on both sides."""
        doing = next(self._neutral)
        return Phrase(doing, doing)

    def style(self) -> Style:
        remarks = next(self._remarks), next(self._remarks)
        return Style(next(self._forms), next(self._looks), tuple(self._rng.sample(self._finishes, 5)), remarks)
