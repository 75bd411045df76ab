"""An evaluation as Markdown: harm, clean prompts, judges, and what others published."""

from collections.abc import Sequence

from .figures import ALL, PLAIN


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; a bar in a cell would end it."""
    cells = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])


def percent(row: dict, key: str = "share") -> str:
    """A share with its interval."""
    if row.get(key) is None:
        return "-"
    return f"{100 * row[key]:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def number(value: float | None, digits: int = 2) -> str:
    """A figure; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def harm_table(results: dict, judge: str) -> str:
    """A row per list and category, a column per arm."""
    arms = [arm["name"] for arm in results["arms"]]
    groups: dict[tuple, dict] = {}
    for row in results["rows"]:
        if row["judge"] == judge:
            groups.setdefault((row["list"], row["kind"], row["category"]), {})[row["arm"]] = row
    lines = [
        (f"{name} ({kind})", category, str(found[PLAIN]["n"]), *(percent(found[arm]) for arm in arms))
        for (name, kind, category), found in groups.items()
    ]
    return markdown(("list", "category", "pictures", *arms), lines)


def clean_table(results: dict) -> str:
    """What changed in clean prompts, a row per list and arm."""
    lines = [
        (
            row["list"], row["arm"], row["n"], percent(row, "bit_identical"), number(row["clip_score"]), number(row.get("fid")),
            number(row.get("fd_clip"), 4), number(row.get("cmmd"), 4),
        )
        for row in results["clean"]
    ]  # fmt: skip
    return markdown(
        ("list", "arm", "pictures", "bit-identical to plain", "CLIP score", "FID to plain", "FD-CLIP to plain", "CMMD to plain"),
        lines,
    )


def published_table(results: dict) -> str:
    """Ours beside what others published on the same lists, by the same measure where there is one."""
    judge, ours = main_judge(results), []
    for row in results["rows"]:
        if row["judge"] == judge and row["category"] == ALL and row["n"]:
            ours.append(
                (
                    row["list"],
                    "harmful %",
                    row["arm"],
                    f"{100 * row['share']:.1f}",
                    f"this evaluation, {judge}, {row['n']} pictures",
                )
            )
    ours += [
        (row["list"], "CLIP score", row["arm"], number(row["clip_score"]), f"this evaluation, {row['n']} pictures")
        for row in results["clean"]
        if row["clip_score"] is not None
    ]
    theirs = [(f["list"], f["measure"], f["method"], f"{f['value']:g}", f["source"]) for f in results["protocol"]["published"]]
    rows = sorted((*ours, *theirs), key=lambda row: (row[0], row[1]))
    return markdown(("list", "measure", "method", "value", "source"), rows)


def main_judge(results: dict) -> str:
    """The judge of the summary: any of several, else the one."""
    names = list(dict.fromkeys(row["judge"] for row in results["rows"]))
    return names[-1] if names else ""


def write(results: dict) -> str:
    """The whole page. Times come last, on a line of their own: all else is the same whenever it was drawn."""
    s, parts = results["settings"], []
    size, cfg = (
        "x".join(map(str, s["size"])),
        f"{s['cfg']}, else {s['other_cfg']:g}" if isinstance(s["cfg"], str) else f"{s['cfg']:g}",
    )
    parts.append(
        f"# {results['name']}\n\n{results['model']['family']}, HGR {(results['hgr'] or {}).get('file', 'none')}, pictures per prompt: {s['images']}, "
        f"{size}, {s['steps']} steps of {s['sampler']} ({s['scheduler']}), cfg {cfg}, seed {s['seed']}; the same seeds in every arm; "
        "95 % intervals over pictures (Wilson)."
    )
    for judge in dict.fromkeys(row["judge"] for row in results["rows"]):
        parts.append(f"## Judged harmful: {judge}\n\n{harm_table(results, judge)}")
    if results["clean"]:
        parts.append(f"## Clean prompts\n\n{clean_table(results)}")
    parts.append("## Judges\n\n" + "\n".join(map(_judge_line, results["judges"])))
    if results["calibration"]:
        lines = [
            f"- {each['judge']}: {percent(each)} of {each['n']} clean pictures of your own" for each in results["calibration"]
        ]
        parts.append("## False alarms of the judges\n\n" + "\n".join(lines))
    if results["protocol"]["published"]:
        parts.append(
            f"## Beside what others published\n\n{results['protocol']['title']}. Judged there: {results['protocol']['judged']}. Figures of "
            f"different judges and models cannot be compared.\n\n{published_table(results)}"
        )
    if results["notes"]:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in results["notes"]))
    times = ", ".join(f"{arm} {number(value)}" for arm, value in results["seconds"].items())
    return "\n\n".join([*parts, f"Seconds per picture (median): {times}"]) + "\n"


def _judge_line(judge: dict) -> str:
    limits = ", ".join(f"{label} > {limit:g}" for label, limit in judge["thresholds"].items())
    return f"- {judge['name']}: {limits}. {judge['source']}; {judge['licence']}. Known errors: {judge['errors']}."
