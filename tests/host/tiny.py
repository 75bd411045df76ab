"""A random UNet in core's own classes that behaves like a denoiser, small enough for hundreds of runs in a test."""

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
    "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 16,
    "num_heads": 4, "num_head_channels": -1, "use_spatial_transformer": True, "legacy": False, "use_linear_in_transformer": False,
    "adm_in_channels": None, "use_temporal_attention": False, "dtype": torch.float32,
}  # fmt: skip
TEXT_GAIN = 0.5  # how much the prompt matters; chosen so that the guidance is 0.05-0.5 of the latent (test_tiny_model.py)


def make_tiny_model(seed: int = 0, dtype=torch.float32, compute_dtype=None) -> comfy.model_patcher.ModelPatcher:
    """A MODEL (SD15 family, eps prediction, CPU) with random weights; the same seed gives the same weights.

    `dtype` is that of the weights; `compute_dtype` is what core casts them to in every layer, None: nothing else.
    """
    torch.manual_seed(seed)
    config = comfy.supported_models.SD15({k: v for k, v in UNET.items() if k != "dtype"})
    config.unet_config = {**UNET, "dtype": dtype}
    config.set_inference_dtype(dtype, compute_dtype)
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS, device=torch.device("cpu"))
    model.eval().requires_grad_(False)
    _initialise(model.diffusion_model)
    model.diffusion_model.register_forward_hook(_as_denoiser(model.model_sampling))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def _initialise(unet: torch.nn.Module) -> None:
    """Every layer keeps its input's size; core's zero-initialised layers would make a UNet that ignores its prompt."""
    for name, parameter in unet.named_parameters():
        value = torch.empty(parameter.shape)  # float32: other dtypes know no random numbers
        if parameter.ndim > 1:
            torch.nn.init.normal_(value, std=parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.constant_(value, 1.0 if name.endswith("weight") else 0.0)
        if "attn2.to_out" in name:
            value.mul_(TEXT_GAIN)
        parameter.copy_(value)


def _as_denoiser(sampling):
    """A forward hook: the UNet's output u, about 1 in size, becomes the noise that makes `(1 + sigma^2)^0.35 u` the denoised
    latent. A raw random UNet's guidance would be `sigma` times u: nothing at the end of the schedule."""

    def hook(unet, args, output):
        sigma = sampling.sigma(args[1]).reshape(-1, *[1] * (output.ndim - 1))
        scale = (1 + sigma**2) ** 0.5  # core's EPS input scaling, undone
        return (args[0] * scale - scale**0.7 * output) / sigma

    return hook


def tiny_conditioning(seed: int, tokens: int = 7, batch: int = 1) -> list:
    """A CONDITIONING for the tiny model: random tokens (batch, tokens, 16)."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(batch, tokens, UNET["context_dim"], generator=generator), {}]]
