"""The pack as ComfyUI meets it."""

import asyncio
import importlib
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import safecfg

PACK = Path(safecfg.__path__[0])


def test_comfy_is_the_host_and_not_the_pack():
    import nodes  # our own nodes/ must not shadow it

    assert hasattr(nodes, "KSampler") and nodes.__file__.endswith("nodes.py")


def test_entry_point_gives_v3_nodes():
    from comfy_api.latest import ComfyExtension, io

    extension = asyncio.run(safecfg.comfy_entrypoint())
    assert isinstance(extension, ComfyExtension)
    nodes = asyncio.run(extension.get_node_list())
    assert nodes and all(issubclass(node, io.ComfyNode) for node in nodes)
    ids = [node.GET_SCHEMA().node_id for node in nodes]
    assert len(set(ids)) == len(ids) and all(i.startswith("SafeCFG_") for i in ids)


@pytest.mark.parametrize("name", ["hgr_models", "nodes", "demo"])
def test_no_second_copy_of_the_pack_is_loaded(name):
    """Absolute imports inside the pack would pick up ComfyUI's own `nodes`, or another pack's folders."""
    asyncio.run(safecfg.comfy_entrypoint())
    module = sys.modules.get(name)
    assert module is None or not str(module.__file__).startswith(str(safecfg.__path__[0]))


def test_every_module_imports_without_the_repository(tmp_path):
    """From a copy of what the registry's archive has of code: nothing may need `tests` or `benchmarks`."""
    for folder in ("nodes", "hgr_models", "demo"):
        shutil.copytree(PACK / folder, tmp_path / folder, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    shutil.copyfile(PACK / "__init__.py", tmp_path / "__init__.py")
    spec = importlib.util.spec_from_file_location("packed", tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)])
    before = set(sys.modules)
    try:
        sys.modules["packed"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["packed"])
        paths = [path.relative_to(tmp_path).with_suffix("").parts for path in sorted((tmp_path / "nodes").rglob("*.py"))]
        for parts in paths:
            importlib.import_module(".".join(("packed", *parts)).removesuffix(".__init__"))
        assert len(paths) > 50 and not {"tests", "benchmarks"} & (set(sys.modules) - before)
    finally:
        for name in [name for name in sys.modules if name == "packed" or name.startswith("packed.")]:
            del sys.modules[name]
