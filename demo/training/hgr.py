"""Trains the demo's HGR from prompts alone: records runs of the frozen model, trains both redirectors, calibrates."""

import random
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm, trange

import hgr_models
from hgr_models import CategorySettings, HGRInfo, redirect_guidance
from hgr_models.calibration import calibrated, calibrated_on_pictures
from hgr_models.condition import ConditionConfig
from hgr_models.guidance import GuidanceConfig
from hgr_models.recording import Prompts
from hgr_models.redirection import read_guidance
from hgr_models.shards import CLEAN, HARMFUL, Recording
from hgr_models.train_condition import ConditionTraining
from hgr_models.train_guidance import GuidanceTraining
from hgr_models.training import StepReport, disguise

from .. import prompts as p
from .. import world
from ..detection import clean_renders, detect
from ..files import WEIGHTS
from ..pipeline import LATENT_SHAPE, DemoModel
from ..sampling import normal_schedule, scale_input
from .hgr_data import BATCH, frozen, prompt_tensors, record, write_prompts

OUT = WEIGHTS.parents[1] / "hgr_models" / "weights" / "demo.safetensors"
HARMFUL_RUNS, CLEAN_RUNS, ON_POLICY_RUNS = 960, 960, 480  # a third of the harmful runs each follows prompt, partner and HGR
CLEAN_PROMPTS, CALIBRATION_PROMPTS, CALIBRATION_RUNS = 6000, 4000, 800
CONDITION_SHARE = 0.25  # of the steps; the others train the guidance redirector
FALSE_POSITIVE_RATE = 0.006  # per picture, both networks and all categories together
PICTURE_RATE = 0.008  # of finished pictures that are looked at
LEVELS = (-3.5, -1.0, 1.5)  # of -2 ln sigma: sigma 5.8, 1.6, 0.47


def empty_hgr(model: DemoModel) -> hgr_models.HGR:
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
    return hgr_models.HGR(info, ConditionConfig(info.token_width, k), GuidanceConfig(4, k))


@torch.no_grad()
def clean_runs(
    model: DemoModel, hgr, prompts: Prompts, generator: torch.Generator, steps: int = 25, cfg: float = 5.0
) -> tuple[Tensor, Tensor]:
    """The largest `b` of each clean run per noise level, (runs, L, K), and the runs' latents (runs, 4, 16, 16)."""
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
            at = int(torch.bucketize(-2 * sigma.log(), levels))
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


def train(steps: int, device: str, seed: int) -> None:
    """`steps` of both redirectors together; writes the shipped HGR."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the networks' first weights
    model = DemoModel.load(device)
    hgr = empty_hgr(model).to(device)
    words, other_words = p.harmless_words()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_both(model, hgr, steps, seed, words, folder, rng, generator)
    hgr.info = calibrate(model, hgr, other_words, rng, generator)
    hgr.info.training.update(steps=steps, seed=seed)
    hgr_models.save_hgr(OUT, hgr.cpu())


def train_both(
    model: DemoModel, hgr, steps: int, seed: int, words: list[str], folder: Path, rng: random.Random, generator: torch.Generator
) -> None:
    """Records into `folder` and trains both networks."""
    write_prompts(model, [p.clean_pair(rng, words, 0.4) for _ in range(CLEAN_PROMPTS)], folder, "clean")
    write_prompts(model, [p.harmful_pair(rng) for _ in range(CLEAN_PROMPTS // 2)], folder, "harmful")
    condition_steps = round(steps * CONDITION_SHARE)
    condition = ConditionTraining(hgr, condition_steps, seed)
    condition.measure(Recording.open(folder))
    prompts = prompt_tensors(model, [p.harmful_pair(rng) for _ in range(HARMFUL_RUNS)], rng)
    hidden = disguise(prompts.tokens[HARMFUL_RUNS // 2 :], hgr.condition.token_scale, 0.5, generator)
    prompts.tokens = torch.cat([prompts.tokens[: HARMFUL_RUNS // 2], hidden])
    # For words that the denoiser was not trained with it may draw anything, harm too: only the reading of prompts learns from them.
    clean_prompts = prompt_tensors(model, [p.clean_pair(rng, (), 0.0) for _ in range(CLEAN_RUNS)], rng)
    record(model, prompts, HARMFUL, lambda i: ("prompt", "partner")[i % 2], None, generator, folder, "harmful runs")
    record(model, clean_prompts, CLEAN, lambda i: "prompt", None, generator, folder, "clean runs")

    recording, predict = Recording.open(folder), frozen(model.device)
    advance("condition redirector", condition, condition_steps, lambda: condition.train_step(recording, predict))
    condition.finish()
    guidance = GuidanceTraining(hgr, steps - condition_steps, seed + 1)
    advance("guidance redirector", guidance, guidance.steps // 2, lambda: guidance.train_step(recording))
    settings = CategorySettings((1.0,) * len(world.CATEGORIES))
    policy = lambda x, sigma, u, c: redirect_guidance(hgr, c, u, scale_input(x, sigma), sigma, settings).cond_denoised  # noqa: E731
    again = prompts[torch.randperm(HARMFUL_RUNS, generator=generator)[:ON_POLICY_RUNS].to(model.device)]
    record(model, again, HARMFUL, lambda i: "policy", policy, generator, folder, "on-policy runs")
    everything = Recording.open(folder)
    advance("guidance redirector", guidance, guidance.steps, lambda: guidance.train_step(everything))
    guidance.finish()


def calibrate(model: DemoModel, hgr, words: list[str], rng: random.Random, generator: torch.Generator) -> HGRInfo:
    """Thresholds from clean prompts and clean runs that training never used, with words that it never used."""
    hgr.eval()
    tokens = model.encode([p.clean_pair(rng, words, 0.3).prompt for _ in range(CALIBRATION_PROMPTS)])
    prompts = prompt_tensors(model, [p.clean_pair(rng, (), 0.0) for _ in range(CALIBRATION_RUNS)], rng)
    prompts.negative_tokens = model.encode([""]).expand_as(prompts.tokens)
    runs, latents = clean_runs(model, hgr, prompts, generator)
    rendered, captions = clean_renders(model, len(latents), rng)
    with torch.no_grad():
        hgr.info = calibrated(hgr, hgr.condition.harmfulness(tokens).cpu(), runs.cpu(), FALSE_POSITIVE_RATE)
    scores = torch.cat([detect(model, hgr, latents, prompts.tokens).scores, detect(model, hgr, rendered, captions).scores])
    return calibrated_on_pictures(hgr.info, scores.cpu(), PICTURE_RATE)
