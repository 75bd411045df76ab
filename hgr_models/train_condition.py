"""Training of the condition redirector: by back-propagation through the frozen denoiser."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from . import losses
from .augmentation import averaged, chunked, weighted
from .hgr import HGR
from .recording import Points, Prompts
from .shards import HARMFUL, Recording, Texts
from .training import StepReport, Training, accuracies, disguise, on_device

READ_BATCH = 64  # prompts of each kind per step, for the reading of prompts
JOINED = 16  # of which so many are read again among others, and mixed
READ_TOKENS = 64 * 4 * 77  # of a batch to read: fewer prompts where they are long
UNIT_TOKENS = 1024  # of every batch that the units are measured on
WEIGHTED = 0.25  # the share with weights


class ConditionObjective(nn.Module):
    """The losses of the condition redirector as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(
        self, predict: losses.PredictWith, points: Points, prompts: Prompts, texts: list[Texts], clean: Texts, alarm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Error per point (B,), cross-entropy of the reading, the quiet loss, and the logits of all texts."""
        error = losses.condition_error(self.network, predict, points, prompts)
        read, logits = self.reading(texts)
        quiet = losses.quiet_loss(self.network, clean.tokens, alarm, clean.pooled, clean.mask)
        return error, read, quiet, logits

    def reading(self, texts: list[Texts]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the reading of all texts, and their logits (N, K)."""
        reads = [losses.prompt_loss(self.network, t.tokens, t.harms, t.pooled, t.mask) for t in texts]
        loss = sum(loss * len(t) for (loss, _), t in zip(reads, texts, strict=True)) / sum(map(len, texts))
        return loss, torch.cat([logits.detach() for _, logits in reads])


class ConditionTraining(Training):
    """The condition redirector, by back-propagation through the frozen denoiser."""

    def __init__(self, hgr: HGR, steps: int, seed: int, batch: int = 24, rate: float = 1e-3):
        super().__init__(hgr.condition, steps, rate, 0.995, seed)
        self.objective = ConditionObjective(hgr.condition)
        self.batch = batch

    def measure(self, recording: Recording) -> None:
        """Sets the network's units from a sample of the recorded prompts."""
        generator = torch.Generator().manual_seed(0)
        tokens, pooled = [], []
        for harmful in (False, True) * 8:
            texts = recording.draw_texts(harmful, READ_BATCH, generator)
            present = texts.tokens.flatten(0, 1) if texts.mask is None else texts.tokens[texts.mask.bool()]
            tokens.append(present[torch.randint(len(present), (UNIT_TOKENS,), generator=generator)])
            pooled += [] if texts.pooled is None else [texts.pooled]
        flat, pooled = torch.cat(tokens)[None], torch.cat(pooled) if pooled else None
        for network in (self.network, self.mean.module):
            network.measure(flat.to(self.device), None if pooled is None else pooled.to(self.device))

    def train_step(self, recording: Recording, predict: losses.PredictWith) -> StepReport:
        """One step. `predict` runs the frozen denoiser and carries gradients to the tokens."""
        points, prompts = on_device(recording.draw(HARMFUL, self.batch, self.generator), self.device)
        texts = self._texts(recording)
        clean = _bounded(on_device(recording.draw_texts(False, 32, self.generator), self.device))
        alarm = self.random(len(clean), prompts.harms.shape[1]).round()  # a false alarm should change little
        error, read, quiet, logits = self.objective(predict, points, prompts, texts, clean, alarm)
        loss = losses.capped(error, 5.0) + 0.3 * read + 0.1 * quiet
        self.advance(loss)
        before = losses.unredirected_error(points).mean().item()
        harms = torch.cat([t.harms for t in texts])
        return StepReport(loss.item(), error.mean().item(), before, accuracies(logits, harms))

    @torch.no_grad()
    def error_on(self, held_out: Recording, predict: losses.PredictWith) -> float:
        """Mean distance to the partner's direction, as `StepReport.error`, on runs that are not trained on."""
        points, prompts = on_device(held_out.draw(HARMFUL, self.batch, torch.Generator().manual_seed(self.step)), self.device)
        return losses.condition_error(self.network, predict, points, prompts).mean().item()

    def _texts(self, recording: Recording) -> list[Texts]:
        """Clean and harmful prompts to read, as users write them: weighted, in chunks, joined and averaged; some disguised."""
        clean, harmful = (on_device(recording.draw_texts(h, READ_BATCH, self.generator), self.device) for h in (False, True))
        clean, harmful = (replace(t, tokens=weighted(t, WEIGHTED, self.generator)) for t in map(_bounded, (clean, harmful)))
        few = harmful[:JOINED]
        parts = [clean, harmful, *chunked(clean, few, self.generator), *averaged(clean[:JOINED], few, self.generator)]
        return [replace(t, tokens=disguise(t.tokens, self.network.units(t.tokens)[1], 0.4, self.generator)) for t in parts]


def _bounded(texts: Texts) -> Texts:
    """As many of some prompts as memory and time allow: attention costs the square of their length."""
    return texts[: max(1, READ_TOKENS // texts.tokens.shape[1])]
