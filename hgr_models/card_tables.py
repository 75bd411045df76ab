"""What was measured with an HGR as tables of its model card.

`evaluation`, the JSON of SafeCFG Evaluate, of which these are read (everything else is left out; whatever is missing is a dash):
    rows      [{list, kind, category, judge, arm, n, share, low, high}]: of n pictures the share that a judge takes for harmful, with its
              95 % interval, in [0, 1]
    clean     [{list, arm, n, bit_identical, clip_score, ...}]: what became of clean prompts
    seconds   {arm: seconds per picture}
    protocol  {name, ...}; judges [{name, ...}]
`check`, the JSON of SafeCFG Check HGR: {name: share or count}, and `model`, what it ran on.
"""

from collections.abc import Mapping

from .words import cell, number, percent

CLEAN_TEXTS = ("list", "arm")
SHARES = ("bit_identical", "low", "high")
MOST_ROWS = 400
CHECKED = {  # in the order of the table
    "model": "checked on",
    "harmful_runs": "harmful runs",
    "flagged_by_prompt": "flagged by the prompt",
    "flagged_by_guidance": "flagged by the guidance",
    "removal_condition": "way to the safe direction, condition redirector",
    "removal_guidance": "way to the safe direction, guidance redirector",
    "clean_runs": "clean runs",
    "false_positives": "redirected by mistake",
    "false_positives_by_prompt": "by the prompt",
    "false_positives_by_guidance": "by the guidance",
    "attack_steps": "steps of a white-box attack on the tokens",
    "attacked_runs": "attacked runs",
    "harm_without_attack": "harm drawn before it",
    "harm_after_attack": "harm drawn after it",
    "attack_strength": "the same attack, undefended, from the safe prompt",
}
COUNTS = ("model", "harmful_runs", "clean_runs", "attack_steps", "attacked_runs")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table of cells that are safe already."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ("---",) * len(head), *rows])


def shareable(evaluation: Mapping) -> dict:
    """What a card keeps of an evaluation: the figures, and the names of its protocol and judges. No path and no setting of somebody's machine."""
    kept = {name: evaluation[name] for name in ("rows", "clean", "seconds") if name in evaluation}
    return {
        **kept,
        "protocol": _named(evaluation.get("protocol")),
        "judges": [_named(v) for v in _listed(evaluation.get("judges"))],
    }


def evaluation_tables(evaluation: Mapping) -> list[str]:
    """The tables of an evaluation: harm by list, category and judge, clean prompts, seconds, and how it was judged."""
    head = ("prompts", "category", "judge", "arm", "n", "harmful", "95 % interval")
    texts = ("list", "category", "judge", "arm", "n")
    rows = _rows(evaluation, "rows")
    harm = [(*(cell(row.get(name, "–")) for name in texts), percent(row.get("share")), _interval(row)) for row in rows]
    parts = [table(head, harm)] if harm else ["No prompt list was judged."]
    parts += _clean_table(_rows(evaluation, "clean"))
    seconds = evaluation.get("seconds")
    if isinstance(seconds, Mapping) and seconds:
        parts.append(
            table(("arm", "seconds per picture"), [(cell(arm), _number(s)) for arm, s in list(seconds.items())[:MOST_ROWS]])
        )
    names = {"protocol": [evaluation.get("protocol")], "judges": evaluation.get("judges")}
    found = {name: _names(values) for name, values in names.items()}
    how = [f"{name}: {', '.join(some)}" for name, some in found.items() if some]
    return [*parts, *([". ".join(how).capitalize() + "."] if how else [])]


def harm_in_short(evaluation: object) -> str:
    """The evaluation in one line: harm per arm over its rows of all categories and harmful lists, by the last judge; "" without rows.

    Of several judges the last one is "any judge", whatever one of them takes for harmful.
    """
    rows = _rows(evaluation, "rows") if isinstance(evaluation, Mapping) else []
    rows = [row for row in rows if row.get("category") == "all"] or rows
    rows = [row for row in rows if row.get("kind") != "clean"] or rows
    rows = [row for row in rows if row.get("judge") == rows[-1].get("judge")]
    found: dict[str, list[float]] = {}
    for row in rows:
        n, share = number(row.get("n")), number(row.get("share"))
        if n and share is not None:
            sums = found.setdefault(cell(row.get("arm", "–"), 40), [0.0, 0.0])
            sums[0], sums[1] = sums[0] + n * share, sums[1] + n
    parts = [f"{arm} {percent(harm / n)} of {n:.0f}" for arm, (harm, n) in found.items()]
    return f"harmful pictures: {', '.join(parts)}" if parts else ""


def check_table(check: Mapping) -> str:
    """The numbers of SafeCFG Check HGR."""
    rows = [
        (title, cell(check[name]) if name in COUNTS else percent(check[name])) for name, title in CHECKED.items() if name in check
    ]
    return table(("", ""), rows)


def _rows(evaluation: Mapping, name: str) -> list[Mapping]:
    rows = evaluation.get(name)
    return [row for row in rows if isinstance(row, Mapping)][:MOST_ROWS] if isinstance(rows, (list, tuple)) else []


def _interval(row: Mapping) -> str:
    low, high = number(row.get("low")), number(row.get("high"))
    return "–" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f} %"


def _clean_table(rows: list[Mapping]) -> list[str]:
    """Clean prompts: a column for every figure that some row has."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if number(value) is not None))[:20]
    if not names:
        return []
    head = ("clean prompts", "arm", *(cell(name).replace("\\_", " ") for name in names))
    values = lambda row: [(percent if name in SHARES else _number)(row.get(name)) for name in names]  # noqa: E731
    return [table(head, [(*(cell(row.get(name, "–")) for name in CLEAN_TEXTS), *values(row)) for row in rows])]


def _number(value: object) -> str:
    found = number(value)
    return "–" if found is None else f"{found:.4g}"


def _listed(values: object) -> list:
    return list(values) if isinstance(values, (list, tuple)) else []


def _named(value: object) -> dict:
    """{"name": ...} of an object that has one; of anything else nothing."""
    name = value.get("name") if isinstance(value, Mapping) else None
    return {"name": name} if isinstance(name, str) and name else {}


def _names(values: object) -> list[str]:
    """Names of objects."""
    return [cell(found["name"]) for found in map(_named, _listed(values)) if found]
