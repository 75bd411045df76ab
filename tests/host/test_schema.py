"""What the nodes tell the front end, on every host."""

import asyncio

import pytest
import safecfg
from comfy_api.latest import io
from safecfg.nodes import NODES
from safecfg.nodes.schema import make_input, make_schema


def test_unknown_attributes_are_left_out():
    schema = make_schema(node_id="X", inputs=[make_input(io.Float, "x", default=1.0, of_the_next_host=3)], of_the_next_host=4)
    assert schema.node_id == "X" and schema.category == "SafeCFG" and schema.inputs[0].default == 1.0


@pytest.mark.parametrize("node", NODES, ids=lambda n: n.__name__)
def test_everything_is_explained(node):
    schema = node.define_schema()
    assert schema.description and schema.display_name.startswith("SafeCFG ")
    assert all(i.tooltip for i in schema.inputs) and all(o.tooltip for o in schema.outputs)


def test_the_order_of_widgets_is_stable():
    """Saved workflows store widget values by position: append, never insert."""
    asyncio.run(safecfg.comfy_entrypoint())
    names = {node.define_schema().node_id: [i.id for i in node.define_schema().inputs] for node in NODES}
    assert names == {
        "SafeCFG_LoadHGR": ["hgr_name"],
        "SafeCFG_Apply": [
            "model", "hgr", "strength", "threshold_offset", "start_percent", "end_percent", "redirect", "categories", "strict",
            "remember_flagged", "audit_log", "clip",
        ],
        "SafeCFG_DemoModel": [],
        "SafeCFG_PromptBatch": ["clip", "text"],
    }  # fmt: skip
