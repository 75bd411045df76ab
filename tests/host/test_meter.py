"""The live meter's messages: when they are sent, what they say, and that nobody waits for them."""

import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfy_api.latest import io
from comfy_execution.utils import CurrentNodeContext
from safecfg.nodes import NODES
from safecfg.nodes.reporting import meter
from safecfg.nodes.reporting.run_log import Lagged

from fakes import apply_hgr, sample


class FrontEnd:
    """A server with a connected client; keeps the messages."""

    def __init__(self, monkeypatch, client="me", listening=("me",), seconds=1.0):
        self.client_id, self.sockets, self.messages = client, dict.fromkeys(listening), []
        monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=self)))
        clock = itertools.count(1.0, seconds)
        monkeypatch.setattr(meter, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def send_sync(self, event, data, sid):
        assert event == "safecfg.meter" and sid == self.client_id
        self.messages.append(data)


def test_the_meter_lags_a_step_and_ends_complete(tiny_model, tiny_cond, monkeypatch):
    front_end = FrontEnd(monkeypatch)
    model = apply_hgr(tiny_model, node_id="12")
    with CurrentNodeContext("prompt", "8"):
        sample(model, tiny_cond(1), tiny_cond(2), steps=6)
    first, *live, last = front_end.messages
    assert all(m["node"] == "12" and m["sampler"] == "8" and m["prompt_id"] == "prompt" for m in front_end.messages)
    assert len({m["run"] for m in front_end.messages}) == 1 and first["categories"] == ["red", "blue"] and first["steps"] == 6
    assert first["series"] == [] and first["prompt_redirected"] == [True, True] and all(0 < p < 1 for p in first["prompt"])
    assert [m["series"][0]["step"] for m in live] == [1, 2, 3, 4, 5]
    assert last["done"] and [reading["step"] for reading in last["series"]] == [1, 2, 3, 4, 5, 6]
    assert [m["series"][0] for m in live] == last["series"][:5] and last["redirected_images"] == last["images"] == 1
    sample(model, tiny_cond(1), tiny_cond(2), steps=6)
    assert front_end.messages[-1]["run"] != last["run"] and front_end.messages[-1]["sampler"] is None


def test_the_meter_is_throttled(tiny_model, tiny_cond, monkeypatch):
    front_end = FrontEnd(monkeypatch, seconds=0.001)
    sample(apply_hgr(tiny_model, node_id="12", redirect="guidance"), tiny_cond(1), tiny_cond(2), steps=20)
    assert len(front_end.messages) == 2 and front_end.messages[-1]["done"]


@pytest.mark.parametrize("client", [None, "gone"])
def test_without_a_front_end_nothing_is_read(tiny_model, tiny_cond, monkeypatch, client):
    front_end = FrontEnd(monkeypatch, client)
    model = apply_hgr(tiny_model, node_id="12")
    with monkeypatch.context() as patch:
        patch.setattr(Lagged, "put", None)
        sample(model, tiny_cond(1), tiny_cond(2))
    assert not front_end.messages
    monkeypatch.delitem(sys.modules, "server")
    sample(model, tiny_cond(1), tiny_cond(2))


def test_the_meter_changes_nothing(tiny_model, tiny_cond, monkeypatch):
    model = apply_hgr(tiny_model, node_id="12")
    quiet = sample(model, tiny_cond(1), tiny_cond(2))
    FrontEnd(monkeypatch)
    assert torch.equal(sample(model, tiny_cond(1), tiny_cond(2)), quiet)


def test_the_front_end_shows_a_meter_on_every_node_that_sends_one():
    """Those that put SafeCFG into a MODEL and know their own id."""
    script = (Path(__file__).parents[2] / "web" / "js" / "meter.js").read_text(encoding="utf-8")
    shown = set(re.findall(r'"(SafeCFG_\w+)"', re.search(r"const NODES = new Set\((.*?)\);", script)[1]))
    schemas = [node.GET_SCHEMA() for node in NODES]
    sending = {
        s.node_id
        for s in schemas
        if io.Hidden.unique_id in (s.hidden or ()) and s.outputs[:1] and s.outputs[0].io_type == "MODEL"
    }
    assert shown == sending and "SafeCFG_Protect" in shown
