"""Shared by every test: the hosts, and the line that says how many tests ran in them."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from comfy_hosts import NO_HOST, OUTCOMES, TALLY, Host, count_by_host, describe, find_hosts
from inner_runs import InnerRun

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # for test_fused.py; before a test's imports bring Triton

# These run inside a host's Python, started by test_hosts.py.
collect_ignore = ["host"]

HOSTS = find_hosts(os.environ, Path.home())
_PARAMS = HOSTS or [pytest.param(None, marks=pytest.mark.skip(reason=NO_HOST))]


@pytest.fixture(scope="session", params=_PARAMS, ids=[h.name for h in HOSTS] or ["no-host"])
def host(request) -> Host:
    """Each ComfyUI host in turn; without any, the test is skipped."""
    found = request.param
    if not found.python.is_file():
        pytest.fail(f"{found.path} has no Python at {found.python}: set COMFYUI_PATH and COMFYUI_PYTHON.")
    return found


@pytest.fixture(scope="session", autouse=True)
def inner_runs(request, tmp_path_factory):
    """All selected files of tests/host in one process per host, from the first test on: starting ComfyUI costs more than most tests.

    One thread each, behind the tests that run here: those often wait for a server.
    """
    params = [item.callspec.params for item in request.session.items if "inner" in getattr(item, "fixturenames", ())]
    hosts = {p["host"].name: p["host"] for p in params if p["host"] is not None and p["host"].python.is_file()}
    files = {name: [p["inner"] for p in params if p["host"] == host] for name, host in hosts.items()}
    runs = {name: InnerRun(host, files[name], tmp_path_factory.mktemp("inner")) for name, host in hosts.items()}
    yield runs
    for run in runs.values():
        run.stop()


def pytest_configure(config):
    config.stash[TALLY] = []


# What a host between the newest and the oldest runs: how the pack loads and patches, and the templates.
MIDDLE_HOST = {
    "test_apply_node.py", "test_families.py", "test_guiders.py", "test_loader.py", "test_meter.py", "test_pack.py", "test_protect.py",
    "test_schema.py", "test_nodes.py", "test_quickstart.py", "test_server.py", "test_subgraphs.py", "test_templates.py",
}  # fmt: skip


# What the oldest host's front end is not tested for.
NOT_OLDEST = {"test_subgraphs.py"}
# Tests inside a host that train for minutes, and that an old version changes least: `OLDEST=all` runs them on the oldest, too.
LONG = {
    "test_evaluate.py", "test_evaluate_keeping.py", "test_evaluate_resume.py", "test_fine_tune.py", "test_hgr_attack.py",
    "test_own_prompts.py", "test_training.py", "test_training_prompts.py",
}  # fmt: skip
# Tests that somebody has to ask for, by a variable that names what they need. Single ones have the mark `asked_for`.
ASKED_FOR = {
    "test_packs.py": "PACKS", "test_protect_trouble.py": "PROTECT", "test_proxy.py": "PROXY", "test_whole_training.py": "WHOLE_TRAINING",
}  # fmt: skip


def is_left_out(item) -> bool:
    """Tests that a host is not for: the user interface on all but the newest, and most of them on hosts in the middle."""
    marks = [mark.args[0] for mark in item.iter_markers("asked_for")]
    if any(not os.environ.get(variable) for variable in filter(None, [ASKED_FOR.get(item.path.name), *marks])):
        return True
    if item.path.name == "test_full_size.py" and os.environ.get("FULL_SIZE") == "none":
        return True
    params = getattr(item, "callspec", None) and item.callspec.params
    host = params.get("host") if params else None
    if host is None:
        return False
    newest_only = {"newest_host", "newest"} & set(item.fixturenames)
    file = params.get("inner", item.path.name)
    oldest = len(HOSTS) > 1 and host == HOSTS[-1]
    return (
        bool(newest_only and host != HOSTS[0])
        or (host in HOSTS[1:-1] and file not in MIDDLE_HOST)
        or (oldest and file in NOT_OLDEST)
        or (oldest and params.get("inner") in LONG and os.environ.get("OLDEST") != "all")
    )


@pytest.hookimpl(trylast=True)  # after pytest has put the tests of a host together
def pytest_collection_modifyitems(config, items):
    if left_out := [item for item in items if is_left_out(item)]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not is_left_out(item)]
    items.sort(key=lambda item: "inner" in getattr(item, "fixturenames", ()))  # these wait for what runs beside the others
    for item in items:
        if "host" in item.fixturenames:
            item.add_marker("host")
            if found := item.callspec.params["host"]:
                item.user_properties.append(("host", found.name))
        if item.get_closest_marker("gpu"):
            import torch

            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


def _counts(config):
    stats = config.pluginmanager.get_plugin("terminalreporter").stats
    return count_by_host((outcome, report) for outcome in OUTCOMES for report in stats.get(outcome, ()))


def pytest_sessionfinish(session):
    """CI sets REQUIRE_COMFYUI=1: then a run in which no test ran inside a host is a failure."""
    if os.environ.get("REQUIRE_COMFYUI") == "1" and not session.config.option.collectonly:
        counts = _counts(session.config)
        if not counts or any(not c["passed"] for c in counts.values()):
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
    if HOSTS and len(_skipped(session.config)) > int(os.environ.get("SKIPS_AT_MOST", "100000")):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def _skipped(config) -> list:
    return config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])


def pytest_terminal_summary(terminalreporter, config):
    counts = _counts(config)
    for line in config.stash[TALLY]:
        terminalreporter.write_line(line)
    terminalreporter.write_line(describe(counts, bool(HOSTS)), bold=True, yellow=not counts)
    if skipped := Counter(str(report.longrepr[-1]).removeprefix("Skipped: ") for report in _skipped(config)):
        reasons = "; ".join(f"{count} x {reason}" for reason, count in skipped.most_common())
        terminalreporter.write_line(
            f"skipped: {sum(skipped.values())} (with hosts at most {os.environ.get('SKIPS_AT_MOST', 'any')}): {reasons}"
        )
    if os.environ.get("REQUIRE_COMFYUI") == "1" and not counts:
        terminalreporter.write_line("REQUIRE_COMFYUI=1, and no host test ran: this run fails.", red=True, bold=True)
