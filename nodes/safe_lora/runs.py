"""Unlabelled samples of the user's model: runs through core's samplers, and noised pictures. Nothing is decoded.

What is harmful is not known here and asked nowhere: prompts are strings, pictures are latents.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider
from comfy.sd import CLIP
from torch import Tensor

from ... import hgr_models
from ...hgr_models.hgr import Redirectors
from ...hgr_models.lora import LoRA
from ...hgr_models.lora_samples import Samples, read_samples, write_samples
from ..host.encoding import encode_groups, in_rows, padded, text_of
from ..host.families import POOLED
from ..host.more_tokens import TOKENS, scatter
from ..loader import HGRModel
from ..training.recorder import GroupedGuider, RunSettings, at_once_or_one_by_one, empty_latent

BASE, SAFE, STUDENT, PICTURES = "base", "safe", "student", "pictures"  # what runs follow; pictures are noised, not sampled


@dataclass(frozen=True)
class Job:
    """One batch of runs, or of noised pictures: latents (P, C, *spatial) as a LATENT holds them."""

    name: str
    prompts: tuple[str, ...]
    size: tuple[int, int]
    sampler: str
    cfg: float
    follow: str
    seed: int
    latents: Tensor | None = None


def plan_runs(settings: RunSettings, prompts: Sequence[str], runs: int, part: str, follow: tuple[str, ...]) -> list[Job]:
    """The batches of `runs` runs: the same for the same seed. Every prompt is used once before one is used twice."""
    rng = random.Random(f"{settings.seed} {part}")
    order = [text for _ in range(-(-runs // len(prompts))) for text in rng.sample(prompts, len(prompts))][:runs]
    return [
        Job(
            f"{part}-{i:05d}",
            tuple(order[start : start + settings.batch]),
            settings.sizes[i % len(settings.sizes)],
            rng.choice(settings.samplers),
            rng.uniform(*settings.cfg),
            follow[(i // len(settings.sizes)) % len(follow)],
            rng.getrandbits(40),
        )
        for i, start in enumerate(range(0, runs, settings.batch))
    ]


def plan_pictures(settings: RunSettings, pictures: Sequence[tuple[Tensor, str]]) -> list[Job]:
    """Batches of pictures of one shape: (latent (1, C, *spatial), caption) pairs."""
    rng = random.Random(f"{settings.seed} {PICTURES}")
    by_shape: dict[tuple, list[tuple[Tensor, str]]] = {}
    for latent, caption in pictures:
        by_shape.setdefault(tuple(latent.shape[1:]), []).append((latent, caption))
    batches = [some[i : i + settings.batch] for some in by_shape.values() for i in range(0, len(some), settings.batch)]
    return [
        Job(
            f"{PICTURES}-{i:05d}",
            tuple(caption for _, caption in some),
            settings.sizes[0],
            settings.samplers[0],
            1.0,
            PICTURES,
            rng.getrandbits(40),
            torch.cat([latent for latent, _ in some]),
        )
        for i, some in enumerate(batches)
    ]


class UnlabelledGuider(GroupedGuider):
    """Follows the base, the base under the HGR, or the LoRA, and keeps every latent with the base's unconditional prediction."""

    def prepare(
        self, job: Job, roles: dict[str, list], hgr: Redirectors, settings: hgr_models.CategorySettings, lora: LoRA | None
    ) -> "UnlabelledGuider":
        """`roles` as in `set_groups`."""
        self.set_groups(roles)
        self.job, self.hgr, self.settings, self.lora = job, hgr, settings, lora
        self.rows: list = []
        self.held: Tensor | None = None
        return self

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        sigma = timestep.expand(len(x)) if timestep.numel() == 1 else timestep
        roles = {BASE: ("negative", "positive"), SAFE: ("negative", SAFE)}.get(self.job.follow, ("negative",))
        with nullcontext() if self.lora is None else self.lora.off():
            uncond, *cond = self.evaluate(roles, x, timestep, model_options)
        c_in = self.inner_model.model_sampling.calculate_input(sigma, torch.ones_like(x)).flatten(1)[:, 0]
        self.rows.append(tuple(t.detach().float().cpu() for t in (x, sigma, c_in, uncond)))
        if self.job.follow == PICTURES:
            return uncond
        if self.job.follow == STUDENT:
            uncond, *cond = self.evaluate(("negative", "positive"), x, timestep, model_options)
        towards = self._turned(cond[0], uncond, x, sigma) if self.job.follow == SAFE else cond[0]
        return uncond + (towards - uncond) * self.job.cfg

    def _turned(self, cond_denoised: Tensor, uncond_denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        if self.hgr.guidance is None:
            return cond_denoised
        x_in = self.inner_model.model_sampling.calculate_input(sigma, x)
        result = hgr_models.redirect_guidance(self.hgr, cond_denoised, uncond_denoised, x_in, sigma, self.settings, self.held)
        self.held = result.weights
        return result.cond_denoised.to(cond_denoised)


class Noising(comfy.samplers.Sampler):
    """A sampler for core's guiders that evaluates noised pictures instead of sampling."""

    def sample(
        self,
        model_wrap: CFGGuider,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor | None:
        for sigma in sigmas[:-1]:
            levels = sigma.expand(len(noise))
            x = model_wrap.inner_model.model_sampling.noise_scaling(levels, noise.clone(), latent_image)
            model_wrap(x, levels, **extra_args)
        return latent_image


def sample_job(model: ModelPatcher, guider: UnlabelledGuider, settings: RunSettings) -> None:
    """Runs a job. Noise levels lie at random between those of the schedule, so that all of them are met."""
    job, sampling = guider.job, model.get_model_object("model_sampling")
    latent = empty_latent(model, settings, job.size, len(job.prompts)) if job.latents is None else job.latents
    sampler = Noising() if job.follow == PICTURES else comfy.samplers.sampler_object(job.sampler)
    sigmas = comfy.samplers.calculate_sigmas(sampling, settings.scheduler, settings.steps + 1)
    share = torch.rand(1, generator=torch.Generator().manual_seed(job.seed)).to(sigmas)
    between = sigmas[1:-1] ** (1 - share) * sigmas[:-2] ** share
    sigmas = torch.cat([between if job.follow == PICTURES else torch.cat([sigmas[:1], between[1:]]), sigmas[-1:]])
    noise = comfy.sample.prepare_noise(latent, job.seed)
    guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=job.seed)


def run_job(
    model: ModelPatcher,
    clip: CLIP,
    hgr: HGRModel,
    job: Job,
    settings: RunSettings,
    chosen: hgr_models.CategorySettings,
    lora: LoRA | None = None,
) -> Samples:
    """The samples of a job; `lora` for runs that follow it, attached to the model."""
    run = lambda one_by_one: _run_job(model, clip, hgr, job, settings, chosen, lora, one_by_one)  # noqa: E731
    return at_once_or_one_by_one(run, len(job.prompts))


def _run_job(
    model: ModelPatcher,
    clip: CLIP,
    hgr: HGRModel,
    job: Job,
    settings: RunSettings,
    chosen: hgr_models.CategorySettings,
    lora: LoRA | None,
    one_by_one: bool,
) -> Samples:
    positive = encode_groups(clip, list(job.prompts), one_by_one)
    negative = encode_groups(clip, [""] * (len(job.prompts) if one_by_one else 1), one_by_one)
    roles = {"positive": positive, "negative": negative}
    if job.follow == SAFE:
        roles[SAFE] = [(rows, _safe(conditioning, hgr, chosen)) for rows, conditioning in positive]
    guider = UnlabelledGuider(model).prepare(job, roles, hgr.patcher.model, chosen, lora)
    sample_job(model, guider, settings)
    columns = (torch.cat(column) for column in zip(*guider.rows, strict=True))
    texts = text_of(padded([*in_rows(positive), *in_rows(negative)[:1]]), torch.zeros(len(job.prompts) + 1, 0))
    return Samples(*columns, texts.tokens, texts.pooled, texts.mask, texts.lengths)


def _safe(positive: list, hgr: HGRModel, chosen: hgr_models.CategorySettings) -> list:
    """The CONDITIONING that the condition redirector makes of one."""
    if hgr.patcher.model.condition is None:
        return positive
    comfy.model_management.load_models_gpu([hgr.patcher])
    count = len(positive[0][0])
    texts = text_of(padded(in_rows([(list(range(count)), positive)])), torch.zeros(count, 0))
    device = hgr.patcher.load_device
    tokens, pooled, mask = (None if t is None else t.to(device) for t in (texts.tokens, texts.pooled, texts.mask))
    result = hgr_models.redirect_condition(hgr.patcher.model, tokens, pooled, chosen, mask)
    condition = {**positive[0][1], TOKENS: positive[0][0]}
    parts = {key: part.to(condition[key]) for key, part in scatter(condition, result.tokens).items()}
    if result.pooled is not None:
        parts[POOLED] = result.pooled.to(condition[POOLED])
    return [[parts.pop(TOKENS), {**positive[0][1], **parts}]]


def record_jobs(
    model: ModelPatcher,
    clip: CLIP,
    hgr: HGRModel,
    jobs: Sequence[Job],
    settings: RunSettings,
    chosen: hgr_models.CategorySettings,
    folder: Path,
    lora: LoRA | None = None,
) -> Iterator[Job]:
    """Runs every job whose file is not there yet; yields each when it is on disk. `lora`: for runs that follow it."""
    for job in jobs:
        path = folder / f"{job.name}.safetensors"
        if not path.exists():
            with nullcontext() if lora is None else lora.attached(model.model.diffusion_model):
                write_samples(path, run_job(model, clip, hgr, job, settings, chosen, lora))
        yield job


def recorded(folder: Path, jobs: Sequence[Job]) -> list[Samples]:
    """The samples of jobs, from their files."""
    return [read_samples(folder / f"{job.name}.safetensors") for job in jobs]
