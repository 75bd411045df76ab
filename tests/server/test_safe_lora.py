"""The safe-LoRA workflow on a real server: train, save, load with core's own loader, and draw what the preview showed."""

import copy
import json
import re

import numpy as np
import pytest
from PIL import Image

from templates import path_of
from workflow_format import to_prompt

WORKFLOW = path_of("Fine-tune a safe LoRA")
SMALL = {
    "text": "a knife and an apple\na dog", "name": "server_lora", "steps": 12, "learning_rate": 0.01, "runs": 3, "run_steps": 2, "batch": 2,
    "cfg_min": 5.0, "cfg_max": 5.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def workflow() -> dict:
    return json.loads(WORKFLOW.read_text(encoding="utf-8"))


def prompt_of(workflow: dict, info: dict) -> dict:
    """Hosts without Load LoRA Model's `bypass` leave its value out, as their front end does."""
    workflow = copy.deepcopy(workflow)
    for node in workflow["nodes"]:
        if node["type"] == "LoraModelLoader" and "bypass" not in info["LoraModelLoader"]["input"]["required"]:
            del node["widgets_values"][1]
    return to_prompt(workflow, info)


def picture(server, entry: dict, node: str) -> np.ndarray:
    (file,) = server.files(entry, node)
    return np.asarray(Image.open(file).convert("RGB"))


def test_every_node_exists_and_every_link_fits(server, workflow):
    info, nodes = server.object_info(), {node["id"]: node for node in workflow["nodes"]}
    assert len(prompt_of(workflow, info)) == len(nodes) - 1  # all but the note
    for number, source, output, target, slot, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"] and nodes[target]["inputs"][slot]["link"] == number
        assert info[nodes[source]["type"]]["output"][output] == kind
        assert nodes[target]["inputs"][slot]["type"] in (kind, "*")


def test_trained_saved_and_loaded_it_draws_what_the_preview_shows(server, workflow):
    prompt = prompt_of(workflow, server.object_info())
    by_class = lambda kind: [key for key, node in prompt.items() if node["class_type"] == kind]  # noqa: E731
    (tune,), (_, negative) = by_class("SafeCFG_FineTuneSafeLoRA"), by_class("CLIPTextEncode")
    prompt[tune]["inputs"] |= SMALL
    for key in by_class("KSampler"):
        prompt[key]["inputs"]["steps"] = 2
    entry = server.post_prompt(prompt)
    above, below = np.split(picture(server, entry, "4"), 2)
    assert above.shape == (128, 128, 3) and not np.array_equal(above, below)  # `a dog` alone is clean
    assert (server.base / "models" / "loras" / "server_lora.safetensors").is_file()
    report = "".join(entry["outputs"]["5"]["text"])
    assert re.search("judged [12] of 3 samples harmful: weapons [12], drugs 0, death 0", report)  # one run follows the LoRA
    assert "from their safe target" in report

    source = prompt[tune]["inputs"]
    sampler = {
        "positive": ["20", 0], "negative": [negative, 0], "latent_image": ["9", 0], "seed": source["seed"], "steps": 20, "cfg": 5.0,
        "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
    }  # fmt: skip
    again = {key: prompt[key] for key in ("1", "9", negative)}
    again["20"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a dog"}}
    loader = {"model": ["1", 0], "lora_name": "server_lora.safetensors", "strength_model": 1.0}
    again["21"] = {"class_type": "LoraLoaderModelOnly", "inputs": loader}
    again["22"] = {"class_type": "LoraLoaderModelOnly", "inputs": {**loader, "strength_model": 0.0}}
    for key, model in (("30", "21"), ("40", "22")):
        again[key] = {"class_type": "KSampler", "inputs": {**sampler, "model": [model, 0]}}
        again[f"{key}1"] = {"class_type": "VAEDecode", "inputs": {"samples": [key, 0], "vae": ["1", 2]}}
        again[f"{key}2"] = {"class_type": "PreviewImage", "inputs": {"images": [f"{key}1", 0]}}
    entry = server.post_prompt(again)
    assert np.array_equal(picture(server, entry, "302"), below) and np.array_equal(picture(server, entry, "402"), above)


def test_a_wrong_input_fails_with_one_sentence(server, workflow, prompt_error):
    prompt = prompt_of(workflow, server.object_info())
    (tune,) = [key for key, node in prompt.items() if node["class_type"] == "SafeCFG_FineTuneSafeLoRA"]
    prompt[tune]["inputs"] |= {**SMALL, "text": ""}
    with pytest.raises(prompt_error, match="Expected at least one prompt"):
        server.post_prompt(prompt)
