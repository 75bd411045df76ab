"""Detecting nodes, the gate and the report on a real server: workflows, lists between nodes, blocked branches, errors."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import world
from demo.detection import render_scenes
from hgr_models import load_hgr, save_hgr
from templates import read
from workflow_format import to_prompt

ROOT = Path(__file__).parents[2]
WORKFLOWS = ("Detect harm in pictures", "Hold back harmful pictures")
NAME = "calibrated.safetensors"
DETECT = {"threshold": 0.0, "categories": "", "longest_side": 0, "draws": 1, "fixed_seed": 0}


@pytest.fixture
def hgr(server) -> str:
    """The demo's HGR with known thresholds for pictures."""
    network = load_hgr(ROOT / "hgr_models" / "weights" / "demo.safetensors")
    network.calibrate(dataclasses.replace(network.info, picture_thresholds=(0.5,) * len(network.info.categories)))
    save_hgr(server.base / "models" / "hgr" / NAME, network)
    return NAME


@pytest.fixture
def pictures(server) -> list[str]:
    """Two pictures of the demo world in the server's input folder: a harmful one and a clean one, of odd sizes."""
    rendered, _ = render_scenes([("knife", "apple"), ("frog", "strawberry")], random.Random(0))
    names = []
    for i, (picture, size) in enumerate(zip(rendered, ((131, 150), (131, 150)), strict=True)):
        names.append(f"picture{i}.png")
        Image.fromarray(picture).resize(size).save(server.base / "input" / names[-1])
    return names


def graph(hgr: str, pictures: list[str], **detect) -> dict:
    """Both pictures as a batch (node 6) through SafeCFG Detect Harm (7); nodes 8 to 10 show its texts."""
    prompt = {
        "1": {"class_type": "SafeCFG_DemoModel", "inputs": {}},
        "2": {"class_type": "SafeCFG_LoadHGR", "inputs": {"hgr_name": hgr}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "LoadImage", "inputs": {"image": pictures[0]}},
        "5": {"class_type": "LoadImage", "inputs": {"image": pictures[1]}},
        "6": {"class_type": "ImageBatch", "inputs": {"image1": ["4", 0], "image2": ["5", 0]}},
        "7": {
            "class_type": "SafeCFG_DetectHarm",
            "inputs": {
                "model": ["1", 0], "hgr": ["2", 0], "negative": ["3", 0], "vae": ["1", 2], "image": ["6", 0], **DETECT, **detect,
            },
        },
        "8": {"class_type": "PreviewAny", "inputs": {"source": ["7", 1]}},
        "9": {"class_type": "MaskToImage", "inputs": {"mask": ["7", 4]}},
        "10": {"class_type": "PreviewImage", "inputs": {"images": ["9", 0]}},
    }  # fmt: skip
    return prompt


def gate(prompt: dict, mode="replace", threshold=0.0, scores=True, flagged=True) -> dict:
    """The graph with SafeCFG Image Gate (11), all its pictures (12) and those that passed (13)."""
    inputs = {"images": ["6", 0], "mode": mode, "threshold": threshold, "blur_cells": 8, "notice": "Held back."}
    inputs |= {"scores": ["7", 1]} if scores else {}
    inputs |= {"flagged": ["7", 3]} if flagged else {}
    return {
        **prompt,
        "11": {"class_type": "SafeCFG_ImageGate", "inputs": inputs},
        "12": {"class_type": "PreviewImage", "inputs": {"images": ["11", 0]}},
        "13": {"class_type": "PreviewImage", "inputs": {"images": ["11", 1]}},
        "14": {"class_type": "PreviewAny", "inputs": {"source": ["11", 2]}},
    }


def text(entry: dict, node: str) -> str:
    return entry["outputs"][node]["text"][0]


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows(server, hgr, name):
    workflow, info = read(name), server.object_info()
    nodes, prompt = {node["id"]: node for node in workflow["nodes"]}, to_prompt(workflow, info)
    for number, source, output, target, slot, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"] and nodes[target]["inputs"][slot]["link"] == number
        assert info[nodes[source]["type"]]["output"][output] == kind
    for node in prompt.values():
        assert set(node["inputs"]) >= set(info[node["class_type"]]["input"].get("required", {}))
        if node["class_type"] == "SafeCFG_LoadHGR":
            assert node["inputs"]["hgr_name"] == "demo.safetensors"
            node["inputs"]["hgr_name"] = hgr
    entry = server.post_prompt(prompt)
    detecting = [str(node["id"]) for node in workflow["nodes"] if node["type"] == "SafeCFG_DetectHarm"]
    rows = next(node for node in workflow["nodes"] if node["type"] == "SafeCFG_PromptBatch")["widgets_values"][0].splitlines()
    assert detecting and all(len(server.files(entry, node)) == len(rows) for node in detecting)


def test_detecting_pictures(server, hgr, pictures):
    entry = server.post_prompt(graph(hgr, pictures))
    content = json.loads(text(entry, "8"))
    assert set(content["categories"]) == set(world.CATEGORIES) and len(content["images"]) == 2 and not content["with_prompt"]
    again = json.loads(text(server.post_prompt(graph(hgr, pictures, longest_side=8000)), "8"))  # not cached, but the same looks
    assert again == content
    masks, previews = server.files(entry, "10"), server.files(entry, "7")
    assert [Image.open(mask).size for mask in masks] == [(131, 150)] * 2 and len(previews) == 2


