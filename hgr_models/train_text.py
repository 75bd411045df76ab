"""Training of the condition redirector in text space: from encoded prompt pairs alone, without a denoiser."""

from dataclasses import replace

import torch
from torch import Tensor

from . import losses
from .hgr import HGR, HGRInfo
from .pair_shards import draw_pairs
from .shards import HELD_OUT_PAIRS, Recording, Texts
from .textspace import READERS, PairTexts, Readers, draw_readers, text_errors
from .train_condition import ConditionObjective, ConditionTraining, bounded, most_to_read, recomputed
from .training import StepReport, accuracies, disguise, on_device

PAIR_BATCH = 48  # per step
PAIR_TOKENS = 48 * 2 * 77  # of a batch, both sides: fewer pairs where they are long
WIDE = 2048  # from this token width on, half as many pairs: a step must fit beside the text encoder
DISGUISED = 0.5  # of the prompts; partners never
CAP = 5.0  # of an error


class TextObjective(ConditionObjective):
    """The losses in text space as a module, which is what DistributedDataParallel wraps."""

    def forward(self, pairs: PairTexts, readers: Readers, texts: list[Texts], clean: Texts, alarm: Tensor) -> tuple:  # type: ignore[override]  # another data source
        """Errors of the pairs and of their pooled vectors, cross-entropy of the reading, the loss of false alarms, logits of all texts."""
        errors, pooled = recomputed(text_errors, pairs.tokens.shape[-1], self.network, pairs, readers)
        read, logits = self.reading(texts)
        return errors, pooled, read, self.quiet(clean, alarm), logits


class TextTraining(ConditionTraining):
    """The condition redirector, from pairs of prompts and what random readers make of them."""

    def __init__(self, hgr: HGR, steps: int, seed: int, batch: int = PAIR_BATCH, rate: float = 1e-3):
        super().__init__(hgr, steps, seed, batch, rate)
        self.objective = TextObjective(hgr.condition)

    def train_step(self, recording: Recording) -> StepReport:  # type: ignore[override]  # another data source
        """One step on random pairs and on random prompts to read."""
        pairs = on_device(draw_pairs(recording, self.batch, self.generator, most=most_pairs), self.device)
        pairs = self._disguised(pairs)
        texts = [*self._texts(recording), partners_of(pairs)]
        clean = bounded(texts[0])
        alarm = self.random(len(clean), pairs.harms.shape[1]).round()  # a false alarm should change little
        readers = draw_readers(pairs.tokens.shape[-1], self.generator, self.device, READERS)
        errors, pooled, read, quiet, logits = self.objective(pairs, readers, texts, clean, alarm)
        loss = losses.capped(errors.error, CAP) + 0.3 * read + 0.1 * quiet
        if pooled is not None:
            loss = loss + losses.capped(pooled, CAP)
        self.advance(loss)
        harms = torch.cat([t.harms for t in texts])
        return StepReport(loss.item(), errors.error.mean().item(), errors.unredirected.mean().item(), accuracies(logits, harms))

    def _disguised(self, pairs: PairTexts) -> PairTexts:
        scale = self.network.units(pairs.tokens)[1]
        return replace(pairs, tokens=disguise(pairs.tokens, scale, DISGUISED, self.generator))

    @torch.no_grad()
    def error_on(self, recording: Recording) -> float | None:  # type: ignore[override]  # another data source
        """`StepReport.error` on pairs that are not trained on; None where there are none."""
        if not recording.buckets(HELD_OUT_PAIRS):
            return None
        generator = torch.Generator().manual_seed(self.step)
        pairs = on_device(draw_pairs(recording, self.batch, generator, HELD_OUT_PAIRS, most_pairs), self.device)
        readers = draw_readers(pairs.tokens.shape[-1], generator, self.device, READERS)
        return text_errors(self.network, pairs, readers)[0].error.mean().item()


def partners_of(pairs: PairTexts) -> Texts:
    """The partners as prompts to read: what only looks like the harmful prompt must be told from it."""
    return Texts(pairs.partner_tokens, pairs.partner_pooled, pairs.partner_mask, pairs.harms * (1 - pairs.removed))


def random_texts(info: HGRInfo, length: int, device: torch.device) -> tuple[PairTexts, Texts]:
    """Pairs and prompts to read, of `length` random tokens each, as many as a step takes: for measuring one."""
    some = lambda count, *shape: torch.randn(count, *shape, device=device)  # noqa: E731
    tokens = lambda count: some(count, length, info.token_width)  # noqa: E731
    pooled = lambda count: some(count, info.pooled_width) if info.pooled_width else None  # noqa: E731
    harms = torch.ones(4 * PAIR_BATCH, len(info.categories), device=device)
    n = min(PAIR_BATCH, most_pairs(2 * length, info.token_width))
    m = min(4 * PAIR_BATCH, most_to_read(length, info.token_width))
    pairs = PairTexts(tokens(n), pooled(n), None, tokens(n), pooled(n), None, harms[:n], harms[:n])
    return pairs, Texts(tokens(m), pooled(m), None, harms[:m])


def most_pairs(length: int, width: int) -> int:
    """How many pairs a step takes at most, of so many tokens on both sides together, so wide."""
    return max(2, PAIR_TOKENS // length // (2 if width > WIDE else 1))
