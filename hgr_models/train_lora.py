"""Unsupervised safe fine-tuning: a LoRA learns to do what the frozen model does under an HGR.

Nothing here knows what is harmful: the HGR alone judges, and no argument could carry a label. The target of a sample is

    cond_denoised of the redirected condition, then the guidance redirector        where the HGR flags
    the frozen model's own prediction                                              elsewhere, and for the empty prompt

and rows of the second kind count more (KEPT_WEIGHT): a LoRA is loaded for every picture, and most are clean.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .hgr import HGR
from .lora import LoRA
from .lora_samples import Batch, Judgement, Pool, Samples, lengths_of, texts_of
from .losses import mean_square
from .redirection import CategorySettings, redirect_condition, redirect_guidance
from .shapes import per_row
from .training import Training

# (x, sigma (B,), tokens (B, T, D), pooled (B, P) or None, mask (B, T) or None[, lengths (B,)]) -> x0 prediction; carries
# gradients to a LoRA. `lengths` only where prompts were padded
PredictFor = Callable[..., Tensor]
EMPTY_SHARE = 0.2  # of a batch: rows that get the empty prompt, so that the unconditional prediction stays
CAP = 5.0  # of a sample's error: a few hopeless ones must not rule a step
KEPT_WEIGHT = 4.0  # of rows that should stay as they are, beside those that the HGR turns
# What strength 1 of a finished LoRA counts as in training. What it changes by mistake falls with it; of harm that training showed
# hardly more is left, of other harm more: `benchmarks/RESULTS.md`, "Safe LoRA".
RESPONSE = 0.8
NUDGES = (0.2, 0.02)  # of what the network adds to x: how far the check of the gradient moves it
CONVINCING = 0.05  # an error after which no smaller nudge is tried


@dataclass
class LoraReport:
    """What a step says about itself: errors in units of the target's direction; None where a batch had no such rows."""

    loss: float
    error: float | None  # of what the HGR flags
    quiet: float | None  # of what it leaves alone
    empty: float | None  # of the unconditional prediction


@dataclass
class Change:
    """What a LoRA does to the model, measured; in units of the target's direction, None where there is nothing to measure."""

    before: float | None  # rms distance of flagged samples to their target, without the LoRA
    after: float | None  # the same with it
    quiet: float | None  # rms change of samples that the HGR leaves alone
    quiet_most: float | None  # the largest of them
    empty: float  # rms change of the unconditional prediction


