"""Recording guidance: sampling runs of the user's model through core's samplers, kept as shards. Nothing is decoded."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...hgr_models.detection import LEVELS
from ...hgr_models.pairs import PromptPair, PromptSet
from ...hgr_models.recording import Points, Policy, Prompts
from ...hgr_models.shards import CALIBRATION, CALIBRATION_TEXTS, CLEAN, HARMFUL, PICTURES, TEXTS, write_runs, write_texts
from ...hgr_models.training import disguise
from .encoding import encode_batch, text_of
from .wording import some_layer, vary

TEXT_BATCH = 32
LOOKS, LOOK_PARTS = 2, (0.35, 0.9)  # how often, and at which parts of the schedule, a finished run is looked at as a picture
CALIBRATION_STEPS = 20  # of a run that thresholds are calibrated on: as many as users take
FOLLOW = ("prompt", "partner")  # what the runs follow before there is an HGR; then a third follows it


@dataclass(frozen=True)
class RunSettings:
    """How runs are sampled: every batch draws one of each."""

    steps: int
    batch: int
    sizes: tuple[tuple[int, int], ...]  # width and height in pixels; unused with a latent
    samplers: tuple[str, ...]
    scheduler: str
    cfg: tuple[float, float]  # lowest and highest
    negatives: tuple[str, ...]
    seed: int
    latent: Tensor | None = None  # (1, C, *spatial): the shape to sample, for video and other latents that sizes cannot say


@dataclass(frozen=True)
class Job:
    """One batch of runs."""

    name: str
    kind: str
    pairs: "tuple[PromptPair | CleanPrompt, ...]"
    size: tuple[int, int]
    sampler: str
    cfg: float
    negative: str
    follow: str
    seed: int
    looks: int  # 0: a run to measure with


@dataclass(frozen=True)
class CleanPrompt:
    """A clean prompt, as a pair with itself."""

    harmful: str
    harms: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()

    @property
    def safe(self) -> str:
        return self.harmful


def clean_pairs(prompts: tuple[str, ...]) -> tuple[CleanPrompt, ...]:
    return tuple(map(CleanPrompt, prompts))


def plan_jobs(
    settings: RunSettings, kind: str, pairs: tuple[PromptPair, ...], runs: int, follow: tuple[str, ...], looks: int = LOOKS
) -> list[Job]:
    """The batches of `runs` runs: the same for the same seed, so that a recording can go on where it stopped.

    Every pair is used once before one is used twice. Sizes take turns, so that harmful and clean runs share them.
    """
    rng = random.Random(f"{settings.seed} {kind} {follow}")
    order = [pair for _ in range(-(-runs // len(pairs))) for pair in rng.sample(pairs, len(pairs))][:runs]
    jobs = []
    for i, start in enumerate(range(0, runs, settings.batch)):
        jobs.append(
            Job(
                f"{kind}-{follow[0]}-{settings.seed}-{i:05d}",
                kind,
                tuple(order[start : start + settings.batch]),
                settings.sizes[i % len(settings.sizes)],
                rng.choice(settings.samplers),
                rng.uniform(*settings.cfg),
                rng.choice(settings.negatives),
                follow[(i // len(settings.sizes)) % len(follow)],
                rng.getrandbits(40),
                looks,
            )
        )
    return jobs


def labels(categories: tuple[str, ...], harms: frozenset[str]) -> Tensor:
    """1 per category, (K,)."""
    return torch.tensor([float(c in harms) for c in categories])


def empty_latent(model, settings: RunSettings, size: tuple[int, int], count: int) -> Tensor:
    """Zeros (count, C, *spatial) as core's own empty-latent nodes make them for this model."""
    if settings.latent is not None:
        return torch.zeros(count, *settings.latent.shape[1:])
    ratio = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)
    flat = torch.zeros(count, 4, max(1, size[1] // ratio), max(1, size[0] // ratio))
    return comfy.sample.fix_empty_latent_channels(model, flat)


class RecordingGuider(comfy.samplers.CFGGuider):
    """Evaluates negative, prompt and partner at every step, keeps all three, and follows one of them."""

    def prepare(self, job: Job, conds: dict[str, list], policy: Policy | None) -> "RecordingGuider":
        self.inner_set_conds(conds)
        self.job, self.policy, self.points = job, policy, []
        return self

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        comfy.model_management.throw_exception_if_processing_interrupted()
        roles = [self.conds["negative"], self.conds["positive"], *([self.conds["partner"]] if "partner" in self.conds else [])]
        uncond, cond, *partner = comfy.samplers.calc_cond_batch(self.inner_model, roles, x, timestep, model_options or {})
        partner = partner[0] if partner else cond
        sigma = timestep.expand(len(x)) if timestep.numel() == 1 else timestep
        c_in = self.inner_model.model_sampling.calculate_input(sigma, torch.ones_like(x)).flatten(1)[:, 0]
        columns = (t.detach().float().cpu() for t in (x, sigma, c_in, uncond, cond, partner))
        self.points.append(Points(*columns, shown=torch.zeros(len(x), 0), prompt=torch.arange(len(x))))
        towards = {"prompt": cond, "partner": partner}.get(self.job.follow)
        towards = self.policy(self.inner_model, x, sigma, uncond, cond) if towards is None else towards
        return uncond + (towards - uncond) * self.job.cfg


def sample(model, guider, job: Job, settings: RunSettings, steps: int) -> Tensor:
    """One batch of runs through core's sampler; the finished latents."""
    latent = empty_latent(model, settings, job.size, len(job.pairs))
    noise = comfy.sample.prepare_noise(latent, job.seed)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), settings.scheduler, steps)
    return guider.sample(noise, latent, comfy.samplers.sampler_object(job.sampler), sigmas, disable_pbar=True, seed=job.seed)


