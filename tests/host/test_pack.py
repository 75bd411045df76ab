"""The pack as ComfyUI meets it."""

import asyncio
import sys

import pytest
import safecfg


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
