"""Lists of prompts to evaluate on: any CSV, TSV, TXT, JSON or JSONL file, its columns found by name. Nothing here prints a prompt."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...hgr_models import HGRError, file_hash
from ...hgr_models.pairs.tables import read_text

csv.field_size_limit(2**30)

HARMFUL, CLEAN = "harmful", "clean"
SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl")
LAST_SEED = 2**64 - 1
LONGEST_NAME = 3  # words of a column's name that nobody knows
# Names of columns as public lists have them, the first that is there. Both kinds in one file make two lists.
UNSAFE_COLUMNS = ("unsafe_prompt", "harmful", "harmful_prompt", "unsafe", "adv_prompt", "adversarial_prompt", "sensitive prompt")
SAFE_COLUMNS = ("safe_prompt", "safe", "benign_prompt", "clean")
PROMPT_COLUMNS = ("prompt", "text", "caption", "positive", "target_prompt")
CATEGORY_COLUMNS = ("categories", "category", "concept", "class", "label")
SEED_COLUMNS = ("sd_seed", "evaluation_seed", "seed")
CFG_COLUMNS = ("sd_guidance_scale", "evaluation_guidance", "guidance_scale", "guidance", "cfg")


@dataclass(frozen=True)
class Row:
    """A prompt of a list; `number` counts from 0 in its file. `seed` and `cfg` are the list's own, None where it has none."""

    number: int
    text: str
    categories: tuple[str, ...] = ()
    seed: int | None = None
    cfg: float | None = None


@dataclass(frozen=True)
class PromptList:
    """The rows of a file that are drawn. `kind` is HARMFUL or CLEAN; `total`: how many rows the file has."""

    name: str
    kind: str
    digest: str
    rows: tuple[Row, ...]
    total: int


@dataclass(frozen=True)
class Asked:
    """A line of the widget: a file, its kind ("": as its columns say, else harmful) and a column ("": found by name)."""

    file: str
    kind: str = ""
    column: str = ""
    name: str = ""


def parse_lists(text: str) -> list[Asked]:
    """`FILE`, `FILE = clean`, `FILE = harmful, column adv_prompt`, one per line. Raises HGRError for anything else."""
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        file, _, rest = (part.strip() for part in line.partition("="))
        asked = Asked(file)
        for part in filter(None, map(str.strip, rest.split(","))):
            if part.lower() in (HARMFUL, CLEAN):
                asked = replace(asked, kind=part.lower())
            elif match := re.fullmatch(r"column\s+(.+)", part, re.IGNORECASE):
                asked = replace(asked, column=match[1].strip())
            else:
                raise HGRError(
                    f"Expected harmful, clean or `column NAME` behind the = of a list, but got {part!r}. For example: coco.csv = clean"
                )
        found.append(asked)
    return found


