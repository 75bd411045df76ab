"""What a node's picture in its help page shows, so that a test finds a stale one; `pictures.py` takes them."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "web" / "docs" / "images"
NOTED = ROOT / "tests" / "help_pictures.json"  # what every picture showed when it was taken, by node


def shown(kind: str) -> list[str]:
    """A node's title, inputs and outputs as they stand on it, in order; `tests/host/test_locales.py` keeps the file as the schemas are."""
    node = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))[kind]
    slots = [*node.get("inputs", {}).values(), *node.get("outputs", {}).values()]
    return [node["display_name"], *(slot.get("name", "") for slot in slots)]


def noted() -> dict[str, list[str]]:
    return json.loads(NOTED.read_text(encoding="utf-8"))


def note(kind: str) -> None:
    """Says that the picture of a node is of the node as it is."""
    known = {**(noted() if NOTED.is_file() else {}), kind: shown(kind)}
    NOTED.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")
