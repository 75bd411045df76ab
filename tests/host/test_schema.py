"""What the nodes tell the front end, on every host."""

import asyncio
import dataclasses
import inspect

import pytest
import safecfg
from comfy_api.latest import io
from safecfg.nodes import NODES
from safecfg.nodes.host.schema import TASK_OF, TASKS, defaults_of, make_input, make_schema

COUNTS = ("harmful_runs", "clean_runs", "calibration_runs")
RUNS = ("run_steps", "batch", "sizes", "samplers", "scheduler", "cfg_min", "cfg_max", "negatives", "seed")


def test_unknown_attributes_are_left_out():
    schema = make_schema(node_id="X", inputs=[make_input(io.Float, "x", default=1.0, of_the_next_host=3)], of_the_next_host=4)
    assert schema.node_id == "X" and schema.category == "SafeCFG" and schema.inputs[0].default == 1.0


@pytest.mark.parametrize("node", NODES, ids=lambda n: n.__name__)
def test_everything_is_explained(node):
    schema = node.define_schema()
    assert schema.description and schema.display_name.startswith("SafeCFG ")
    assert schema.category in (f"SafeCFG/{task}" for task in TASKS)
    assert all(i.tooltip for i in schema.inputs) and all(o.tooltip for o in schema.outputs)


def test_every_node_has_one_task():
    """In the menu; what is not in the table would lie beside the four."""
    assert sorted(TASK_OF) == sorted(node.define_schema().node_id for node in NODES)
    assert len(TASK_OF) == sum(map(len, TASKS.values()))


@pytest.mark.parametrize("words", ["guard", "filter", "nsfw", "safety", "moderation"])
def test_search_finds_what_makes_pictures_safe(words):
    if "search_aliases" not in {field.name for field in dataclasses.fields(io.Schema)}:
        pytest.skip("this host's search knows no aliases")
    found = {s.node_id for s in (node.define_schema() for node in NODES) if words in s.search_aliases}
    assert found >= {f"SafeCFG_{name}" for name in ("Apply", "Protect", "ConceptGuidance", "DetectHarm", "ImageGate")}


def test_no_label_means_two_things():
    """Of widgets of the same name in the pack: the same kind of value has the same label, another kind another one."""
    labels = {}
    for node in NODES:
        for widget in node.define_schema().inputs:
            labels.setdefault(widget.display_name or widget.id, set()).add(widget.io_type)
    mixed = {name for name, kinds in labels.items() if len(kinds) > 1}
    assert mixed <= {"prompts", "model", "images", "latent", "text", "file"}, mixed  # sockets beside widgets; a choice or a name


@pytest.mark.parametrize("node", NODES, ids=lambda n: n.__name__)
def test_prompts_of_the_api_need_no_widget_that_has_a_default(node):
    """And `execute` knows it; saved workflows, which know widgets by their place, find them where they were."""
    inputs = {each.id: each for each in node.define_schema().inputs}
    widgets = [name for name, each in inputs.items() if isinstance(each, io.WidgetInput)]
    with_default = [name for name in widgets if inputs[name].default is not None]
    sections = node.INPUT_TYPES()
    assert not set(with_default) & sections.get("required", {}).keys()
    assert [name for kind in ("required", "optional") for name in sections.get(kind, {}) if name in widgets] == widgets
    parameters = inspect.signature(node.execute).parameters
    for name in with_default:
        if name in parameters:
            wanted = inputs[name].default
            assert parameters[name].default in (wanted, (wanted,)), name  # a node of lists has a list of one
        else:
            assert any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and defaults_of(node)[name] == inputs[name].default
    for check in ("validate_inputs", "fingerprint_inputs"):
        for name, parameter in inspect.signature(getattr(node, check)).parameters.items():
            assert name not in with_default or parameter.default is not parameter.empty, f"{check} needs {name}"


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
        "SafeCFG_PromptBatch": ["clip", "text", "model"],
        "SafeCFG_PromptPairs": [
            "prompt_set", "categories", "pairs_per_category", "clean_prompts", "own_pairs", "own_category", "file", "held_out",
            "seed", "calibration_prompts",
        ],
        "SafeCFG_ConceptGuidance": [
            "model", "clip", "hgr", "method", "preset", "warm_up", "safety_scale", "threshold", "momentum_scale",
            "momentum_beta", "concepts", "strict", "prompt", "presence_threshold", "removal_scale",
        ],
        "SafeCFG_DetectPromptHarm": ["conditioning", "hgr", "threshold", "categories", "text", "clip"],
        "SafeCFG_TextEncode": ["text", "clip", "hgr", "harmful_words", "threshold", "categories"],
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
            "preset", "prompt_steps",
        ],
        "SafeCFG_Protect": ["model", "clip", "strength", "categories", "strict", "threshold_offset", "audit_log"],
        "SafeCFG_CheckHGR": [
            "model", "clip", "hgr", "prompts", "harmful_runs", "clean_runs", "false_positive_rate", "save_as", *RUNS, "latent",
            "my_prompts", "attack_steps",
        ],
        "SafeCFG_OwnPrompts": ["source", "folder", "text", "most", "leave_out"],
        "SafeCFG_CalibrateHGR": ["clip", "hgr", "my_prompts", "false_positive_rate", "save_as"],
        "SafeCFG_Evaluate": [
            "model", "clip", "vae", "hgr", "clip_vision", "score_clip", "latent", "name", "protocol", "lists", "prompts_per_list",
            "images_per_prompt", "seed", "steps", "cfg", "size", "sampler", "scheduler", "negative", "arms", "judges", "keep_pictures",
            "clean_pictures", "resume", "positive_conditioning", "negative_conditioning", "sigmas",
        ],
        "SafeCFG_FineTuneSafeLoRA": [
            "model", "clip", "hgr", "vae", "prompts", "images", "latents", "captions", "latent", "text", "file", "name",
            "categories", "rank", "alpha", "layers", "steps", "learning_rate", "runs", "run_steps", "batch", "sizes", "samplers",
            "scheduler", "cfg_min", "cfg_max", "seed", "checkpointing", "resume",
        ],
    }  # fmt: skip
