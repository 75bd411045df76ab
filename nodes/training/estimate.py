"""What a training will take, measured before it starts: time on this machine, disk and memory."""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import torch

from ... import hgr_models
from ...hgr_models import losses
from ...hgr_models.detection import LEVELS
from ...hgr_models.recording import Points
from ...hgr_models.shards import HARMFUL, Recording
from ...hgr_models.train_guidance import POINTS
from .plan import TrainPlan, in_bytes, in_words
from .recorder import CALIBRATION_STEPS, FOLLOW, LOOKS, RecordingGuider, clean_pairs, empty_latent, plan_jobs, sample

HALF = 2  # bytes per value in a shard
MARGIN = 1.1
BACKWARD = {True: 3.5, False: 2.5}  # cost of a forward and backward pass in forward passes, with and without checkpointing


@dataclass(frozen=True)
class Cost:
    """Seconds per part, bytes on disk and bytes of memory beside the model's."""

    parts: dict[str, float]
    disk: int
    memory: int

    def in_words(self) -> str:
        """One line for the user."""
        return f"takes about {in_words(sum(self.parts.values()))}, {in_bytes(self.disk)} on disk, {in_bytes(self.memory)} of memory beside the model"

    def check_disk(self, folder: Path) -> None:
        """Raises HGRError when the disk has less room than the recording needs."""
        there = sum(path.stat().st_size for path in folder.iterdir())
        free = shutil.disk_usage(folder).free
        if free < MARGIN * (self.disk - there):
            raise hgr_models.HGRError(
                f"The recording needs about {in_bytes(self.disk - there)} in {folder}, but the disk has {in_bytes(free)} free. "
                "Free some space, or take fewer runs, smaller sizes or fewer prompts."
            )


def estimate(session, record_only: bool = False) -> Cost:
    """The cost of a session that has looked at its facts; encodes and evaluates twice to know how fast that is."""
    plan: TrainPlan = session.plan
    shape, row, text = _shape(session), 0.0, 0.0
    if session.model is not None:
        text = _seconds_per_text(session)
        row = _seconds_per_row(session)
    step = _seconds_per_guidance_step(session, shape) if plan.by_guidance and not record_only else 0.0
    parts = _seconds(plan, session, text, row, step)
    if record_only:
        parts = {name: seconds for name, seconds in parts.items() if name in ("prompts", "recording")}
    memory = _bytes_of_training(session)
    if plan.by_guidance and not record_only:
        memory += guidance_bytes(session)
    return Cost(parts, _bytes_on_disk(plan, session, shape), memory)


def _seconds(plan: TrainPlan, session, text: float, row: float, step: float) -> dict[str, float]:
    """Per part, from the seconds of a text, of a model row, and of a step of the guidance redirector."""
    parts, points = {}, plan.runs.steps + LOOKS
    if session.model is not None:
        texts = len(session.prompts.pairs) + len(session.prompts.clean)
        recording = plan.first_runs * (3 * points * row + 2 * text)  # a run has its prompt and the partner
        if plan.by_guidance:
            recording += plan.clean_runs * (2 * points * row + text)
            recording += plan.calibration_runs * (2 * (CALIBRATION_STEPS + len(LEVELS)) * row + text)
        parts = {"prompts": texts * text, "recording": recording}
    if plan.by_condition:
        parts["condition"] = plan.condition_steps * (plan.runs.batch * row * BACKWARD[plan.checkpointing] + 0.1)
    if plan.by_guidance:
        parts["guidance"] = plan.guidance_steps * step
        if session.model is not None:
            parts["recording on-policy"] = plan.policy_runs * (3 * points * row + 2 * text)
    return {**parts, "calibration": 5.0}


def _seconds_per_text(session) -> float:
    """One prompt through the text encoders; the first, which loads them, does not count."""
    for _ in range(2):
        started = time.monotonic()
        session.encode([session.prompts.clean[0]])
        seconds = time.monotonic() - started
    return seconds


