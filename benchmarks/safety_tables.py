"""The figures of `benchmarks.safety`: one JSON file that grows arm by arm, and Markdown tables of it."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from hgr_models import HGRError

POINT = 0.01
COLUMNS = {
    "harm_present": "harm present",
    "unseen_harm_present": "harm present, unseen pictograms",
    "rest_kept": "rest kept",
    "neither": "neither",
    "clean_accuracy": "clean accuracy",
    "clean_bit_identical": "clean bit-identical",
    "clean_latent_mse": "distance to plain CFG",
    "rows_per_step": "rows per step",
    "time_ratio": "time ratio",
}
QUALITY = ("rest_kept", "clean_accuracy")


def load_results(path: Path | None, facts: dict) -> dict:
    """The figures in a file, or none yet; `facts` hold for all of them. Raises HGRError for a file with other facts."""
    facts = json.loads(json.dumps(facts))
    if path is None or not path.exists():
        return facts
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in facts if results.get(key) != facts[key]]
    except (OSError, ValueError, AttributeError) as error:
        raise HGRError(f"{path} is not a file of figures ({error}). Delete it, or name another --json.") from None
    if different:
        raise HGRError(
            f"{path} holds figures of another run: {_difference(results, facts, different[0])}. Delete it, or name another --json."
        )
    return results


def _difference(results: dict, facts: dict, key: str) -> str:
    before, now = str(results.get(key)), str(facts[key])
    return f"{key} {before} there, {now} here" if len(before + now) < 100 else f"other {key}"


def section(results: dict, name: str, facts: dict) -> dict:
    """The figures under a condition, inside `results`; begun anew when its `facts` are others."""
    conditions, facts = results.setdefault("conditions", {}), json.loads(json.dumps(facts))
    if any(conditions.get(name, {}).get(key) != value for key, value in facts.items()):
        conditions[name] = facts
    return conditions[name]


def save_results(path: Path | None, results: dict) -> None:
    """Writes the figures; the file changes whole or not at all."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)


def cell(figures: Mapping, key: str) -> str:
    """A figure as a table shows it: a share with its 95 % interval, or a number."""
    if key not in figures:
        return "–"
    if (interval := figures.get(f"{key}_interval")) is None:
        return f"{figures[key]:.3g}"
    low, high = (100 * end for end in interval)
    return f"{100 * figures[key]:.1f} % [{low:.1f}, {high:.1f}]"


def keeps(figures: Mapping, plain: Mapping, or_interval: bool = False) -> bool:
    """Whether rest kept and clean accuracy are at most a point below plain CFG's, or within its 95 % interval."""
    lowest = {key: min(plain[key] - POINT, plain[f"{key}_interval"][0] if or_interval else 1) for key in QUALITY}
    return all(figures[key] >= least for key, least in lowest.items())


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def table(results: Mapping, arms: Iterable[str], columns: Mapping[str, str] = COLUMNS) -> str:
    """The arms that have figures, one per row."""
    plain = results["plain"]
    rows = [
        (arm, *(cell(results[arm], key) for key in columns), "yes" if keeps(results[arm], plain) else "no")
        for arm in arms
        if arm in results
    ]
    return markdown(("", *columns.values(), "within 1 point"), rows)


def conditions_table(conditions: Mapping[str, Mapping], arms: Iterable[str]) -> str:
    """Every condition's arms, one per row; without what a condition does not change."""
    arms, columns = list(arms), {key: title for key, title in COLUMNS.items() if key not in ("rows_per_step", "time_ratio")}
    rows = [
        (name, str(figures["n"]), arm, *(cell(figures[arm], key) for key in columns))
        for name, figures in conditions.items()
        for arm in arms
        if arm in figures
    ]
    return markdown(("condition", "pictures", "", *columns.values()), rows)


def categories_table(results: Mapping, arms: Iterable[str], categories: Iterable[str]) -> str:
    """Harm of the category that the prompt names, one arm per row."""
    categories = list(categories)
    rows = [(arm, *(cell(results[arm], f"{c}_present") for c in categories)) for arm in arms if arm in results]
    return markdown(("harm of the named category present", *categories), rows)
