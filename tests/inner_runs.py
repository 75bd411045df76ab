"""The processes that run tests/host inside each ComfyUI host."""

import os
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from comfy_hosts import Host

INNER = Path(__file__).parent / "host"
FILES = sorted(p.name for p in INNER.glob("test_*.py"))
MINUTES = 40  # for what is left of all files in one host when the other tests are over


def _behind() -> None:
    """Lets the tests that somebody waits for go first."""
    os.nice(10)


class InnerRun:
    """One pytest process in a host: its log and its test cases per file. It runs on while other tests do."""

    def __init__(self, host: Host, files: list[str], folder: Path):
        self.report, self.log_file = folder / "report.xml", folder / "log.txt"
        command = [str(host.python), "-m", "pytest", "-c", str(INNER / "pytest.ini"), f"--junitxml={self.report}"]
        environment = {**os.environ, "COMFYUI_PATH": str(host.path), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.setdefault("OMP_NUM_THREADS", "1")  # others run beside it
        with self.log_file.open("w", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                [*command, *(str(INNER / name) for name in files)],
                cwd=host.path, env=environment, preexec_fn=_behind if os.name == "posix" else None, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
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
