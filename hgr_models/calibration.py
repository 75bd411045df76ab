"""Thresholds per picture: how harmful do clean prompts and clean runs look at most?"""

from dataclasses import replace

import torch
from torch import Tensor

from .hgr import HGR, HGRInfo


def quantile_thresholds(clean: Tensor, rate: float, lowest: float, margin: float = 0.5) -> Tensor:
    """Thresholds (K,) that about `rate` of the clean samples (N, K) exceed in any category.

    The rate is shared by the categories. Where the sample is too small to show so rare an event, the threshold is its
    maximum, moved up by `margin` in log odds.
    """
    count, k = clean.shape
    rank = int(rate / k * count)  # clean samples allowed above the threshold, per category
    at = clean.sort(dim=0, descending=True).values[rank].clamp(1e-6, 1 - 1e-6)
    if rank == 0:
        at = torch.sigmoid(torch.logit(at) + margin)
    return at.clamp(lowest, 0.9999)


def upper_bound(alarms: int, runs: int) -> float:
    """95 % upper confidence bound of a rate of which `alarms` in `runs` were seen (Wilson's score interval)."""
    z, p = 1.645, alarms / runs
    center = p + z * z / (2 * runs)
    return min(1.0, (center + z * (p * (1 - p) / runs + z * z / (4 * runs * runs)) ** 0.5) / (1 + z * z / runs))


def calibrated(hgr: HGR, prompts: Tensor, runs: Tensor, rate: float, lowest: float = 0.02) -> HGRInfo:
    """`hgr.info` with thresholds from clean prompts (N, K) of `p`, and from clean runs (M, L, K): the largest `b` of each run
    per noise level.

    `rate` is the share of clean pictures that may be redirected, both networks and all categories together.
    """
    levels = runs.shape[1]
    p = quantile_thresholds(prompts, rate / 2, lowest)
    b = torch.stack([quantile_thresholds(runs[:, level], rate / 2 / levels, lowest) for level in range(levels)])
    alarms = int(((runs > b).flatten(1).any(dim=1)).sum())
    proof = {
        "rate": rate,
        "clean_prompts": len(prompts),
        "clean_runs": len(runs),
        "upper_bound_runs": upper_bound(alarms, len(runs)),
    }
    return replace(
        hgr.info,
        condition_thresholds=tuple(p.tolist()),
        guidance_thresholds=tuple(tuple(row) for row in b.tolist()),
        training={**hgr.info.training, "calibration": proof},
    )
