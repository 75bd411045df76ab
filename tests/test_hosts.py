"""Runs every file of tests/host inside each ComfyUI host: one test here per file, with the outcomes inside it."""

from collections import Counter

import pytest

from comfy_hosts import TALLY
from inner_runs import FILES, InnerRun


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
