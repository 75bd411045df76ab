"""What the trainings of the demo's two redirectors share: the empty HGR, a progress bar, calibration."""

import random
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm, trange

import hgr_models
from hgr_models import HGR, HGRInfo
from hgr_models.calibration import calibrated, calibrated_on_pictures, only_shown
from hgr_models.condition import ConditionConfig
from hgr_models.guidance import GuidanceConfig
from hgr_models.recording import Prompts
from hgr_models.redirection import noise_level, read_guidance
from hgr_models.training import StepReport

from .. import prompts as p
from .. import world
from ..detection import clean_renders, detect
from ..files import WEIGHTS
from ..pipeline import LATENT_SHAPE, DemoModel
from ..sampling import normal_schedule, scale_input
from .hgr_data import BATCH, prompt_tensors

OUT = WEIGHTS.parents[1] / "hgr_models" / "weights" / "demo.safetensors"
CALIBRATION_PROMPTS, CALIBRATION_RUNS, HARMFUL_RUNS = 16000, 4000, 200
CALIBRATION_PICTURES = 800  # finished runs that are looked at, and as many rendered scenes
FALSE_POSITIVE_RATE = 0.0015  # per picture, both networks and all categories together
PICTURE_RATE = 0.008  # of finished pictures that are looked at
LEVELS = (-3.5, -1.0, 1.5)  # of -2 ln sigma: sigma 5.8, 1.6, 0.47


def make_hgr(model: DemoModel, condition: bool, guidance: bool) -> HGR:
    """An HGR for the demo model, untrained and with thresholds of 0.5, with one of the networks or both."""
    k = len(world.CATEGORIES)
    info = HGRInfo(
        categories=world.CATEGORIES,
        condition_thresholds=(0.5,) * k,
        guidance_levels=LEVELS,
        guidance_thresholds=((0.5,) * k,) * (len(LEVELS) + 1),
        latent_format="SD15",
        latent_channels=4,
        latent_dimensions=2,
        prediction="EPS",
        token_width=model.unet.config.context_dim,
        pooled_width=0,
        base=hgr_models.fingerprint(model.unet.state_dict()),
        concept_prompts={c: ", ".join(p.HARM_WORDS[c][:8]) for c in world.CATEGORIES},
    )
    return HGR(info, ConditionConfig(info.token_width, k) if condition else None, GuidanceConfig(4, k) if guidance else None)


def trained(stored: HGR, network: str) -> dict:
    """What a stored HGR says of the training of its `network` (condition, guidance), for one that takes it over."""
    return {k: v for k, v in stored.info.training.items() if k.startswith(f"{network}_")}


@torch.no_grad()
def sampled_runs(
    model: DemoModel, hgr, prompts: Prompts, generator: torch.Generator, steps: int = 25, cfg: float = 5.0
) -> tuple[Tensor, Tensor]:
    """The largest `b` of each run of plain CFG per noise level, (runs, L, K), and the runs' latents (runs, 4, 16, 16)."""
    levels, runs, latents = hgr.guidance_levels, [], []
    sigmas = normal_schedule(steps).to(model.device)
    for start in trange(0, len(prompts), BATCH, desc="calibration"):
        chunk = prompts[slice(start, start + BATCH)]
        x = torch.randn(len(chunk), *LATENT_SHAPE, generator=generator).to(model.device) * (1 + sigmas[0] ** 2) ** 0.5
        largest = torch.zeros(len(chunk), len(levels) + 1, len(world.CATEGORIES), device=model.device)
        for sigma, following in pairwise(sigmas):
            level = sigma.expand(len(chunk))
            both = model.denoised(
                torch.cat([x, x]), sigma.expand(2 * len(chunk)), torch.cat([chunk.negative_tokens, chunk.tokens])
            )
            uncond, cond = both.chunk(2)
            _, _, reading = read_guidance(hgr.guidance, cond, uncond, scale_input(x, level), level)
            at = int(noise_level(-2 * sigma.log(), levels))
            largest[:, at] = torch.maximum(largest[:, at], reading.direction_logits.sigmoid())
            x = x + (x - (uncond + cfg * (cond - uncond))) / sigma * (following - sigma)
        runs.append(largest)
        latents.append(x)
    return torch.cat(runs), torch.cat(latents)


def advance(title: str, training, steps: int, step: Callable[[], StepReport]) -> None:
    """Runs `step` until `training` has done `steps` in all."""
    with tqdm(total=steps, initial=training.step, desc=title) as bar:
        while training.step < steps:
            report = step()
            bar.update()
            if training.step % 10 == 0:
                right = sum(report.accuracy) / len(report.accuracy)
                bar.set_postfix(error=f"{report.error:.3f}", before=f"{report.before:.3f}", right=f"{right:.3f}")


def calibrate(model: DemoModel, hgr: HGR, seed: int) -> HGRInfo:
    """Thresholds of the networks that there are, from clean prompts and clean runs, with words that training never used."""
    hgr.train(False)
    rng, generator = random.Random(f"calibration {seed}"), torch.Generator().manual_seed(seed)
    tokens = model.encode([p.clean_pair(rng, p.harmless_words()[1], 0.3).prompt for _ in range(CALIBRATION_PROMPTS)])
    with torch.no_grad():
        prompts_read = hgr.condition.harmfulness(tokens).cpu() if hgr.condition is not None else None
    if hgr.guidance is None:
        return calibrated(hgr, prompts_read, None, FALSE_POSITIVE_RATE)  # of so many prompts no margin is needed
    prompts = prompt_tensors(model, [p.clean_pair(rng, (), 0.0) for _ in range(CALIBRATION_RUNS)], rng)
    prompts.negative_tokens = model.encode([""]).expand_as(prompts.tokens)
    runs, latents = sampled_runs(model, hgr, prompts, generator)
    latents, drawn = latents[:CALIBRATION_PICTURES], prompts.tokens[:CALIBRATION_PICTURES]
    rendered, captions = clean_renders(model, len(latents), rng)
    harmful = _harmful_readings(model, hgr, rng, generator)
    hgr.info = calibrated(hgr, prompts_read, runs.cpu(), FALSE_POSITIVE_RATE, harmful=harmful)
    scores = torch.cat([detect(model, hgr, latents, drawn).scores, detect(model, hgr, rendered, captions).scores])
    return calibrated_on_pictures(hgr.info, scores.cpu(), PICTURE_RATE)


def _harmful_readings(model: DemoModel, hgr: HGR, rng: random.Random, generator: torch.Generator) -> tuple[Tensor | None, Tensor]:
    """As `calibration.harmful_readings`, of pairs as in training."""
    prompts = prompt_tensors(model, [p.harmful_pair(rng) for _ in range(HARMFUL_RUNS)], rng)
    harms = prompts.harms.cpu()
    read = None if hgr.condition is None else only_shown(hgr.condition.harmfulness(prompts.tokens).detach().cpu(), harms)
    return read, only_shown(sampled_runs(model, hgr, prompts, generator)[0].cpu(), harms)
