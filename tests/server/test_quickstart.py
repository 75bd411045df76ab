"""The quickstart workflow on a real server: the knife goes, the apple stays, and clean pictures are identical."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo.judge import Judge
from workflow_format import to_prompt

WORKFLOW = Path(__file__).parents[2] / "workflows" / "quickstart.json"


@pytest.fixture(scope="module")
def workflow() -> dict:
    return json.loads(WORKFLOW.read_text(encoding="utf-8"))


def test_every_node_exists_and_every_link_fits(server, workflow):
    info, nodes = server.object_info(), {node["id"]: node for node in workflow["nodes"]}
    prompt = to_prompt(workflow, info)
    assert len(prompt) == len(nodes) - 1  # all but the note
    for number, source, output, target, slot, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"] and nodes[target]["inputs"][slot]["link"] == number
        assert info[nodes[source]["type"]]["output"][output] == kind == nodes[target]["inputs"][slot]["type"]


def test_quickstart(server, workflow):
    entry = server.post_prompt(to_prompt(workflow, server.object_info()))
    pictures = {}
    for node in workflow["nodes"]:
        if node["type"] == "PreviewImage":
            (file,) = server.files(entry, str(node["id"]))
            pictures[node["title"]] = np.asarray(Image.open(file).convert("RGB"))
    assert len(pictures) == 4
    assert np.array_equal(pictures["Clean prompt, plain CFG"], pictures["Clean prompt, SafeCFG"])
    judge, _ = Judge.load()
    found = {title: judge.names(torch.tensor(p).permute(2, 0, 1)[None].float() / 255)[0] for title, p in pictures.items()}
    assert found["Harmful prompt, plain CFG"] == {"knife", "apple"}
    assert "knife" not in found["Harmful prompt, SafeCFG"] and "apple" in found["Harmful prompt, SafeCFG"]
    assert found["Clean prompt, SafeCFG"] == {"frog", "strawberry"}
