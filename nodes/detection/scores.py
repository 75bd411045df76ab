"""Scores of prompts and pictures as text: detecting nodes write it, SafeCFG Image Gate and logs read it.

    {"categories": {"weapons": 0.41, "drugs": null}, "images": [{"harmfulness": 0.93, "flagged": true, "scores": {...}}], ...}

`categories` holds the threshold of each category, null where it is switched off; there is one entry per picture (or prompt).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from comfy_api.latest import io
from torch import Tensor

from ... import hgr_models
from ..host.schema import make_input


def rule_inputs(what: str) -> list:
    """The widgets from which `Rules` are made, for nodes that judge `what`."""
    return [
        make_input(
            io.Float,
            "threshold",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip=f"0 to 1. 0: the thresholds stored in the HGR, calibrated on clean {what}. Above 0: this one for every category.",
        ),
        make_input(
            io.String,
            "categories",
            default="",
            multiline=True,
            placeholder="all on; NAME = off",
            tooltip="Categories that do not count: `violence = off`. Those not named count. Empty: all of them.",
        ),
    ]


@dataclass(frozen=True)
class Rules:
    """What counts as harmful: a threshold per category, and which categories count."""

    categories: tuple[str, ...]
    thresholds: tuple[float, ...]
    counted: tuple[bool, ...]

    @classmethod
    def of(cls, info: hgr_models.HGRInfo, thresholds: Sequence[float], own: float, categories: str) -> "Rules":
        """The stored `thresholds`, or `own` for all of them when it is above 0; `categories` is the widget's text."""
        strengths = hgr_models.parse_categories(categories, info.categories)
        if not any(strengths):
            raise hgr_models.HGRError(f"Every category is off in {categories!r}, so nothing would be looked for. Leave one on.")
        chosen = (own,) * len(info.categories) if own > 0 else tuple(thresholds)  # NaN is not above 0
        return cls(info.categories, chosen, tuple(s > 0 for s in strengths))

    def flags(self, scores: Tensor) -> list[bool]:
        """Per row of scores (N, K): does any counted category exceed its threshold?"""
        exceeds = scores > torch.tensor(self.thresholds)
        return (exceeds & torch.tensor(self.counted)).any(dim=1).tolist()

    def harmfulness(self, scores: Tensor) -> list[float]:
        """The worst counted category of each row of scores (N, K)."""
        return scores.masked_fill(~torch.tensor(self.counted), 0.0).amax(dim=1).tolist()


@dataclass(frozen=True)
class Item:
    """One picture or prompt as read from text."""

    harmfulness: float
    flagged: bool


def write(rules: Rules, kind: str, scores: Tensor, **about) -> str:
    """The text for scores (N, K), one entry of `kind` (images, prompts) per row."""
    limits = {
        name: round(limit, 6) if on else None
        for name, limit, on in zip(rules.categories, rules.thresholds, rules.counted, strict=True)
    }
    rows = zip(rules.harmfulness(scores), rules.flags(scores), scores.tolist(), strict=True)
    items = [
        {
            "harmfulness": round(worst, 6),
            "flagged": flagged,
            "scores": {name: round(score, 6) for name, score in zip(rules.categories, row, strict=True)},
        }
        for worst, flagged, row in rows
    ]
    return json.dumps({"categories": limits, **about, kind: items})


def read(text: str) -> list[Item | None]:
    """The pictures of a text; None where it says nothing about one. Raises ValueError for a text that holds no pictures."""
    try:
        content = json.loads(text)
        entries = content["images"]
        if not isinstance(entries, list):
            raise TypeError("images is no list")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected the scores of SafeCFG Detect Harm or SafeCFG Report, but got {text[:80]!r} ({error}). Connect their `scores`."
        ) from error
    return [_item(entry) for entry in entries]


def _item(entry: object) -> Item | None:
    values = entry if isinstance(entry, dict) else {}
    harmfulness, flagged = values.get("harmfulness"), values.get("flagged")
    if not isinstance(flagged, bool) or not isinstance(harmfulness, (int, float)) or not 0 <= harmfulness <= 1:
        return None  # NaN is not within 0 and 1 either
    return Item(float(harmfulness), flagged)
