"""Recording guidance: sampling runs of the user's model through core's samplers, kept as shards. Nothing is decoded."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor

from ... import hgr_models
from ...hgr_models.detection import LEVELS
from ...hgr_models.pairs import PromptPair, PromptSet
from ...hgr_models.recording import Points, Prompts
from ...hgr_models.shards import CALIBRATION, HARMFUL, PICTURES, write_runs
from ...hgr_models.training import disguise
from ..host.encoding import encode_groups, in_rows, padded, some_layer, text_of, vary
from ..host.families import latents_of
from ..host.packed_latents import Part, part_for
from .frozen_model import BATCH_ERRORS

LOOKS, LOOK_PARTS = 2, (0.35, 0.9)  # how often, and at which parts of the schedule, a finished run is looked at as a picture
CALIBRATION_STEPS = 20  # of a run that thresholds are calibrated on: as many as users take
FOLLOW = ("prompt", "partner")  # what the runs follow before there is an HGR; then a third follows it

logger = logging.getLogger(__name__)
Found = TypeVar("Found")
# (model, x, sigma, uncond_denoised, cond_denoised) -> the cond_denoised to follow
Policy = Callable[[BaseModel, Tensor, Tensor, Tensor, Tensor], Tensor]


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
    settings: RunSettings,
    kind: str,
    pairs: tuple[PromptPair | CleanPrompt, ...],
    runs: int,
    follow: tuple[str, ...],
    looks: int = LOOKS,
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


def empty_latent(model: ModelPatcher, settings: RunSettings, size: tuple[int, int], count: int) -> Tensor:
    """Zeros (count, C, *spatial) as core's own empty-latent nodes make them for this model."""
    if settings.latent is not None:
        return _repeated(settings.latent, count)
    ratio = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)
    flat = torch.zeros(count, 4, max(1, size[1] // ratio), max(1, size[0] // ratio))
    return comfy.sample.fix_empty_latent_channels(model, flat)


def _repeated(latent: Tensor, count: int) -> Tensor:
    """Zeros like a latent (1, C, *spatial), or like nested ones (audio and video), `count` times."""
    zeros = lambda t: torch.zeros(count, *t.shape[1:])  # noqa: E731
    if isinstance(latent, Tensor):
        return zeros(latent)
    return type(latent)([zeros(t) for t in latent.unbind()])


class GroupedGuider(comfy.samplers.CFGGuider):
    """Evaluates roles whose rows have prompts of different lengths, every group of prompts that are alike by itself."""

    def set_groups(self, roles: dict[str, list[tuple[list[int], list]]]) -> None:
        """`roles`: name to groups of `encode_groups`."""
        name = lambda role, i: role if i == 0 else f"{role} {i}"  # noqa: E731
        self.groups = {role: [(name(role, i), rows) for i, (rows, _) in enumerate(groups)] for role, groups in roles.items()}
        self.inner_set_conds({name(role, i): cond for role, groups in roles.items() for i, (_, cond) in enumerate(groups)})

    def inner_sample(self, *args, **kwargs) -> Tensor:
        """As core's; remembers the shapes of latents that core packed into one."""
        self.latent_shapes = tuple(kwargs.get("latent_shapes") or ())
        return super().inner_sample(*args, **kwargs)

    def part(self, x: Tensor) -> Part:
        """Where a latent x holds what the model draws for the eye. Raises HGRError where it does not."""
        facts = latents_of(self.model_patcher)
        if (part := part_for(x, self.latent_shapes, facts)) is None:
            raise hgr_models.HGRError(
                f"Expected latents with {facts.latent_channels} channels and {facts.latent_dimensions} dimensions, as this model has, but "
                f"got the shape {tuple(x.shape)}. Connect an empty latent that was made for it."
            )
        return part

    def evaluate(self, roles: Sequence[str], x: Tensor, timestep: Tensor, model_options: dict | None) -> list[Tensor]:
        """The x0 prediction (B, C, *spatial) of each role."""
        together = [role for role in roles if len(self.groups[role]) == 1]  # in one batch, as core samples
        found = dict(zip(together, self._calc(together, x, timestep, model_options), strict=True)) if together else {}
        for role in roles:
            if role not in found:
                found[role] = torch.empty_like(x)
                for name, rows in self.groups[role]:
                    at = timestep if timestep.numel() == 1 else timestep[rows]
                    found[role][rows] = self._calc([name], x[rows], at, model_options)[0]
        return [found[role] for role in roles]

    def _calc(self, names: list[str], x: Tensor, timestep: Tensor, model_options: dict | None) -> list[Tensor]:
        conds = [self.conds[name] for name in names]
        return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options or {})


class RecordingGuider(GroupedGuider):
    """Evaluates negative, prompt and partner at every step, keeps all three, and follows one of them."""

    def prepare(self, job: Job, roles: dict[str, list], policy: Policy | None) -> "RecordingGuider":
        """`roles` as in `set_groups`: positive, negative, and partner where it is another prompt."""
        self.set_groups(roles)
        self.job, self.policy = job, policy
        self.points: list[Points] = []
        return self

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        roles = ["negative", "positive", *(["partner"] if "partner" in self.groups else [])]
        uncond, cond, *others = self.evaluate(roles, x, timestep, model_options)
        partner = others[0] if others else cond
        sigma = timestep.expand(len(x)) if timestep.numel() == 1 else timestep
        c_in = self.inner_model.model_sampling.calculate_input(sigma, torch.ones_like(x)).flatten(1)[:, 0]
        part, kept = self.part(x), lambda t: t.detach().float().cpu()
        seen, *predicted = (part.take(t) for t in (x, uncond, cond, partner))
        columns, rest = map(kept, (seen, sigma, c_in, *predicted)), part.rest(x)
        shown, rest = torch.zeros(len(x), 0), None if rest is None else kept(rest)
        self.points.append(Points(*columns, shown, torch.arange(len(x)), rest))
        towards = {"prompt": cond, "partner": partner}.get(self.job.follow)
        if towards is None:
            assert self.policy is not None  # who follows it has one
            towards = part.put(cond, self.policy(self.inner_model, seen, sigma, *predicted[:2]))
        return uncond + (towards - uncond) * self.job.cfg


def sample(model: ModelPatcher, guider: GroupedGuider, job: Job, settings: RunSettings, steps: int) -> Tensor:
    """One batch of runs through core's sampler; the finished latents."""
    latent = empty_latent(model, settings, job.size, len(job.pairs))
    noise = comfy.sample.prepare_noise(latent, job.seed)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), settings.scheduler, steps)
    return guider.sample(noise, latent, comfy.samplers.sampler_object(job.sampler), sigmas, disable_pbar=True, seed=job.seed)


