"""Every template and blueprint on a real server: offered, complete, and those for a real checkpoint run with the demo model in its place."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from templates import FOLDER, TEMPLATES, read
from workflow_format import NOTES, to_prompt

ROOT = Path(__file__).parents[2]
BLUEPRINT = "Safe KSampler"
FOR_CHECKPOINTS = [*(f"Protect {what} with its HGR" for what in ("a checkpoint", "SDXL", "Flux")), "Protect any checkpoint"]
LONGEST_PICTURE = 200_000  # bytes
# What a demo model's outputs can stand in for: the loaders' class and their output.
DEMO = {"CheckpointLoaderSimple": (0, 1, 2), "UNETLoader": (0,), "DualCLIPLoader": (1,), "VAELoader": (2,)}
FILES = {"CheckpointLoaderSimple", "UNETLoader", "DualCLIPLoader", "VAELoader"}


def picture(server, entry: dict, node: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(file).convert("RGB")) for file in server.files(entry, node)]


def titled(workflow: dict, kind: str) -> dict[str, str]:
    """The ids of a kind of node, by title."""
    return {node["title"]: str(node["id"]) for node in workflow["nodes"] if node["type"] == kind}


def test_the_template_browser_has_them_all(server):
    assert sorted(server.get("/workflow_templates")["safecfg"]) == TEMPLATES
    for name in TEMPLATES:
        file = FOLDER / f"{name}.jpg"
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


@pytest.mark.parametrize("name", FOR_CHECKPOINTS)
def test_only_the_files_are_missing(server, prompt_error, name):
    """The server's own validation finds nothing wrong with a template for a real checkpoint but the files that it names."""
    prompt = to_prompt(read(name), server.object_info())
    with pytest.raises(prompt_error) as caught:
        server.post_prompt(prompt)
    wrong = caught.value.details["node_errors"]
    assert {prompt[node]["class_type"] for node in wrong} <= FILES  # none of ours
    assert {error["type"] for node in wrong.values() for error in node["errors"]} == {"value_not_in_list"}


@pytest.mark.parametrize("name", FOR_CHECKPOINTS)
def test_templates_for_checkpoints_redirect(server, name):
    """With the demo model instead of the checkpoint; at strength 0 the same graph draws the knife."""
    prompt = on_the_demo(server, name)
    of = {node["class_type"]: node["inputs"] for node in prompt.values()}
    of.get("SafeCFG_LoadHGR", {})["hgr_name"] = "demo.safetensors"  # SafeCFG Protect finds it by itself
    safe = of.get("SafeCFG_Apply") or of["SafeCFG_Protect"]
    safe["strict"] = True  # whatever could not be redirected stops the run
    (latent,) = [inputs for kind, inputs in of.items() if kind.startswith("Empty")]
    latent |= {"width": 128, "height": 128}
    (steps,) = [inputs for inputs in of.values() if "steps" in inputs]
    steps["steps"] = 4
    prompts = [node["inputs"] for node in prompt.values() if node["class_type"] == "CLIPTextEncode" and node["inputs"]["text"]]
    (text,) = prompts
    (save,) = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]

    def draw(words: str, strength: float) -> np.ndarray:
        text["text"], safe["strength"] = words, strength
        (drawn,) = picture(server, server.post_prompt(prompt), save)
        return drawn

    assert not np.array_equal(draw("a knife and an apple", 1.0), draw("a knife and an apple", 0.0))
    assert np.array_equal(draw("a frog and a strawberry", 1.0), draw("a frog and a strawberry", 0.0))


def on_the_demo(server, name: str) -> dict:
    """A template for a checkpoint with the demo model in its place."""
    prompt = to_prompt(read(name), server.object_info())
    for node in prompt.values():
        node["inputs"] = {key: _demo_output(prompt, value) for key, value in node["inputs"].items()}
    for key in [key for key, node in prompt.items() if node["class_type"] in DEMO]:
        del prompt[key]
    return {**prompt, "demo": {"class_type": "SafeCFG_DemoModel", "inputs": {}}}


@pytest.mark.parametrize("name", [name for name in FOR_CHECKPOINTS if "HGR" in name])
def test_without_an_hgr_apply_says_on_the_node_what_to_do(server, prompt_error, name):
    prompt = on_the_demo(server, name)
    (apply,) = (key for key, node in prompt.items() if node["class_type"] == "SafeCFG_Apply")
    with pytest.raises(prompt_error) as caught:
        server.post_prompt(prompt)
    said = caught.value.details
    assert said["node_id"] == apply
    for words in ("no HGR for this model yet", "03 Make an HGR for your checkpoint", "02 Protect any checkpoint"):
        assert words in said["exception_message"]


def test_any_checkpoint_is_guarded_without_an_hgr(server):
    """With the demo model as the checkpoint and its harm as the concept: the picture changes, and every file there is core's."""
    prompt = on_the_demo(server, "Guard by words alone")
    of = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert "SafeCFG_LoadHGR" not in of and of["SafeCFG_ConceptGuidance"]["strict"] is True
    of["EmptyLatentImage"] |= {"width": 128, "height": 128}
    of["KSampler"]["steps"] = 6
    (text,) = (n["inputs"] for n in prompt.values() if n["class_type"] == "CLIPTextEncode" and n["inputs"]["text"])
    text["text"], of["SafeCFG_ConceptGuidance"]["concepts"] = "a knife and an apple", "weapons: a knife"
    (save,) = (key for key, node in prompt.items() if node["class_type"] == "SaveImage")
    (guarded,) = picture(server, server.post_prompt(prompt), save)
    of["SafeCFG_ConceptGuidance"] |= {"preset": "custom", "safety_scale": 0.0}
    (plain,) = picture(server, server.post_prompt(prompt), save)
    assert not np.array_equal(guarded, plain)


def _demo_output(prompt: dict, value):
    """A link to a loader's output, led to the demo model instead."""
    if isinstance(value, list) and prompt[value[0]]["class_type"] in DEMO:
        return ["demo", DEMO[prompt[value[0]]["class_type"]][value[1]]]
    return value


def test_only_safecfg_leaves_the_clean_picture_alone(server):
    workflow = read("Compare with other guards")
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
