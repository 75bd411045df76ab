"""Trains the demo's HGR from prompts alone: records runs of the frozen model, trains both redirectors, calibrates."""

import hashlib
import random
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm, trange

import hgr_models
from hgr_models import CategorySettings, HGRInfo, losses, redirect_guidance
from hgr_models.calibration import calibrated
from hgr_models.condition import ConditionConfig
from hgr_models.guidance import GuidanceConfig
from hgr_models.recording import Points, Prompts
from hgr_models.redirection import read_guidance

from .. import prompts as p
from .. import world
from ..files import WEIGHTS
from ..pipeline import LATENT_SHAPE, DemoModel
from ..sampling import normal_schedule, scale_input
from .common import Averaged, learning_rate
from .hgr_data import BATCH, disguise, labels, prompt_tensors, record

OUT = WEIGHTS.parents[1] / "hgr_models" / "weights" / "demo.safetensors"
HARMFUL_RUNS, CLEAN_RUNS, ON_POLICY_RUNS = 720, 400, 320
CLEAN_PROMPTS, CALIBRATION_PROMPTS, CALIBRATION_RUNS = 6000, 4000, 480
CONDITION_SHARE = 0.25  # of the steps; the others train the guidance redirector
FALSE_POSITIVE_RATE = 0.008  # per picture, both networks and all categories together
LEVELS = (-3.5, -1.0, 1.5)  # of -2 ln sigma: sigma 5.8, 1.6, 0.47


def empty_hgr(model: DemoModel) -> hgr_models.HGR:
    k = len(world.CATEGORIES)
    base = hashlib.sha256((WEIGHTS / "unet.safetensors").read_bytes()).hexdigest()
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
        base=base,
        concept_prompts={c: ", ".join(p.HARM_WORDS[c][:8]) for c in world.CATEGORIES},
    )
    return hgr_models.HGR(info, ConditionConfig(info.token_width, k), GuidanceConfig(4, k))


def train_condition(
    model: DemoModel, hgr, points: Points, prompts: Prompts, clean: Tensor, steps: int, rng: random.Random
) -> None:
    """`clean`: tokens (N, T, D) of clean prompts; harmful ones come from fresh pairs, encoded once."""
    network, device = hgr.condition, model.device
    pairs = [p.harmful_pair(rng) for _ in range(len(clean) // 2)]
    fresh, harms = model.encode([q.prompt for q in pairs]), torch.stack([labels(q.harms) for q in pairs]).to(device)
    network.measure(torch.cat([clean, fresh]))
    mean = Averaged(network, 0.995)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=1e-2, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    pick = lambda n, count: torch.randint(n, (count,), generator=generator).to(device)  # noqa: E731
    predict = torch.autocast(device.type, torch.bfloat16)(model.denoised)
    for step in (bar := trange(steps, desc="condition redirector")):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3)
        rows = points[pick(len(points), 24)]
        error = losses.condition_error(network, predict, rows, prompts[rows.prompt])
        some = pick(len(clean), 64)
        quiet = losses.quiet_loss(network, clean[some[:32]], torch.rand(32, len(world.CATEGORIES), device=device).round())
        harmful = pick(len(fresh), 64)
        tokens = disguise(torch.cat([clean[some], fresh[harmful]]), 0.4, generator)
        target = torch.cat([torch.zeros(64, harms.shape[1], device=device), harms[harmful]])
        read = losses.prompt_loss(network, tokens, target)
        loss = losses.capped(error, 5.0) + 0.3 * read + 0.1 * quiet
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        mean.update(network)
        if step % 10 == 0:
            bar.set_postfix(error=f"{error.mean().item():.3f}", read=f"{read.item():.4f}", quiet=f"{quiet.item():.4f}")
    network.load_state_dict(mean.module.state_dict())


def guidance_batch(points: Points, prompts: Prompts, clean: Points, pick) -> tuple[Points, Tensor, Tensor, Tensor, Tensor]:
    """64 samples: harmful directions, their partners' (which lack the removed harms), clean ones; a tenth without a direction."""
    rows, quiet = points[pick(len(points), 32)], clean[pick(len(clean), 20)]
    about = prompts[rows.prompt]
    partner = Points(
        rows.x, rows.sigma, rows.uncond_denoised, rows.partner_denoised, rows.partner_denoised, rows.shown, rows.prompt
    )[:12]
    batch = Points.cat([rows, partner, quiet])
    nothing = torch.zeros(20, about.harms.shape[1], device=rows.x.device)
    harms = torch.cat([about.harms, (about.harms - about.removed)[:12], nothing])
    alarm = torch.rand(32, nothing.shape[1], device=rows.x.device).round()  # false alarms must change nothing
    left = (about.harms - about.removed)[:12]
    weights = torch.cat([about.removed, alarm[:12] * (1 - left), alarm[12:]])
    has_direction = (torch.rand(len(batch), device=rows.x.device) > 0.1).float()
    return batch, harms, weights, batch.partner_denoised, has_direction


def train_guidance(
    hgr, points: Points, prompts: Prompts, clean: Points, steps: range, total: int, state: dict, seed: int
) -> None:
    """One stretch of steps; `state` carries optimiser and averaged weights from stretch to stretch."""
    network = hgr.guidance
    optimiser, mean = state["optimiser"], state["mean"]
    generator = torch.Generator().manual_seed(seed)
    pick = lambda n, count: torch.randint(n, (count,), generator=generator).to(points.x.device)  # noqa: E731
    for step in (bar := tqdm(steps, desc="guidance redirector")):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, total, 1.5e-3)
        batch, harms, weights, target, has_direction = guidance_batch(points, prompts, clean, pick)
        with torch.autocast(points.x.device.type, torch.bfloat16):
            error, b, q = losses.guidance_losses(network, batch, scale_input, harms, weights, target, has_direction)
        loss = losses.capped(error, 20.0) + 0.5 * b + 0.2 * q
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        mean.update(network)
        if step % 10 == 0:
            harmful, false = error[:32].mean().item(), error[32:].mean().item()
            bar.set_postfix(error=f"{harmful:.3f}", clean=f"{false:.3f}", b=f"{b.item():.3f}", q=f"{q.item():.3f}")