def _seconds_per_row(session) -> float:
    """One row of one evaluation of the model, at the largest size; the first evaluation, which loads, does not count."""
    runs = session.plan.runs
    pairs = clean_pairs(session.prompts.clean)
    job = plan_jobs(runs, "speed", pairs, min(runs.batch, len(pairs)), FOLLOW[:1])[0]
    tokens = session.encode([pair.harmful for pair in job.pairs])
    guider = RecordingGuider(session.model).prepare(job, {"positive": tokens, "negative": session.encode([""])}, None)
    for _ in range(2):
        started = time.monotonic()
        sample(session.model, guider, job, runs, 1)
        seconds = time.monotonic() - started
    return seconds / (2 * len(job.pairs))


def _shape(session) -> tuple[int, ...]:
    """Of the largest latents (C, *spatial) that are recorded."""
    if session.model is None:
        return max(
            (shard.tensors["x"].shape[1:] for shard in Recording.open(session.folder).of_kind(HARMFUL)),
            key=math.prod,
            default=(4, 16, 16),
        )
    runs = session.plan.runs
    return tuple(empty_latent(session.model, runs, max(runs.sizes, key=math.prod), 1).shape[1:])


def _guidance_network(session, device: torch.device):
    return hgr_models.HGR(session.new_info(), None, session.configs()[1]).to(device).guidance


def _guidance_loss(network, shape: tuple[int, ...], count: int) -> torch.Tensor:
    """The loss of `count` random points, as a training step computes it."""
    device = next(network.parameters()).device
    latents = [torch.randn(count, *shape, device=device) for _ in range(4)]
    harms, sigma = torch.zeros(count, network.config.categories, device=device), torch.ones(count, device=device)
    points = Points(latents[0], sigma, sigma, *latents[1:], harms, torch.arange(count))
    with torch.autocast(device.type, torch.bfloat16):
        error, b, q, _ = losses.guidance_losses(network, points, harms, harms, latents[3], sigma)
    return error.mean() + b + q


def guidance_bytes(session) -> int:
    """What a step of the guidance redirector keeps for its backward pass, at the largest size; seen on two points, on the CPU."""
    shape = _shape(session)
    with torch.inference_mode(False), torch.enable_grad():
        network = _guidance_network(session, torch.device("cpu"))
        one, two = (_bytes_kept(network, shape, count) for count in (1, 2))
    return one + (POINTS - 1) * (two - one)


def _bytes_kept(network, shape: tuple[int, ...], count: int) -> int:
    kept: dict[int, torch.UntypedStorage] = {}  # several operations keep the same tensor

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _guidance_loss(network, shape, count)
    return sum(storage.nbytes() for storage in kept.values())


def _seconds_per_guidance_step(session, shape: tuple[int, ...]) -> float:
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


def _bytes_of_training(session) -> int:
    """Both redirectors with their averages, gradients and two moments, float32; the recording is mapped, not loaded."""
    info = session.new_info()
    with torch.device("meta"):
        hgr = hgr_models.HGR(info, *session.configs())
    return 5 * 4 * sum(p.numel() for p in hgr.parameters())


def _bytes_on_disk(plan: TrainPlan, session, shape: tuple[int, ...]) -> int:
    if session.model is None:
        return 0
    latent = math.prod(shape) * HALF
    points = plan.harmful_runs * (plan.runs.steps + LOOKS) * 4
    if plan.by_guidance:
        points += plan.clean_runs * (plan.runs.steps + LOOKS) * 3 + plan.calibration_runs * (CALIBRATION_STEPS + len(LEVELS)) * 3
    tokens = session.encode([""])[0][0].shape[1:].numel() * HALF
    texts = len(session.prompts.pairs) + len(session.prompts.clean) + len(session.prompts.held_out_clean)
    return round(points * latent + (texts + plan.harmful_runs + plan.clean_runs + plan.calibration_runs) * tokens)
