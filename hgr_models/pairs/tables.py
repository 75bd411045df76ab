"""Rows of CSV and JSON files of prompts, each with its place in the file."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import HGRError
from .types import shown

COLUMNS = ("harmful", "safe", "category", "removed", "subject")
LISTS = ("category", "removed")  # several separated by |

# A place ("line 3") and the row with every column, or the reason why there is none.
Row = tuple[str, dict | HGRError]


def csv_rows(path: Path) -> tuple[list[Row], set[str]]:
    """The rows, and the names of columns that nothing uses. Raises HGRError for a file that is not CSV with our columns."""
    text = read_text(path)
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)  # spreadsheets of some countries write semicolons
    # newline="": line breaks inside quotes belong to the prompt.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip().lower() for name in next(reader, [])]
        if not {"harmful", "safe"} <= set(names) or len(set(names)) < len(names):
            wanted = f"harmful and safe, and if wanted {', '.join(COLUMNS[2:])}, each once"
            raise HGRError(f"Expected the columns {wanted}, in the first line of {path.name}, but got {shown(first)}.")
        return list(_csv_rows(reader, names)), set(names) - set(COLUMNS)
    except csv.Error as error:
        raise HGRError(
            f"{path.name} is not CSV near line {reader.line_num}: {error}. Double the quotes inside quotes."
        ) from error


def _csv_rows(reader: Any, names: list[str]) -> Iterator[Row]:
    start = reader.line_num + 1
    for cells in reader:
        place, start = f"line {start}", reader.line_num + 1
        if len(cells) > len(names):
            hint = "put a prompt with commas into double quotes"
            yield place, HGRError(f"expected {len(names)} cells, but got {len(cells)}: {shown(cells[0])} and so on; {hint}")
        elif any(cell.strip() for cell in cells):
            given = dict(zip(names, (cell.strip() for cell in cells), strict=False))
            row = {name: given.get(name, "") for name in COLUMNS}
            yield place, {**row, **{name: _names(row[name]) for name in LISTS}}


def json_rows(path: Path) -> tuple[list[Row], set[str]]:
    """The rows, and the keys that nothing uses. Raises HGRError for a file that is not JSON with lists of prompts."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise HGRError(f"{path.name} is not JSON: {error}.") from error
    content = {"pairs": content} if isinstance(content, list) else content
    if not isinstance(content, dict) or not all(isinstance(content.get(key, []), list) for key in ("pairs", "clean")):
        raise HGRError(f'Expected a list of pairs in {path.name}, or an object with lists as "pairs" and "clean".')
    pairs, clean = content.get("pairs", []), content.get("clean", [])
    rows = [(f"entry {i}", _json_row(entry)) for i, entry in enumerate(pairs, 1)]
    rows += [(f"entry {i} of clean", _json_row({"safe": prompt})) for i, prompt in enumerate(clean, 1)]
    keys = {key for entry in (*pairs, content) if isinstance(entry, dict) for key in entry}
    return rows, keys - {*COLUMNS, "pairs", "clean"}


def _json_row(entry: object) -> dict | HGRError:
    if not isinstance(entry, dict):
        return HGRError(f"expected an object with harmful and safe, but got {shown(json.dumps(entry))}")
    row: dict = {}
    for name in COLUMNS:
        value = entry.get(name)
        value = "" if value is None else value
        if name in LISTS and isinstance(value, list) and all(isinstance(v, str) for v in value):
            row[name] = value
        elif isinstance(value, str):
            row[name] = _names(value) if name in LISTS else value.strip()
        else:
            return HGRError(f"expected a text as {name}, but got {shown(json.dumps(value))}")
    return row


def _names(text: str) -> list[str]:
    return [name for name in text.split("|") if name.strip()]


def read_text(path: Path) -> str:
    """A file's text. Raises HGRError for one that is not UTF-8, or cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise HGRError(f"{path.name} is not UTF-8 text (byte {error.start}). Save it with the encoding UTF-8.") from error
    except OSError as error:
        raise HGRError(f"{path.name} cannot be read: {error.strerror}.") from error
