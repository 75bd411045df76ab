"""Reading texts with a CLIP and an HGR: how far each exceeds its thresholds, and what redaction makes of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import comfy.model_management
import torch
from comfy.sd import CLIP
from torch import Tensor

from ...hgr_models.pairs import NEUTRAL
from ...hgr_models.redaction import Redaction, redact
from ..host.encoding import encode_text
from ..loader import HGRModel
from .detector import detect_prompts
from .scores import Rules


@dataclass
class TextReader:
    """Reads texts; each is encoded once. The worst of a text's entries and rows counts."""

    clip: CLIP
    hgr: HGRModel
    rules: Rules
    seen: dict[str, Tensor] = field(default_factory=dict)

    def scores(self, text: str) -> Tensor:
        """Harmfulness (K,) of a text. Raises what `detect_prompts` raises, and core's interruption."""
        if text not in self.seen:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.seen[text] = detect_prompts(self.hgr, encode_text(self.clip, text)).amax(dim=0)
        return self.seen[text]

    def excess(self, texts: Sequence[str]) -> Tensor:
        """By how much the worst counted category of each text exceeds its threshold, in log odds (N,)."""
        scores = torch.stack([self.scores(text) for text in texts]).double()
        limits = torch.tensor(self.rules.thresholds, dtype=torch.float64)
        over = torch.logit(scores, eps=1e-9) - torch.logit(limits, eps=1e-9)
        return over.masked_fill(~torch.tensor(self.rules.counted), -torch.inf).amax(dim=1).float()

    def worst(self, text: str) -> str:
        """The counted category that exceeds its threshold most."""
        over = torch.logit(self.scores(text), eps=1e-9) - torch.logit(torch.tensor(self.rules.thresholds), eps=1e-9)
        return self.rules.categories[int(over.masked_fill(~torch.tensor(self.rules.counted), -torch.inf).argmax())]

    def redacted(self, text: str, neutral: bool) -> Redaction:
        """The text without the smallest set of words that makes it harmful; with `neutral` the category's words in their place.

        What cannot be made clean by leaving words out is left out as a whole.
        """
        found = redact(text, self.excess, NEUTRAL.get(self.worst(text), "") if neutral else "")
        if found.clean:
            return found
        return Redaction("", (text,), float(self.excess([""])[0]))

    def row(self, text: str) -> dict[str, float]:
        """Scores by category, for people and programs."""
        return {name: round(value, 6) for name, value in zip(self.rules.categories, self.scores(text).tolist(), strict=True)}


def about(reader: TextReader, before: str, found: Redaction) -> str:
    """JSON: whether a text was changed, what was left out, and its scores before and after."""
    limits = {
        name: round(limit, 6) if on else None
        for name, limit, on in zip(reader.rules.categories, reader.rules.thresholds, reader.rules.counted, strict=True)
    }
    return json.dumps(
        {
            "categories": limits,
            "changed": found.text != before,
            "left_out": list(found.left_out),
            "clean": found.clean,
            "before": reader.row(before),
            "after": reader.row(found.text),
        },
        ensure_ascii=False,
    )
