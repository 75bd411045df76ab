"""Detecting harm in a prompt, in a picture, and in a run; how well that works, and at which threshold.

A picture is noised to a few levels, and the model says what it makes of each. Every view of it is averaged over these looks
in log odds; the views are then compared, and the most alarming one counts:

    alone         q of the picture, with no direction at all (g = 0)
    with prompt   b of the direction, q of the picture beside it, and p of the prompt itself

p knows words, so it also knows harm that no picture in training showed. A caption can hide what a picture shows, so it may
only add to the alarm. `detect` is the one statistic that thresholds are calibrated on, that the nodes report and that the
benchmark measures.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import HGRError
from .hgr import HGRInfo, Redirectors
from .redirection import RMS_FLOOR, read_guidance

# Parts of the sampling schedule: Stable Diffusion's sigma is 1.9 and 0.4 there. A third level was worth 0.01 of AUROC in the demo
# world, and a third of the cost.
LEVELS = (0.45, 0.85)
CERTAIN = 12.0  # log odds; a look that is surer than that counts as much


@dataclass(frozen=True)
class Looks:
    """How often a picture is looked at: `draws` times at each of `levels`, every time with other noise from `seed`.

    Each look costs one evaluation of the model (two rows with a prompt, one without). Thresholds belong to the default.
    """

    levels: tuple[float, ...] = LEVELS
    draws: int = 1
    seed: int = 0


@dataclass
class Seen:
    """What a model makes of noised latents, in core's x0 space; every tensor (B, C, *spatial), `sigma` (B,)."""

    x_in: Tensor  # core's `calculate_input(sigma, x)`
    sigma: Tensor
    uncond_denoised: Tensor
    cond_denoised: Tensor | None = None  # None: no prompt, or it does not act at this noise level


# (part of the schedule in (0, 1), unit noise (B, C, *spatial)) -> what the model makes of the latents with this noise
See = Callable[[float, Tensor], Seen]


@dataclass
class Detection:
    """Harmfulness of pictures (B, K), and per place (B, K, h, w) with a place for every 2 x 2 of the latent; in [0, 1]."""

    scores: Tensor
    places: Tensor

    def heat(self, counted: Tensor) -> Tensor:
        """Where a picture is harmful, (B, h, w) in [0, 1]: the worst of the categories that `counted` (K,) names.

        A category's places count as much as the category itself does, so that doubts about what is not there stay dark.
        """
        return (self.places * (self.scores * counted.to(self.scores))[..., None, None]).amax(dim=1)

    @staticmethod
    def cat(parts: "Sequence[Detection]") -> "Detection":
        """Detections of pictures of one size, as one."""
        return Detection(torch.cat([p.scores for p in parts]), torch.cat([p.places for p in parts]))


@torch.no_grad()
def detect(
    network: nn.Module, see: See, shape: Sequence[int], looks: Looks = Looks(), prompts: Tensor | None = None
) -> Detection:
    """What a guidance redirector finds in latents of `shape` (B, C, *spatial), on its device; the same answer every time.

    `prompts` is the harmfulness (B, K) of the pictures' prompts (`prompt_scores`); it counts for a picture, not for a place.
    All pictures get the same noise, so that none depends on its place in the batch. Raises HGRError when what the model or
    the network gave is not finite.
    """
    generator = torch.Generator().manual_seed(looks.seed)
    views: dict[str, list[tuple[Tensor, Tensor]]] = {}
    finite: list[Tensor] = []
    for level in looks.levels:
        for _ in range(looks.draws):
            noise = torch.randn(tuple(shape[1:]), generator=generator).expand(*shape)
            seen = see(level, noise)
            finite += [
                torch.isfinite(t).flatten(1).all(dim=1) for t in (seen.uncond_denoised, seen.cond_denoised) if t is not None
            ]
            for name, logits, places in _read(network, seen):
                views.setdefault(name, []).append((logits, places))
                finite.append(torch.isfinite(logits).all(dim=1))
    _check_finite(torch.stack(finite).all(dim=0))
    logits, places = (
        torch.stack([torch.stack([look[i] for look in view]).clamp(-CERTAIN, CERTAIN).mean(dim=0) for view in views.values()])
        for i in (0, 1)
    )
    logits = logits.amax(dim=0)
    if prompts is not None:
        logits = torch.maximum(logits, torch.logit(prompts.to(logits)).clamp(-CERTAIN, CERTAIN))
    return Detection(logits.sigmoid(), places.amax(dim=0).sigmoid())


def _check_finite(finite: Tensor) -> None:
    if not finite.all():
        bad = ", ".join(str(i + 1) for i in (~finite).nonzero()[:, 0].tolist())
        raise HGRError(
            f"The model gave values that are not finite (NaN or infinity) for picture {bad}, so nothing is known about it. "
            "Treat it as harmful; another precision (--force-fp32) may help."
        )


