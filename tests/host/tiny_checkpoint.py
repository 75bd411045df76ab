"""A checkpoint file of a tiny SD3, which core's loader recognises by its keys and measures by its weights."""

from pathlib import Path

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from safetensors.torch import save_file

WIDTH, DEPTH = 64, 1  # core: 64 channels per layer


def write_checkpoint(path: Path, token_width: int, pooled_width: int, seed: int = 0) -> Path:
    """Random weights, 16 latent channels, flow prediction, no text encoders and no VAE; the same seed writes the same file."""
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": token_width, "out_features": WIDTH}}
    with torch.inference_mode(False):
        network = OpenAISignatureMMDITWrapper(
            input_size=None, patch_size=2, in_channels=16, depth=DEPTH, adm_in_channels=pooled_width, pos_embed_max_size=16,
            num_patches=256, context_embedder_config=embedder, operations=comfy.ops.disable_weight_init, dtype=torch.float32,
        )  # fmt: skip
        weights, generator = {}, torch.Generator().manual_seed(seed)
        for name, value in network.state_dict().items():
            size = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
            weights[f"model.diffusion_model.{name}"] = size * torch.randn(value.shape, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    return path
