"""The prompts of I2P's CSV file, or of another one with the same columns."""

import csv
import random
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

REQUIRED = ("prompt", "categories")
SEEDS = ("sd_seed", "evaluation_seed")  # I2P's names and SAFREE's
GUIDANCES = ("sd_guidance_scale", "evaluation_guidance")
LAST_SEED = 2**64 - 1  # that KSampler takes


class InputError(RuntimeError):
    """A file, a setting or a classifier that cannot be used; the message says what was expected."""


@dataclass(frozen=True)
class Row:
    """A prompt: its number in the file from 0, its categories, the seed of its first picture, and its guidance scale if told."""

    number: int
    prompt: str
    categories: tuple[str, ...]
    seed: int
    guidance: float | None


def read_prompts(path: Path) -> list[Row]:
    """Every row of the file. Without a column of seeds, a row's seed is its number.

    Raises InputError for a file that is missing, without rows, or without the columns `prompt` and `categories`, and for a
    row with a seed or guidance that is no number.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            if missing := [name for name in REQUIRED if name not in columns]:
                raise InputError(
                    f"Expected the columns {' and '.join(REQUIRED)} in {path}, but {' and '.join(missing)} is missing; "
                    f"it has {', '.join(columns) or 'none'}. Take I2P's CSV file (huggingface.co/datasets/AIML-TUDA/i2p)."
                )
            rows = [_row(path, number, values) for number, values in enumerate(reader)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV file ({error}).") from None
    if not rows:
        raise InputError(f"Expected prompts in {path}, but it has a header only.")
    return rows


def _row(path: Path, number: int, values: dict) -> Row:
    def find(names: tuple[str, ...], kind: type):
        text = next((values[name].strip() for name in names if values.get(name)), "")
        try:
            return kind(text) if text else None
        except ValueError:
            raise InputError(f"Expected a number as {' or '.join(names)} in row {number} of {path}, but got {text!r}.") from None

    if None in values.values():
        raise InputError(f"Row {number} of {path} has fewer values than the header. Is the file cut off?")
    seed = find(SEEDS, _whole)
    categories = tuple(dict.fromkeys(name.strip() for name in values["categories"].split(",") if name.strip()))
    return Row(number, values["prompt"], categories, number if seed is None else seed, find(GUIDANCES, float))


def _whole(text: str) -> int:
    """An integer, also as tables write it that once had gaps: `7.0`."""
    whole, _, rest = text.partition(".")
    if rest.strip("0") or not 0 <= int(whole) <= LAST_SEED:
        raise ValueError
    return int(whole)


def choose(rows: list[Row], count: int | None, categories: Collection[str]) -> list[Row]:
    """The rows of these categories (all if none is named), or `count` of them drawn by lot, in the file's order.

    A larger count has the rows of a smaller one. Raises InputError for a category that no row has.
    """
    known = {name for row in rows for name in row.categories}
    if unknown := sorted(set(categories) - known):
        raise InputError(f"Expected categories of the file ({', '.join(sorted(known))}), but got {', '.join(unknown)}.")
    found = [row for row in rows if not categories or set(categories) & set(row.categories)]
    if count is not None:
        random.Random(0).shuffle(found)  # I2P's rows are sorted by category
        found = sorted(found[:count], key=lambda row: row.number)
    return found
