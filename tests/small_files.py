"""Checkpoints and text encoders as files that core's own loaders detect: real widths and tokenizers, few layers, random weights.

    python tests/small_files.py --comfyui PATH --models DIR --family flux [--denoiser 1] [--encoder 1]

in the Python of that ComfyUI. Core builds encoders of full depth whatever a file holds, so a server that reads these needs
`tests/server/small_pack`, which gives core SIZES. A seed per part: two checkpoints may share an encoder.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = {  # what core's classes take for layers; widths are those that core's loaders look at
    "clip_l_model_config": {"num_hidden_layers": 3, "intermediate_size": 64},
    "clip_g_model_config": {"num_hidden_layers": 3, "intermediate_size": 64},
    "t5xxl_model_config": {"num_layers": 2, "d_ff": 64, "num_heads": 2},
    "qwen25_7b_model_config": {"num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4},
    "qwen3_4b_model_config": {"num_hidden_layers": 4, "intermediate_size": 64, "num_attention_heads": 8},
}
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True, "legacy": False,
    "use_temporal_attention": False,
}  # fmt: skip
DENOISERS = {  # core's class, and what its loader finds in the file
    "sd15": ("SD15", {
        **UNET, "num_res_blocks": [1, 1], "channel_mult": [1, 1], "transformer_depth": [1, 1], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1], "context_dim": 768, "num_heads": 8, "num_head_channels": -1,
        "use_linear_in_transformer": False, "adm_in_channels": None,
    }),
    "sdxl": ("SDXL", {
        **UNET, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 1, 1], "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048, "num_heads": -1,
        "num_head_channels": 64, "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816,
    }),
    "sd3": ("SD3", {
        "in_channels": 16, "out_channels": 16, "pos_embed_scaling_factor": None, "depth": 1, "num_patches": 1024, "pos_embed_max_size": 32,
        "adm_in_channels": 2048, "input_size": None, "patch_size": 2,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64}},
    }),
    "flux": ("Flux", {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 4096,
        "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56],
        "theta": 10000, "qkv_bias": True, "guidance_embed": True,
    }),
    "qwen_image": ("QwenImage", {"image_model": "qwen_image", "in_channels": 64, "num_layers": 1}),
    "z_image": ("ZImage", {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560, "n_layers": 2, "qk_norm": True,
        "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
        "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0,
    }),
}  # fmt: skip
IN_ONE_FILE = ("sd15", "sdxl")
ENCODERS = {  # of a family: the parts that are files, and the type that core's CLIP loaders are told
    "sd3": (("clip_l", "clip_g", "t5xxl"), "sd3"),
    "flux": (("clip_l", "t5xxl"), "flux"),
    "qwen_image": (("qwen25_7b",), "qwen_image"),
    "z_image": (("qwen3_4b",), "lumina2"),
}
DEEP = {  # keys by which core tells an encoder, that a shallow one lacks
    "clip_g": "text_model.encoder.layers.30.mlp.fc1.weight",
    "t5xxl": "encoder.block.23.layer.1.DenseReluDense.wi_1.weight",
}
VAE = {
    "double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
GAIN = 0.7  # of a layer


def loaders(family: str, denoiser: int = 0, encoder: int = 0) -> dict[str, dict]:
    """Core's loaders with the files of a family as nodes in API format: `model`, `clip` and `vae`, or one `checkpoint`."""
    if family in IN_ONE_FILE:
        return {"checkpoint": _node("CheckpointLoaderSimple", ckpt_name=f"{family}_{denoiser}_{encoder}.safetensors")}
    parts, kind = ENCODERS[family]
    names = [f"{part}_{encoder}.safetensors" for part in parts]
    clip = {
        1: lambda: _node("CLIPLoader", clip_name=names[0], type=kind),
        2: lambda: _node("DualCLIPLoader", clip_name1=names[0], clip_name2=names[1], type=kind),
        3: lambda: _node("TripleCLIPLoader", **{f"clip_name{i}": name for i, name in enumerate(names, 1)}),
    }[len(parts)]()
    model = _node("UNETLoader", unet_name=f"{family}_{denoiser}.safetensors", weight_dtype="default")
    vae = "wan.safetensors" if family == "qwen_image" else "ae.safetensors"
    return {"model": model, "clip": clip, "vae": _node("VAELoader", vae_name=vae)}


def _node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def write(family: str, models: Path, denoiser: int = 0, encoder: int = 0) -> list[Path]:
    """Writes the files of a family that are not there yet; their paths."""
    network, config = _denoiser(family)
    made = []

    def save(name: str, weights: dict) -> None:
        from safetensors.torch import save_file

        path = models / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in weights.items()}, path)
        made.append(path)

    wanted = loaders(family, denoiser, encoder)
    if family in IN_ONE_FILE:
        save(
            f"checkpoints/{wanted['checkpoint']['inputs']['ckpt_name']}", _checkpoint(config, network, family, denoiser, encoder)
        )
        return made
    if not (path := models / "diffusion_models" / wanted["model"]["inputs"]["unet_name"]).exists():
        save(f"diffusion_models/{path.name}", random_weights(network, denoiser))
    for part in ENCODERS[family][0]:
        if not (models / "text_encoders" / f"{part}_{encoder}.safetensors").exists():
            save(f"text_encoders/{part}_{encoder}.safetensors", _encoder(family, part, encoder))
    name = wanted["vae"]["inputs"]["vae_name"]
    if not (models / "vae" / name).exists():
        save(f"vae/{name}", _wan_vae() if name.startswith("wan") else _vae(16))
    return made


