"""Thresholds per picture: how harmful do clean prompts and clean runs look at most?"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from .detection import Seen, detect, prompt_scores
from .hgr import HGR, HGRInfo
from .recording import Points
from .redirection import log_snr_of, noise_level, read_guidance
from .shapes import per_row
from .shards import HARMFUL, Recording, Texts

HARMFUL_TEXTS = 512  # that are read to know how far harmful prompts are
AT_ONCE = 2**25  # values of tokens that are read at once; reading takes some copies of them
TAIL = 0.1  # of the clean samples: the part whose shape says how rare a high reading is
DEEP = 10  # the rank at which that shape is measured
MISSED = 0.05  # of the harmful readings: those below are not what a margin is measured to
CONDITION_SHARE = 0.5  # of the false positives: harm that no training showed is found by its prompt or not at all


def joint_thresholds(clean: Tensor, rate: float, lowest: float, harmful: Tensor | None = None) -> Tensor:
    """Thresholds (*cells) such that about `rate` of the clean samples (N, *cells), in [0, 1], exceed any of them.

    A cell is a category, or a category at a noise level. In log odds every cell is measured in units of its own upper tail
    (above the quantile 1 - TAIL), which makes cells alike; then one quantile of the largest cell of each sample serves them
    all. Thresholds per cell at rate / cells would be maxima of the sample: too high where a picture is flagged in several
    cells at once, and no estimate of anything.

    A sample that is too small to show so rare a reading gets a margin above its maximum: one unit, but no more than half of
    the way to the `harmful` readings (M, *cells), which are NaN where a sample does not show the cell's harm. A lower rate
    never gives a lower threshold.
    """
    logits = torch.logit(clean.double(), eps=1e-9)
    start, unit = _tail(logits)
    largest = ((logits - start) / unit).flatten(1).amax(dim=1).sort(descending=True).values
    allowed = int(rate * len(clean))
    thresholds = start + largest[allowed] * unit
    if allowed == 0:
        shown = start + largest[min(1, len(clean) - 1)] * unit  # by a rate that the sample does show
        thresholds = torch.maximum(shown, _with_margin(logits.amax(dim=0), thresholds + unit, harmful))
    return thresholds.sigmoid().clamp(lowest, 1 - 1e-6).float()


def _tail(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Where the upper tail of readings (N, *cells) begins, and its unit: the excess that e times fewer samples reach.

    The unit is measured at the tenth highest sample, so that cells with long tails get no more than their part of the false
    alarms; from a sample too small for that it is the mean excess.
    """
    start = logits.quantile(1 - TAIL, dim=0)
    deep = TAIL * len(logits) / DEEP
    if deep > math.e:
        unit = (logits.sort(dim=0, descending=True).values[DEEP - 1] - start) / math.log(deep)
    else:
        unit = (logits - start).clamp(min=0).sum(dim=0) / (logits > start).sum(dim=0).clamp(min=1)
    return start, unit.clamp(min=0.05)  # a cell that is the same everywhere has no tail


def _with_margin(highest: Tensor, thresholds: Tensor, harmful: Tensor | None) -> Tensor:
    """Thresholds (*cells) that are not beyond the middle between the highest clean readings and the harmful ones, in log odds."""
    if harmful is None:
        return thresholds
    low = torch.logit(harmful.double(), eps=1e-9).nanquantile(MISSED, dim=0)
    return torch.where(low > highest, torch.minimum(thresholds, (highest + low) / 2), thresholds)


def needed(rate: float) -> int:
    """How many clean samples without an alarm it takes to prove, with 95 % confidence, that no more than `rate` are flagged."""
    return math.ceil(2.706 * (1 - rate) / rate)  # Wilson's bound of 0 in n is z^2 / (n + z^2)


def proof_in_words(proof: dict) -> list[str]:
    """What a calibration proves about clean prompts and runs, one line each; it says where they are too few for the rate."""
    rate, lines = proof["rate"], []
    for what in ("prompts", "runs", "pictures"):
        if f"clean_{what}" not in proof:
            continue
        count, bound, asked = proof[f"clean_{what}"], proof[f"upper_bound_{what}"], rate
        if what == "pictures":
            asked = proof["picture_rate"]
        line = f"{count} clean {what}: with 95 % confidence at most {100 * bound:.2g} % are flagged"
        if bound > 1.5 * asked and count < needed(asked):
            line += f"; too few to prove {100 * asked:.2g} %, which takes {needed(asked)}"
        lines.append(line)
    return lines


def only_shown(readings: Tensor, harms: Tensor) -> Tensor:
    """Readings (N, ..., K) of harmful samples, NaN where a sample does not show a category, by harms (N, K), or has no step."""
    hidden = harms.view(len(harms), *[1] * (readings.ndim - 2), -1) == 0
    return readings.masked_fill(hidden | (readings == 0), torch.nan)


