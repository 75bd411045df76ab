"""Runs every file of tests/host inside each ComfyUI host: one test here per file, with the outcomes inside it."""

import os
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest

from comfy_hosts import TALLY, Host

INNER = Path(__file__).parent / "host"
FILES = sorted(p.name for p in INNER.glob("test_*.py"))
MINUTES = 25  # for all files in one host


class InnerRun:
    """One pytest process in a host: its log and its test cases per file. It runs on while others are started."""

    def __init__(self, host: Host, files: list[str], folder: Path):
        self.report, self.log_file = folder / "report.xml", folder / "log.txt"
        command = [str(host.python), "-m", "pytest", "-c", str(INNER / "pytest.ini"), f"--junitxml={self.report}"]
        environment = {**os.environ, "COMFYUI_PATH": str(host.path), "PYTHONDONTWRITEBYTECODE": "1"}
        with self.log_file.open("w", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                [*command, *(str(INNER / name) for name in files)],
                cwd=host.path, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        self.cases: list[ElementTree.Element] | None = None

    def finish(self) -> None:
        """Waits for the process, and reads what it said."""
        if self.cases is None:
            self.returncode = self.process.wait(60 * MINUTES)
            self.log = self.log_file.read_text(encoding="utf-8", errors="replace")
            cases = ElementTree.parse(self.report).iter("testcase") if self.report.is_file() else ()
            self.cases = [case for case in cases if case.get("file")]

    def stop(self) -> None:
        """Ends the process if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

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
def inner_runs(request, tmp_path_factory):
    """All selected files in one process per host: starting ComfyUI costs more than most tests. One thread each, side by side."""
    params = [item.callspec.params for item in request.session.items if "inner" in getattr(item, "fixturenames", ())]
    hosts = {p["host"].name: p["host"] for p in params if p["host"] is not None and p["host"].python.is_file()}
    files = {name: [p["inner"] for p in params if p["host"] == host] for name, host in hosts.items()}
    runs = {name: InnerRun(host, files[name], tmp_path_factory.mktemp("inner")) for name, host in hosts.items()}
    yield runs
    for run in runs.values():
        run.stop()


@pytest.fixture(scope="session")
def inner_run(host, inner_runs, request) -> InnerRun:
    """The finished run in a host."""
    run = inner_runs[host.name]
    run.finish()
    request.config.stash[TALLY] += [f"{host.name} {line}" for line in run.log.splitlines() if line.startswith("matrix |")]
    return run


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
