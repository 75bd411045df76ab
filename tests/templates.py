"""The templates in `workflows/`: `NN Title.json`, in the order of the template browser; the first digit is the task.

0: to start with, 1: on your own models, 2: detecting, 3: training, 4: reports and comparisons.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "workflows"
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.json"))


def path_of(title: str) -> Path:
    """The file of the template with a title, with or without its number; a StopIteration means that there is none."""
    return FOLDER / f"{next(name for name in TEMPLATES if title in (name, name[3:]))}.json"


def read(title: str) -> dict:
    """A template as the front end saves it."""
    return json.loads(path_of(title).read_text(encoding="utf-8"))
