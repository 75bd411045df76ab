"""The line that every run ends with: in the log, and on the sampler where no SafeCFG Apply has a meter."""

import logging
import sys
from types import SimpleNamespace

import pytest
from comfy_execution.utils import CurrentNodeContext
from safecfg.nodes.enforcement.enforced_model import enforced
from safecfg.nodes.host.hooks import SafeCFGError

from fakes import ALWAYS, NEVER, KnownRedirection, Once, apply_hgr, guide, make_hgr, sample
from test_guiders import basic_guider


@pytest.fixture
def lines(caplog):
    """`lines()`: the INFO lines since the last call."""
    caplog.set_level(logging.INFO, logger="safecfg")

    def take() -> list[str]:
        found = [r.message for r in caplog.records if r.levelno == logging.INFO]
        caplog.clear()
        return found

    return take


BOTH, NONE = "1 of 1 image redirected: red (prompt, guidance), blue (prompt, guidance)", "nothing redirected in 1 image"


@pytest.mark.parametrize(
    ("condition", "guidance", "says"),
    [
        (ALWAYS, ALWAYS, BOTH),
        (ALWAYS, NEVER, "1 of 1 image redirected: red (prompt), blue (prompt)"),
        (NEVER, ALWAYS, "1 of 1 image redirected: red (guidance), blue (guidance)"),
        (NEVER, NEVER, NONE),
    ],
)
def test_a_run_says_what_it_did(tiny_model, tiny_cond, lines, condition, guidance, says):
    model = apply_hgr(tiny_model, make_hgr(condition, guidance), node_id="6")
    with CurrentNodeContext("prompt", "8"):
        sample(model, tiny_cond(1), tiny_cond(2), steps=2)
        sample(model, tiny_cond(1), tiny_cond(2), steps=2)
    assert lines() == [f"SafeCFG (SafeCFG Apply 6, sampler 8): {says}"] * 2


def test_it_says_what_could_not_be_redirected_and_what_was_stopped(tiny_model, tiny_cond, lines):
    guide(basic_guider(apply_hgr(tiny_model, make_hgr(NEVER, NEVER)), tiny_cond), Once())
    (line,) = lines()
    assert line.startswith(f"SafeCFG: {NONE}; NOT REDIRECTED: Guider_Basic has no negative prompt")
    with pytest.raises(SafeCFGError):
        guide(basic_guider(apply_hgr(tiny_model, strict=True), tiny_cond), Once())
    (line,) = lines()
    assert line.startswith("SafeCFG: the run was stopped: SafeCFG (strict): Guider_Basic has no negative prompt")


def test_an_enforced_run_shows_it_on_the_sampler(tiny_model, tiny_cond, monkeypatch, lines):
    sent = []
    server = SimpleNamespace(client_id="me", sockets={"me": 1}, send_progress_text=lambda *args: sent.append(args))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    with CurrentNodeContext("prompt", "8"):
        sample(enforced(tiny_model, [make_hgr()]), tiny_cond(1), tiny_cond(2), steps=2)
    assert lines() == [f"SafeCFG (sampler 8): {BOTH}"] and sent == [(f"SafeCFG: {BOTH}", "8", "me")]


def test_images_of_a_batch_are_counted(tiny_model, tiny_cond, monkeypatch, lines):
    KnownRedirection(monkeypatch, rows={1})
    sample(apply_hgr(tiny_model, redirect="guidance"), tiny_cond(1), tiny_cond(2), steps=2, batch=3)
    assert lines() == ["SafeCFG: 1 of 3 images redirected: red (guidance), blue (guidance)"]
