"""Graphs of SafeCFG Protect with the files of `small_files`, and what a server made of them."""

import json
import subprocess
import time
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file

from small_files import loaders

ROOT = Path(__file__).resolve().parents[1]
MADE, NONE_YET = "SafeCFG Protect: made ", "no HGR of this text encoder yet"


def write(host, models: Path, families, denoiser: int = 0, encoder: int = 0) -> None:
    command = [
        str(host.python),
        "tests/small_files.py",
        "--comfyui",
        str(host.path),
        "--models",
        str(models),
        "--family",
        *families,
    ]
    subprocess.run([*command, "--denoiser", str(denoiser), "--encoder", str(encoder)], check=True, cwd=ROOT, capture_output=True)


def graph(family: str, denoiser: int = 0, encoder: int = 0, seed: int = 0, **widgets) -> dict:
    """Core's loaders, SafeCFG Protect (3), and a small picture's latent (9)."""
    files = loaders(family, denoiser, encoder)
    found = {"1": files["checkpoint"]} if "checkpoint" in files else {"1": files["model"], "2": files["clip"]}
    model, clip = ["1", 0], ["1", 1] if "checkpoint" in files else ["2", 0]
    sizes = {"width": 64, "height": 64, "batch_size": 1}
    text = lambda words: {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": words}}  # noqa: E731
    sampled = {
        "model": ["3", 0], "positive": ["4", 0], "negative": ["5", 0], "latent_image": ["6", 0], "seed": seed, "steps": 1, "cfg": 4.0,
        "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    protect = {"model": model, "clip": clip, "strength": 1.0, "categories": "", "strict": True, **widgets}
    return {
        **found,
        "3": {"class_type": "SafeCFG_Protect", "inputs": protect},
        "4": text("two men fight in a bar"),
        "5": text(""),
        "6": {"class_type": "EmptyLatentImage" if "checkpoint" in files else "EmptySD3LatentImage", "inputs": sizes},
        "7": {"class_type": "KSampler", "inputs": sampled},
        "9": {"class_type": "SaveLatent", "inputs": {"samples": ["7", 0], "filename_prefix": family}},
    }


def made(server) -> list[str]:
    """Names of the HGRs in models/hgr."""
    return sorted(path.name for path in (server.base / "models" / "hgr").glob("*.safetensors"))


def latent(server, entry: dict) -> torch.Tensor:
    (file,) = server.files(entry, "9")
    return load_file(file)["latent_tensor"]


def post(server, path: str, content: dict) -> None:
    request = urllib.request.Request(server.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).close()


def wait_for(there, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
