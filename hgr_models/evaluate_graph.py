"""Where the model of an evaluation comes from: graphs (API format) of loaders by file. A user's own workflow: `evaluate_workflow`."""

import argparse
from typing import Any

from .comfy_client import Client
from .errors import HGRError


class GraphError(HGRError):
    """A workflow of which the parts that an evaluation needs are not found."""


def node(class_type: str, **inputs: Any) -> dict:
    """A node of a graph in API format."""
    return {"class_type": class_type, "inputs": inputs}


def from_files(client: Client, args: argparse.Namespace) -> tuple[dict, dict]:
    """A graph of loaders, and the links for model, clip and vae. Raises ComfyError for a file that the server does not have."""
    if args.demo:
        return {"model": node("SafeCFG_DemoModel")}, {"model": ["model", 0], "clip": ["model", 1], "vae": ["model", 2]}
    if args.checkpoint:
        client.check_choice("CheckpointLoaderSimple", "ckpt_name", args.checkpoint)
        graph = {"model": node("CheckpointLoaderSimple", ckpt_name=args.checkpoint)}
        sockets = {"model": ["model", 0], "clip": ["model", 1], "vae": ["model", 2]}
    else:
        graph = {
            "model": _diffusion_model(client, args.diffusion_model),
            "clip": _text_encoders(client, args.text_encoders, args.type),
        }
        sockets = {"model": ["model", 0], "clip": ["clip", 0]}
    if args.vae:
        client.check_choice("VAELoader", "vae_name", args.vae)
        graph["vae"] = node("VAELoader", vae_name=args.vae)
        sockets["vae"] = ["vae", 0]
    return graph, sockets


def _diffusion_model(client: Client, name: str) -> dict:
    if name.lower().endswith(".gguf"):
        client.check_choice("UnetLoaderGGUF", "unet_name", name)
        return node("UnetLoaderGGUF", unet_name=name)
    client.check_choice("UNETLoader", "unet_name", name)
    return node("UNETLoader", unet_name=name, weight_dtype="default")


def _text_encoders(client: Client, names: list[str], kind: str) -> dict:
    loaders = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader", 4: "QuadrupleCLIPLoader"}
    if len(names) not in loaders:
        raise GraphError(f"Expected one to four text encoders, but got {len(names)}.")
    loader = loaders[len(names)] + ("GGUF" if any(name.lower().endswith(".gguf") for name in names) else "")
    inputs = ["clip_name"] if len(names) == 1 else [f"clip_name{i}" for i in range(1, len(names) + 1)]
    for name, file in zip(inputs, names, strict=True):
        client.check_choice(loader, name, file)
    if "type" in client.inputs(loader):
        client.check_choice(loader, "type", kind)
        return node(loader, **dict(zip(inputs, names, strict=True)), type=kind)
    return node(loader, **dict(zip(inputs, names, strict=True)))
