"""Core's own text-encoder classes and tokenizers, with shrunk sizes and random weights: real layouts that fit a test."""

from importlib.util import find_spec

import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.qwen_image
import comfy.text_encoders.sd3_clip
import torch
from comfy import sd1_clip

CLIP = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 32}
LLAMA = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL = {
    "clip_l_model_config": CLIP,
    "clip_g_model_config": {**CLIP, "hidden_size": 48, "projection_dim": 48, "num_attention_heads": 3},
    "t5xxl_model_config": {"d_ff": 64, "d_kv": 16, "d_model": 128, "num_heads": 2, "num_layers": 2},
    "qwen25_7b_model_config": LLAMA,
    "qwen3_4b_model_config": {**LLAMA, "num_hidden_layers": 36, "hidden_size": 32, "intermediate_size": 16},  # it reads layer -2
}
FAMILIES = {  # encoder class, tokenizer class
    "SD1.5": lambda: (sd1_clip.SD1ClipModel, sd1_clip.SD1Tokenizer),
    "SDXL": lambda: (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer),
    # Without T5, which core wants 4096 wide: half a gigabyte for its words alone.
    "SD3": lambda: (comfy.text_encoders.sd3_clip.sd3_clip(t5=False), comfy.text_encoders.sd3_clip.SD3Tokenizer),
    "Flux": lambda: (comfy.text_encoders.flux.flux_clip(), comfy.text_encoders.flux.FluxTokenizer),
    "Qwen-Image": lambda: (comfy.text_encoders.qwen_image.te(), comfy.text_encoders.qwen_image.QwenImageTokenizer),
}
if find_spec("comfy.text_encoders.z_image"):  # newer than ComfyUI 0.3.64
    import comfy.text_encoders.z_image

    FAMILIES["Z-Image"] = lambda: (comfy.text_encoders.z_image.te(), comfy.text_encoders.z_image.ZImageTokenizer)


def small_clip(family: str, seed: int = 0) -> comfy.sd.CLIP:
    """A CLIP of a family, shrunk, with random weights."""
    kind, tokenizer = FAMILIES[family]()
    target = comfy.supported_models_base.ClipTarget(tokenizer, kind)
    clip = comfy.sd.CLIP(target, model_options={key: dict(values) for key, values in SMALL.items()})
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in clip.cond_stage_model.named_parameters():
        if tensor.ndim > 1:
            tensor.data = torch.randn(tensor.shape, generator=generator).mul_(tensor.shape[-1] ** -0.5).to(tensor.dtype)
        elif "logit_scale" not in name:
            tensor.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return clip
