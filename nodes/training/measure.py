"""What an HGR does on a model: runs of prompts that it never saw, read and redirected as SafeCFG Apply would."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ... import hgr_models
from ...hgr_models import losses
from ...hgr_models.calibration import only_shown, picture_readings, run_maxima
from ...hgr_models.hgr import Redirectors
from ...hgr_models.recording import Points, Prompts
from ...hgr_models.shapes import per_row
from ...hgr_models.shards import Texts
from .frozen_model import FrozenModel


@dataclass
class Found:
    """What was found in harmful and clean runs; per run, unless it says otherwise."""

    categories: tuple[str, ...]
    harms: list[Tensor] = field(default_factory=list)  # (K,) of harmful runs
    by_prompt: list[bool] = field(default_factory=list)  # the harm was flagged by the condition redirector
    first_flag: list[float | None] = field(default_factory=list)  # share of the run at which guidance was first flagged
    before: dict[str, list[float]] = field(default_factory=dict)  # squared distance to the partner's direction, per network
    after: dict[str, list[float]] = field(default_factory=dict)
    readings: list[Tensor] = field(default_factory=list)  # p of harmful prompts, (K,)
    maxima: list[Tensor] = field(default_factory=list)  # largest b of harmful runs, (L, K)
    clean_readings: list[Tensor] = field(default_factory=list)  # p of clean prompts, (K,)
    clean_maxima: list[Tensor] = field(default_factory=list)  # largest b of clean runs, (L, K)
    clean_pictures: list[Tensor] = field(default_factory=list)  # what a detector says of the finished clean runs, (K,)

    def removal(self, network: str) -> float | None:
        """How much of the way to the partner's direction a network goes, in [0, 1]; None where it was not looked at."""
        if not self.before.get(network):
            return None
        return 1 - sum(self.after[network]) / max(sum(self.before[network]), 1e-12)

    def harmful_readings(self) -> tuple[Tensor | None, Tensor | None]:
        """As `calibration.harmful_readings`."""
        both = self.readings, self.maxima
        p, b = (only_shown(torch.stack(rows), torch.stack(self.harms)) if rows else None for rows in both)
        return p, b

    def add_distance(self, network: str, before: Tensor, after: Tensor) -> None:
        self.before.setdefault(network, []).extend(before.tolist())
        self.after.setdefault(network, []).extend(after.tolist())


@torch.no_grad()
def look_at_harmful(
    found: Found, hgr: Redirectors, frozen: FrozenModel, points: Points, prompts: Prompts, device: torch.device
) -> None:
    """Adds a batch of harmful runs; `points.prompt` are rows of `prompts`."""
    on = hgr_models.CategorySettings((1.0,) * len(found.categories))
    found.harms += list(prompts.harms)
    if hgr.condition is not None:
        parts = (None if t is None else t.to(device) for t in (prompts.tokens, prompts.pooled))
        tokens, pooled = parts
        mask = None if prompts.mask is None else prompts.mask.to(device)
        result = hgr_models.redirect_condition(hgr, tokens, pooled, on, mask)
        found.readings += list(result.harmfulness.cpu())
        found.by_prompt += (result.weights.cpu() * prompts.harms).any(dim=1).tolist()
        for rows in torch.arange(len(points)).split(len(prompts)):  # a step of every run
            some, about = points[rows], prompts[points.prompt[rows]]
            redirected = None if result.pooled is None else result.pooled[some.prompt]
            denoised = frozen.predict(some, about, result.tokens[some.prompt], redirected).cpu()
            found.add_distance("condition", *_distances(some, denoised))
    if hgr.guidance is not None:
        found.maxima += list(run_maxima(hgr, points, device))
        _look_at_guidance(found, hgr, points, len(prompts), on, device)