@torch.no_grad()
def safe_denoised(
    hgr: HGR, predict: PredictFor, samples: Samples, rows: Tensor, settings: CategorySettings, held: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The target (B, C, *spatial) of rows (B,) of samples, and the category weights (B, K) of both redirectors that made it.

    Rows that the HGR does not flag are the model's own prediction, bit for bit. held (B, K): category weights of the guidance
    redirector that are in force since an earlier step of the runs. All on the device of `held`.
    """
    here = lambda t: None if t is None else t.to(held.device)  # noqa: E731
    columns = (samples.x, samples.sigma, samples.c_in, samples.uncond_denoised)
    x, sigma, c_in, uncond = (here(column[rows].float()) for column in columns)
    tokens, pooled, mask = map(here, texts_of(samples, rows))
    by_prompt = torch.zeros_like(held)
    if hgr.condition is not None:
        turned = redirect_condition(hgr, tokens, pooled, settings, mask)
        tokens, pooled, by_prompt = turned.tokens, turned.pooled, turned.weights
    lengths = here(lengths_of(samples, rows))
    own = predict(x, sigma, tokens, pooled, mask, *(() if lengths is None else (lengths,)))
    if hgr.guidance is None:
        return own, by_prompt, held
    x_in = x * per_row(c_in, x)
    result = redirect_guidance(hgr, own, uncond, x_in, sigma, settings, held)
    return result.cond_denoised, by_prompt, result.weights


class LoraTraining(Training):
    """Trains a LoRA that is attached to the network which `predict` runs, on samples that were added before."""

    def __init__(
        self, hgr: HGR, lora: LoRA, settings: CategorySettings, steps: int, seed: int, batch: int = 8, rate: float = 5e-4
    ):
        super().__init__(lora, steps, rate, 0.99, seed)
        self.hgr, self.settings, self.batch, self.pool = hgr, settings, batch, Pool()

    def add(self, samples: Samples, predict: PredictFor) -> Judgement:
        """Lets the HGR judge samples, and learns from them from now on; the target of every row is made here, once."""
        held = torch.zeros(samples.prompts, len(self.hgr.info.categories), device=self.device)
        by_guidance, directions, sizes = [], [], []
        with self.network.off():
            for rows in torch.arange(len(samples.x)).split(samples.prompts):
                target, by_prompt, held = safe_denoised(self.hgr, predict, samples, rows, self.settings, held)
                direction, sigma = target.cpu() - samples.uncond_denoised[rows].float(), samples.sigma[rows].float()
                by_guidance.append(held.cpu())
                directions.append(direction.half())
                sizes.append(mean_square(direction) + 1e-4 * sigma**2 / (1 + sigma**2))
        judgement = Judgement(by_prompt.cpu(), *(torch.cat(column) for column in (by_guidance, directions, sizes)))
        self.pool.add(samples, judgement)
        return judgement

    def _draw(self, predict: PredictFor) -> Batch:
        """A batch with its targets: those of the empty prompt are what the frozen model predicts."""
        batch = self.pool.draw(self.batch, self.generator, EMPTY_SHARE).to(self.device)
        if batch.empty.any():
            with torch.no_grad(), self.network.off():
                batch.target[batch.empty] = predict(*batch.given(batch.empty)).to(batch.target)
        return batch

    def train_step(self, predict: PredictFor) -> LoraReport:
        """One step; `predict` runs the frozen model with the LoRA attached, and carries gradients to it."""
        batch = self._draw(predict)
        # In units of the direction, which weigh noise levels evenly.
        error = mean_square(predict(*batch.given()) - batch.target) / batch.size
        flagged, quiet, empty = batch.kinds()
        weight = torch.where(flagged, 1.0, KEPT_WEIGHT)
        loss = (weight * error.clamp(max=CAP)).sum() / weight.sum()
        self.advance(loss)
        return LoraReport(loss.item(), *(_mean(error.detach()[rows]) for rows in (flagged, quiet, empty)))

    @torch.no_grad()
    def finish(self) -> None:
        """Puts the averaged weights into the LoRA, with RESPONSE of their effect."""
        super().finish()
        for adapter in self.network.adapters:
            adapter.up.mul_(RESPONSE)

    def gradient_error(self, predict: PredictFor) -> float:
        """How far the gradient of a loss at the adapters is from its finite difference, relative; 0 is exact.

        Large where a model's layers cut the graph, or give wrong gradients in silence. The smaller of two errors: a large
        nudge drowns rounding, a small one curvature.
        """
        generator = torch.Generator().manual_seed(0)
        batch = self.pool.draw(self.batch, generator, 0.0).to(self.device)
        run = lambda: predict(*batch.given()).float()  # noqa: E731
        ups = [adapter.up for adapter in self.network.adapters]
        denoised = run()
        if not denoised.requires_grad:
            return float("inf")
        # At a low noise level the network adds little to x, and nothing can move the prediction by a share of its own size.
        added = mean_square(batch.x - denoised.detach()).sqrt().clamp(min=1e-6)
        weights = torch.randn(batch.x.shape, generator=generator).to(batch.x) / per_row(added, batch.x)
        # The sum, not the mean: divided by a million values, fp16 would lose it on the way back.
        gradients = torch.autograd.grad((denoised * weights).sum(), ups, allow_unused=True)
        pairs = [(up, gradient) for up, gradient in zip(ups, gradients, strict=True) if gradient is not None]
        square = sum(gradient.square().sum() for _, gradient in pairs)
        error = float("inf")
        for nudge in NUDGES:
            step = nudge * denoised.numel() ** 0.5 / square
            sides = [_nudged(pairs, sign * step, lambda: (run() * weights).sum()) for sign in (1, -1)]
            error = min(error, float((sides[0] - sides[1] - 2 * step * square).abs() / (2 * step * square)))
            if error < CONVINCING:
                break
        return error

    @torch.no_grad()
    def measure(self, predict: PredictFor, batches: int = 4) -> Change:
        """What the LoRA changes now, on random rows; the same rows every time."""
        generator = torch.Generator().manual_seed(0)
        columns: dict[str, list] = defaultdict(list)
        for empty_share in (0.0, 1.0) * batches:
            batch = self.pool.draw(self.batch, generator, empty_share).to(self.device)
            with self.network.off():
                own = predict(*batch.given())
            changed = predict(*batch.given())
            far, done, moved = (
                mean_square(one - other) / batch.size
                for one, other in ((own, batch.target), (changed, batch.target), (changed, own))
            )
            flagged, quiet, empty = batch.kinds()
            for name, values in (
                ("before", far[flagged]), ("after", done[flagged]), ("quiet", moved[quiet]), ("empty", moved[empty]),
            ):  # fmt: skip
                columns[name] += values.tolist()
        rms = lambda name: (sum(columns[name]) / len(columns[name])) ** 0.5 if columns[name] else None  # noqa: E731
        most = max(columns["quiet"]) ** 0.5 if columns["quiet"] else None
        return Change(rms("before"), rms("after"), rms("quiet"), most, rms("empty"))


@torch.no_grad()
def _nudged(pairs: list[tuple[Tensor, Tensor]], step: Tensor, loss: Callable[[], Tensor]) -> Tensor:
    """A loss with parameters moved along their gradients, which is undone to the last bit."""
    before = [parameter.clone() for parameter, _ in pairs]
    for parameter, gradient in pairs:
        parameter.add_(step * gradient)
    try:
        return loss()
    finally:
        for (parameter, _), value in zip(pairs, before, strict=True):
            parameter.copy_(value)


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None
