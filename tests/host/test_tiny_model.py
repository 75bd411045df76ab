"""The tiny model is a fair test bed: what a test sees change must be neither rounding error nor an explosion."""

import comfy.samplers
import pytest
import torch


def rms(x: torch.Tensor) -> float:
    return float(x.float().square().mean().sqrt())


def guidance_ratios(model, positive, negative, cfg, scheduler="normal", steps=12) -> list[float]:
    """rms of the guidance against rms of the noisy latent, at every sigma of a run."""
    model, ratios = model.clone(), []

    def record(args):
        cond_denoised, uncond_denoised = args["conds_out"]
        ratios.append(rms(cond_denoised - uncond_denoised) / rms(args["input"]))
        return args["conds_out"]

    model.set_model_sampler_pre_cfg_function(record, disable_cfg1_optimization=True)
    sampler = comfy.samplers.KSampler(model, steps, torch.device("cpu"), "euler", scheduler)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sampler.sample(noise, positive, negative, cfg, latent_image=torch.zeros_like(noise), disable_pbar=True)
    return ratios


@pytest.mark.parametrize("scheduler", ["normal", "karras"])
@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_guidance_is_neither_tiny_nor_huge(tiny_model, tiny_cond, seed, cfg, scheduler):
    ratios = guidance_ratios(tiny_model, tiny_cond(seed), tiny_cond(100 + seed), cfg, scheduler)
    assert len(ratios) == 12
    assert all(0.05 <= r <= 0.5 for r in ratios), ratios
