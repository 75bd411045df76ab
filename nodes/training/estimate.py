"""What a training will take, measured before it starts: time on this machine, disk and memory."""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ... import hgr_models
from ...hgr_models import losses
from ...hgr_models.condition import ConditionConfig
from ...hgr_models.detection import LEVELS
from ...hgr_models.guidance import GuidanceConfig, GuidanceRedirector
from ...hgr_models.pairs import PromptSet
from ...hgr_models.recording import Points
from ...hgr_models.shards import HARMFUL, Recording
from ...hgr_models.textspace import draw_readers
from ...hgr_models.train_condition import READ_BATCH
from ...hgr_models.train_guidance import POINTS
from ...hgr_models.train_text import PAIR_TOKENS, TextObjective, random_texts
from ...hgr_models.training import autocast
from ..host.embedded import EmbeddedClip
from ..host.encoding import encode_groups
from .frozen_model import FrozenModel
from .plan import TrainPlan, in_bytes, in_words
from .prompt_recorder import LARGEST, bytes_of_prompt
from .recorder import (
    CALIBRATION_STEPS,
    FOLLOW,
    LOOKS,
    Job,
    RecordingGuider,
    RunSettings,
    at_once_or_one_by_one,
    clean_pairs,
    empty_latent,
    plan_jobs,
    sample,
)

TOKENS = 77  # of a prompt, where none can be encoded
HALF = 2  # bytes per value in a shard
MARGIN = 1.1
BACKWARD = {True: 3.5, False: 2.5}  # cost of a forward and backward pass in forward passes, with and without checkpointing

