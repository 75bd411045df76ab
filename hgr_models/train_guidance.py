"""Training of the guidance redirector: on recorded tensors alone."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from .errors import HGRError
from .guidance import ELSEWHERE
from .hgr import HGR
from .recording import Points, Prompts
from .redirection import read_guidance
from .shapes import per_row
from .shards import CLEAN, HARMFUL, Recording
from .training import StepReport, Training, accuracies, on_device

HARMFUL_BATCH, PARTNER_BATCH, CLEAN_BATCH = 32, 12, 20  # points per step; the partners are those of the first harmful ones
POINTS = HARMFUL_BATCH + PARTNER_BATCH + CLEAN_BATCH


class GuidanceObjective(nn.Module):
    """`losses.guidance_losses` as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return losses.guidance_losses(self.network, *arguments)


class GuidanceTraining(Training):
    """The guidance redirector, on recorded tensors alone."""

    def __init__(self, hgr: HGR, steps: int, seed: int, rate: float = 1.5e-3):
        super().__init__(hgr.guidance, steps, rate, 0.998, seed)
        self.objective = GuidanceObjective(hgr.guidance)

    def train_step(
        self, recording: Recording, attacked: tuple[Points, Tensor] | None = None, alarming: Points | None = None
    ) -> StepReport:
        """One step. `attacked`: points whose directions someone bent, and their harms (B, K), which are turned as they are in use;
        `alarming`: clean points that this network reads as harmful.
        """
        shapes = recording.shapes()
        if not shapes:
            raise HGRError("The recording has no harmful and clean runs of the same latent size. Record both.")
        shape = shapes[int(torch.randint(len(shapes), (), generator=self.generator))]
        draw = lambda kind, count: on_device(recording.draw(kind, count, self.generator, shape), self.device)  # noqa: E731
        batch, harms, weights = self._batch(*draw(HARMFUL, HARMFUL_BATCH), draw(CLEAN, CLEAN_BATCH)[0])
        has_direction = (self.random(len(batch)) > 0.2).float()  # a picture alone teaches only `q`
        with torch.autocast(self.device.type, torch.bfloat16):
            error, b, q, logits = self.objective(batch, harms, weights, batch.partner_denoised, has_direction)
        before = losses.unredirected_guidance_error(batch)
        # At low noise a direction is small beside what separates it from its partner's, and the picture is drawn already:
        # without the division these points would rule the loss.
        loss = losses.capped(error / before.clamp(min=1), 20.0) + 0.5 * b + 0.3 * q
        if attacked is not None and len(attacked[0]):
            loss = loss + 0.5 * self._attacked_loss(*attacked)
        if alarming is not None:
            loss = loss + 0.5 * self._alarm_loss(alarming)
        self.advance(loss)
        before = before[:HARMFUL_BATCH].mean().item()
        real = has_direction > 0
        return StepReport(loss.item(), error[:HARMFUL_BATCH].mean().item(), before, accuracies(logits[real], harms[real]))

    def _attacked_loss(self, points: Points, harms: Tensor) -> Tensor:
        """What counts of attacked points: that their harm is seen, and what is left of it with the correction as it is in use."""
        ones = torch.ones(len(points), device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            error, b, *_ = self.objective(points, harms, harms, points.partner_denoised, ones, ELSEWHERE)
        return losses.capped(error / losses.unredirected_guidance_error(points).clamp(min=1), 20.0) + b

    def _alarm_loss(self, points: Points) -> Tensor:
        """Cross-entropy of `b` at clean points."""
        x_in = points.x * per_row(points.c_in, points.x)
        with torch.autocast(self.device.type, torch.bfloat16):
            reading = read_guidance(self.network, points.cond_denoised, points.uncond_denoised, x_in, points.sigma)[2]
        return F.softplus(reading.direction_logits.float()).mean()

    @torch.no_grad()
    def error_on(self, held_out: Recording, count: int = 64) -> float:
        """Mean distance to the partner's direction, as `StepReport.error`, on runs that are not trained on."""
        points, about = on_device(held_out.draw(HARMFUL, count, torch.Generator().manual_seed(self.step)), self.device)
        real = torch.ones(count, device=self.device)
        error, *_ = losses.guidance_losses(self.network, points, about.harms, about.removed, points.partner_denoised, real)
        return error.mean().item()

    def _batch(self, rows: Points, about: Prompts, quiet: Points) -> tuple[Points, Tensor, Tensor]:
        """Harmful directions, their partners' (which lack the removed harms) and clean ones, with harms and weights."""
        partner = replace(rows, cond_denoised=rows.partner_denoised)[:PARTNER_BATCH]
        batch = Points.cat([rows, partner, quiet])
        nothing = torch.zeros(len(quiet), about.harms.shape[1], device=rows.x.device)
        left = (about.harms - about.removed)[:PARTNER_BATCH]
        harms = torch.cat([about.harms, left, nothing])
        alarm = self.random(PARTNER_BATCH + len(quiet), harms.shape[1]).round()  # false alarms must change nothing
        return batch, harms, torch.cat([about.removed, alarm[:PARTNER_BATCH] * (1 - left), alarm[PARTNER_BATCH:]])
