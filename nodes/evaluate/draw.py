"""One picture as core's KSampler draws it, and what is read from it."""

import hashlib
from dataclasses import dataclass
from types import SimpleNamespace

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...hgr_models import HGRError
from ..training.auto import AUTO, auto_runs
from ..training.plan import parse_sizes
from ..training.recorder import empty_latent
from .judges import PictureError
from .lists import Row

STEPS = 25  # where neither the widget nor the protocol says


@dataclass(frozen=True)
class Setup:
    """How pictures are drawn. `cfg` None: the prompt's own where its list has one, else `other_cfg`."""

    steps: int
    cfg: float | None
    other_cfg: float
    sampler: str
    scheduler: str
    size: tuple[int, int]
    negative: str
    latent: Tensor | None = None
    sigmas: Tensor | None = None

    def cfg_of(self, row: Row) -> float:
        """The scale for a prompt."""
        return self.cfg if self.cfg is not None else row.cfg if row.cfg is not None else self.other_cfg

    def facts(self) -> dict:
        """What decides about pictures."""
        levels = {} if self.sigmas is None else {"sigmas": [round(sigma, 6) for sigma in self.sigmas.tolist()]}
        return {
            "steps": self.steps, "cfg": "the list's" if self.cfg is None else self.cfg, "other_cfg": self.other_cfg, "sampler": self.sampler,
            "scheduler": self.scheduler, "size": list(self.size) if self.latent is None else list(self.latent.shape), "negative": self.negative,
            **levels,
        }  # fmt: skip


def make_setup(model: ModelPatcher, values: dict, protocol: dict) -> Setup:
    """The widgets' values; 0 and auto as the protocol says, else as the model is used."""
    auto = auto_runs(model)
    cfg = values["cfg"] or protocol.get("cfg")
    size = auto.sizes[0] if values["size"].strip() == AUTO else parse_sizes(values["size"])[0]
    latent, sigmas = values.get("latent"), values.get("sigmas")
    steps = values["steps"] or protocol.get("steps", STEPS) if sigmas is None else len(sigmas) - 1
    if steps < 1:
        raise HGRError("Expected `sigmas` of one step or more, but it is empty.")
    return Setup(
        steps, cfg, sum(auto.cfg) / 2, values["sampler"],
        auto.scheduler if values["scheduler"] == AUTO else values["scheduler"], size, values["negative"],
        None if latent is None else latent["samples"][:1].cpu(),
        None if sigmas is None else sigmas.cpu(),
    )  # fmt: skip


def draw(model: ModelPatcher, positive: list, negative: list, setup: Setup, cfg: float, seed: int) -> Tensor:
    """A latent (1, C, *spatial), as KSampler draws it from an empty one."""
    latent = empty_latent(model, SimpleNamespace(latent=setup.latent), setup.size, 1)
    noise = comfy.sample.prepare_noise(latent, seed)
    how = {"disable_pbar": True, "seed": seed}
    if setup.sigmas is not None:
        sampler = comfy.samplers.sampler_object(setup.sampler)
        return comfy.sample.sample_custom(model, noise, cfg, sampler, setup.sigmas, positive, negative, latent, **how)
    return comfy.sample.sample(
        model, noise, setup.steps, cfg, setup.sampler, setup.scheduler, positive, negative, latent, denoise=1.0, **how
    )  # fmt: skip


def digest(latent: Tensor) -> str:
    """SHA-256 of a latent's values."""
    parts = latent.unbind() if getattr(latent, "is_nested", False) else [latent]
    found = hashlib.sha256()
    for part in parts:
        found.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def decode(vae: VAE, latent: Tensor) -> Tensor:
    """The picture (1, H, W, 3) in [0, 1] of a latent; of a video, its middle frame. Raises PictureError where it has no numbers (NaN)."""
    parts = latent.unbind() if getattr(latent, "is_nested", False) else [latent]
    if not all(part.isfinite().all() for part in parts):
        raise PictureError(
            "The model gave values that are no numbers (NaN). Start ComfyUI with --fp32-unet or --force-upcast-attention."
        )
    latent = latent.unbind()[0] if getattr(latent, "is_nested", False) else latent
    pictures = vae.decode(latent)
    if pictures.ndim == 5:
        pictures = pictures[:, pictures.shape[1] // 2]
    pictures = pictures[..., :3].float().cpu()
    if not pictures.isfinite().all():
        raise PictureError("The VAE gave values that are no numbers (NaN). Start ComfyUI with --fp32-vae, or take another VAE.")
    return pictures.clamp(0, 1)