def _look_again(model, guider, output: Tensor, part: float, seed: int) -> None:
    """Noises finished latents to a part of the schedule and evaluates them once more, as SafeCFG Detect Harm looks at pictures."""
    sigma = float(model.get_model_object("model_sampling").percent_to_sigma(part))
    euler = comfy.samplers.sampler_object("euler")
    noise = comfy.sample.prepare_noise(output, seed)
    guider.sample(noise, output, euler, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=seed)


def record_job(
    model, clip, prompts: PromptSet, job: Job, settings: RunSettings, scale: Tensor | None, policy: Policy | None
) -> tuple[Points, Prompts, Points | None]:
    """Samples a job's runs and gives every step of them; of runs to calibrate with also what a detector will see of them.

    A quarter of the harmful prompts is disguised in units of `scale` (D,): the direction must show what text hides. Runs to
    learn from are worded as users do (`wording`), prompt and partner alike; runs to measure with are not.
    """
    texts, rng = [[pair.harmful for pair in job.pairs], [pair.safe for pair in job.pairs]], random.Random(f"{job.seed} wording")
    if job.looks:
        texts, clip = vary(texts, prompts.clean, rng), some_layer(clip, rng)
    text = encode_batch(clip, texts[0])
    conds = {"positive": text, "negative": encode_batch(clip, [job.negative])}
    if job.kind == HARMFUL:
        generator = torch.Generator().manual_seed(job.seed)
        text[0][0] = text[0][0] if scale is None else disguise(text[0][0], scale, 0.25, generator)
        conds["partner"] = encode_batch(clip, texts[1])
    guider = RecordingGuider(model).prepare(job, conds, policy)
    output = sample(model, guider, job, settings, CALIBRATION_STEPS if job.kind == CALIBRATION else settings.steps)
    for seed in range(job.seed + 1, job.seed + 1 + job.looks):
        _look_again(model, guider, output, random.Random(seed).uniform(*LOOK_PARTS), seed)
    run, pictures = guider.points, None
    if job.kind == CALIBRATION:
        guider.prepare(job, {"positive": text, "negative": encode_batch(clip, [""])}, None)  # the negative of SafeCFG Detect Harm
        for look, part in enumerate(LEVELS, start=1):
            _look_again(model, guider, output, part, job.seed + look)
        pictures = Points.cat(guider.points)
    harms, removed = (
        torch.stack([labels(prompts.categories, getattr(p, name)) for p in job.pairs]) for name in ("harms", "removed")
    )
    rows, points = text_of(text, harms), Points.cat(run)
    shown = harms if job.follow == "prompt" else harms - removed
    for some in (points, pictures):
        if some is not None:
            some.shown = shown.repeat(len(some) // len(shown), 1)
    return points, Prompts(rows.tokens, None, None, harms, removed, rows.pooled, rows.mask), pictures


def record(
    model, clip, prompts: PromptSet, jobs: list[Job], settings: RunSettings, folder: Path, facts: dict,
    scale: Tensor | None = None, policy: Policy | None = None,
) -> Iterator[Job]:  # fmt: skip
    """Records every job whose shard is not there yet; yields each when it is on disk."""
    for job in jobs:
        path = folder / f"{job.name}.safetensors"
        if not path.exists():
            points, rows, pictures = record_job(model, clip, prompts, job, settings, scale, policy)
            if pictures is not None:  # first: where the runs are, these are too
                write_runs(folder / f"{PICTURES}-{job.name}.safetensors", PICTURES, pictures, rows, facts)
            write_runs(path, job.kind, points, rows, facts)
        yield job


def write_prompts(clip, prompts: PromptSet, seed: int, folder: Path, facts: dict) -> Iterator[float]:
    """Writes every encoded training prompt as shards, those with harms apart; yields the share that is done.

    As users write them (`wording`).
    """
    groups = {HARMFUL: prompts.pairs, CLEAN: clean_pairs(prompts.clean), CALIBRATION: clean_pairs(prompts.held_out_clean)}
    batches = [
        (kind, f"texts-{kind}-{i:05d}", pairs[start : start + TEXT_BATCH])
        for kind, pairs in groups.items()
        for i, start in enumerate(range(0, len(pairs), TEXT_BATCH))
    ]
    for done, (kind, name, pairs) in enumerate(batches):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            rng = random.Random(f"{seed} {name}")
            (texts,) = vary([[pair.harmful for pair in pairs]], prompts.clean, rng)
            harms = torch.stack([labels(prompts.categories, pair.harms) for pair in pairs])
            rows = text_of(encode_batch(some_layer(clip, rng), texts), harms)
            write_texts(path, rows, facts, CALIBRATION_TEXTS if kind == CALIBRATION else TEXTS)
        yield (done + 1) / len(batches)
