"""Tiny models of core's families: its own latent formats and kinds of prediction around a network of two layers."""

import inspect
from dataclasses import dataclass, replace

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import torch

from fakes import CPU, INFO
from tiny import tiny_conditioning

WIDTH = INFO.token_width


@dataclass(frozen=True)
class Family:
    """Class names of core's latent format and model, what an HGR for it says, and shapes of its latents (the picture's first)."""

    latent_format: str
    model: str
    channels: int
    dimensions: int
    prediction: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def info(self):
        return replace(
            INFO, latent_format=self.latent_format, latent_channels=self.channels, latent_dimensions=self.dimensions,
            prediction=self.prediction,
        )  # fmt: skip


FAMILIES = {
    "SD1.5": Family("SD15", "BaseModel", 4, 2, "EPS", ((2, 4, 8, 8),)),
    "SDXL": Family("SDXL", "SDXL", 4, 2, "EPS", ((2, 4, 8, 8),)),
    "SD3": Family("SD3", "SD3", 16, 2, "FLOW", ((2, 16, 8, 8),)),
    "Flux": Family("Flux", "Flux", 16, 2, "FLOW", ((2, 16, 8, 6),)),
    "video": Family("Wan21", "WAN21", 16, 3, "FLOW", ((2, 16, 3, 8, 8),)),
    "audio and video": Family("LTXAV", "LTXAV", 128, 3, "FLOW", ((2, 128, 2, 4, 6), (2, 8, 5, 16))),
    "pixels": Family("ChromaRadiance", "ChromaRadiance", 3, 2, "FLOW", ((2, 3, 32, 32),)),
}
FAMILIES = {name: family for name, family in FAMILIES.items() if hasattr(comfy.latent_formats, family.latent_format)}


class Net(torch.nn.Module):
    """A denoiser of any channels and dimensions that listens to its prompt; of several latents it draws the first by the prompt."""

    dtype = torch.float32

    def __init__(self, channels: int, dimensions: int):
        super().__init__()
        conv = torch.nn.Conv3d if dimensions == 3 else torch.nn.Conv2d
        self.first, self.last = conv(channels, 8, 3, padding=1), conv(8, channels, 3, padding=1)
        self.text = torch.nn.Linear(WIDTH, 8)

    def forward(self, x, timesteps, context=None, **_):
        if not torch.is_tensor(x):
            return [self.forward(x[0], timesteps, context), *(0.5 * other for other in x[1:])]
        text = self.text(context).mean(dim=1).view(-1, 8, *[1] * (x.ndim - 2))
        return self.last(torch.nn.functional.silu(self.first(x) + 3 * text))


class Model(comfy.model_base.BaseModel):
    """Takes packed latents apart, as core's models of audio and video do."""

    def extra_conds(self, **kwargs):
        found = super().extra_conds(**kwargs)
        if len(kwargs.get("latent_shapes") or ()) > 1:
            found["latent_shapes"] = comfy.conds.CONDConstant(kwargs["latent_shapes"])
        return found


def model_type_of(family: Family):
    """What core's own class for the family predicts."""
    return inspect.signature(getattr(comfy.model_base, family.model)).parameters["model_type"].default


def make_model(family: Family, model_type=None):
    torch.manual_seed(0)
    config = comfy.supported_models.SD15({"context_dim": WIDTH})
    config.unet_config = {"disable_unet_model_creation": True}
    config.latent_format = getattr(comfy.latent_formats, family.latent_format)()
    model = Model(config, model_type or model_type_of(family), device=CPU)
    model.diffusion_model = Net(family.channels, family.dimensions)
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def sample(model, family: Family, cfg: float = 4.0, steps: int = 3) -> list[torch.Tensor]:
    """A run of core's CFGGuider; the latents of the family."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(shape, generator=generator) for shape in family.shapes]
    latent = [torch.zeros(shape) for shape in family.shapes]
    if len(noise) > 1:
        from comfy.nested_tensor import NestedTensor

        noise, latent = NestedTensor(noise), NestedTensor(latent)
    else:
        (noise,), (latent,) = noise, latent
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny_conditioning(1), tiny_conditioning(2))
    guider.set_cfg(cfg)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    out = guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)
    return list(out.unbind()) if len(family.shapes) > 1 else [out]
