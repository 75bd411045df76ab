"""Public lists of prompts, read by column name; the lists themselves never become part of this repository.

The harmful ones are for programs alone: nothing here prints a row.
"""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

csv.field_size_limit(2**30)

HARMFUL, CLEAN = "harmful", "clean"


@dataclass(frozen=True)
class Source:
    """One list of a file. `limit` rows at most are taken, evenly spread; `kind` says what a flag in it means."""

    name: str
    file: str
    column: str
    kind: str
    limit: int | None = None
    rows: str = ""  # a group of rows in the file of labels; "": those with an even number


SOURCES = (
    Source("I2P clear", "i2p.csv", "prompt", HARMFUL, rows="clear"),
    Source("I2P border", "i2p.csv", "prompt", "", rows="border"),
    Source("I2P none", "i2p.csv", "prompt", "", rows="none"),
    Source("MMA targets", "mma.csv", "target_prompt", HARMFUL),
    Source("MMA adversarial", "mma.csv", "adv_prompt", HARMFUL),
    Source("Ring-A-Bell", "ringabell.csv", "sensitive prompt", HARMFUL),
    Source("SafeSteer test unsafe", "safesteer_test.parquet", "unsafe_prompt", HARMFUL),
    Source("SafeSteer test safe", "safesteer_test.parquet", "safe_prompt", CLEAN),
    Source("SafeSteer train unsafe", "safesteer_train.parquet", "unsafe_prompt", HARMFUL, 500),
    Source("SafeSteer train safe", "safesteer_train.parquet", "safe_prompt", CLEAN, 500),
    Source("CoPro unsafe", "copro.csv", "unsafe_prompt", "", 500),
    Source("CoPro safe", "copro.csv", "safe_prompt", CLEAN, 1000),
    Source("DiffusionDB (reFL)", "refl_data.json", "text", CLEAN, 1500),
    Source("DiffusionDB (test)", "test.json", "prompt", CLEAN),
    Source("COCO", "coco.csv", "prompt", CLEAN, 1000),
    Source("PartiPrompts", "parti.tsv", "Prompt", CLEAN),
    Source("GenEval", "geneval.txt", "", CLEAN),
)


def read_column(path: Path, column: str) -> list[str]:
    """The texts of a column of a CSV, TSV, JSON (a list of objects), Parquet or TXT file (a prompt per line; no column).

    Raises ValueError, naming the columns that there are, for a column that is missing.
    """
    kind = path.suffix.lower()
    if kind == ".txt":
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = _rows(path, kind)
    if rows and column not in rows[0]:
        raise ValueError(f"Expected a column {column!r} in {path.name}; there is {', '.join(map(str, rows[0]))}.")
    return [str(row[column] or "") for row in rows]


def _rows(path: Path, kind: str) -> list[dict]:
    if kind == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if kind == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    delimiter = "\t" if kind == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        quoting = csv.QUOTE_NONE if kind == ".tsv" else csv.QUOTE_MINIMAL
        return list(csv.DictReader(file, delimiter=delimiter, quoting=quoting))


def read_source(source: Source, folder: Path, labels: dict | None, parity: int = 0) -> list[str]:
    """The prompts of a list with row numbers (from 0) of this parity; of a labelled group the rows that the labels name."""
    texts = read_column(folder / source.file, source.column)
    if source.rows:
        named = (labels or {}).get(source.rows, ())
        return [texts[int(row)] for row in named]
    texts = [text for text in texts[parity::2] if text.strip()]
    return spread(texts, source.limit)


def spread(texts: list[str], limit: int | None) -> list[str]:
    """At most `limit` of some texts, evenly spread."""
    if limit is None or len(texts) <= limit:
        return texts
    return [texts[i * len(texts) // limit] for i in range(limit)]


def read_all(folder: Path, labels_file: Path | None, extra: Iterable[Source] = (), parity: int = 0) -> dict[Source, list[str]]:
    """Every list whose file is in the folder; those that are absent are left out."""
    labels = None if labels_file is None else json.loads(labels_file.read_text(encoding="utf-8"))
    present = [s for s in (*SOURCES, *extra) if (folder / s.file).is_file() and (labels is not None or not s.rows)]
    return {source: read_source(source, folder, labels, parity) for source in present}
