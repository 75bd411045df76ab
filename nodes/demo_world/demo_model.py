"""`SafeCFG Demo Model`: the demo world's MODEL, CLIP and VAE in core's own classes, so that every node works on them."""

import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ...demo import files
from ...demo.autoencoder import Autoencoder
from ...demo.unet import UNetConfig
from ..host.schema import make_schema
from ..loader import core_patcher
from .demo_clip import DemoTextModel, DemoTokenizer

# What core's UNetModel wants besides the demo's own sizes: the layout of Stable Diffusion 1.5.
SD15_LAYOUT = {
    "image_size": 32,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}
BYTES_PER_PIXEL = 1600  # of a picture in the autoencoder: some 20 fp32 tensors of 64 channels at half the size live at once


class DemoConfig(comfy.supported_models.SD15):
    """Core's SD15 family with the demo's UNet sizes."""

    unet_extra_config: dict = {}  # core would overwrite the number of heads
    native_side = 128  # pixels of the pictures it draws


def demo_unet(disable_dynamic: bool = False) -> ModelPatcher:
    """The demo's UNet as a MODEL; core calls it again for a copy on another GPU."""
    weights, _ = files.load_weights(files.WEIGHTS / "unet.safetensors")
    load_device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    config = DemoConfig({**UNetConfig().as_dict(), **SD15_LAYOUT})
    parameters = sum(w.numel() for w in weights.values())
    kinds = list(config.supported_inference_dtypes)
    # The file is fp16, but its exact values are wanted where core would not compute in fp16 anyway (CPU).
    dtype = comfy.model_management.unet_dtype(device=load_device, model_params=parameters, supported_dtypes=kinds)
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, load_device, kinds))
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS, device=offload_device)
    model.train(False).requires_grad_(False)
    patcher = core_patcher(model, disable_dynamic, load_device=load_device, offload_device=offload_device)
    dynamic = hasattr(patcher, "is_dynamic") and patcher.is_dynamic()  # then core wants the tensors themselves, not copies
    model.diffusion_model.load_state_dict({k: w.to(dtype) for k, w in weights.items()}, assign=dynamic)
    patcher.cached_patcher_init = (demo_unet, ())
    return patcher


def demo_clip() -> comfy.sd.CLIP:
    """The demo's text encoder as a CLIP."""
    target = comfy.supported_models_base.ClipTarget(DemoTokenizer, DemoTextModel)
    clip = comfy.sd.CLIP(target)
    clip.cond_stage_model.load_demo_weights()
    return clip


def demo_vae() -> comfy.sd.VAE:
    """The demo's autoencoder as a VAE: core builds its simplest one, and gets another network and its facts."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    module = Autoencoder(comfy.ops.manual_cast)
    files.load_module(module, "autoencoder")
    vae.first_stage_model = module
    vae.downscale_ratio = vae.upscale_ratio = 8
    vae.latent_channels, vae.latent_dim, vae.output_channels = 4, 2, 3
    vae.memory_used_encode = lambda shape, dtype: BYTES_PER_PIXEL * shape[2] * shape[3]
    vae.memory_used_decode = lambda shape, dtype: BYTES_PER_PIXEL * shape[2] * shape[3] * 64
    vae.size = None  # hosts that know it measure it again
    vae.disable_offload = False
    offload_device = comfy.model_management.vae_offload_device()
    vae.patcher = core_patcher(module, load_device=vae.device, offload_device=offload_device)
    vae.patcher.cached_patcher_init = (_vae_patcher, ())
    return vae


def _vae_patcher(disable_dynamic: bool = False) -> ModelPatcher:
    return demo_vae().patcher


class DemoModel(io.ComfyNode):
    """The demo world's model; its weights are part of the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_DemoModel",
            display_name="SafeCFG Demo Model",
            description="A small text-to-image diffusion model that ships with SafeCFG and runs on a CPU: scenes of one or two "
            "pictograms, such as `a knife and an apple`. Use 128 x 128 latents, about 25 steps, cfg 5.",
            search_aliases=["safecfg example", "emoji"],
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The denoiser: Stable Diffusion 1.5's layout in small, so patches and LoRAs act on it."),
                io.Clip.Output(tooltip="The text encoder, for CLIP Text Encode. It knows simple English words."),
                io.Vae.Output(tooltip="The autoencoder, for VAE Decode and VAE Encode; sizes are multiples of 8."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(demo_unet(), demo_clip(), demo_vae())