def harmful_readings(hgr: HGR, recording: Recording, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """`only_shown` of what the networks read in a recording's harmful prompts (N, K) and runs (M, L, K); None without the network."""
    p = b = None
    if hgr.condition is not None:
        parts = recording.draw_texts_in_parts(True, HARMFUL_TEXTS, torch.Generator().manual_seed(0))
        p = torch.cat([only_shown(prompt_readings(hgr, texts, device), texts.harms) for texts in parts])
    if hgr.guidance is not None:
        shards = recording.of_kind(HARMFUL)
        b = torch.cat([only_shown(run_maxima(hgr, s.runs(), device), s.prompts().harms) for s in shards])
    return p, b


@torch.no_grad()
def prompt_readings(hgr: HGR, texts: Texts, device: torch.device) -> Tensor:
    """`p` of encoded prompts, (N, K), on the CPU; few at a time where they are long and wide."""
    found = []
    for rows in torch.arange(len(texts)).split(max(1, AT_ONCE // texts.tokens[0].numel())):
        some = texts[rows]
        found.append(
            hgr.condition.harmfulness(*(None if t is None else t.to(device) for t in (some.tokens, some.pooled, some.mask)))
        )
    return torch.cat(found).cpu()


@torch.no_grad()
def run_maxima(hgr: HGR, points: Points, device: torch.device, batch: int = 64) -> Tensor:
    """The largest `b` of each run per noise level, (runs, L, K), on the CPU; 0 where a run has no step.

    `points.prompt` numbers the runs.
    """
    levels, k = torch.tensor(hgr.info.guidance_levels), len(hgr.info.categories)
    runs = torch.zeros(int(points.prompt.max()) + 1, len(levels) + 1, k)
    for rows in torch.arange(len(points)).split(batch):
        some = points[rows]
        cells = some.prompt.cpu() * (len(levels) + 1) + noise_level(log_snr_of(some.sigma).cpu(), levels)
        b = guidance_readings(hgr, some, device)
        runs.view(-1, k).scatter_reduce_(0, cells[:, None].expand_as(b), b, "amax")
    return runs


@torch.no_grad()
def guidance_readings(hgr: HGR, points: Points, device: torch.device) -> Tensor:
    """`b` of recorded points, (N, K), on the CPU."""
    x_in = points.x * per_row(points.c_in, points.x)
    parts = (t.to(device) for t in (points.cond_denoised, points.uncond_denoised, x_in, points.sigma))
    return read_guidance(hgr.guidance, *parts)[2].direction_logits.sigmoid().cpu()


@torch.no_grad()
def picture_readings(hgr: HGR, points: Points, prompts: Texts, device: torch.device) -> Tensor:
    """`detection.detect` of finished runs with their prompts, (N, K), on the CPU.

    `points` are the runs' latents noised to each of `detection.LEVELS` in turn, as `shard_check.PICTURES` says.
    """
    looks = iter(torch.arange(len(points)).split(len(prompts)))

    def see(part: float, noise: Tensor) -> Seen:
        some = points[next(looks)]
        x_in = some.x * per_row(some.c_in, some.x)
        return Seen(*(t.to(device) for t in (x_in, some.sigma, some.uncond_denoised, some.cond_denoised)))

    rows = (None if t is None else t.to(device) for t in (prompts.tokens, prompts.pooled, prompts.mask))
    p = None if hgr.condition is None else prompt_scores(hgr, *rows)
    return detect(hgr.guidance, see, (len(prompts), *points.x.shape[1:]), prompts=p).scores.cpu()


def upper_bound(alarms: int, runs: int) -> float:
    """95 % upper confidence bound of a rate of which `alarms` in `runs` were seen (Wilson's score interval)."""
    z, p = 1.645, alarms / runs
    center = p + z * z / (2 * runs)
    return min(1.0, (center + z * (p * (1 - p) / runs + z * z / (4 * runs * runs)) ** 0.5) / (1 + z * z / runs))


def calibrated(
    hgr: HGR,
    prompts: Tensor | None,
    runs: Tensor | None,
    rate: float,
    lowest: float = 0.02,
    harmful: tuple[Tensor | None, Tensor | None] = (None, None),
) -> HGRInfo:
    """`hgr.info` with thresholds from clean prompts (N, K) of `p`, and from clean runs (M, L, K): the largest `b` of each run
    per noise level. None leaves that network's thresholds as they are.

    `rate` is the share of clean pictures that may be redirected, both networks and all categories together. `harmful` is what
    both networks read in harmful prompts and runs, as in `harmful_readings`.
    """
    info, proof = hgr.info, {"rate": rate}
    if prompts is not None:
        p = joint_thresholds(prompts, CONDITION_SHARE * rate if hgr.guidance is not None else rate, lowest, harmful[0])
        alarms = int((prompts > p).any(dim=1).sum())
        proof |= {"clean_prompts": len(prompts), "upper_bound_prompts": upper_bound(alarms, len(prompts))}
        info = replace(info, condition_thresholds=tuple(p.tolist()))
    if runs is not None:
        b = joint_thresholds(runs, (1 - CONDITION_SHARE) * rate if hgr.condition is not None else rate, lowest, harmful[1])
        alarms = int((runs > b).flatten(1).any(dim=1).sum())
        proof |= {"clean_runs": len(runs), "upper_bound_runs": upper_bound(alarms, len(runs))}
        info = replace(info, guidance_thresholds=tuple(tuple(row) for row in b.tolist()))
    return replace(info, training={**info.training, "calibration": {**info.training.get("calibration", {}), **proof}})


def calibrated_on_pictures(info: HGRInfo, clean: Tensor, rate: float, lowest: float = 0.02) -> HGRInfo:
    """`info` with thresholds for detecting harm in pictures, from `detection.detect` of clean pictures with their prompts (N, K).

    With the prompts, because every view then counts: a picture alone exceeds these thresholds no more often. `rate` is the
    share of clean pictures that may be flagged, all categories together.
    """
    thresholds = joint_thresholds(clean, rate, lowest)
    alarms = int((clean > thresholds).any(dim=1).sum())
    proof = {"picture_rate": rate, "clean_pictures": len(clean), "upper_bound_pictures": upper_bound(alarms, len(clean))}
    calibration = {**info.training.get("calibration", {}), **proof}
    return replace(info, picture_thresholds=tuple(thresholds.tolist()), training={**info.training, "calibration": calibration})