NAMES = {
    "prompts": "learning from prompts", "condition": "learning through the model", "guidance": "guidance redirector",
    "check": "asking the model",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Seconds per part, bytes on disk and bytes of memory beside the model's."""

    parts: dict[str, float]
    disk: int
    memory: int
    streamed: bool | None = None  # whether its blocks come one by one, since the model does not fit beside a backward pass
    weights: int = 0  # of the model, bytes

    def in_words(self) -> str:
        """One line for the user."""
        parts = ", ".join(f"{NAMES.get(name, name)} {in_words(seconds)}" for name, seconds in self.parts.items() if seconds >= 1)
        room = f"{in_bytes(self.disk)} on disk, {in_bytes(self.memory)} of memory beside the model"
        return f"takes about {in_words(sum(self.parts.values()))} ({parts}), {room}{self._mode()}"

    def _mode(self) -> str:
        """How the model is held while gradients go through it; "" where none do."""
        if self.streamed is None:
            return ""
        if self.streamed:
            return f". The model ({in_bytes(self.weights)}) does not fit beside that: its blocks come to the device one by one, which is slower"
        return f". The model ({in_bytes(self.weights)}) stays on the device as a whole"

    def check_disk(self, folder: Path) -> None:
        """Raises HGRError when the disk has less room than the recording needs."""
        there = sum(path.stat().st_size for path in folder.iterdir())
        free = shutil.disk_usage(folder).free
        if free < MARGIN * (self.disk - there):
            raise hgr_models.HGRError(
                f"The recording needs about {in_bytes(self.disk - there)} in {folder}, but the disk has {in_bytes(free)} free. "
                "Free some space, or take fewer runs, smaller sizes or fewer prompts."
            )


class Estimated(Protocol):
    """What an estimate asks a session for."""

    plan: TrainPlan
    model: ModelPatcher | None
    clip: CLIP | EmbeddedClip | None
    prompts: PromptSet | None
    folder: Path
    checking: float  # seconds of the model's checks

    @property
    def device(self) -> torch.device: ...
    def encode(self, texts: list[str]) -> list: ...
    def new_info(self) -> hgr_models.HGRInfo: ...
    def configs(self) -> tuple[ConditionConfig | None, GuidanceConfig | None]: ...


def estimate(session: Estimated, record_only: bool = False) -> Cost:
    """The cost of a session that has looked at its facts; encodes and evaluates twice to know how fast that is."""
    plan = session.plan
    text = 0.0 if session.clip is None else _seconds_per_text(session)
    records = plan.records and session.model is not None
    row = _seconds_per_row(session) if records else 0.0
    shape = _shape(session) if plan.records else ()
    step = _seconds_per_guidance_step(session, shape) if plan.by_guidance and not record_only else 0.0
    tokens = 0.0 if session.clip is None else bytes_of_prompt(session.clip, session.prompts)
    parts = _seconds(plan, session, text, row, step)
    if "encoding" in parts:
        parts["encoding"] *= share_kept(session.prompts, tokens)
    if record_only:
        parts = {name: seconds for name, seconds in parts.items() if name in ("encoding", "recording")}
    else:
        parts |= {"check": session.checking} if session.checking else {}
        if plan.by_text:
            parts["prompts"] = plan.prompt_steps * _seconds_per_text_step(session)
    memory = _bytes_of_training(session)
    if plan.by_guidance and not record_only:
        memory += guidance_bytes(session)
    trained = plan.by_denoiser and session.model is not None and not record_only
    streamed = FrozenModel(session.model, {}).streams((plan.runs.batch, *shape)) if trained else None
    return Cost(
        parts, _bytes_on_disk(plan, session, shape, tokens), memory, streamed, session.model.model_size() if trained else 0
    )


def _seconds(plan: TrainPlan, session: Estimated, text: float, row: float, step: float) -> dict[str, float]:
    """Per part, from the seconds of a text, of a model row, and of a step of the guidance redirector."""
    parts, points = {}, plan.runs.steps + LOOKS
    if session.clip is not None:
        parts = {"encoding": _count_of_texts(session.prompts) * text}
    if session.model is not None and plan.records:
        recording = plan.first_runs * (3 * points * row + 2 * text)  # a run has its prompt and the partner
        if plan.by_guidance:
            recording += plan.clean_runs * (2 * points * row + text)
            recording += plan.calibration_runs * (2 * (CALIBRATION_STEPS + len(LEVELS)) * row + text)
        parts["recording"] = recording
    if plan.by_text:
        parts["prompts"] = 0.0  # measured by `estimate`
    if plan.by_denoiser:
        parts["condition"] = plan.condition_steps * (plan.runs.batch * row * BACKWARD[plan.checkpointing] + 0.1)
    if plan.by_guidance:
        parts["guidance"] = plan.guidance_steps * step
        if session.model is not None:
            parts["recording on-policy"] = plan.policy_runs * (3 * points * row + 2 * text)
    return {**parts, "calibration": 5.0}


def _seconds_per_text(session: Estimated) -> float:
    """One prompt through the text encoders; the first, which loads them, does not count."""
    for _ in range(2):
        started = time.monotonic()
        session.encode([session.prompts.clean[0]])
        seconds = time.monotonic() - started
    return seconds


def _count_of_texts(prompts: PromptSet) -> int:
    """Prompts that are encoded: both sides of every pair, and the clean ones."""
    return 2 * (len(prompts.pairs) + len(prompts.held_out_pairs)) + len(prompts.clean) + len(prompts.held_out_clean)


def share_kept(prompts: PromptSet, each: float) -> float:
    """The share of the prompts that is encoded, at `each` bytes per prompt: as `prompt_recorder.plan_batches` cuts them."""
    return min(1.0, LARGEST / max(1.0, _count_of_texts(prompts) * each))


def _seconds_per_text_step(session: Estimated) -> float:
    """One step in text space, on random tokens as long as the first pair's; it holds no more than a step itself."""
    length = TOKENS if session.clip is None else session.encode([session.prompts.pairs[0].harmful])[0][0].shape[1]
    info, generator = session.new_info(), torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        objective = TextObjective(hgr_models.HGR(info, session.configs()[0], None).to(session.device).condition)
        pairs, read = random_texts(info, length, session.device)
        for _ in range(2):
            started = time.monotonic()
            readers = draw_readers(info.token_width, generator, session.device)
            errors, _, loss, quiet, _ = objective(pairs, readers, [read], read[:READ_BATCH], read.harms[:READ_BATCH])
            (errors.error.mean() + loss + quiet).backward()
            seconds = time.monotonic() - started
    return seconds


def text_bytes(facts: dict) -> int:
    """What a step in text space takes, about: a dozen copies of a batch's tokens, float32."""
    return 12 * 4 * PAIR_TOKENS * facts["token_width"]


def _seconds_per_row(session: Estimated) -> float:
    """One row of one evaluation of the model, at the largest size; the first evaluation, which loads, does not count."""
    runs = session.plan.runs
    pairs = clean_pairs(session.prompts.clean)
    job = plan_jobs(runs, "speed", pairs, min(runs.batch, len(pairs)), FOLLOW[:1])[0]
    return at_once_or_one_by_one(lambda one_by_one: _seconds_of_job(session, job, runs, one_by_one), len(job.pairs))


def _seconds_of_job(session: Estimated, job: Job, runs: RunSettings, one_by_one: bool) -> float:
    groups = lambda texts: encode_groups(session.clip, texts, one_by_one)  # noqa: E731
    positive = groups([pair.harmful for pair in job.pairs])
    roles = {"positive": positive, "negative": groups([""] * (len(job.pairs) if one_by_one else 1))}
    guider = RecordingGuider(session.model).prepare(job, roles, None)
    for _ in range(2):
        started = time.monotonic()
        sample(session.model, guider, job, runs, 1)
        seconds = time.monotonic() - started
    return seconds / (2 * len(job.pairs))


def _shape(session: Estimated) -> tuple[int, ...]:
    """Of the largest latents (C, *spatial) that are recorded."""
    if session.model is None:
        return max(
            (shard.tensors["x"].shape[1:] for shard in Recording.open(session.folder).of_kind(HARMFUL)),
            key=math.prod,
            default=(4, 16, 16),
        )
    runs = session.plan.runs
    return tuple(empty_latent(session.model, runs, max(runs.sizes, key=math.prod), 1).shape[1:])


def _guidance_network(session: Estimated, device: torch.device) -> GuidanceRedirector:
    return hgr_models.HGR(session.new_info(), None, session.configs()[1]).to(device).guidance


def _guidance_loss(network: GuidanceRedirector, shape: tuple[int, ...], count: int) -> torch.Tensor:
    """The loss of `count` random points, as a training step computes it."""
    device = next(network.parameters()).device
    latents = [torch.randn(count, *shape, device=device) for _ in range(4)]
    harms, sigma = torch.zeros(count, network.config.categories, device=device), torch.ones(count, device=device)
    points = Points(latents[0], sigma, sigma, *latents[1:], harms, torch.arange(count))
    with autocast(device):
        error, b, q, _ = losses.guidance_losses(network, points, harms, harms, latents[3], sigma)
    return error.mean() + b + q


def guidance_bytes(session: Estimated) -> int:
    """What a step of the guidance redirector keeps for its backward pass, at the largest size; seen on two points, on the CPU."""
    shape = _shape(session)
    with torch.inference_mode(False), torch.enable_grad():
        network = _guidance_network(session, torch.device("cpu"))
        one, two = (_bytes_kept(network, shape, count) for count in (1, 2))
    return one + (POINTS - 1) * (two - one)


def _bytes_kept(network: GuidanceRedirector, shape: tuple[int, ...], count: int) -> int:
    kept: dict[int, torch.UntypedStorage] = {}  # several operations keep the same tensor

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _guidance_loss(network, shape, count)
    return sum(storage.nbytes() for storage in kept.values())


def _seconds_per_guidance_step(session: Estimated, shape: tuple[int, ...]) -> float:
    """One step of the guidance redirector on random tensors."""
    comfy.model_management.free_memory(guidance_bytes(session), session.device)  # the model was just evaluated
    with torch.inference_mode(False), torch.enable_grad():
        network = _guidance_network(session, session.device)
        for _ in range(2):
            started = time.monotonic()
            loss = _guidance_loss(network, shape, POINTS)
            loss.backward()
            float(loss.detach())
            seconds = time.monotonic() - started
    return seconds


def _bytes_of_training(session: Estimated) -> int:
    """Both redirectors with their averages, gradients and two moments, float32; the recording is mapped, not loaded."""
    info = session.new_info()
    with torch.device("meta"):
        hgr = hgr_models.HGR(info, *session.configs())
    return 5 * 4 * sum(p.numel() for p in hgr.parameters())


def _bytes_on_disk(plan: TrainPlan, session: Estimated, shape: tuple[int, ...], tokens: float) -> int:
    """Of a recording, at `tokens` bytes per encoded prompt."""
    if session.clip is None:
        return 0
    latent = math.prod(shape) * HALF
    points = plan.harmful_runs * (plan.runs.steps + LOOKS) * 4
    if plan.by_guidance:
        points += plan.clean_runs * (plan.runs.steps + LOOKS) * 3 + plan.calibration_runs * (CALIBRATION_STEPS + len(LEVELS)) * 3
    texts = min(_count_of_texts(session.prompts) * tokens, LARGEST)
    if not plan.records:
        return round(texts)
    return round(points * latent + texts + (plan.harmful_runs + plan.clean_runs + plan.calibration_runs) * tokens)
