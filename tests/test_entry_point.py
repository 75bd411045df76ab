"""The root entry point where the pack cannot load: with enforcement asked for, nothing may run."""

import asyncio
import importlib.util
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def handlers(monkeypatch):
    """The prompt handlers of a server that has started; the pack's nodes cannot be imported (no ComfyUI here)."""
    found = []
    server = types.SimpleNamespace(add_on_prompt_handler=found.append)
    monkeypatch.setitem(sys.modules, "server", types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server)))
    return found


def load_pack(monkeypatch):
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    monkeypatch.setitem(sys.modules, "pack", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def test_a_server_that_enforces_refuses_everything_without_the_pack(monkeypatch, handlers):
    monkeypatch.setenv("SAFECFG_ENFORCE", "my_hgr.safetensors")
    with pytest.raises(ImportError):
        asyncio.run(load_pack(monkeypatch).comfy_entrypoint())
    assert [handle({"prompt": {"1": {"class_type": "KSampler"}}}) for handle in handlers] == [{"prompt": {}}]


def test_other_servers_are_left_alone(monkeypatch, handlers):
    monkeypatch.delenv("SAFECFG_ENFORCE", raising=False)
    with pytest.raises(ImportError):
        asyncio.run(load_pack(monkeypatch).comfy_entrypoint())
    assert handlers == []
