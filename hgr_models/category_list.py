"""The one grammar of category lists, in every node that has one: `sexual, hate = 0.5, violence = off`, `all = off, drugs`.

A name stands for itself or for `name = on`; a value is on, off or a number from 0 to 1; `all` means the categories that are not named.
Upper and lower case, spaces, `_` and `-` are the same; commas, semicolons and new lines separate.
"""

import re
from collections.abc import Sequence

from .errors import HGRError

ALL, WORDS = "all", {"on": 1.0, "off": 0.0}


def parse_list(text: str, categories: Sequence[str], whose: str = "this HGR has") -> dict[str, float]:
    """What a text says: strengths in [0, 1] by the names of `categories`, and under `all` what it says of the others.

    Raises HGRError for an unknown category (`whose` introduces those that there are), one named twice, or a value outside [0, 1].
    """
    known = {_plain(name): name for name in (ALL, *categories)}
    said: dict[str, float] = {}
    for entry in re.split(r"[,;\n]", text):
        if not entry.strip():
            continue
        name, sign, value = (part.strip() for part in re.fullmatch(r"([^=:]*)([=:]?)(.*)", entry.strip(), re.S).groups())
        if not sign and _plain(name) not in known:  # `violence off`
            name, _, value = name.rpartition(" ") if name.casefold().endswith((" on", " off")) else (name, "", "")
        if (found := known.get(_plain(name))) is None:
            raise HGRError(f"Unknown category {name!r} in {text!r}: {whose} {', '.join(categories)}.")
        if found in said:
            raise HGRError(f"Category {found!r} is named twice in {text!r}; name it once.")
        said[found] = _strength(value, found) if sign or value else 1.0
    return said


def strengths(text: str, categories: Sequence[str], strength: float = 1.0) -> tuple[float, ...]:
    """Strengths (K,) times `strength`: categories that are not named stay on, unless `all` says otherwise."""
    said = parse_list(text, categories)
    return tuple(said.get(name, said.get(ALL, 1.0)) * strength for name in categories)


def chosen(text: str, categories: Sequence[str], whose: str = "these prompts have") -> tuple[str, ...]:
    """The categories that a text keeps, in order: those named as on; all others where it only names some as off; all for no text."""
    said = parse_list(text, categories, whose)
    others = said.get(ALL, 0.0 if any(said.values()) else 1.0)
    return tuple(name for name in categories if said.get(name, others) > 0)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "-", name.strip()).casefold()


def _strength(value: str, name: str) -> float:
    try:
        number = WORDS.get(value.casefold())
        number = float(value) if number is None else number
    except ValueError:
        number = float("nan")
    if not 0 <= number <= 1:
        raise HGRError(f"Expected `{name} = ` on, off or a number from 0 to 1, but got {value!r}.")
    return number
