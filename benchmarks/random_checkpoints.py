"""Full-size checkpoints of random weights, as the files that core's loaders and this pack's templates name.

    python -m benchmarks.random_checkpoints --comfyui PATH --family sd15 --models PATH/models

in the Python of that ComfyUI. Shapes, keys and fp16 are those of the real files, made from core's own classes; what they draw
is noise. Flux keeps the width of its blocks and of its text encoders, but has one block of each kind, to fit into a small
machine.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from hgr_models.train import cli_model

UNETS = {
    "sd15": {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 768, "num_heads": 8, "num_head_channels": -1,
        "use_spatial_transformer": True, "use_linear_in_transformer": False, "adm_in_channels": None, "legacy": False,
        "use_temporal_attention": False,
    },
    "sdxl": {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048, "num_heads": -1, "num_head_channels": 64,
        "use_spatial_transformer": True, "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816,
        "legacy": False, "use_temporal_attention": False,
    },
    "flux": {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 4096,
        "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56],
        "theta": 10000, "qkv_bias": True, "guidance_embed": True,
    },
}  # fmt: skip
CONFIGS = {"sd15": "SD15", "sdxl": "SDXL", "flux": "Flux"}  # core's classes
AUTOENCODER = {
    "double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
CHECKPOINTS = {
    "sd15": "checkpoints/v1-5-pruned-emaonly-fp16.safetensors",
    "sdxl": "checkpoints/sd_xl_base_1.0.safetensors",
}
FLUX = {
    "model": "diffusion_models/flux1-dev.safetensors",
    "clip_l": "text_encoders/clip_l.safetensors",
    "t5xxl": "text_encoders/t5xxl_fp16.safetensors",
    "vae": "vae/ae.safetensors",
}
RANDOM_VALUES = 2**22
GAIN = 0.4  # of a layer. With 1, what a network as deep as SDXL's makes of a prompt is chaos, and its gradients mean nothing

Weights = dict[str, Tensor]


def files_of(family: str) -> list[str]:
    """The files of a family, relative to a models folder."""
    return [CHECKPOINTS[family]] if family in CHECKPOINTS else list(FLUX.values())


def write(family: str, models: Path) -> None:
    """Writes the files of a family. Raises FileExistsError rather than replace a real checkpoint."""
    from safetensors.torch import save_file

    if there := [name for name in files_of(family) if (models / name).exists()]:
        raise FileExistsError(f"{models / there[0]} exists. Random weights never replace a file: give another models folder.")
    for name, weights in _files(family).items():
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(weights(), models / name)  # one file's weights at a time: T5 alone has 9 GB


def _files(family: str) -> dict:
    """What makes the weights of each file."""
    network, text, vae = _shapes(family)
    if family == "flux":
        parts = {"model": network, "vae": {k: t for k, t in vae.items() if "quant_conv" not in k}}
        for encoder in ("clip_l", "t5xxl"):
            prefix = f"{encoder}.transformer."
            parts[encoder] = {k.removeprefix(prefix): t for k, t in text.items() if k.startswith(prefix)}
        return {FLUX[part]: lambda shapes=shapes: _random_weights(shapes) for part, shapes in parts.items()}
    config = _config(family)

    def whole() -> Weights:
        unet, clip = _random_weights(network), _random_weights(text)
        weights = config.process_unet_state_dict_for_saving(unet) | config.process_clip_state_dict_for_saving(clip)
        return {k: t.contiguous() for k, t in weights.items()} | {
            f"first_stage_model.{k}": t for k, t in _random_weights(vae).items()
        }

    return {CHECKPOINTS[family]: whole}


def _config(family: str):
    import comfy.supported_models

    settings = dict(UNETS[family])
    if family == "flux":
        from comfy.ldm.flux.model import FluxParams

        # Newer cores' fields without a default; empty for this model.
        settings |= {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__annotations__ else {}
    config = getattr(comfy.supported_models, CONFIGS[family])(settings)
    config.set_inference_dtype(torch.float16, None)
    return config


def _shapes(family: str) -> tuple[Weights, Weights, Weights]:
    """The weights of the denoiser, the text encoders and the autoencoder, without values."""
    import comfy.text_encoders.flux
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config, meta = _config(family), torch.device("meta")
    channels = 16 if family == "flux" else 4
    with meta:
        if family == "flux":
            text = comfy.text_encoders.flux.flux_clip(dtype_t5=torch.float16)(device=meta, dtype=torch.float16)
        else:
            text = config.clip_target({}).clip(device=meta, dtype=torch.float16, model_options={})
        vae = AutoencoderKL(ddconfig={**AUTOENCODER, "z_channels": channels}, embed_dim=channels)
    network = config.get_model({}, device=meta).diffusion_model
    return tuple(module.state_dict() for module in (network, text, vae))


def _random_weights(shapes: Weights) -> Weights:
    """fp16; a layer gives about GAIN times the size of its input. What is no weight (positions) core makes itself."""
    values = torch.randn(RANDOM_VALUES, generator=torch.Generator().manual_seed(0))
    return {k: _random(k, t, values) for k, t in shapes.items() if t.is_floating_point()}


def _random(name: str, like: Tensor, values: Tensor) -> Tensor:
    """Weights of the shape of `like` from random values, which repeat in a large one."""
    if like.ndim < 2:
        return torch.full(like.shape, float(name.endswith("weight")), dtype=torch.float16)
    size = (GAIN * like[0].numel() ** -0.5) * values.half()
    return size.repeat(-(-like.numel() // len(size)))[: like.numel()].view(like.shape).clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, metavar="PATH")
    parser.add_argument("--family", choices=list(UNETS), default="sd15")
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="the models folder to write into")
    args = parser.parse_args()
    cli_model().start(args.comfyui, torch.device("cpu"))
    write(args.family, args.models)


if __name__ == "__main__":
    main()