def _read(network: nn.Module, seen: Seen) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(view, logits (B, K), logits per place (B, K, h, w)) of one look; a row without a direction has only the view alone."""
    strongest = lambda places: places.amax(dim=2)  # noqa: E731 (over a video's frames)
    uncond = seen.uncond_denoised
    times = 1 if seen.cond_denoised is None else 2
    cond = (
        uncond if seen.cond_denoised is None else torch.cat([uncond, seen.cond_denoised])
    )  # one call for both views: it is cheaper
    twice = lambda t: torch.cat([t] * times)  # noqa: E731
    _, n, reading = read_guidance(network, cond, twice(uncond), twice(seen.x_in), twice(seen.sigma))
    picture = [*zip(reading.picture_logits.chunk(times), strongest(reading.picture_places).chunk(times), strict=True)]
    yield "alone", *picture[0]
    if times == 2:
        yield "beside", *picture[1]
        nothing = n[len(uncond) :] <= RMS_FLOOR
        logits, places = reading.direction_logits[len(uncond) :], strongest(reading.places)[len(uncond) :]
        masked = places.masked_fill(nothing[:, None, None, None], -CERTAIN)
        yield "direction", logits.masked_fill(nothing[:, None], -CERTAIN), masked


@torch.no_grad()
def prompt_scores(hgr: Redirectors, tokens: Tensor, pooled: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Harmfulness (B, K) float32 in [0, 1] of prompts: tokens (B, T, D), pooled (B, P), mask (B, T), on the HGR's device."""
    return hgr.condition.harmfulness(tokens, pooled, mask)


def picture_thresholds(info: HGRInfo, file: str = "this HGR") -> tuple[float, ...]:
    """The thresholds (K,) for `detect`; HGRError when the checkpoint was never calibrated for pictures."""
    if not info.picture_thresholds:
        raise HGRError(
            f"{file} has no thresholds for pictures: an older version made it. SafeCFG Check HGR with `save_as` makes a copy that has "
            "them; or set a threshold of your own (0.5 is a start)."
        )
    return info.picture_thresholds


def run_excess(prompt: Tensor, steps: Tensor, sigmas: Tensor, hgr: Redirectors) -> Tensor:
    """How far a run exceeds its thresholds (B, K), in log odds; above 0 it is redirected.

    prompt (B, K): harmfulness of the prompt. steps (S, B, K): that of the direction at each step, sigmas (S,).
    """
    excess = lambda p, threshold: torch.logit(p, eps=1e-7) - torch.logit(threshold, eps=1e-7)  # noqa: E731
    directions = excess(steps, hgr.guidance_thresholds_at(sigmas)[:, None])
    return torch.maximum(excess(prompt, hgr.condition_thresholds), directions.amax(dim=0))


@dataclass(frozen=True)
class Roc:
    """A receiver operating characteristic: at `thresholds` (descending), which share of clean and of harmful scores exceeds it."""

    thresholds: tuple[float, ...]
    false_positives: tuple[float, ...]
    true_positives: tuple[float, ...]
    auroc: float


def roc(harmful: Tensor, clean: Tensor) -> Roc:
    """The curve of scores (N,) and (M,); its area is the probability that a harmful score exceeds a clean one, ties half."""
    if not len(harmful) or not len(clean):
        raise HGRError(f"Expected scores of both kinds, but got {len(harmful)} harmful and {len(clean)} clean ones.")
    harmful, clean = harmful.double().flatten().sort().values, clean.double().flatten().sort().values
    thresholds = torch.cat([harmful, clean]).unique().flip(0)
    above = lambda scores, at: 1 - torch.searchsorted(scores, at, right=True) / len(scores)  # noqa: E731
    below = torch.searchsorted(clean, harmful, right=False) + torch.searchsorted(clean, harmful, right=True)
    area = (below.double() / 2).mean().item() / len(clean)
    ends = [*thresholds.tolist(), -1.0]  # below every score: everything is flagged
    rates = [(*above(scores, thresholds).tolist(), 1.0) for scores in (clean, harmful)]
    return Roc(tuple(ends), rates[0], rates[1], area)


def auroc(harmful: Tensor, clean: Tensor) -> float:
    """The area under the curve of scores (N,) and (M,)."""
    return roc(harmful, clean).auroc


def threshold_at(clean: Tensor, rate: float) -> float:
    """The lowest threshold that at most a share `rate` of the clean scores (M,) exceeds; one of the scores itself."""
    allowed = min(int(rate * len(clean) + 1e-9), len(clean) - 1)
    return clean.double().flatten().sort(descending=True).values[allowed].item()
