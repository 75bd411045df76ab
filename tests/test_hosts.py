"""Runs every file of tests/host inside each ComfyUI host: one test here per file, with the outcomes inside it."""

import os
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest

from comfy_hosts import Host

INNER = Path(__file__).parent / "host"
FILES = sorted(p.name for p in INNER.glob("test_*.py"))
MINUTES = 25  # for all files in one host


class InnerRun:
    """One pytest process in a host: its log and its test cases per file."""

    def __init__(self, host: Host, files: list[str], folder: Path):
        report, log = folder / "report.xml", folder / "log.txt"
        command = [str(host.python), "-m", "pytest", "-c", str(INNER / "pytest.ini"), f"--junitxml={report}"]
        environment = {**os.environ, "COMFYUI_PATH": str(host.path), "PYTHONDONTWRITEBYTECODE": "1"}
        with log.open("w", encoding="utf-8") as out:
            self.returncode = subprocess.run(
                [*command, *(str(INNER / name) for name in files)],
                cwd=host.path, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=60 * MINUTES,
            ).returncode  # fmt: skip
        self.log = log.read_text(encoding="utf-8", errors="replace")
        cases = ElementTree.parse(report).iter("testcase") if report.is_file() else ()
        self.cases = [case for case in cases if case.get("file")]

    def of(self, name: str) -> dict[str, tuple[str, str]]:
        """Outcome and text of each test of a file."""
        return {case.get("name"): outcome(case) for case in self.cases if Path(case.get("file")).name == name}


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    """A test case's outcome, as pytest names it, and the text of its failure."""
    for tag, name in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
        if (child := case.find(tag)) is not None:
            return name, child.text or child.get("message") or ""
    return "passed", ""


@pytest.fixture(scope="session")
def inner_run(host, request, tmp_path_factory) -> InnerRun:
    """All selected files in one process per host: starting ComfyUI costs more than most tests."""
    params = [item.callspec.params for item in request.session.items if "inner" in getattr(item, "fixturenames", ())]
    files = [p["inner"] for p in params if p["host"] == host]
    return InnerRun(host, files, tmp_path_factory.mktemp("inner"))


@pytest.mark.parametrize("inner", FILES)
def test_in_host(inner, inner_run, record_property):
    results = inner_run.of(inner)
    if not results:
        print(inner_run.log[-6000:])
        pytest.fail(f"no test of {inner} ran, exit status {inner_run.returncode}", pytrace=False)
    record_property("inner", dict(Counter(name for name, _ in results.values())))
    bad = {test: text for test, (name, text) in results.items() if name in ("failed", "error")}
    for test, text in bad.items():
        print(f"____ {inner}::{test} ____\n{text}")
    if bad:
        pytest.fail(f"{len(bad)} of {len(results)} failed: {', '.join(bad)}", pytrace=False)