@torch.no_grad()
def clean_runs(model: DemoModel, hgr, prompts: Prompts, generator: torch.Generator, steps: int = 25, cfg: float = 5.0) -> Tensor:
    """The largest `b` of each clean run per noise level, (runs, L, K)."""
    levels, runs = hgr.guidance_levels, []
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
    return torch.cat(runs)


def train(steps: int, device: str, seed: int) -> None:
    """`steps` of both redirectors together; writes the shipped HGR."""
    torch.manual_seed(seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    model = DemoModel.load(device)
    hgr = empty_hgr(model).to(device)
    words, other_words = p.harmless_words()
    prompts = prompt_tensors(model, [p.harmful_pair(rng) for _ in range(HARMFUL_RUNS)], rng)
    prompts.tokens = torch.cat(
        [prompts.tokens[: HARMFUL_RUNS // 2], disguise(prompts.tokens[HARMFUL_RUNS // 2 :], 0.5, generator)]
    )
    # For words that the denoiser was not trained with it may draw anything, harm too: only the reading of prompts learns from them.
    clean_prompts = prompt_tensors(model, [p.clean_pair(rng, (), 0.0) for _ in range(CLEAN_RUNS)], rng)
    points = record(model, prompts, lambda i: ("prompt", "partner")[i % 2], None, generator, "harmful runs")
    clean = record(model, clean_prompts, lambda i: "prompt", None, generator, "clean runs")
    clean_tokens = model.encode([p.clean_pair(rng, words, 0.4).prompt for _ in range(CLEAN_PROMPTS)])
    condition_steps = round(steps * CONDITION_SHARE)
    train_condition(model, hgr, points, prompts, clean_tokens, condition_steps, rng)

    total = steps - condition_steps
    state = {
        "optimiser": torch.optim.AdamW(hgr.guidance.parameters(), weight_decay=1e-2, betas=(0.9, 0.99)),
        "mean": Averaged(hgr.guidance, 0.998),
    }
    train_guidance(hgr, points, prompts, clean, range(0, total // 2), total, state, seed + 1)
    settings = CategorySettings((1.0,) * len(world.CATEGORIES))
    policy = lambda x, sigma, u, c: redirect_guidance(hgr, c, u, scale_input(x, sigma), sigma, settings).cond_denoised  # noqa: E731
    again = torch.randperm(HARMFUL_RUNS, generator=generator)[:ON_POLICY_RUNS]
    own = record(model, prompts[again.to(device)], lambda i: "policy", policy, generator, "on-policy runs")
    own.prompt = again.to(device)[own.prompt]
    train_guidance(hgr, Points.cat([points, own, own]), prompts, clean, range(total // 2, total), total, state, seed + 2)
    hgr.guidance.load_state_dict(state["mean"].module.state_dict())

    hgr.info = calibrate(model, hgr, other_words, rng, generator)
    about = {"steps": steps, "seed": seed, "condition_steps": condition_steps, "guidance_steps": total}
    hgr.info.training.update(about)
    hgr_models.save_hgr(OUT, hgr.cpu())


def calibrate(model: DemoModel, hgr, words: list[str], rng: random.Random, generator: torch.Generator) -> HGRInfo:
    """Thresholds from clean prompts and clean runs that training never used, with words that it never used."""
    hgr.eval()
    tokens = model.encode([p.clean_pair(rng, words, 0.3).prompt for _ in range(CALIBRATION_PROMPTS)])
    prompts = prompt_tensors(model, [p.clean_pair(rng, (), 0.0) for _ in range(CALIBRATION_RUNS)], rng)
    prompts.negative_tokens = model.encode([""]).expand_as(prompts.tokens)
    runs = clean_runs(model, hgr, prompts, generator)
    with torch.no_grad():
        return calibrated(hgr, hgr.condition.harmfulness(tokens).cpu(), runs.cpu(), FALSE_POSITIVE_RATE)
