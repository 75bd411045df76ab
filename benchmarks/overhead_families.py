"""Denoisers of the real sizes with random weights, in ComfyUI's own classes where it can be imported, and HGRs that fit them."""

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from demo.unet import UNet, UNetConfig
from hgr_models import HGR, HGRInfo
from hgr_models.condition import ConditionConfig
from hgr_models.guidance import GuidanceConfig

CATEGORIES = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal")
POOL = 2**27  # random values, 512 MB in fp32: larger than a processor's caches


class HostError(RuntimeError):
    """A ComfyUI that cannot be imported; the message says what to do."""


@dataclass(frozen=True)
class Family:
    """A denoiser's published size: latents (B, channels, size, size), tokens (B, tokens, token_width), pooled (B, pooled_width).

    `vector`: width of what the model gets beside the tokens (pooled text and sizes). `config`: core's arguments.
    """

    title: str
    size: int
    channels: int
    tokens: int
    token_width: int
    pooled_width: int
    vector: int
    latent_format: str
    prediction: str
    config: dict

    def inputs(self, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a model of this family is called with, at random."""
        random = lambda *shape: torch.randn(rows, *shape, device=device, dtype=dtype)  # noqa: E731
        vector = {"y": random(self.vector)} if self.vector else {}
        context = random(self.tokens, self.token_width)
        timesteps = torch.full((rows,), 500.0, device=device)
        return {"x": random(self.channels, self.size, self.size), "timesteps": timesteps, "context": context, **vector}


UNET = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "use_temporal_attention": False}
SD15_SIZES = {
    "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1, "context_dim": 768, "num_heads": 8,
}  # fmt: skip
SDXL_SIZES = {
    "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10, "context_dim": 2048, "num_head_channels": 64, "use_linear_in_transformer": True,
    "num_classes": "sequential", "adm_in_channels": 2816,
}  # fmt: skip
SD3_SIZES = {
    "input_size": None, "patch_size": 2, "in_channels": 16, "depth": 24, "adm_in_channels": 2048, "num_patches": 192 * 192,
    "pos_embed_max_size": 192, "pos_embed_scaling_factor": None,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
}  # fmt: skip
FAMILIES = {
    "sd15": Family("SD1.5", 64, 4, 77, 768, 0, 0, "SD15", "EPS", {**UNET, **SD15_SIZES}),
    "sdxl": Family("SDXL", 128, 4, 77, 2048, 1280, 2816, "SDXL", "EPS", {**UNET, **SDXL_SIZES}),
    "sd3": Family("SD3 medium", 128, 16, 154, 4096, 2048, 2048, "SD3", "FLOW", SD3_SIZES),
}


@dataclass(frozen=True)
class Host:
    """An imported ComfyUI."""

    name: str
    unet: type
    mmdit: type
    operations: type


def find_host(path: str | None) -> Host | None:
    """The ComfyUI at a path, else at COMFYUI_PATH, imported into this process; None when neither is given.

    Raises HostError when there is none, or when this Python lacks what it needs.
    """
    if not (path := path or os.environ.get("COMFYUI_PATH")):
        return None
    root = Path(path).expanduser().resolve()
    if not (root / "main.py").is_file():
        raise HostError(f"Expected a ComfyUI checkout, but there is no main.py in {root}.")
    sys.path.insert(0, str(root))
    try:
        options = importlib.import_module("comfy.cli_args").args
        options.cpu = not torch.cuda.is_available()
        options.use_pytorch_cross_attention = True  # what ComfyUI takes on NVIDIA GPUs by itself; on CPUs it is asked for
        unet = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel
        mmdit = importlib.import_module("comfy.ldm.modules.diffusionmodules.mmdit").OpenAISignatureMMDITWrapper
        operations = importlib.import_module("comfy.ops").disable_weight_init
        version = importlib.import_module("comfyui_version").__version__
    except ImportError as error:
        sys.path.remove(str(root))
        raise HostError(
            f"ComfyUI at {root} cannot be imported ({error}). Start this command with the Python that runs ComfyUI."
        ) from None
    return Host(f"ComfyUI {version}", unet, mmdit, operations)


def make_denoiser(name: str, host: Host | None, dtype: torch.dtype) -> nn.Module:
    """A family's denoiser without weights (on the meta device), called with `Family.inputs`.

    Without a host, SD1.5 is the demo's own class, which has the same layers; others raise HostError.
    """
    family = FAMILIES[name]
    if host is None:
        if name != "sd15":
            raise HostError(f"{family.title} needs ComfyUI's own classes: name a checkout with --comfyui or COMFYUI_PATH.")
        sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in SD15_SIZES.items()}
        with torch.device("meta"):
            return UNet(UNetConfig(**sizes)).to(dtype).eval().requires_grad_(False)
    kind = host.mmdit if name == "sd3" else host.unet
    with torch.device("meta"):
        model = kind(**family.config, dtype=dtype, device="meta", operations=host.operations)
    return model.eval().requires_grad_(False)


def fill(model: nn.Module, device: torch.device) -> nn.Module:
    """Gives a model without weights random ones on a device: every layer its own part of one pool, from its start when it ends.

    So that SDXL in fp32 (10 GB) fits a small machine; the pool is larger than the caches, so weights still come from memory.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    dtype = next(t.dtype for _, t in tensors if t.is_floating_point())
    total, largest = sum(t.numel() for _, t in tensors), max(t.numel() for _, t in tensors)
    pool, start = 0.02 * torch.randn(min(total, max(POOL, largest)), device=device, dtype=dtype), 0
    for name, tensor in tensors:
        start = start if start + tensor.numel() <= len(pool) else 0
        values = pool[start : start + tensor.numel()].view(tensor.shape).to(tensor.dtype)
        start += tensor.numel()
        parent, _, own = name.rpartition(".")
        place = model.get_submodule(parent)
        if own in place._parameters:
            place._parameters[own] = nn.Parameter(values, requires_grad=False)
        else:
            place._buffers[own] = values
    return model


def make_hgr(name: str, device: torch.device) -> HGR:
    """An HGR of the shipped sizes for seven categories, with random weights in fp32, as ComfyUI holds them."""
    family, k = FAMILIES[name], len(CATEGORIES)
    info = HGRInfo(
        CATEGORIES, (0.5,) * k, (), ((0.5,) * k,), family.latent_format, family.channels, 2, family.prediction, family.token_width,
        family.pooled_width,
    )  # fmt: skip
    condition = ConditionConfig(family.token_width, k, family.pooled_width)
    return HGR(info, condition, GuidanceConfig(family.channels, k)).to(device).eval().requires_grad_(False)
