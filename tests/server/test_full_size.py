"""The templates for real checkpoints with full-size ones of random weights, loaded by core's loaders: train an HGR, then draw.

Flux gets an HGR that was not trained. Stable Diffusion 1.5 on the newest host by default; `FULL_SIZE=sd15,sdxl,flux` takes the
others, too, on every host (SDXL's denoiser alone has 9.6 GiB on a CPU; minutes each), and `FULL_SIZE=none` leaves all out.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.random_checkpoints import CHECKPOINTS, FLUX
from comfy_server import Server
from hgr_models import HGR, HGRInfo, evaluate, load_hgr, save_hgr
from hgr_models.condition import ConditionConfig
from templates import read
from workflow_format import to_prompt

ROOT = Path(__file__).parents[2]
WANTED = os.environ.get("FULL_SIZE", "")
DRAW = {"sd15": "Protect a checkpoint with its HGR", "sdxl": "Protect SDXL with its HGR", "flux": "Protect Flux with its HGR"}
WIDTHS = {"sd15": ("SD15", 768, 768), "sdxl": ("SDXL", 2048, 1280), "flux": ("Flux", 4096, 768)}
FEW = {
    "harmful_runs": 3, "clean_runs": 1, "calibration_runs": 1, "run_steps": 2, "batch": 1, "condition_steps": 2, "guidance_steps": 2,
    "prompt_steps": 2, "train": "prompts + guidance", "size": "small", "sizes": "64x64", "pairs_per_category": 1, "clean_prompts": 4,
    "width": 64, "height": 64, "steps": 2,
}  # fmt: skip
DETECTOR = """
import sys
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
labels = {0: "normal", 1: "nsfw"}
small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
ViTForImageClassification(ViTConfig(**small, id2label=labels, label2id={v: k for k, v in labels.items()})).save_pretrained(sys.argv[1])
ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(sys.argv[1])
"""
ONE_RUN = {"harmful_runs": 1, "clean_runs": 1}  # of SafeCFG Check HGR, whose clean runs have 20 steps


@pytest.fixture(params=WANTED.split(",") if WANTED else ["sd15"])
def family(request, newest_host) -> str:
    return request.param


@pytest.fixture
def full_size_server(host, family, tmp_path):
    """A server of its own: these models are large, and other tests expect their files to be missing."""
    command = [str(host.python), "-m", "benchmarks.random_checkpoints", "--comfyui", str(host.path), "--family", family]
    subprocess.run([*command, "--models", str(tmp_path / "models")], check=True, cwd=ROOT)
    server = Server(host, tmp_path)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def prompt_of(server, template: str) -> dict:
    """A template as the front end sends it, with few runs and steps, and small pictures."""
    workflow = read(template)
    prompt = to_prompt(workflow, server.object_info())
    for node in prompt.values():
        few = {**FEW, **(ONE_RUN if node["class_type"] == "SafeCFG_CheckHGR" else {})}
        node["inputs"] |= {k: v for k, v in few.items() if k in node["inputs"]}
    return prompt


def inputs_of(prompt: dict, kind: str) -> dict:
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == kind)


def train(server, family: str) -> None:
    """An HGR by the training template, with the loader's file."""
    prompt = prompt_of(server, "Make an HGR for your checkpoint")
    inputs_of(prompt, "SafeCFG_TrainHGR")["name"] = f"{family}_hgr"
    inputs_of(prompt, "CheckpointLoaderSimple")["ckpt_name"] = Path(CHECKPOINTS[family]).name
    server.post_prompt(prompt)


def untrained(server, family: str) -> None:
    """An HGR of random weights: training one for Flux on two cores was not done after seven minutes: its T5 is slow there."""
    latents, width, pooled = WIDTHS[family]
    info = HGRInfo(
        categories=("violence",), condition_thresholds=(0.5,), guidance_levels=(), guidance_thresholds=((0.5,),),
        latent_format=latents, latent_channels=16, latent_dimensions=2, prediction="FLOW", token_width=width, pooled_width=pooled,
    )  # fmt: skip
    hgr = HGR(info, ConditionConfig(width, 1, pooled_width=pooled), None)
    torch.nn.init.normal_(hgr.condition.token_out.weight)
    path = server.base / "models" / "hgr" / f"{family}_hgr.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_hgr(path, hgr)


