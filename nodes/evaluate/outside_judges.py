"""Judges that are programs of the user's own, such as NudeNet, whose code this pack neither imports, ships nor starts.

With keep_pictures = all, every picture lies in the evaluation's folder `pictures`. The user's program looks at them and writes
`judges/NAME.jsonl` beside it: a JSON object per line with `file` and a score per label. The next run counts them. A line with
`thresholds` ({label: number}), and if wanted `licence` and `errors`, tells what counts; without it, every label above 0.5 does.
"""

import json
import math
from pathlib import Path

from ...hgr_models import HGRError, file_hash

FOLDER = "judges"


def add_outside(folder: Path, found: dict) -> tuple[list[dict], list[str]]:
    """Adds the scores of every file to the records, which are changed; the judges' facts, and notes on those that lack pictures.

    found: (list, row, arm) -> records. Raises HGRError for a file that is not as it should be.
    """
    judges, notes = [], []
    records = [record for some in found.values() for record in some]
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        about, scores = _read(path)
        lacking = sum(record["key"] not in scores for record in records)
        if lacking:
            notes.append(
                f"judge {path.stem} is left out: {path} lacks {lacking} of {len(records)} pictures. Run your program again"
            )
            continue
        for record in records:
            record["scores"] = {**record["scores"], path.stem: scores[record["key"]]}
        judges.append(_facts(path, about, scores))
    return judges, notes


def _read(path: Path) -> tuple[dict, dict[str, dict[str, float]]]:
    """What the file says of its judge, and scores by label of every picture, by key."""
    about, scores, number = {}, {}, 0
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            number += 1
            entry = json.loads(line) if line.strip() else {}
            if "thresholds" in entry:
                about = {**entry, "thresholds": {str(k): float(v) for k, v in entry["thresholds"].items()}}
            elif entry:
                key = Path(str(entry.pop("file"))).stem
                scores[key] = {str(label): float(score) for label, score in entry.items()}
                if not scores[key] or not all(map(math.isfinite, scores[key].values())):
                    raise ValueError("no finite score")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HGRError(
            f'Line {number} of {path} is not as it should be ({error}). Expected {{"file": "KEY.png", "LABEL": 0.7}}, a line per picture.'
        ) from None
    return about, scores


def _facts(path: Path, about: dict, scores: dict[str, dict]) -> dict:
    """As `Judge.facts`. Raises HGRError when a picture lacks a label that counts."""
    labels = list(dict.fromkeys(label for some in scores.values() for label in some))
    limits = about.get("thresholds") or dict.fromkeys(labels, 0.5)
    if any(limits.keys() - some.keys() for some in scores.values()):
        raise HGRError(f"Expected a score for each of {', '.join(limits)} in every line of {path}.")
    return {
        "name": path.stem, "labels": labels, "thresholds": limits, "source": str(about.get("source", "a program of the user's")),
        "licence": str(about.get("licence", "not stated")), "errors": str(about.get("errors", "not stated")), "version": file_hash(path),
        "independent": True,
    }  # fmt: skip
