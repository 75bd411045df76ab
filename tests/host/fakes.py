"""A small HGR with random networks, known redirections, and runs of core's guiders on the tiny model."""

import dataclasses
import uuid

import comfy.samplers
import torch
from safecfg import hgr_models
from safecfg.hgr_models.condition import ConditionConfig
from safecfg.hgr_models.guidance import GuidanceConfig
from safecfg.nodes.host.settings import ApplySettings
from safecfg.nodes.loader import HGRModel, core_patcher
from safecfg.nodes.redirect.apply import apply

CPU = torch.device("cpu")
INFO = hgr_models.HGRInfo(
    categories=("red", "blue"),
    condition_thresholds=(0.0, 0.0),
    guidance_levels=(0.0,),
    guidance_thresholds=((0.0, 0.0), (0.0, 0.0)),
    latent_format="SD15",
    latent_channels=4,
    latent_dimensions=2,
    prediction="EPS",
    token_width=16,
    pooled_width=0,
)
ALWAYS, NEVER = 0.0, 1.0  # thresholds: harmfulness lies strictly between


def make_hgr(condition: float = ALWAYS, guidance: float = ALWAYS, info=INFO, networks=("condition", "guidance")) -> HGRModel:
    """An HGR_MODEL whose redirections are random but far from nothing; the same weights every time."""
    k = len(info.categories)
    info = dataclasses.replace(info, condition_thresholds=(condition,) * k, guidance_thresholds=((guidance,) * k,) * 2)
    configs = {
        "condition": ConditionConfig(info.token_width, k, info.pooled_width, width=32, depth=1, delta_depth=1),
        "guidance": GuidanceConfig(info.latent_channels, k, info.latent_dimensions, width=32, read_depth=1, correct_depth=2),
    }
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        hgr = hgr_models.HGR(info, *(config if name in networks else None for name, config in configs.items()))
        for parameter in hgr.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    hgr.eval().requires_grad_(False)
    return HGRModel(core_patcher(hgr, load_device=CPU, offload_device=CPU), info, "random.safetensors", uuid.uuid4().hex)


def make_settings(hgr: HGRModel, strength: float = 1.0, **settings) -> ApplySettings:
    chosen = hgr_models.CategorySettings((strength,) * len(hgr.info.categories))
    return ApplySettings(hgr.info, chosen, **settings)


def apply_hgr(model, hgr: HGRModel | None = None, strength: float = 1.0, **settings):
    """`SafeCFG Apply` with defaults."""
    hgr = hgr or make_hgr()
    return apply(model, hgr, make_settings(hgr, strength, **settings))


def turned(guidance: torch.Tensor) -> torch.Tensor:
    """A known redirection of a guidance direction; applied twice, or never, it gives something else."""
    return 0.5 * guidance.flip(-1)


class KnownRedirection:
    """Stands in for `hgr_models.redirect_guidance`: `turned` for the rows and calls that `flags` names; counts its calls."""

    def __init__(self, monkeypatch, rows=None, calls=None, value=None):
        self.rows, self.calls, self.value = rows, calls, value
        self.count, self.x_in, self.sigmas, self.remembered = 0, None, [], []
        monkeypatch.setattr(hgr_models, "redirect_guidance", self)

    def __call__(self, hgr, cond_denoised, uncond_denoised, x_in, sigma, settings, flagged=None):
        rows = torch.tensor([self.rows is None or i in self.rows for i in range(len(x_in))])
        rows = rows & torch.tensor(self.calls is None or self.count in self.calls)
        weights = rows[:, None].float().expand(-1, len(settings.strengths))
        if flagged is not None:
            weights = torch.maximum(weights, flagged)
        self.count, self.x_in = self.count + 1, x_in
        self.sigmas.append(float(sigma[0]))
        self.remembered.append(flagged)
        safe = uncond_denoised + turned(cond_denoised - uncond_denoised) if self.value is None else cond_denoised * self.value
        chosen = (weights > 0).any(dim=1).view(-1, *[1] * (x_in.ndim - 1))
        return hgr_models.GuidanceResult(torch.where(chosen, safe, cond_denoised), weights, weights)


class Once(comfy.samplers.Sampler):
    """Evaluates a guider once at one sigma, and each of its conditions alone."""

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        self.x = x = noise * sigmas[0]
        sigma = sigmas[0] * noise.new_ones(len(noise))
        self.out = model_wrap(x, sigma, **extra_args)
        alone = {"transformer_options": {}}
        self.alone = {
            role: comfy.samplers.calc_cond_batch(model_wrap.inner_model, [conds], x, sigma, alone)[0]
            for role, conds in model_wrap.conds.items()
        }
        return self.out


class AtEverySigma(comfy.samplers.Sampler):
    """Evaluates a guider at every sigma of a schedule, always on the same noise, so that runs can be compared step by step."""

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        self.outs = {}
        for sigma in sigmas:
            self.outs[float(sigma)] = model_wrap(noise * sigma, sigma * noise.new_ones(len(noise)), **extra_args)
        return noise


def guide(guider, sampler, sigmas=(3.0, 0.0), batch: int = 1, seed: int = 0, size: int = 8):
    """Runs a guider with a sampler object on random noise; returns the sampler."""
    noise = torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(seed))
    guider.sample(noise, torch.zeros_like(noise), sampler, torch.tensor(sigmas), disable_pbar=True, seed=seed)
    return sampler


def sample(model, positive, negative, cfg=5.0, steps=6, sampler="euler", scheduler="normal", batch=1, seed=0) -> torch.Tensor:
    """A run of core's KSampler on random noise."""
    noise = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    ksampler = comfy.samplers.KSampler(model, steps, CPU, sampler, scheduler)
    return ksampler.sample(noise, positive, negative, cfg, latent_image=torch.zeros_like(noise), disable_pbar=True, seed=seed)
