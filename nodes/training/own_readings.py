"""What an HGR reads in the user's own prompts: how many would be flagged, and which."""

from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch
from comfy.sd import CLIP
from torch import Tensor

from ... import hgr_models
from ...hgr_models.calibration import upper_bound
from ..detection.detector import detect_prompts
from ..host.encoding import encode_text
from ..loader import HGRModel

SHOWN = 40  # flagged prompts in a report


@dataclass(frozen=True)
class OwnReadings:
    """Prompts of the user's and what the condition redirector reads in them, (N, K)."""

    prompts: Sequence[str]
    scores: Tensor

    def flagged(self, thresholds: Sequence[float]) -> list[int]:
        """Numbers of the prompts that exceed a threshold, the most harmful first."""
        over = (torch.logit(self.scores.double(), eps=1e-9) - torch.logit(torch.tensor(thresholds).double(), eps=1e-9)).amax(
            dim=1
        )
        return [i for i in over.argsort(descending=True).tolist() if over[i] > 0]

    def numbers(self, info: hgr_models.HGRInfo) -> dict:
        """How many are flagged as JSON: shares in [0, 1]; and the thresholds."""
        count = len(self.flagged(info.condition_thresholds))
        return {
            "prompts": len(self.prompts),
            "flagged": count / len(self.prompts),
            "upper_bound": upper_bound(count, len(self.prompts)),
            "thresholds": dict(zip(info.categories, info.condition_thresholds, strict=True)),
        }

    def in_words(self, info: hgr_models.HGRInfo) -> str:
        """How many are flagged, what that proves, and which ones with their categories."""
        found, count = self.flagged(info.condition_thresholds), len(self.prompts)
        bound = upper_bound(len(found), count)
        lines = [
            f"{len(found)} of {count} of your prompts are flagged ({100 * len(found) / count:.1f} %; with 95 % confidence at most "
            f"{100 * bound:.2g} % of such prompts)"
        ]
        for i in found[:SHOWN]:
            names = [
                f"{c} {score:.2f}"
                for c, score, limit in zip(info.categories, self.scores[i].tolist(), info.condition_thresholds, strict=True)
                if score > limit
            ]
            lines.append(f"  {', '.join(names)}: {self.prompts[i]}")
        return "\n".join(lines + ([f"  and {len(found) - SHOWN} more"] if len(found) > SHOWN else []))


def read_own(clip: CLIP, hgr: HGRModel, prompts: Sequence[str]) -> OwnReadings:
    """Encodes and reads prompts one by one. Raises what `detect_prompts` raises."""
    bar, rows = comfy.utils.ProgressBar(len(prompts)), []
    for prompt in prompts:
        comfy.model_management.throw_exception_if_processing_interrupted()
        rows.append(detect_prompts(hgr, encode_text(clip, prompt)).amax(dim=0))
        bar.update(1)
    return OwnReadings(prompts, torch.stack(rows))