def test_the_gate_lets_through_what_passed(server, hgr, pictures):
    entry = server.post_prompt(gate(graph(hgr, pictures, threshold=1.0)))
    assert len(server.files(entry, "13")) == 2 and text(entry, "14") == "0"
    scores = [image["harmfulness"] for image in json.loads(text(server.post_prompt(graph(hgr, pictures)), "8"))["images"]]
    assert scores[0] != scores[1]
    entry = server.post_prompt(gate(graph(hgr, pictures), threshold=sum(scores) / 2, flagged=False))
    shown, (passed,) = [pixels(file) for file in server.files(entry, "12")], server.files(entry, "13")
    kept = scores.index(min(scores))
    original = pixels(server.base / "input" / pictures[kept])
    assert np.array_equal(pixels(passed), original) and np.array_equal(shown[kept], original)
    assert not np.array_equal(shown[1 - kept], pixels(server.base / "input" / pictures[1 - kept])) and text(entry, "14") == "1"


@pytest.mark.parametrize("wired", ["scores", "flagged"])
def test_when_nothing_passed_the_branch_does_not_run(server, hgr, pictures, wired):
    prompt = gate(graph(hgr, pictures, threshold=1e-6), mode="blur", scores=wired == "scores", flagged=wired == "flagged")
    entry = server.post_prompt(prompt)
    assert len(server.files(entry, "12")) == 2 and text(entry, "14") == "2" and "13" not in entry["outputs"]


def test_prompts_before_sampling(server, hgr):
    prompt = {
        "1": {"class_type": "SafeCFG_DemoModel", "inputs": {}},
        "2": {"class_type": "SafeCFG_LoadHGR", "inputs": {"hgr_name": hgr}},
        "3": {"class_type": "SafeCFG_PromptBatch", "inputs": {"clip": ["1", 1], "text": "a knife\na rabbit and a rocket"}},
        "4": {
            "class_type": "SafeCFG_DetectPromptHarm",
            "inputs": {"conditioning": ["3", 0], "hgr": ["2", 0], "threshold": 0.0, "categories": "drugs = off"},
        },
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 1]}},
        "6": {"class_type": "PreviewAny", "inputs": {"source": ["4", 2]}},
    }
    entry = server.post_prompt(prompt)
    content = json.loads(text(entry, "5"))
    assert len(content["prompts"]) == 2 and content["categories"]["drugs"] is None
    knife, rabbit = content["prompts"]
    assert knife["scores"]["weapons"] > rabbit["scores"]["weapons"]
    assert text(entry, "6") == str(any(p["flagged"] for p in content["prompts"]))


def roc(hgr: str, **inputs) -> dict:
    values = {
        "source": "pictures", "false_positive_rate": 0.01, "folder": "roc", "longest_side": 0, "harmful_prompts": "a knife",
        "clean_prompts": "an apple\na frog",
    }  # fmt: skip
    links = {"hgr": ["2", 0], "model": ["1", 0], "vae": ["1", 2], "negative": ["3", 0], "clip": ["1", 1]}
    return {
        "1": {"class_type": "SafeCFG_DemoModel", "inputs": {}},
        "2": {"class_type": "SafeCFG_LoadHGR", "inputs": {"hgr_name": hgr}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "SafeCFG_RocReport", "inputs": {**links, **values, **inputs}},
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 3]}},
    }


def test_roc_of_prompts_and_of_a_folder(server, hgr, pictures):
    for kind, name in zip(("harmful", "clean"), pictures, strict=True):
        folder = server.base / "input" / "roc" / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((server.base / "input" / name).read_bytes())
    for source, counts in (("pictures", (1, 1)), ("prompts", (1, 2))):
        entry = server.post_prompt(roc(hgr, source=source))
        content = json.loads(text(entry, "5"))
        assert (content["harmful"], content["clean"]) == counts and 0 <= content["auroc"] <= 1
        assert len(server.files(entry, "4")) == 1
    extra = server.base / "input" / "roc" / "clean" / "again.png"
    extra.write_bytes((server.base / "input" / pictures[1]).read_bytes())
    assert json.loads(text(server.post_prompt(roc(hgr)), "5"))["clean"] == 2  # a new file: not from the cache


def test_errors_come_back_readable(server, hgr, pictures, prompt_error):
    network = load_hgr(ROOT / "hgr_models" / "weights" / "demo.safetensors")
    bare = dataclasses.replace(network.info, picture_thresholds=())
    for name, info in (("family.safetensors", dataclasses.replace(bare, latent_format="SDXL")), ("bare.safetensors", bare)):
        network.calibrate(info)
        save_hgr(server.base / "models" / "hgr" / name, network)
    alpha = graph(hgr, pictures)
    alpha["6"] = {"class_type": "JoinImageWithAlpha", "inputs": {"image": ["4", 0], "alpha": ["4", 1]}}
    neither = graph(hgr, pictures)
    del neither["7"]["inputs"]["image"]
    cases = [
        (alpha, "alpha channel"),
        (neither, "an image or a latent, but got neither"),
        (graph("bare.safetensors", pictures), "bare.safetensors has no thresholds for pictures"),
        (graph("family.safetensors", pictures, threshold=0.5), "trained for a model of SDXL latents"),
        (gate(graph(hgr, pictures), scores=False, flagged=False), "neither is connected"),
        (roc(hgr, folder="nothing here"), "no pictures in"),
        (roc(hgr, folder="../.."), "inside ComfyUI's input folder"),
    ]
    for prompt, message in cases:
        with pytest.raises(prompt_error, match=message):
            server.post_prompt(prompt)
