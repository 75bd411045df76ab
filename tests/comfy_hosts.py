"""Finds the ComfyUI hosts that tests run in, and counts what ran in them.

A host is a ComfyUI checkout and the Python of its environment: `COMFYUI_PATH` (with `COMFYUI_PYTHON`), else every
`~/comfy/ComfyUI<suffix>` with `~/comfy/venv<suffix>`.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

NO_HOST = "NO COMFYUI HOST FOUND: set COMFYUI_PATH (and COMFYUI_PYTHON) to test inside ComfyUI; everything else was tested"
TALLY = pytest.StashKey[list[str]]()  # lines that runs inside the hosts want to be seen
OUTCOMES = ("passed", "failed", "error", "skipped")


@dataclass(frozen=True)
class Host:
    """A ComfyUI checkout and the Python that runs it."""

    path: Path
    python: Path

    @property
    def name(self) -> str:
        """`ComfyUI-<version>`, the version being the checkout's own."""
        version = self.path / "comfyui_version.py"
        words = version.read_text(encoding="utf-8").split('"') if version.is_file() else []
        return f"ComfyUI-{words[-2]}" if len(words) >= 3 else self.path.name

    @property
    def version(self) -> tuple[int, ...]:
        """To compare hosts by: (0, 33, 0); () where the checkout does not say."""
        return tuple(int(part) for part in re.findall(r"\d+", self.name))


def python_of(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def find_hosts(env: Mapping[str, str], home: Path) -> list[Host]:
    """The hosts named by the environment, else those under `home/comfy`; newest name first, [] when there is none."""
    if path := env.get("COMFYUI_PATH"):
        root = Path(path).expanduser().resolve()
        if not (root / "main.py").is_file():
            raise FileNotFoundError(f"COMFYUI_PATH is {path!r}, but there is no main.py in it: it must be a ComfyUI checkout.")
        return [Host(root, _python_beside(root, env.get("COMFYUI_PYTHON")))]
    roots = [root for root in (home / "comfy").glob("ComfyUI*") if (root / "main.py").is_file()]
    return sorted((Host(root, _python_beside(root)) for root in roots), key=lambda host: (host.version, host.name), reverse=True)


def _python_beside(root: Path, given: str | None = None) -> Path:
    """COMFYUI_PYTHON, else the environment beside the checkout (`venv<suffix>`) or inside it; the first one if none exists."""
    if given:
        return Path(given).expanduser()
    suffix = root.name.removeprefix("ComfyUI")
    places = (root.parent / f"venv{suffix}", root / ".venv", root / "venv")
    pythons = [python_of(place) for place in places]
    return next((p for p in pythons if p.is_file()), pythons[0])


def count_by_host(reports: Iterable[tuple[str, object]]) -> dict[str, Counter]:
    """Outcomes per host of (outcome, pytest report) pairs; a report that stands for tests inside a host counts as those."""
    counts: dict[str, Counter] = {}
    for outcome, report in reports:
        about = dict(getattr(report, "user_properties", ()))
        if host := about.get("host"):
            counts.setdefault(host, Counter()).update(about.get("inner", {outcome: 1}))
    return counts


def describe(counts: Mapping[str, Counter], found: bool) -> str:
    """One line: how many host tests ran, and where; loud when no host was found."""
    total = sum(counts.values(), Counter())
    ran = sum(total[o] for o in OUTCOMES if o != "skipped")
    say = lambda c: ", ".join(f"{c[o]} {o}" for o in OUTCOMES if c[o]) or "none"  # noqa: E731
    where = "; ".join(f"{host}: {say(c)}" for host, c in sorted(counts.items()))
    return " | ".join(filter(None, (f"host tests ran: {ran} ({say(total)})", where, "" if found else NO_HOST)))