def _look_at_guidance(
    found: Found, hgr: Redirectors, points: Points, runs: int, on: hgr_models.CategorySettings, device: torch.device
) -> None:
    first: list[float | None] = [None] * runs
    flagged = None
    steps = list(torch.arange(len(points)).split(runs))
    for i, rows in enumerate(steps):
        some = points[rows]
        x_in = some.x * per_row(some.c_in, some.x)
        parts = (t.to(device) for t in (some.cond_denoised, some.uncond_denoised, x_in, some.sigma))
        result = hgr_models.redirect_guidance(hgr, *parts, on, flagged)
        flagged = result.weights
        for run in (result.weights > 0).any(dim=1).nonzero().flatten().tolist():
            first[run] = i / len(steps) if first[run] is None else first[run]
        found.add_distance("guidance", *_distances(some, result.cond_denoised.cpu()))
    found.first_flag += first


def _distances(points: Points, denoised: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to the partner's direction before and after, (N,), each in units of its own direction."""
    size = losses.mean_square(points.cond_denoised - points.uncond_denoised).clamp(min=1e-12)
    before = losses.mean_square(points.cond_denoised - points.partner_denoised) / size
    return before, losses.mean_square(denoised - points.partner_denoised) / size


@torch.no_grad()
def look_at_clean(
    found: Found, hgr: Redirectors, points: Points, prompts: Prompts, pictures: Points, device: torch.device
) -> None:
    """Adds a batch of clean runs; `points.prompt` are rows of `prompts`, `pictures` as in `calibration.picture_readings`."""
    if hgr.condition is not None:
        rows = (None if t is None else t.to(device) for t in (prompts.tokens, prompts.pooled, prompts.mask))
        found.clean_readings += list(hgr.condition.harmfulness(*rows).cpu())
    if hgr.guidance is not None:
        found.clean_maxima += list(run_maxima(hgr, points, device))
        texts = Texts(prompts.tokens, prompts.pooled, prompts.mask, prompts.harms, prompts.lengths)
        found.clean_pictures += list(picture_readings(hgr, pictures, texts, device))


def report(found: Found, info: hgr_models.HGRInfo) -> dict:
    """Everything in numbers, as JSON: shares in [0, 1], None where there is nothing to say."""
    p, b = torch.tensor(info.condition_thresholds), torch.tensor(info.guidance_thresholds)
    by_prompt = [bool((row > p).any()) for row in found.clean_readings]
    by_guidance = [bool((row > b).any()) for row in found.clean_maxima]
    either = [x or y for x, y in zip(by_prompt or by_guidance, by_guidance or by_prompt, strict=True)]
    seen = [part for part in found.first_flag if part is not None]
    return {
        "harmful_runs": len(found.harms),
        "clean_runs": len(either),
        "flagged_by_prompt": _share(found.by_prompt),
        "flagged_by_guidance": _share([part is not None for part in found.first_flag]),
        "first_flag": sum(seen) / len(seen) if seen else None,
        "removal_condition": found.removal("condition"),
        "removal_guidance": found.removal("guidance"),
        "false_positives_by_prompt": _share(by_prompt),
        "false_positives_by_guidance": _share(by_guidance),
        "false_positives": _share(either),
    }


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def in_words(numbers: dict) -> str:
    """The report for people."""
    percent = lambda key: "-" if numbers[key] is None else f"{100 * numbers[key]:.1f} %"  # noqa: E731
    return "\n".join(
        [
            f"{numbers['harmful_runs']} harmful runs: flagged by the prompt {percent('flagged_by_prompt')}, by the guidance "
            f"{percent('flagged_by_guidance')} (on average after {percent('first_flag')} of the run)",
            f"way to the safe direction: condition redirector {percent('removal_condition')}, guidance redirector {percent('removal_guidance')}",
            f"{numbers['clean_runs']} clean runs: redirected by mistake {percent('false_positives')} (by the prompt "
            f"{percent('false_positives_by_prompt')}, by the guidance {percent('false_positives_by_guidance')})",
        ]
    )
