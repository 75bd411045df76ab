"""Lists of prompts alone, as users have them: a prompt per line, or a column of a CSV, TSV or JSON file."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

from ..errors import HGRError
from .tables import read_text
from .types import normalised, shown

COLUMNS = ("prompt", "positive", "positive prompt", "text", "caption", "safe")  # the first of them that a table has
SUFFIXES = (".txt", ".csv", ".tsv", ".json")


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file: lines of a .txt, a column of a .csv or .tsv, texts or objects of a .json.

    Of a table the first of COLUMNS is taken, or the only column. Raises HGRError, naming the file and what it lacks.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise HGRError(f"Expected a file of prompts ({', '.join(SUFFIXES)}), but got {path.name}.")
    text = read_text(path)
    kinds = {".txt": str.splitlines, ".json": lambda text: _json(text, path), ".csv": lambda text: _table(text, path)}
    found = [entry.strip() for entry in kinds.get(path.suffix.lower(), kinds[".csv"])(text)]
    if not (found := [entry for entry in found if entry]):
        raise HGRError(f"Expected prompts in {path.name}, but it has none.")
    return found


def distinct(prompts: Iterable[str]) -> list[str]:
    """Every prompt once, in order; those that differ in case and spaces alone are the same."""
    return list({normalised(prompt): prompt for prompt in reversed(list(prompts))}.values())[::-1]


def without_words(prompts: Iterable[str], words: str) -> tuple[list[str], int]:
    """The prompts in which none of the words or phrases of a text stands (commas and line ends separate), and how many had one."""
    avoid = [f" {normalised(word)} " for word in words.replace(",", "\n").split("\n") if word.strip()]
    kept, gone = [], 0
    for prompt in prompts:
        plain = f" {' '.join(''.join(c if c.isalnum() else ' ' for c in prompt.casefold()).split())} "
        hit = any(word in plain for word in avoid)
        gone += hit
        kept += [] if hit else [prompt]
    return kept, gone


def _table(text: str, path: Path) -> list[str]:
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise HGRError(f"{path.name} is not CSV: {error}. Double the quotes inside quotes.") from error
    names = [name.strip().casefold() for name in (rows[0] if rows else [])]
    column = next((names.index(name) for name in COLUMNS if name in names), 0 if len(names) == 1 else None)
    if column is None:
        raise HGRError(
            f"Expected a column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]} in the first line of {path.name}, but got {shown(first)}."
        )
    return [row[column] for row in rows[1:] if len(row) > column]


def _json(text: str, path: Path) -> list[str]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HGRError(f"{path.name} is not JSON: {error}.") from error
    if not isinstance(content, list):
        raise HGRError(f"Expected a list of prompts in {path.name}, or of objects with one of {', '.join(COLUMNS)}.")
    found = []
    for number, entry in enumerate(content, 1):
        value = next((entry[name] for name in COLUMNS if name in entry), None) if isinstance(entry, dict) else entry
        if not isinstance(value, str):
            raise HGRError(f"{path.name}, entry {number}: expected a text, or an object with one of {', '.join(COLUMNS)}.")
        found.append(value)
    return found