def _look_again(model: ModelPatcher, guider: RecordingGuider, output: Tensor, part: float, seed: int) -> None:
    """Noises finished latents to a part of the schedule and evaluates them once more, as SafeCFG Detect Harm looks at pictures."""
    sigma = float(model.get_model_object("model_sampling").percent_to_sigma(part))
    euler = comfy.samplers.sampler_object("euler")
    nested = getattr(output, "is_nested", False)
    sampled = output if nested else model.model.process_latent_in(output)  # a format may fold frames into channels
    noise = comfy.sample.prepare_noise(sampled, seed)
    guider.sample(noise, output, euler, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=seed)


def at_once_or_one_by_one(run: Callable[[bool], Found], count: int) -> Found:
    """What `run(one_by_one)` gives for `count` rows: at once, or one by one where core cannot evaluate a model in batches."""
    try:
        return run(False)
    except BATCH_ERRORS as error:
        if count == 1 or isinstance(error, (torch.OutOfMemoryError, hgr_models.HGRError)):
            raise
        logger.debug("SafeCFG: a batch failed; its rows are evaluated one by one.", exc_info=True)
    return run(True)


def record_job(
    model: ModelPatcher,
    clip: CLIP,
    prompts: PromptSet,
    job: Job,
    settings: RunSettings,
    scale: Tensor | None,
    policy: Policy | None,
) -> tuple[Points, Prompts, Points | None]:
    """As `_record_job`; a model that core cannot evaluate in batches gets its rows one by one."""
    arguments = model, clip, prompts, job, settings, scale, policy
    return at_once_or_one_by_one(lambda one_by_one: _record_job(*arguments, one_by_one), len(job.pairs))


def _record_job(
    model: ModelPatcher,
    clip: CLIP,
    prompts: PromptSet,
    job: Job,
    settings: RunSettings,
    scale: Tensor | None,
    policy: Policy | None,
    one_by_one: bool,
) -> tuple[Points, Prompts, Points | None]:
    """Samples a job's runs and gives every step of them; of runs to calibrate with also what a detector will see of them.

    A quarter of the harmful prompts is disguised in units of `scale` (D,): the direction must show what text hides. Runs to
    learn from are worded as users do (`encoding.vary`), prompt and partner alike; runs to measure with are not.
    """
    texts, rng = [[pair.harmful for pair in job.pairs], [pair.safe for pair in job.pairs]], random.Random(f"{job.seed} wording")
    if job.looks:
        texts, clip = vary(texts, prompts.clean, rng), some_layer(clip, rng)
    groups = lambda texts: encode_groups(clip, texts, one_by_one)  # noqa: E731
    negative = lambda text: groups([text] * (len(job.pairs) if one_by_one else 1))  # noqa: E731
    roles = {"positive": groups(texts[0]), "negative": negative(job.negative)}
    if job.kind == HARMFUL:
        if scale is not None:
            _disguise(roles["positive"], scale, torch.Generator().manual_seed(job.seed))
        roles["partner"] = groups(texts[1])
    guider = RecordingGuider(model).prepare(job, roles, policy)
    output = sample(model, guider, job, settings, CALIBRATION_STEPS if job.kind == CALIBRATION else settings.steps)
    for seed in range(job.seed + 1, job.seed + 1 + job.looks):
        _look_again(model, guider, output, random.Random(seed).uniform(*LOOK_PARTS), seed)
    run, pictures = guider.points, None
    if job.kind == CALIBRATION:
        roles["negative"] = negative("")  # the negative of SafeCFG Detect Harm
        guider.prepare(job, roles, None)
        for look, part in enumerate(LEVELS, start=1):
            _look_again(model, guider, output, part, job.seed + look)
        pictures = Points.cat(guider.points)
    harms = torch.stack([labels(prompts.categories, pair.harms) for pair in job.pairs])
    removed = torch.stack([labels(prompts.categories, pair.removed) for pair in job.pairs])
    rows, points = text_of(padded(in_rows(roles["positive"])), harms), Points.cat(run)
    shown = harms if job.follow == "prompt" else harms - removed
    for some in (points, pictures):
        if some is not None:
            some.shown = shown.repeat(len(some) // len(shown), 1)
    return points, Prompts(rows.tokens, None, None, harms, removed, rows.pooled, rows.mask, rows.lengths), pictures


def _disguise(groups: list[tuple[list[int], list]], scale: Tensor, generator: torch.Generator) -> None:
    """Moves the tokens of some prompts; in place in the groups."""
    for _, conditioning in groups:
        conditioning[0][0] = disguise(conditioning[0][0], scale[: conditioning[0][0].shape[-1]], 0.25, generator)


def record_shards(
    model: ModelPatcher, clip: CLIP, prompts: PromptSet, jobs: list[Job], settings: RunSettings, folder: Path, facts: dict,
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
