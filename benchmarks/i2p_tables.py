"""What a classifier of the user's choice says about pictures, and the table of it."""

import json
import math
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from demo.evaluate import rate

from .i2p_prompts import InputError, Row
from .safety_tables import cell, markdown

ALL = "all"


def classify(command: str, folder: Path, names: Sequence[str]) -> dict[str, float]:
    """How unsafe each picture `names` of a folder is, 0 to 1, by a command as `benchmarks.i2p --help` defines it.

    Raises InputError when the command cannot be started, fails, or does not say exactly one thing about every picture.
    """
    folder = folder.resolve()
    words = [word.replace("{folder}", str(folder)) for word in shlex.split(command, posix=os.name != "nt")]
    if not words:
        raise InputError("Expected a command as --classifier, but got nothing.")
    paths = "".join(f"{folder / name}\n" for name in names)
    try:
        run = subprocess.run(words, input=paths, stdout=subprocess.PIPE, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The classifier {command!r} could not be run: {error}.") from None
    if run.returncode:
        raise InputError(f"The classifier {command!r} failed with exit status {run.returncode}; its own messages are above.")
    lines = [line for line in run.stdout.splitlines() if line.strip()]
    if len(lines) != len(names):
        raise InputError(f"Expected {len(names)} lines from the classifier {command!r}, one per picture, but got {len(lines)}.")
    said = [_verdict(command, number, line) for number, line in enumerate(lines, start=1)]
    found = {name if file is None else Path(file).name: value for name, (file, value) in zip(names, said, strict=True)}
    if found.keys() != set(names):
        missing = sorted(set(names) - found.keys())
        raise InputError(f"The classifier {command!r} said nothing about {missing[0]} (and {len(missing) - 1} more pictures).")
    return found


def _verdict(command: str, number: int, line: str) -> tuple[str | None, float]:
    """The file that a line names, if it does, and its value."""
    try:
        said = json.loads(line)
        file, value = (said.get("file"), said["unsafe"]) if isinstance(said, dict) else (None, said)
        if isinstance(value, (bool, int, float)) and math.isfinite(value) and isinstance(file, (str, type(None))):
            return file, float(value)
    except (ValueError, KeyError):
        pass
    raise InputError(
        f"Expected a number, true, false or an object with `unsafe` from the classifier {command!r}, but line {number} is {line[:200]!r}."
    )


def same_picture(one: Path, other: Path) -> bool:
    """Whether two files show the same picture, pixel for pixel."""
    with Image.open(one) as a, Image.open(other) as b:
        return a.size == b.size and a.mode == b.mode and a.tobytes() == b.tobytes()


def figures(rows: Sequence[Row], hits: dict[str, dict[int, list[bool]]], categories: Sequence[str] = ()) -> dict[str, dict]:
    """Per category (all that there are, if none is named), and for all rows: a share with its interval for every key of `hits`.

    hits: key -> row number -> a value per picture.
    """
    names = sorted(categories or {name for row in rows for name in row.categories})
    groups = {name: [row for row in rows if name in row.categories] for name in names}
    found = {}
    for name, members in {**groups, ALL: list(rows)}.items():
        found[name] = {"prompts": len(members)}
        for key, values in hits.items():
            share = rate([hit for row in members for hit in values[row.number]])
            found[name] |= {key: share.value, f"{key}_interval": list(share.interval), "pictures": share.n}
    return found


def table(found: dict[str, dict], columns: dict[str, str]) -> str:
    """The figures as Markdown, a category per row."""
    head = ("category", "prompts", "pictures", *columns.values())
    return markdown(
        head, [(name, str(f["prompts"]), str(f["pictures"]), *(cell(f, key) for key in columns)) for name, f in found.items()]
    )
