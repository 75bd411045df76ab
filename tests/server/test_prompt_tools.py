"""The templates for prompts on a real server: harmful words are found and left out, and alarms on one's own prompts are counted."""

import json

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from templates import read
from workflow_format import to_prompt


def node_of(workflow: dict, title: str) -> str:
    return next(str(node["id"]) for node in workflow["nodes"] if node.get("title") == title)


def shown(entry: dict, node: str) -> str:
    """What a PreviewAny node shows."""
    return entry["outputs"][node]["text"][0]


def drawn(server, workflow: dict, text: str) -> tuple[dict, np.ndarray]:
    prompt = to_prompt(workflow, server.object_info())
    prompt[node_of(workflow, "Prompt")]["inputs"]["value"] = text
    entry = server.post_prompt(prompt)
    return entry, np.asarray(Image.open(server.files(entry, node_of(workflow, "Picture"))[0]).convert("RGB"))


def test_harmful_words_are_taken_out(server):
    workflow = read("Take harmful words out")
    entry, safe = drawn(server, workflow, "a knife and an apple")
    assert shown(entry, node_of(workflow, "The prompt that is drawn")) == "an apple"
    assert shown(entry, node_of(workflow, "In words")).startswith("harmful by: knife")
    assert np.array_equal(drawn(server, workflow, "an apple")[1], safe)
    entry, _ = drawn(server, workflow, "a frog and a strawberry")
    assert shown(entry, node_of(workflow, "The prompt that is drawn")) == "a frog and a strawberry"
    assert shown(entry, node_of(workflow, "In words")).startswith("clean")


def test_own_prompts_and_the_prompts_of_own_pictures(server):
    workflow = read("Calibrate on your own prompts")
    prompt = to_prompt(workflow, server.object_info())
    report = node_of(workflow, "How many are flagged, and which")
    assert "1 of 6 of your prompts are flagged" in shown(server.post_prompt(prompt), report)
    mine = next(node for node in prompt.values() if node["class_type"] == "SafeCFG_OwnPrompts")
    folder = server.base / "output" / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    graph = {"1": {"inputs": {"positive": ["2", 0], "negative": ["2", 0]}}, "2": {"inputs": {"text": "a pistol and a car"}}}
    about = PngInfo()
    about.add_text("prompt", json.dumps(graph))
    Image.new("RGB", (8, 8)).save(folder / "a.png", pnginfo=about)
    mine["inputs"] |= {"source": "my pictures", "folder": "mine"}
    assert "1 of 1 of your prompts are flagged" in shown(server.post_prompt(prompt), report)
