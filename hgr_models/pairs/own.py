"""The user's own pairs: a text with one pair per line, and the rows of a file."""

import re
from pathlib import Path
from re import compile as pattern

from ..errors import HGRError
from .build import Clean, Material, Sourced, problem_list
from .tables import csv_rows, json_rows
from .types import PromptPair, listed, normalised, shown

ARROW = "=>"
SEPARATORS = ",;=|\n"  # of lists of categories, here and in SafeCFG Apply
LONGEST_NAME = 60


def category_name(text: str) -> str:
    """A category's name in lower case. Raises HGRError for an empty or too long one, and for characters that separate lists."""
    name = text.strip().lower()
    if not name or len(name) > LONGEST_NAME or any(c in name for c in SEPARATORS):
        raise HGRError(f"expected a category name of 1 to {LONGEST_NAME} characters without , ; = or |, but got {shown(text)}")
    return name


# `weapons: a knife => a spoon`: one or two words before a colon and a space. Prompts begin with an article, or run on longer.
NAMED = pattern(r"(?!(?:an?|the)\s)([^\W_][\w-]*(?: [\w-]+)?(?:\|[^\W_][\w-]*(?: [\w-]+)?)*):\s+(.*)", re.IGNORECASE | re.DOTALL)


def named_categories(text: str, category: str) -> tuple[list[str], str]:
    """The categories that a line names before a colon (several separated by |), and the rest; else `category` and the whole."""
    found = NAMED.fullmatch(text)
    return (found[1].split("|"), found[2]) if found else ([category], text)


def parse_own(text: str, category: str) -> Material:
    """The pairs of a text of lines `harmful => safe` of one category, or `name: harmful => safe` of another.

    Empty lines and those that begin with # are left out.
    Raises HGRError with the number of every line that is something else.
    """
    found, problems = Material(), []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        harmful, *safe = (side.strip() for side in line.split(ARROW))
        try:
            if len(safe) != 1:
                raise HGRError(f"expected one `{ARROW}`, as in `harmful {ARROW} safe`, but got {shown(line.strip())}")
            names, harmful = named_categories(harmful, category)
            row = {"harmful": harmful, "safe": safe[0], "category": names}
            found.pairs.append(Sourced(_pair(row), f"line {number} of the own pairs"))
        except HGRError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise HGRError(problem_list("Lines of the own pairs cannot be used:", problems))
    return found


def read_file(path: str | Path, category: str) -> Material:
    """The pairs and clean prompts of a CSV or JSON file; rows without a category get the one given here.

    CSV: the columns harmful and safe, and if wanted category (several separated by |), removed (what the safe prompt lacks of
    them; all of them without it) and subject. A row with a safe prompt alone is a clean prompt. JSON: a list of objects with
    the same keys (lists for several categories), or an object with such a list as "pairs" and a list of texts as "clean".
    Raises HGRError for a file of another kind, and with the number of every line that cannot be used.
    """
    path = Path(path)
    rows, unused = (json_rows if path.suffix.lower() == ".json" else csv_rows)(path)
    found, problems = Material(), []
    for place, row in rows:
        try:
            if isinstance(row, HGRError):
                raise row
            if row["harmful"]:
                pair = _pair({**row, "category": row["category"] or [category]})
                found.pairs.append(Sourced(pair, f"{path.name}, {place}"))
            else:
                found.clean.append(_clean(row))
        except HGRError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise HGRError(problem_list(f"Entries of {path.name} cannot be used:", problems))
    if not found.pairs and not found.clean:
        raise HGRError(f"Expected prompts in {path.name}, but it has none.")
    if unused:
        found.notes.append(f"{path.name} has {listed(unused)}, which nothing uses")
    return found


def _pair(row: dict) -> PromptPair:
    if not row["harmful"] or not row["safe"]:
        raise HGRError(f"expected a harmful and a safe prompt, but got {shown(row['harmful'])} and {shown(row['safe'])}")
    harms = frozenset(map(category_name, row["category"]))
    removed = frozenset(map(category_name, row.get("removed") or harms))
    # Without a subject of their own, pairs with the same partner are of one subject.
    return PromptPair(row["harmful"], row["safe"], harms, removed, row.get("subject") or normalised(row["safe"]))


def _clean(row: dict) -> Clean:
    if not row["safe"] or row["category"] or row["removed"]:
        given = ", ".join(f"{name} {shown(str(value))}" for name, value in row.items() if value)
        raise HGRError(f"expected harmful and safe, or a clean prompt as safe and no category, but got {given or 'nothing'}")
    return Clean(row["safe"], row["subject"] or normalised(row["safe"]))
