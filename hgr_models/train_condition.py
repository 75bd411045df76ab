"""Training of the condition redirector: by back-propagation through the frozen denoiser."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import losses
from .augmentation import MAX_CHUNKS, averaged, chunked, strayed, weighted
from .hgr import HGR
from .recording import Points, Prompts
from .shards import HARMFUL, Recording, Texts
from .training import StepReport, Training, accuracies, disguise, on_device, thinned

READ_BATCH = 64  # prompts of each kind per step, for the reading of prompts
JOINED = 16  # of which so many are read again among others, and mixed
READ_TOKENS = 64 * 4 * 77  # of a batch to read: fewer prompts where they are long
UNIT_TOKENS = 1024  # of every batch that the units are measured on
WIDE = 1024  # from twice this token width on, a batch to read has fewer prompts
WEIGHTED = 0.25  # the share with weights
STRAYED = 1.0  # of the difference between two clean prompts, at most: what a prompt to read is moved by
THINNED = 0.2  # of the channels of prompts to read
START = -3.0  # log odds of every category before the first step: nearly all prompts show none of them
RECOMPUTED = (
    2048  # the token width from which what a backward pass needs of a part is computed again: memory for a third more time
)


def recomputed(function: Callable, width: int, *arguments: Any) -> Any:
    """`function(*arguments)`; for tokens of RECOMPUTED channels and more nothing inside it is kept for the backward pass."""
    if width < RECOMPUTED or not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class ConditionObjective(nn.Module):
    """The losses of the condition redirector as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(
        self, predict: losses.PredictWith, points: Points, prompts: Prompts, texts: list[Texts], clean: Texts, alarm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Error per point (B,), cross-entropy of the reading, the loss of false alarms, and the logits of all texts."""
        error = losses.condition_error(self.network, predict, points, prompts)
        read, logits = self.reading(texts)
        return error, read, self.quiet(clean, alarm), logits

    def quiet(self, clean: Texts, alarm: Tensor) -> Tensor:
        """The loss of false alarms on clean prompts, for weights (B, K) of false alarms."""
        rows = clean.tokens, alarm, clean.pooled, clean.mask
        return recomputed(losses.quiet_loss, clean.tokens.shape[-1], self.network, *rows)

    def reading(self, texts: list[Texts]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the reading of all texts, and their logits (N, K)."""
        reads = [
            recomputed(losses.prompt_loss, t.tokens.shape[-1], self.network, t.tokens, t.harms, t.pooled, t.mask) for t in texts
        ]
        loss = sum(loss * len(t) for (loss, _), t in zip(reads, texts, strict=True)) / sum(map(len, texts))
        return torch.as_tensor(loss), torch.cat([logits.detach() for _, logits in reads])


class ConditionTraining(Training):
    """The condition redirector, by back-propagation through the frozen denoiser."""

    def __init__(self, hgr: HGR, steps: int, seed: int, batch: int = 24, rate: float = 1e-3):
        super().__init__(hgr.condition, steps, rate, 0.995, seed)
        self.objective = ConditionObjective(hgr.condition)
        self.batch = batch

    def measure(self, recording: Recording) -> None:
        """Sets a new network's units from a sample of the recorded prompts; its reading begins at harmless."""
        generator = torch.Generator().manual_seed(0)
        tokens, pooled = [], []
        count = READ_BATCH // max(1, self.network.config.token_width // WIDE)
        for harmful in (False, True) * 8:
            texts = recording.draw_texts(harmful, count, generator)
            present = texts.tokens.flatten(0, 1) if texts.mask is None else texts.tokens[texts.mask.bool()]
            tokens.append(present[torch.randint(len(present), (UNIT_TOKENS,), generator=generator)])
            pooled += [] if texts.pooled is None else [texts.pooled]
        flat, vectors = torch.cat(tokens)[None], torch.cat(pooled) if pooled else None
        for network in (self.network, self.mean.module):
            network.measure(flat.to(self.device), None if vectors is None else vectors.to(self.device))
            nn.init.constant_(network.read_head.bias, START)

    def train_step(self, recording: Recording, predict: losses.PredictWith) -> StepReport:
        """One step. `predict` runs the frozen denoiser and carries gradients to the tokens."""
        points, prompts = on_device(recording.draw(HARMFUL, self.batch, self.generator), self.device)
        texts = self._texts(recording)
        clean = bounded(on_device(recording.draw_texts(False, 32, self.generator), self.device))
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
        count = max(JOINED, READ_BATCH // max(1, self.network.config.token_width // WIDE))  # wide tokens take much memory
        clean, harmful = self._drawn(recording, count)
        clean, harmful = (replace(t, tokens=weighted(t, WEIGHTED, self.generator)) for t in (clean, harmful))
        few = bounded(harmful[:JOINED], MAX_CHUNKS)
        parts = [clean, harmful, *chunked(clean, few, self.generator), *averaged(clean[: len(few)], few, self.generator)]
        del clean, harmful, few  # so that what is disguised already is not held twice
        return [self.roughened(parts.pop(0)) for _ in range(len(parts))]

    def _drawn(self, recording: Recording, count: int) -> tuple[Texts, Texts]:
        """Clean and harmful prompts to read, up to `count` of each, all of them strayed."""
        clean, harmful = (bounded(on_device(recording.draw_texts(h, count, self.generator), self.device)) for h in (False, True))
        return strayed(clean, clean, STRAYED, self.generator), strayed(harmful, clean, STRAYED, self.generator)

    def roughened(self, texts: Texts) -> Texts:
        """Prompts to read, some of them disguised and all without some of their channels: words that no pair has must be read, too."""
        center, scale = self.network.units(texts.tokens)
        tokens = disguise(texts.tokens, scale, 0.4, self.generator)
        return replace(texts, tokens=thinned(tokens, center.to(tokens), THINNED, self.generator))


def bounded(texts: Texts, chunks: int = 1) -> Texts:
    """As many of some prompts as memory and time allow, of which `chunks` are joined: attention costs the square of their length."""
    return texts[: most_to_read(chunks * texts.tokens.shape[1], texts.tokens.shape[2])]


def most_to_read(length: int, width: int) -> int:
    """How many prompts of so many tokens, so wide, are read at once."""
    return max(1, READ_TOKENS // length // max(1, width // WIDE))