def random_weights(shapes: dict, seed: int) -> dict:
    """fp16 of a seed; a layer gives about GAIN times the size of its input. What is no weight (positions) core makes itself."""
    import torch

    generator, found = torch.Generator().manual_seed(seed), {}
    for name, like in shapes.items():
        if not like.is_floating_point():
            continue
        if like.ndim < 2:
            found[name] = torch.full(like.shape, float(name.endswith(("weight", "scale", "gamma"))), dtype=torch.float16)
            continue
        values = torch.randn(min(like.numel(), 2**22), generator=generator)  # they repeat in a large one
        size = 1.0 if "embed" in name and like.shape[0] > 2**14 else GAIN * like[0].numel() ** -0.5
        values = (size * values).half()
        found[name] = values.repeat(-(-like.numel() // len(values)))[: like.numel()].view(like.shape)
    return found


def _denoiser(family: str) -> tuple[dict, object]:
    """The shapes of a denoiser's weights, and core's description of the model."""
    import comfy.supported_models
    import torch

    kind, settings = DENOISERS[family]
    settings = dict(settings)
    if family == "flux":
        from comfy.ldm.flux.model import FluxParams

        # Newer cores' fields without a default; empty for this model.
        settings |= {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__annotations__ else {}
    config = getattr(comfy.supported_models, kind)(settings)
    config.set_inference_dtype(torch.float16, None)
    return config.get_model({}, device=torch.device("meta")).diffusion_model.state_dict(), config


def _checkpoint(config, network: dict, family: str, denoiser: int, encoder: int) -> dict:
    import torch

    text = config.clip_target({}).clip(device=torch.device("meta"), dtype=torch.float16, model_options=_sizes()).state_dict()
    unet, clip = random_weights(network, denoiser), random_weights(text, encoder)
    return {
        **config.process_unet_state_dict_for_saving(unet),
        **config.process_clip_state_dict_for_saving(clip),
        **{f"first_stage_model.{key}": value for key, value in _vae(4).items()},
    }


def _sizes() -> dict:
    return {name: dict(values) for name, values in SIZES.items()}


def _encoder(family: str, part: str, seed: int) -> dict:
    import torch

    shapes = {
        key.removeprefix(f"{part}.transformer."): value
        for key, value in _text_class(family)(device="meta", dtype=torch.float16, model_options=_sizes()).state_dict().items()
        if key.startswith(f"{part}.transformer.") and ".visual." not in key
    }
    weights = random_weights(shapes, seed)
    return {**weights, **({DEEP[part]: torch.zeros(1, 1).half()} if part in DEEP else {})}


def _text_class(family: str):
    import torch

    if family == "flux":
        import comfy.text_encoders.flux

        return comfy.text_encoders.flux.flux_clip(dtype_t5=torch.float16)
    if family == "sd3":
        import comfy.text_encoders.sd3_clip

        return comfy.text_encoders.sd3_clip.sd3_clip(dtype_t5=torch.float16)
    if family == "qwen_image":
        import comfy.text_encoders.qwen_image

        return comfy.text_encoders.qwen_image.te()
    import comfy.text_encoders.z_image

    return comfy.text_encoders.z_image.te()


def _vae(channels: int) -> dict:
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with torch.device("meta"):
        shapes = AutoencoderKL(ddconfig={**VAE, "z_channels": channels}, embed_dim=channels).state_dict()
    return random_weights({key: value for key, value in shapes.items() if channels == 4 or "quant_conv" not in key}, 0)


def _wan_vae() -> dict:
    import inspect

    from comfy.ldm.wan.vae import WanVAE

    settings = {"dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "dropout": 0.0}
    settings["temperal_downsample"] = [False, True, True]
    known = {key: value for key, value in settings.items() if key in inspect.signature(WanVAE).parameters}
    return random_weights(WanVAE(**known).state_dict(), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--family", choices=list(DENOISERS), nargs="+", required=True)
    parser.add_argument("--denoiser", type=int, default=0)
    parser.add_argument("--encoder", type=int, default=0)
    args = parser.parse_args()
    sys.path.append(str(ROOT))
    import torch

    from hgr_models.train import cli_model

    cli_model().start(args.comfyui, torch.device("cpu"))
    for family in args.family:
        print(json.dumps([str(path) for path in write(family, args.models, args.denoiser, args.encoder)]))


if __name__ == "__main__":
    main()
