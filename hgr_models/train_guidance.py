"""Training of the guidance redirector: on recorded tensors alone."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import losses
from .errors import HGRError
from .hgr import HGR
from .recording import Points, Prompts
from .shards import CLEAN, HARMFUL, Recording
from .training import StepReport, Training, accuracies, autocast, on_device

HARMFUL_BATCH, PARTNER_BATCH, CLEAN_BATCH = 32, 12, 20  # points per step; the partners are those of the first harmful ones
POINTS = HARMFUL_BATCH + PARTNER_BATCH + CLEAN_BATCH
NO_DIRECTION = 0.2  # of the points are given as pictures alone, which teaches only `q`
CAP = 20.0  # of an error


class GuidanceObjective(nn.Module):
    """`losses.guidance_losses` as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return losses.guidance_losses(self.network, *arguments)


class GuidanceTraining(Training):
    """The guidance redirector, on recorded tensors alone."""

    def __init__(self, hgr: HGR, steps: int, seed: int, rate: float = 1.5e-3):
        super().__init__(hgr.guidance, steps, rate, 0.998, seed)
        self.objective = GuidanceObjective(hgr.guidance)

    def train_step(self, recording: Recording) -> StepReport:
        """One step."""
        shapes = recording.shapes()
        if not shapes:
            raise HGRError("The recording has no harmful and clean runs of the same latent size. Record both.")
        shape = shapes[int(torch.randint(len(shapes), (), generator=self.generator))]
        draw = lambda kind, count: on_device(recording.draw(kind, count, self.generator, shape), self.device)  # noqa: E731
        (rows, about), (quiet, _) = draw(HARMFUL, HARMFUL_BATCH), draw(CLEAN, CLEAN_BATCH)
        alarm = self.random(PARTNER_BATCH + CLEAN_BATCH, about.harms.shape[1])
        batch, harms, weights = mixed(rows, about, quiet, alarm)
        has_direction = (self.random(len(batch)) > NO_DIRECTION).float()
        loss, error, logits = self.loss(batch, harms, weights, has_direction)
        self.advance(loss)
        before = losses.unredirected_guidance_error(batch[:HARMFUL_BATCH]).mean().item()
        real = has_direction > 0
        return StepReport(loss.item(), error[:HARMFUL_BATCH].mean().item(), before, accuracies(logits[real], harms[real]))

    def loss(self, batch: Points, harms: Tensor, weights: Tensor, has_direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of points, their error after redirection (B,), and the logits (B, K) of `b`; arguments as in `guidance_losses`."""
        with autocast(self.device):
            error, b, q, logits = self.objective(batch, harms, weights, batch.partner_denoised, has_direction)
        return losses.capped(relative(error, batch), CAP) + 0.5 * b + 0.3 * q, error, logits

    @torch.no_grad()
    def error_on(self, held_out: Recording, count: int = 64) -> float:
        """Mean distance to the partner's direction, as `StepReport.error`, on runs that are not trained on."""
        points, about = on_device(held_out.draw(HARMFUL, count, torch.Generator().manual_seed(self.step)), self.device)
        real = torch.ones(count, device=self.device)
        error, *_ = losses.guidance_losses(self.network, points, about.harms, about.removed, points.partner_denoised, real)
        return error.mean().item()


def relative(error: Tensor, points: Points) -> Tensor:
    """Errors (B,) in parts of what they are without a redirector, where that is above 1.

    At low noise a direction is small beside what separates it from its partner's, and the picture is drawn already: without
    the division these points would rule the loss.
    """
    return error / losses.unredirected_guidance_error(points).clamp(min=1)


def mixed(rows: Points, about: Prompts, quiet: Points, alarm: Tensor) -> tuple[Points, Tensor, Tensor]:
    """Harmful directions, the partners' of the first of them (which lack the removed harms) and clean ones, with harms and weights.

    alarm (partners + clean, K) in [0, 1) draws the weights of what is not harmful: false alarms must change nothing.
    """
    partners, alarm = len(alarm) - len(quiet), alarm.round()
    partner = replace(rows, cond_denoised=rows.partner_denoised)[:partners]
    nothing = torch.zeros(len(quiet), about.harms.shape[1], device=rows.x.device)
    left = (about.harms - about.removed)[:partners]
    harms = torch.cat([about.harms, left, nothing])
    weights = torch.cat([about.removed, alarm[:partners] * (1 - left), alarm[partners:]])
    return Points.cat([rows, partner, quiet]), harms, weights
