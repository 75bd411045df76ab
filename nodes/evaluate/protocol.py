"""Published protocols by one word: which lists, which settings, and what others measured there. Files in `protocols/`."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ...hgr_models import HGRError
from .demo_lists import KINDS, demo_list
from .lists import SUFFIXES, Asked, PromptList, find_file, parse_lists, read_list

OWN = "own lists"
FOLDER = Path(__file__).parent / "protocols"
HOW_TO_NAME = (
    f"Write the name of a file in ComfyUI's input folder ({', '.join(SUFFIXES)}) into `lists`, or choose a `protocol`. SafeCFG Demo Model has "
    f"lists of its own: {' and '.join(f'`{name}`' for name in KINDS)}."
)


@dataclass(frozen=True)
class Protocol:
    """`settings`: cfg, seed, steps and images where the protocol says them. `published`: figures with their sources."""

    name: str
    title: str = ""
    settings: dict = field(default_factory=dict)
    judged: str = ""
    lists: tuple[dict, ...] = ()
    published: tuple[dict, ...] = ()


def names() -> list[str]:
    """The words that choose a protocol."""
    return [OWN, *sorted(path.stem for path in FOLDER.glob("*.json"))]


def load(name: str) -> Protocol:
    """A protocol by its word; raises HGRError for one that there is not."""
    if name == OWN:
        return Protocol(OWN)
    if name not in names():
        raise HGRError(f"There is no protocol {name!r}. Choose one of {', '.join(names())}.")
    content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Protocol(
        name, content["title"], content["settings"], content["judged"], tuple(content["lists"]), tuple(content["published"])
    )


def gather(protocol: Protocol, text: str, folder: Path) -> tuple[list[PromptList], list[str]]:
    """The lists of a protocol that lie in `folder`, and those of the widget; with notes on what is missing.

    Raises HGRError when there is none, naming every file with its source, and when two lists have one name.
    """
    found, notes = [], []
    for wanted in protocol.lists:
        file = next((name for name in wanted["files"] if (folder / name).is_file()), None)
        if file is None:
            notes.append(
                f"{wanted['name']}: put {wanted['files'][0]} ({wanted['prompts']} prompts) from {wanted['where']} into {folder}"
            )
            continue
        asked = Asked(file, wanted["kind"], _column(wanted, file), wanted["name"])
        found += read_list(find_file(folder, file), asked)
        if found[-1].total != wanted["prompts"]:
            notes.append(f"{wanted['name']}: {file} has {found[-1].total} prompts, the protocol {wanted['prompts']}")
    for asked in parse_lists(text):
        found += [demo_list(asked.file)] if asked.file in KINDS else read_list(find_file(folder, asked.file), asked)
    if not found:
        raise HGRError("There is no list to evaluate on. " + ("\n".join(notes) or HOW_TO_NAME))
    twice = {each.name for each in found if sum(other.name == each.name for other in found) > 1}
    if twice:
        raise HGRError(f"Two lists are called {', '.join(sorted(twice))}. Rename a file.")
    return found, notes


def _column(wanted: dict, file: str) -> str:
    """The protocol's own column; a text file has none."""
    return "" if file.endswith(".txt") else wanted.get("column", "")
