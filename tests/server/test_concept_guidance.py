"""The workflow of `SafeCFG Concept Guidance` on a real server: the knife goes, the apple stays."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo.judge import Judge
from workflow_format import to_prompt

WORKFLOW = Path(__file__).parents[2] / "workflows" / "concept_guidance.json"


@pytest.fixture(scope="module")
def workflow() -> dict:
    return json.loads(WORKFLOW.read_text(encoding="utf-8"))


def test_every_node_exists_and_every_link_fits(server, workflow):
    info, nodes = server.object_info(), {node["id"]: node for node in workflow["nodes"]}
    assert len(to_prompt(workflow, info)) == len(nodes) - 1  # all but the note
    for number, source, output, target, slot, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"] and nodes[target]["inputs"][slot]["link"] == number
        assert info[nodes[source]["type"]]["output"][output] == kind == nodes[target]["inputs"][slot]["type"]


def test_the_concept_goes_and_the_rest_stays(server, workflow):
    entry = server.post_prompt(to_prompt(workflow, server.object_info()))
    pictures = {}
    for node in workflow["nodes"]:
        if node["type"] == "PreviewImage":
            (file,) = server.files(entry, str(node["id"]))
            pictures[node["title"]] = np.asarray(Image.open(file).convert("RGB"))
    assert len(pictures) == 4
    judge, _ = Judge.load()
    found = {title: judge.names(torch.tensor(p).permute(2, 0, 1)[None].float() / 255)[0] for title, p in pictures.items()}
    assert found["Harmful prompt, plain CFG"] == {"knife", "apple"}
    assert found["Harmful prompt, concept guard"] == {"apple"}
    assert found["Clean prompt, concept guard"] == {"frog", "strawberry"}
    assert "SafeCFG Concept Guidance" not in server.log()  # no warning


def test_presets_methods_and_notices(server, workflow, prompt_error):
    prompt = to_prompt(workflow, server.object_info())
    name = next(key for key, node in prompt.items() if node["class_type"] == "SafeCFG_ConceptGuidance")
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    inputs = prompt[name]["inputs"]
    for widgets in ({"preset": "Max", "method": "CASG"}, {"preset": "custom"}, {"concepts": "weapons: knife\ndrugs: pill"}):
        server.post_prompt({**prompt, name: {**prompt[name], "inputs": {**inputs, **widgets}}})
    with pytest.raises(prompt_error, match="line 2 of the concepts"):
        server.post_prompt({**prompt, name: {**prompt[name], "inputs": {**inputs, "concepts": "weapons: knife\npill"}}})
    hgr = {"class_type": "SafeCFG_LoadHGR", "inputs": {"hgr_name": "demo.safetensors"}}
    server.post_prompt({**prompt, "99": hgr, name: {**prompt[name], "inputs": {**inputs, "hgr": ["99", 0], "method": "CASG"}}})
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["cfg"] = 1.0
    with pytest.raises(prompt_error, match="samples without an unconditional"):
        server.post_prompt({**prompt, name: {**prompt[name], "inputs": {**inputs, "strict": True}}})