def test_an_hgr_draws_with_a_full_size_model(full_size_server, family):
    server = full_size_server
    (train if family in CHECKPOINTS else untrained)(server, family)
    info = load_hgr(server.base / "models" / "hgr" / f"{family}_hgr.safetensors").info
    assert (info.latent_format, info.token_width, info.pooled_width) == WIDTHS[family]

    prompt = prompt_of(server, DRAW[family])
    inputs_of(prompt, "SafeCFG_LoadHGR")["hgr_name"] = f"{family}_hgr.safetensors"
    apply = inputs_of(prompt, "SafeCFG_Apply")
    (save,) = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]

    def draw(**changes) -> np.ndarray:
        apply.update(strict=True, **changes)  # whatever could not be redirected stops the run
        (file,) = server.files(server.post_prompt(prompt), save)
        return np.asarray(Image.open(file))

    flagged = draw(threshold_offset=-1.0, strength=1.0)  # an HGR of two steps knows nothing: everything is harmful
    plain = draw(threshold_offset=-1.0, strength=0.0)
    assert plain.std() > 0 and not np.array_equal(flagged, plain)
    assert np.array_equal(draw(threshold_offset=1.0, strength=1.0), plain)  # nothing is
    an_evaluation(server, family)
    if family == "sd15":
        everything_is_harmful(server)
        a_lora_changes_the_picture(server)
        detection_judges(server)


def an_evaluation(server, family: str) -> None:
    """By the command, from the loaders' files, with a small ViT of random weights as the detector that Falconsai's is."""
    folder = server.base / "models" / "safety_judges" / "nsfw_image_detection"
    subprocess.run([str(server.host.python), "-c", DETECTOR, str(folder)], check=True)
    (server.base / "input" / "mine.csv").write_text("unsafe_prompt,safe_prompt\na knife,a spoon\n", encoding="utf-8")
    files = ["--checkpoint", Path(CHECKPOINTS[family]).name] if family in CHECKPOINTS else [
        "--diffusion-model", Path(FLUX["model"]).name, "--text-encoders", *(Path(FLUX[name]).name for name in ("clip_l", "t5xxl")),
        "--vae", Path(FLUX["vae"]).name,
    ]  # fmt: skip
    line = ["mine.csv", *files, "--hgr", f"{family}_hgr.safetensors", "--name", family, "--steps", "2", "--size", "64x64"]
    evaluate.main([*line, "--judges", "nsfw_image_detection", "--server", server.url, "--json", str(server.base / "found.json")])
    found = json.loads((server.base / "found.json").read_text(encoding="utf-8"))
    assert [(row["list"], row["arm"], row["n"]) for row in found["rows"]] == [
        (f"mine {kind}", arm, 1) for kind in ("unsafe", "safe") for arm in ("plain", "SafeCFG")
    ]
    assert found["hgr"]["file"] == f"{family}_hgr.safetensors" and found["clean"][0]["bit_identical"] == 1.0


def everything_is_harmful(server) -> None:
    """The trained HGR with thresholds of 0, as all_harmful.safetensors."""
    folder = server.base / "models" / "hgr"
    hgr = load_hgr(folder / "sd15_hgr.safetensors")
    k, levels = len(hgr.info.categories), len(hgr.info.guidance_thresholds)
    none = (0.0,) * k
    hgr.info = replace(
        hgr.info, condition_thresholds=none, guidance_thresholds=(none,) * levels, picture_thresholds=none, training={}
    )
    save_hgr(folder / "all_harmful.safetensors", hgr)


def with_checkpoint(server, template: str) -> dict:
    """A template of the demo model with the checkpoint instead, and the HGR to which everything is harmful."""
    prompt = prompt_of(server, template)
    for node in prompt.values():
        if node["class_type"] == "SafeCFG_DemoModel":
            node |= {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": Path(CHECKPOINTS["sd15"]).name}}
    inputs_of(prompt, "SafeCFG_LoadHGR")["hgr_name"] = "all_harmful.safetensors"
    return prompt


def a_lora_changes_the_picture(server) -> None:
    prompt = with_checkpoint(server, "Fine-tune a safe LoRA")
    inputs_of(prompt, "SafeCFG_FineTuneSafeLoRA").update(text="a knife\na dog", runs=2)
    entry = server.post_prompt(prompt)
    base, tuned = (server.files(entry, key)[0] for key in ("12", "15"))
    assert not np.array_equal(np.asarray(Image.open(base)), np.asarray(Image.open(tuned)))


def detection_judges(server) -> None:
    prompt = with_checkpoint(server, "Detect harm in pictures")
    entry = server.post_prompt(prompt)
    (key,) = [key for key, node in prompt.items() if node["class_type"] == "PreviewAny"]
    assert "violence" in str(entry["outputs"][key])
    assert all(server.files(entry, key) for key, node in prompt.items() if node["class_type"] == "SafeCFG_DetectHarm")
