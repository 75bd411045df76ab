import os
import subprocess
import sys
from pathlib import Path

import pytest

import run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """run.py with its environment in an empty folder and subprocesses that only get recorded; `status[word]` lets one fail."""
    monkeypatch.setattr(run, "VENV", str(tmp_path / "venv"))
    monkeypatch.setattr(run, "PYTHON", str(tmp_path / "venv/python"))
    monkeypatch.setattr(run, "STAMP", str(tmp_path / "venv/stamp"))
    record, record_status = [], {}

    def call(command, **_):
        record.append(command[1:])
        if command[2] == "venv" and "venv" not in record_status:
            (tmp_path / "venv").mkdir(exist_ok=True)
            (tmp_path / "venv/python").touch()
        return next((status for word, status in record_status.items() if word in command), 0)

    monkeypatch.setattr(run.subprocess, "call", call)
    monkeypatch.setattr(run, "index_options", lambda: [])
    return record, record_status


def test_options_reach_the_last_step_only():
    assert run.steps("demo", ["--images", "4"]) == [["-m", "demo", "--images", "4"]]
    *lint, tests = run.steps("test", ["-k", "x"])
    assert tests == ["-m", "pytest", "-k", "x"] and all("-k" not in step for step in lint)


def test_sets_up_once_and_again_when_the_requirements_change(calls, monkeypatch):
    record, _ = calls
    assert run.main(["demo", "--seed", "1"]) == 0
    assert [c[1] for c in record] == ["venv", "pip", "demo"] and record[-1] == ["-m", "demo", "--seed", "1"]
    record.clear()
    assert run.main(["demo"]) == 0
    assert [c[1] for c in record] == ["demo"]
    record.clear()
    monkeypatch.setattr(run, "stamp", lambda count: f"other_requirements_{count}")
    assert run.main(["demo"]) == 0
    assert [c[1] for c in record] == ["pip", "demo"]


def installs(record):
    return [Path(c[c.index("-r") + 1]).name for c in record if c[1] == "pip"]


def test_the_demo_needs_less_than_the_tests(calls):
    """No Triton, which is hundreds of megabytes, for what does not use it; what the tests installed is enough for the demo."""
    record, _ = calls
    run.main(["demo"])
    run.main(["test"])
    run.main(["demo"])
    assert installs(record) == ["requirements-demo.txt", "requirements-dev.txt"]
    assert "triton" not in (ROOT / "requirements-demo.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("platform", "cuda", "config", "taken"),
    [
        ("linux", False, "", True),
        ("linux", True, "", False),
        ("win32", False, "", False),
        ("linux", False, "global.index-url='x'", False),
    ],
)
def test_torch_for_the_cpu_where_there_is_no_gpu(monkeypatch, platform, cuda, config, taken):
    monkeypatch.setattr(run.sys, "platform", platform)
    monkeypatch.setattr(run, "has_cuda", lambda: cuda)
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=config))
    assert run.index_options() == (["--extra-index-url", run.CPU_INDEX] if taken else [])


def test_every_check_runs_and_the_first_failure_is_the_exit_status(calls):
    record, status = calls
    status.update(format=3, pytest=1)
    assert run.main(["test"]) == 3
    assert record[-1] == ["-m", "pytest"]


@pytest.mark.parametrize("part", ["venv", "pip"])
def test_failed_set_up_stops_with_a_remedy_and_is_tried_again(calls, capsys, part):
    record, status = calls
    status[part] = 1
    assert run.main(["demo"]) == 1
    assert "Could not" in capsys.readouterr().err and record[-1][1] == part
    status.clear()
    assert run.main(["demo"]) == 0


def test_old_python_is_named(calls, monkeypatch, capsys):
    monkeypatch.setattr(run.sys, "version_info", (3, 9, 1))
    assert run.main(["demo"]) == 1
    assert "Expected Python 3.10 or newer, got 3.9" in capsys.readouterr().err
    assert calls[0] == []


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["tset"], 2), (["--help"], 0)])
def test_unknown_command_prints_the_usage(calls, capsys, arguments, status):
    assert run.main(arguments) == status
    assert "run.py test" in capsys.readouterr().out and calls[0] == []


@pytest.mark.parametrize(("required", "status"), [("", 0), ("1", 1)])
def test_without_a_host_ci_fails_only_when_one_is_required(tmp_path, required, status):
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "USERPROFILE": str(tmp_path),
        "REQUIRE_COMFYUI": required,
        "COMFYUI_PATH": "",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["tests/test_hosts.py", "tests/server", "tests/test_comfy_hosts.py"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stdout + result.stderr
    assert "host tests ran: 0 (none) | NO COMFYUI HOST FOUND" in result.stdout
    assert "passed" in result.stdout and "failed" not in result.stdout
