"""What the nodes tell the front end, on every host."""

import asyncio

import pytest
import safecfg
from comfy_api.latest import io
from safecfg.nodes import NODES
from safecfg.nodes.schema import make_input, make_schema

COUNTS = ("harmful_runs", "clean_runs", "calibration_runs")
RUNS = ("run_steps", "batch", "sizes", "samplers", "scheduler", "cfg_min", "cfg_max", "negatives", "seed")


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
            "remember_flagged", "audit_log", "clip", "negative",
        ],
        "SafeCFG_CombineHGR": ["hgr_1", "hgr_2", "hgr_3", "hgr_4"],
        "SafeCFG_DemoModel": [],
        "SafeCFG_PromptBatch": ["clip", "text"],
        "SafeCFG_PromptPairs": [
            "prompt_set", "categories", "pairs_per_category", "clean_prompts", "own_pairs", "own_category", "file", "held_out",
            "seed",
        ],
        "SafeCFG_ConceptGuidance": [
            "model", "clip", "hgr", "method", "preset", "warm_up", "safety_scale", "threshold", "momentum_scale",
            "momentum_beta", "concepts", "strict",
        ],
        "SafeCFG_DetectPromptHarm": ["conditioning", "hgr", "threshold", "categories"],
        "SafeCFG_DetectHarm": [
            "model", "hgr", "negative", "image", "latent", "vae", "positive", "threshold", "categories", "longest_side", "draws",
            "fixed_seed",
        ],
        "SafeCFG_ImageGate": ["images", "mode", "threshold", "blur_cells", "notice", "scores", "flagged"],
        "SafeCFG_RocReport": [
            "hgr", "source", "false_positive_rate", "folder", "longest_side", "harmful_prompts", "clean_prompts", "model", "vae",
            "negative", "clip",
        ],
        "SafeCFG_Report": ["model", "latent"],
        "SafeCFG_RecordGuidance": ["model", "clip", "prompts", "name", *COUNTS, *RUNS, "latent"],
        "SafeCFG_TrainHGR": [
            "model", "clip", "prompts", "name", "train", "condition_steps", "guidance_steps", "learning_rate", "size",
            "false_positive_rate", *COUNTS, *RUNS, "checkpointing", "resume", "latent",
        ],
        "SafeCFG_CheckHGR": [
            "model", "clip", "hgr", "prompts", "harmful_runs", "clean_runs", "false_positive_rate", "save_as", *RUNS, "latent",
        ],
        "SafeCFG_FineTuneSafeLoRA": [
            "model", "clip", "hgr", "vae", "prompts", "images", "latents", "captions", "latent", "text", "file", "name",
            "categories", "rank", "alpha", "layers", "steps", "learning_rate", "runs", "run_steps", "batch", "sizes", "samplers",
            "scheduler", "cfg_min", "cfg_max", "seed", "checkpointing", "resume",
        ],
    }  # fmt: skip
