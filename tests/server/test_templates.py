"""Every template and blueprint on a real server: offered, complete, and those for a real checkpoint run with the demo model in its place."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workflow_format import NOTES, to_prompt

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
BLUEPRINT = "Safe KSampler"
LONGEST_PICTURE = 200_000  # bytes
# What a demo model's outputs can stand in for: the loaders' class and their output.
DEMO = {"CheckpointLoaderSimple": (0, 1, 2), "UNETLoader": (0,), "DualCLIPLoader": (1,), "VAELoader": (2,)}
FILES = {"CheckpointLoaderSimple", "UNETLoader", "DualCLIPLoader", "VAELoader", "SafeCFG_LoadHGR"}


def read(name: str, folder: str = "workflows") -> dict:
    return json.loads((ROOT / folder / f"{name}.json").read_text(encoding="utf-8"))


def picture(server, entry: dict, node: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(file).convert("RGB")) for file in server.files(entry, node)]


def titled(workflow: dict, kind: str) -> dict[str, str]:
    """The ids of a kind of node, by title."""
    return {node["title"]: str(node["id"]) for node in workflow["nodes"] if node["type"] == kind}


def test_the_template_browser_has_them_all(server):
    assert sorted(server.get("/workflow_templates")["safecfg"]) == TEMPLATES
    for name in TEMPLATES:
        file = ROOT / "workflows" / f"{name}.jpg"
        assert file.stat().st_size < LONGEST_PICTURE and Image.open(file).format == "JPEG"


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_node_exists_and_every_link_fits(server, name):
    workflow, info = read(name), server.object_info()
    nodes = {node["id"]: node for node in workflow["nodes"]}
    kinds = Counter(node["type"] for node in nodes.values())
    assert kinds["MarkdownNote"] == 1 and workflow["groups"] and kinds.keys() - NOTES <= info.keys()
    for number, source, output, target, slot, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"] and nodes[target]["inputs"][slot]["link"] == number
        assert info[nodes[source]["type"]]["output"][output] == kind and nodes[target]["inputs"][slot]["type"] in (kind, "*")


@pytest.mark.parametrize("name", ["safe_checkpoint", "safe_sdxl", "safe_flux"])
def test_only_the_files_are_missing(server, prompt_error, name):
    """The server's own validation finds nothing wrong with a template for a real checkpoint but the files that it names."""
    prompt = to_prompt(read(name), server.object_info())
    with pytest.raises(prompt_error) as caught:
        server.post_prompt(prompt)
    wrong = caught.value.details["node_errors"]
    assert {prompt[node]["class_type"] for node in wrong} <= FILES
    kinds = {error["type"] for node in wrong.values() for error in node["errors"]}
    assert kinds == {"value_not_in_list", "custom_validation_failed"}  # the latter: SafeCFG Load HGR says what there is


@pytest.mark.parametrize("name", ["safe_checkpoint", "safe_sdxl", "safe_flux"])
def test_templates_for_checkpoints_redirect(server, name):
    """With the demo model instead of the checkpoint; at strength 0 the same graph draws the knife."""
    prompt = to_prompt(read(name), server.object_info())
    for node in prompt.values():
        node["inputs"] = {key: _demo_output(prompt, value) for key, value in node["inputs"].items()}
    loaders = [key for key, node in prompt.items() if node["class_type"] in DEMO]
    for key in loaders:
        del prompt[key]
    prompt["demo"] = {"class_type": "SafeCFG_DemoModel", "inputs": {}}
    of = {node["class_type"]: node["inputs"] for node in prompt.values()}
    of["SafeCFG_LoadHGR"]["hgr_name"] = "demo.safetensors"
    of["SafeCFG_Apply"]["strict"] = True  # whatever could not be redirected stops the run
    (latent,) = [inputs for kind, inputs in of.items() if kind.startswith("Empty")]
    latent |= {"width": 128, "height": 128}
    (steps,) = [inputs for inputs in of.values() if "steps" in inputs]
    steps["steps"] = 4
    prompts = [node["inputs"] for node in prompt.values() if node["class_type"] == "CLIPTextEncode" and node["inputs"]["text"]]
    (text,) = prompts
    (save,) = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]

    def draw(words: str, strength: float) -> np.ndarray:
        text["text"], of["SafeCFG_Apply"]["strength"] = words, strength
        (drawn,) = picture(server, server.post_prompt(prompt), save)
        return drawn

    assert not np.array_equal(draw("a knife and an apple", 1.0), draw("a knife and an apple", 0.0))
    assert np.array_equal(draw("a frog and a strawberry", 1.0), draw("a frog and a strawberry", 0.0))


def _demo_output(prompt: dict, value):
    """A link to a loader's output, led to the demo model instead."""
    if isinstance(value, list) and prompt[value[0]]["class_type"] in DEMO:
        return ["demo", DEMO[prompt[value[0]]["class_type"]][value[1]]]
    return value


def test_only_safecfg_leaves_the_clean_picture_alone(server):
    workflow = read("compare_guards")
    prompt, previews = to_prompt(workflow, server.object_info()), titled(workflow, "PreviewImage")
    samplers = [node["inputs"] for node in prompt.values() if node["class_type"] == "KSampler"]
    assert len(samplers) == 4 and len({(s["seed"], s["steps"], s["cfg"]) for s in samplers}) == 1
    for sampler in samplers:
        sampler["steps"] = 8
    entry = server.post_prompt(prompt)
    harmful, clean = zip(
        *(picture(server, entry, previews[title]) for title in ("Plain CFG", "SLD", "CASG", "SafeCFG")), strict=True
    )
    assert [np.array_equal(each, clean[0]) for each in clean] == [True, False, False, True]
    assert not any(np.array_equal(each, harmful[0]) for each in harmful[1:])


def test_the_blueprint_is_offered_and_complete(server):
    if not (server.host.path / "app" / "subgraph_manager.py").is_file():
        pytest.skip(f"{server.host.name} knows no blueprints")
    found = {
        entry["name"]: key
        for key, entry in server.get("/global_subgraphs").items()
        if entry["info"]["node_pack"].endswith("safecfg")
    }
    assert set(found) == {path.stem for path in (ROOT / "subgraphs").glob("*.json")} == {BLUEPRINT}
    blueprint, info = json.loads(server.get(f"/global_subgraphs/{found[BLUEPRINT]}")["data"]), server.object_info()
    (outer,), (graph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert outer["type"] == graph["id"] and [i["name"] for i in outer["inputs"]] == [i["name"] for i in graph["inputs"]]
    nodes = {node["id"]: node for node in graph["nodes"]}
    for node in nodes.values():
        expected = [name for kind in ("required", "optional") for name in info[node["type"]]["input"].get(kind, {})]
        assert sorted(i["name"] for i in node["inputs"]) == sorted(expected)
        assert len(node["widgets_values"]) == sum("widget" in i for i in node["inputs"]) + (
            node["type"] == "KSampler"
        )  # its seed has two
    for link in graph["links"]:
        if link["target_id"] in nodes:
            target = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert target["link"] == link["id"] and target["type"] == link["type"]
    assert [o["type"] for o in graph["outputs"]] == info["KSampler"]["output"]
