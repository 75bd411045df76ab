"""Reading and writing the demo's weights: fp16 safetensors with what made them in the metadata."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights"


def save_weights(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Writes floating-point tensors as fp16, atomically, with `about` as JSON metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in tensors.items()}
    part = path.with_suffix(".part")
    save_file(halves, part, {"about": json.dumps(about)})
    os.replace(part, path)


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors (float32) and the `about` metadata of a file of this demo."""
    if not path.is_file():
        raise FileNotFoundError(
            f"The demo's weights {path} are missing. Clone the repository again, or run `python -m demo.train`."
        )
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    return {k: (v.float() if v.is_floating_point() else v) for k, v in tensors.items()}, about


def load_module(module: nn.Module, name: str) -> dict:
    """Loads `weights/<name>.safetensors` into a frozen module in evaluation mode; returns the metadata."""
    tensors, about = load_weights(WEIGHTS / f"{name}.safetensors")
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    if unexpected or [k for k in missing if k != "vectors"]:  # the text encoder's word vectors have a file of their own
        raise ValueError(
            f"The demo's weights {name}.safetensors do not fit this version: missing {missing}, unexpected {unexpected}."
        )
    module.train(False).requires_grad_(False)
    return about


def pictures_to_tensor(pictures) -> Tensor:
    """uint8 pictures (B, H, W, 3) -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