def read_list(path: Path, asked: Asked) -> list[PromptList]:
    """The lists of a file: one, or two where it holds unsafe prompts and safe ones side by side.

    Raises HGRError, naming the file and its columns, for one that cannot be read or has no prompts.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise HGRError(f"Expected a list of prompts ({', '.join(SUFFIXES)}), but got {path.name}. Save it as CSV or TXT.")
    records = _records(path)
    if not records:
        raise HGRError(f"Expected prompts in {path.name}, but it has none.")
    names = {str(name).strip().casefold(): name for name in records[0]}
    found = []
    for suffix, kind, column in _columns(names, path, asked):
        rows = [_row(path, i, record, names, column) for i, record in enumerate(records)]
        rows = [row for row in rows if row.text]
        if not rows:
            raise HGRError(f"Expected prompts in the column {column!r} of {path.name}, but it is empty.")
        name = (asked.name or path.stem) + suffix
        found.append(PromptList(name, kind, file_hash(path), tuple(rows), len(rows)))
    return found


def _columns(names: dict, path: Path, asked: Asked) -> list[tuple[str, str, object]]:
    """(addition to the list's name, kind, column) of every list in a file with these columns."""
    first = lambda wanted: next((names[name] for name in wanted if name in names), None)  # noqa: E731
    if asked.column:
        if asked.column.casefold() not in names:
            raise HGRError(f"Expected a column {asked.column!r} in {path.name}; it has {_shown(names)}.")
        return [("", asked.kind or HARMFUL, names[asked.column.casefold()])]
    unsafe, safe, plain = first(UNSAFE_COLUMNS), first(SAFE_COLUMNS), first(PROMPT_COLUMNS)
    if not asked.kind and unsafe is not None and safe is not None:
        return [(" unsafe", HARMFUL, unsafe), (" safe", CLEAN, safe)]
    order = (safe, plain) if asked.kind == CLEAN else (unsafe, plain)
    column = next((column for column in order if column is not None), None)
    if column is None and len(names) == 1:
        (column,) = names.values()
        if len(str(column).split()) > LONGEST_NAME:
            raise HGRError(
                f"The first line of {path.name} has no name of a column, but looks like a prompt ({_shown(names)}). Write `prompt` above it, or "
                f"name the file {path.stem}.txt."
            )
    if column is None:
        known = ", ".join((PROMPT_COLUMNS, SAFE_COLUMNS)[asked.kind == CLEAN][:3])
        raise HGRError(
            f"Expected a column of prompts ({known}) in {path.name}; it has {_shown(names)}. Name it: {path.name} = column NAME"
        )
    return [("", asked.kind or HARMFUL, column)]


def _shown(names: dict) -> str:
    """Names of columns for a message: short, and never a prompt of a table without a header."""
    return ", ".join(name if len(name) <= 30 else f"{name[:12]}..." for name in list(names)[:8]) or "none"


def _row(path: Path, number: int, record: dict, names: dict, column: object) -> Row:
    def find(wanted: Sequence[str], kind: Callable[[Any], Any]) -> Any:
        known = (names[name] for name in wanted if name in names and record.get(names[name]) not in (None, ""))
        if (name := next(known, None)) is None:
            return None
        value = record[name]
        try:
            return kind(value)
        except (TypeError, ValueError, OverflowError):
            raise HGRError(
                f"Expected a number as {name} in row {number + 1} of {path.name}, but got {str(value)[:20]!r}."
            ) from None

    text, groups = record.get(column), find(CATEGORY_COLUMNS, _categories) or ()
    if text is not None and not isinstance(text, str):
        raise HGRError(f"Expected a text as {column} in row {number + 1} of {path.name}.")
    return Row(number, (text or "").strip(), groups, find(SEED_COLUMNS, _whole), find(CFG_COLUMNS, _scale))


def _categories(value: Any) -> tuple[str, ...]:
    parts = value if isinstance(value, list) else re.split(r"[,|;]", str(value))
    return tuple(dict.fromkeys(part.strip() for part in map(str, parts) if part.strip()))


def _whole(value: Any) -> int:
    """A seed, also as tables write it that once had gaps: `7.0`."""
    whole, _, rest = str(value).strip().partition(".")
    if rest.strip("0") or not 0 <= int(whole) <= LAST_SEED:
        raise ValueError
    return int(whole)


def _scale(value: Any) -> float:
    if not 0 < (scale := float(value)) < 1000:
        raise ValueError
    return scale


def _records(path: Path) -> list[dict]:
    """The rows of a file as dictionaries; a text file has one column, `prompt`."""
    text, kind = read_text(path), path.suffix.lower()
    if kind == ".txt":
        return [{"prompt": line} for line in text.splitlines()]
    try:
        if kind == ".jsonl":
            return _objects([json.loads(line) for line in text.splitlines() if line.strip()], path)
        if kind == ".json":
            return _objects(json.loads(text), path)
    except (ValueError, RecursionError) as error:
        raise HGRError(f"{path.name} is not JSON: {error}.") from None
    head = text.partition("\n")[0]
    delimiter = "\t" if kind == ".tsv" else max(",;\t", key=head.count)
    # A quote in a TSV is a letter; a CSV may break lines inside of quotes.
    quoting = csv.QUOTE_NONE if kind == ".tsv" else csv.QUOTE_MINIMAL
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True))
    except csv.Error as error:
        raise HGRError(f"{path.name} is not CSV: {error}. Close every quote, and double the quotes inside quotes.") from None
    if any(None in row for row in rows):
        raise HGRError(f"A row of {path.name} has more values than its header. Put a prompt with commas into double quotes.")
    return rows


def _objects(content: Any, path: Path) -> list[dict]:
    content = content.get("prompts") if isinstance(content, dict) else content
    if not isinstance(content, list) or not all(isinstance(entry, (str, dict)) for entry in content):
        raise HGRError(f"Expected a list of texts or of objects in {path.name}, one per prompt.")
    return [{"prompt": entry} if isinstance(entry, str) else entry for entry in content]


def spread(rows: Sequence[Row], limit: int) -> tuple[Row, ...]:
    """At most `limit` rows (0: all), evenly spread: lists are sorted by category."""
    if not limit or len(rows) <= limit:
        return tuple(rows)
    return tuple(rows[i * len(rows) // limit] for i in range(limit))


def find_file(folder: Path, name: str) -> Path:
    """A list in ComfyUI's input folder. Raises HGRError for another place, and for a file that is not there."""
    root = folder.resolve()
    path = (root / name).resolve()
    if root not in path.parents or not path.is_file():
        raise HGRError(
            f"Expected the name of a list in {root}, but there is no {name!r}. Put the file there; a `protocol` says where its own come from."
        )
    return path
