"""Server-wide enforcement, the prompt handler: whatever goes wrong, nothing runs without SafeCFG."""

import copy
import types

import pytest
from safecfg.nodes.enforcement import enforce, settings
from safecfg.nodes.enforcement.enforced_graph import rewrite

import nodes as core
from enforce_fakes import CLASSES, node, save_hgr, unguarded, workflow
from fakes import make_hgr


class Server:
    """As much of PromptServer as the handler meets."""

    def __init__(self):
        self.on_prompt_handlers = []

    def add_on_prompt_handler(self, handler):
        self.on_prompt_handlers.append(handler)

    def trigger(self, request):
        """As core does, which swallows what a handler raises."""
        for handler in self.on_prompt_handlers:
            try:
                request = handler(request)
            except Exception:
                continue
        return request


@pytest.fixture
def start(monkeypatch, tmp_path):
    """`start(value, allow="")`: a server started with these environment variables; value None: unset, "good": an HGR file."""
    monkeypatch.setattr(core, "NODE_CLASS_MAPPINGS", CLASSES)

    def make(value, allow=""):
        server = Server()
        if value is None:
            monkeypatch.delenv(settings.VARIABLE, raising=False)
        else:
            good = str(save_hgr(tmp_path / "good", make_hgr()))
            monkeypatch.setenv(settings.VARIABLE, value.replace("good", good))
        monkeypatch.setenv(settings.ALLOW, allow)
        monkeypatch.setattr(enforce, "current_server", lambda: server)
        settings.enforcement.cache_clear()
        enforce.register()
        enforce.register()
        return server

    yield make
    settings.enforcement.cache_clear()


def reason_of(request: dict) -> str:
    """Why a request was refused: the text with which its only node fails validation."""
    (refused,) = request["prompt"].values()
    assert refused["class_type"] == "SafeCFG_Refused" and set(request) == {"prompt"}
    reason = enforce.Refused.validate_inputs(**refused["inputs"])
    assert isinstance(reason, str) and reason
    return reason


def test_nothing_happens_without_the_variable(start):
    server = start(None)
    assert server.on_prompt_handlers == [] and enforce.extra_nodes() == []


def test_every_prompt_is_rewritten(start):
    server = start("good")
    assert server.on_prompt_handlers == [enforce.handle] and len(enforce.extra_nodes()) == 4
    request = {"prompt": workflow(), "client_id": "x", "extra_data": {"a": 1}, "partial_execution_targets": ["6"]}
    answer = server.trigger(copy.deepcopy(request))
    assert answer == {**request, "prompt": rewrite(request["prompt"], CLASSES)}
    assert server.trigger({"no prompt": 1}) == {"no prompt": 1}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "empty"),
        (" , ", "empty"),
        ("gone.safetensors", "no HGR 'gone.safetensors'"),
        ("good,gone", "no HGR 'gone'"),
        ("good,good", "twice"),
    ],
)
def test_a_wrong_variable_lets_nothing_run(start, caplog, value, reason):
    """Clients are told that nothing runs; the reason, which may name files, is for the log."""
    assert "Its log says why" in reason_of(start(value).trigger({"prompt": workflow()}))
    assert reason in caplog.text


def test_failures_refuse_the_prompt(start, monkeypatch):
    server = start("good")
    deep = []
    for _ in range(5000):
        deep = [deep]
    for prompt in (None, [], 3, {"1": node("X", x=deep)}, {"1": {"class_type": "TheirSampler", "inputs": {}}}):
        assert reason_of(server.trigger({"prompt": prompt, "partial_execution_targets": ["1"]}))
    assert reason_of(server.trigger([1]))
    monkeypatch.setattr(enforce, "rewrite", lambda *a: 1 / 0)
    assert "could not be checked (ZeroDivisionError" in reason_of(server.trigger({"prompt": workflow()}))


def test_allow_names_nodes_and_packs(start):
    prompt = {"prompt": workflow(n4=node("TheirSampler", model=["1", 0]))}
    assert "TheirSampler" in reason_of(start("good").trigger(copy.deepcopy(prompt)))
    for allow in ("TheirSampler", "x, their-pack"):
        assert unguarded(start("good", allow).trigger(copy.deepcopy(prompt))["prompt"]) == []


def test_handlers_of_other_packs_come_before(start):
    """One that is registered later could put a bare MODEL back: what it made is looked at again."""
    server = start("good")
    server.add_on_prompt_handler(lambda request: {"prompt": workflow()})
    for _ in range(2):
        assert unguarded(server.trigger({"prompt": {}})["prompt"]) == []
        assert server.on_prompt_handlers[-1] is enforce.handle and len(server.on_prompt_handlers) == 3


def test_renamed_nodes_are_seen_as_what_they_become(start):
    server = start("good")

    def apply_replacements(prompt):
        prompt["4"]["class_type"] = "TheirSampler"

    server.node_replace_manager = types.SimpleNamespace(apply_replacements=apply_replacements)
    assert "TheirSampler" in reason_of(server.trigger({"prompt": workflow(n4=node("OldName", model=["1", 0]))}))


def test_an_hgr_may_be_named_without_its_ending(start):
    start("demo")
    state = settings.enforcement()
    assert state.problem == "" and state.hgrs[0].path.endswith("demo.safetensors") and state.judge


def test_a_file_that_changes_after_the_start_changes_nothing(start, tmp_path):
    start("good")
    before = enforce.enforcement().hgrs[0]
    (tmp_path / "good.safetensors").write_bytes(b"x")
    assert enforce.enforcement().hgrs[0] is before
