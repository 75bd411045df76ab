"""The coverage matrix: every way to sample x every core node that changes guidance or output x SafeCFG before and after it.

This file: the ways to sample. `matrix_ideal.py` computes what a run must give, `matrix_check.py` compares.
"""

import dataclasses
from collections.abc import Callable
from functools import cache

import comfy.samplers
import torch
from safecfg import hgr_models
from safecfg.nodes.host.settings import ApplySettings
from safecfg.nodes.redirect.apply import apply

from fakes import make_hgr
from host_nodes import call, scan
from matrix_ideal import prompt


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What a way to sample can be given."""

    positive: list
    middle: list
    negative: list
    empty: list

    @classmethod
    def make(cls, batch: int = 2) -> "Prompts":
        """Harmful in the last row, the negative ones too: those must stay as they are."""
        return cls(*(prompt(seed, batch) for seed in (1, 3, 2, 4)))

    def changed(self, change: Callable[[list], list]) -> "Prompts":
        """With other prompts to draw."""
        return dataclasses.replace(self, positive=change(self.positive), middle=change(self.middle))


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything else of a run. `sampler`: a name, or a SAMPLER."""

    latent: dict
    steps: int = 1
    cfg: float = 5.0
    denoise: float = 1.0
    sampler: object = "euler"

    @classmethod
    def make(cls, batch: int = 2, size: int = 8, **settings) -> "Scene":
        return cls({"samples": torch.zeros(batch, 4, size, size)}, **settings)

    def sigmas(self, model) -> torch.Tensor:
        return comfy.samplers.KSampler(model, self.steps, torch.device("cpu"), "euler", "normal", self.denoise).sigmas


def _ksampler(model, prompts, scene):
    return call(
        "KSampler", model=model, seed=0, steps=scene.steps, cfg=scene.cfg, sampler_name=scene.sampler, scheduler="normal",
        positive=prompts.positive, negative=prompts.negative, latent_image=scene.latent, denoise=scene.denoise,
    )  # fmt: skip


def _ksampler_advanced(model, prompts, scene):
    steps = round(scene.steps / scene.denoise)
    return call(
        "KSamplerAdvanced", model=model, add_noise="enable", noise_seed=0, steps=steps, cfg=scene.cfg, sampler_name=scene.sampler,
        scheduler="normal", positive=prompts.positive, negative=prompts.negative, latent_image=scene.latent,
        start_at_step=steps - scene.steps, end_at_step=steps, return_with_leftover_noise="disable",
    )  # fmt: skip


def _sampler_of(scene):
    return comfy.samplers.sampler_object(scene.sampler) if isinstance(scene.sampler, str) else scene.sampler


def _sampler_custom(model, prompts, scene):
    return call(
        "SamplerCustom", model=model, add_noise=True, noise_seed=0, cfg=scene.cfg, positive=prompts.positive,
        negative=prompts.negative, sampler=_sampler_of(scene), sigmas=scene.sigmas(model), latent_image=scene.latent,
    )  # fmt: skip


def _with_guider(name: str, inputs: Callable[[Prompts, float], dict]):
    def run(model, prompts, scene):
        (guider,) = call(name, model=model, **inputs(prompts, scene.cfg))
        return _advanced(model, guider, scene)

    return run


def _advanced(model, guider, scene):
    return call(
        "SamplerCustomAdvanced", noise=call("RandomNoise", noise_seed=0)[0], guider=guider, sampler=_sampler_of(scene),
        sigmas=scene.sigmas(model), latent_image=scene.latent,
    )  # fmt: skip


def _dual(style: str):
    return _with_guider(
        "DualCFGGuider",
        lambda p, cfg: dict(
            cond1=p.positive, cond2=p.middle, negative=p.negative, cfg_conds=3.0, cfg_cond2_negative=cfg, style=style
        ),
    )


class _HalfVideo(property):
    """Where LTXVDualCFGGuider divides a packed latent: here in the middle, since the tiny model's is a picture."""

    def __init__(self):
        super().__init__(lambda guider: 4, lambda guider, found: None)


def _dual_modality(model, prompts, scene):
    inputs = dict(positive=prompts.positive, negative=prompts.negative, video_cfg=scene.cfg, audio_cfg=3.0)
    (guider,) = call("LTXVDualCFGGuider", model=model, **inputs)
    guider.__class__ = type("Halved", (type(guider),), {"_v_numel": _HalfVideo()})
    return _advanced(model, guider, scene)


def _dual_model(model, prompts, scene):
    inputs = lambda p, cfg: dict(model_negative=model, positive=p.positive, negative=p.negative, cfg=cfg)  # noqa: E731
    return _with_guider("DualModelGuider", inputs)(model, prompts, scene)


WAYS = {  # by name: the nodes, and a run with them
    "KSampler": (["KSampler"], _ksampler),
    "KSamplerAdvanced": (["KSamplerAdvanced"], _ksampler_advanced),
    "SamplerCustom": (["SamplerCustom"], _sampler_custom),
    "CFGGuider": (
        ["CFGGuider", "SamplerCustomAdvanced"],
        _with_guider("CFGGuider", lambda p, cfg: dict(positive=p.positive, negative=p.negative, cfg=cfg)),
    ),
    "BasicGuider": (["BasicGuider"], _with_guider("BasicGuider", lambda p, cfg: dict(conditioning=p.positive))),
    "DualCFGGuider regular": (["DualCFGGuider"], _dual("regular")),
    "DualCFGGuider nested": (["DualCFGGuider"], _dual("nested")),
    "PerpNegGuider": (
        ["PerpNegGuider"],
        _with_guider(
            "PerpNegGuider",
            lambda p, cfg: dict(positive=p.positive, negative=p.negative, empty_conditioning=p.empty, cfg=cfg, neg_scale=0.7),
        ),
    ),
    "DualModelGuider": (["DualModelGuider"], _dual_model),
    "LTXVDualCFGGuider": (["LTXVDualCFGGuider"], _dual_modality),
}
WAYS = {name: run for name, (needed, run) in WAYS.items() if all(node in scan() for node in needed)}


COUPLED = ("PerpNegGuider",)  # it projects the directions of a whole batch on each other


def is_blind(way: str, cfg: float) -> bool:
    """Whether a guider gives the guidance redirector nothing to look at; the condition redirector still works."""
    return way == "BasicGuider" or (way == "DualModelGuider" and cfg == 1)


def sample(way: str, model, prompts: Prompts, scene: Scene) -> torch.Tensor:
    return WAYS[way](model, prompts, scene)[0]["samples"]


_hgr = cache(make_hgr)  # one for all: its networks are stood in for


def with_safecfg(model, strict: bool = True, strengths: tuple[float, float] = (1.0, 1.0)):
    """`SafeCFG Apply`. The known harm is of the first category."""
    hgr = _hgr()
    chosen = hgr_models.CategorySettings(strengths)
    return apply(model, hgr, ApplySettings(hgr.info, chosen, strict=strict, remember_flagged=True))
