"""What differs between diffusers' pipelines: the denoiser's inputs, its latents, its noise levels, and where prompts stand."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..edges import Edge
from ..errors import HGRError
from ..hgr import HGRInfo

PREDICTIONS = {"epsilon": "EPS", "v_prediction": "V", "sample": "X0", "flow_prediction": "FLOW"}


@dataclass(frozen=True)
class Family:
    """A family of denoisers. `pooled` says where `encode_prompt` puts the pooled vector (None: there is none)."""

    latent_format: str  # core's name, as in an HGR's metadata
    channels: int
    token_width: int
    pooled_width: int
    pooled: int | None
    packed: bool = False  # latents come as tokens of 2x2 places (Flux)

    def unpack(self, packed: Tensor, img_ids: Tensor | None) -> Tensor:
        """Latents (B, C, H, W) of what the denoiser gets; of packed tokens (B, N, 4 C), by the places that `img_ids` name."""
        if not self.packed:
            return packed[:, : self.channels]  # an inpainting model's input has a mask and a picture behind the latent
        rows = int(img_ids.reshape(-1, img_ids.shape[-1])[:, 1].max()) + 1
        latents = packed.unflatten(1, (rows, -1)).unflatten(3, (self.channels, 2, 2))  # (B, h, w, C, 2, 2)
        return latents.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def pack(self, latents: Tensor) -> Tensor:
        """The inverse of `unpack`."""
        if not self.packed:
            return latents
        places = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, h, 2, w, 2)
        return places.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def check(self, info: HGRInfo, prediction: str, guidance: bool) -> None:
        """Raises HGRError for an HGR that was trained for another family. Latents matter where guidance is redirected."""
        wanted, found = (info.token_width, info.pooled_width), (self.token_width, self.pooled_width)
        if wanted[0] != found[0] or wanted[1] not in (0, found[1]):
            raise HGRError(
                f"This HGR was trained for prompts of token width {wanted[0]} and pooled width {wanted[1] or 'none'}, but this "
                f"pipeline's have {found[0]} and {found[1] or 'none'}. Load an HGR that was trained for this model."
            )
        latents = (info.latent_format, info.latent_channels, info.prediction)
        if guidance and latents != (self.latent_format, self.channels, prediction):
            raise HGRError(
                f"This HGR was trained for {info.latent_format} latents ({info.latent_channels} channels) with {info.prediction} "
                f"prediction, but this pipeline has {self.latent_format} ({self.channels}) with {prediction}. Load an HGR that was "
                "trained for this model, or redirect by `condition` alone."
            )


def family_of(denoiser: nn.Module) -> Family:
    """The family of a pipeline's `unet` or `transformer`. Raises HGRError for one that SafeCFG does not know."""
    config = denoiser.config
    kind = type(getattr(denoiser, "_orig_mod", denoiser)).__name__  # torch.compile wraps it
    if kind == "UNet2DConditionModel":
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            return Family("SDXL", config.out_channels, config.cross_attention_dim, pooled, 2)
        return Family("SD15", config.out_channels, config.cross_attention_dim, 0, None)
    if kind == "SD3Transformer2DModel":
        return Family("SD3", config.out_channels, config.joint_attention_dim, config.pooled_projection_dim, 2)
    if kind == "FluxTransformer2DModel":
        return Family("Flux", config.in_channels // 4, config.joint_attention_dim, config.pooled_projection_dim, 1, packed=True)
    raise HGRError(f"Expected a Stable Diffusion 1.x, XL, 3 or Flux pipeline, but this one denoises with {kind}.")


def edge_of(scheduler: Any) -> Edge:
    """What a scheduler takes its model to predict. Raises HGRError for preconditioned (EDM) models."""
    name = type(scheduler).__name__
    if name.startswith("EDM"):
        raise HGRError(f"SafeCFG does not know the scaling of {name}. Use another scheduler.")
    if name.startswith("FlowMatch") or getattr(scheduler.config, "use_flow_sigmas", False):
        return Edge("FLOW")
    return Edge(PREDICTIONS.get(scheduler.config.prediction_type, scheduler.config.prediction_type))


def sigma_of(scheduler: Any, edge: Edge, timestep: Tensor | float) -> float:
    """The noise level of a timestep as the scheduler counts them, in ComfyUI's units (b / a, or b of a flow)."""
    now = float(torch.as_tensor(timestep).flatten()[0])
    if hasattr(scheduler, "sigmas") and len(scheduler.sigmas) >= len(scheduler.timesteps):
        times = scheduler.timesteps.detach().double().cpu()
        return float(scheduler.sigmas[int((times - now).abs().argmin())])
    if edge.prediction == "FLOW":
        return now / scheduler.config.num_train_timesteps
    kept = float(scheduler.alphas_cumprod[int(now)])
    return math.sqrt((1 - kept) / kept)
