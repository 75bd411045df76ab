"""The Harmful Guidance Redirector: two networks and what is known about the model they belong to."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor, nn

from .condition import ConditionConfig, ConditionRedirector
from .errors import HGRError
from .guidance import GuidanceConfig, GuidanceRedirector
from .redirection import log_snr_of

LARGEST = 1e9  # of any number in the metadata


@dataclass(frozen=True)
class HGRInfo:
    """What an HGR is for; stored as metadata of its checkpoint. Thresholds are harmfulness in [0, 1]."""

    categories: tuple[str, ...]  # K names, in the order of every (B, K) tensor
    condition_thresholds: tuple[float, ...]  # (K,)
    guidance_levels: tuple[float, ...]  # ascending values of -2 ln sigma that part L noise levels; L - 1 of them
    guidance_thresholds: tuple[tuple[float, ...], ...]  # (L, K)
    latent_format: str  # class name of core's latent format, e.g. SD15
    latent_channels: int
    latent_dimensions: int  # 2: pictures, 3: video
    prediction: str  # EPS, V or FLOW
    token_width: int
    pooled_width: int  # 0: the family has no pooled vector
    base: str = ""  # hash of the base model
    concept_prompts: dict[str, str] = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    picture_thresholds: tuple[float, ...] = ()  # (K,) of `detection.detect`; (): not calibrated on pictures

    def validate(self, file: str = "this HGR") -> None:
        """Raises HGRError when the fields contradict each other."""
        self._check_types(file)
        k, levels = len(self.categories), len(self.guidance_levels) + 1
        if k == 0 or len(set(self.categories)) != k or not all(isinstance(c, str) and c.strip() for c in self.categories):
            raise HGRError(
                f"Expected distinct, non-empty category names in {file}, but got {list(self.categories)}. Train it again."
            )
        if len(self.condition_thresholds) != k:
            raise HGRError(f"Expected {k} condition thresholds in {file}, but got {len(self.condition_thresholds)}.")
        if len(self.guidance_thresholds) != levels or any(len(row) != k for row in self.guidance_thresholds):
            raise HGRError(f"Expected {levels} x {k} guidance thresholds in {file}, but got {self.guidance_thresholds}.")
        if self.picture_thresholds and len(self.picture_thresholds) != k:
            raise HGRError(f"Expected {k} picture thresholds in {file}, but got {len(self.picture_thresholds)}.")
        rows = (self.condition_thresholds, self.picture_thresholds, *self.guidance_thresholds)
        values = [threshold for row in rows for threshold in row]
        if not all(0 <= t <= 1 for t in values):
            raise HGRError(f"Expected thresholds from 0 to 1 in {file}, but got {values}. Calibrate it again.")
        if self.latent_dimensions not in (2, 3):
            raise HGRError(f"Expected latent_dimensions 2 or 3 in {file}, but got {self.latent_dimensions}.")
        if any(low >= high for low, high in pairwise(self.guidance_levels)):
            raise HGRError(f"Expected ascending guidance levels in {file}, but got {self.guidance_levels}. Calibrate it again.")

    def _check_types(self, file: str) -> None:
        """Values from a file may be anything that JSON knows; an integer there may have thousands of digits."""
        numbers = (self.guidance_levels, self.condition_thresholds, self.picture_thresholds, *self.guidance_thresholds)
        sizes = (self.latent_channels, self.latent_dimensions, self.token_width, self.pooled_width)
        wrong = {
            "texts": [v for v in (*self.categories, self.latent_format, self.prediction, self.base) if not isinstance(v, str)],
            "finite numbers": [
                v for row in numbers for v in row if not isinstance(v, Real) or isinstance(v, bool) or not abs(v) < LARGEST
            ],
            "sizes": [v for v in sizes if type(v) is not int or not 0 <= v < LARGEST],
            "objects": [v for v in (self.concept_prompts, self.training) if not isinstance(v, dict)],
        }
        prompts = self.concept_prompts if isinstance(self.concept_prompts, dict) else {}
        wrong["texts"] += [v for pair in prompts.items() for v in pair if not isinstance(v, str)]
        for what, values in wrong.items():
            if values:
                raise HGRError(f"Expected {what} in the metadata of {file}, but got {str(values[0])[:80]!r}. Train it again.")


def uncalibrated_info(facts: Mapping) -> HGRInfo:
    """The metadata of an HGR for a recording, before calibration; `facts` are what its shards say about the model."""
    known = {f.name for f in fields(HGRInfo)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k in known}
    k, levels = len(facts["categories"]), len(facts["guidance_levels"]) + 1
    return HGRInfo(**values, condition_thresholds=(0.5,) * k, guidance_thresholds=((0.5,) * k,) * levels)


class HGR(nn.Module):
    """Both redirectors with their thresholds as buffers, so that they move with the weights. Either network may be absent."""

    def __init__(self, info: HGRInfo, condition: ConditionConfig | None, guidance: GuidanceConfig | None, ops=nn):
        super().__init__()
        info.validate()
        if condition is None and guidance is None:
            raise HGRError("Expected a condition redirector, a guidance redirector or both, but got neither.")
        self.condition = ConditionRedirector(condition, ops) if condition else None
        self.guidance = GuidanceRedirector(guidance, ops) if guidance else None
        self.calibrate(info)

    def calibrate(self, info: HGRInfo) -> None:
        """Takes over other thresholds (and whatever else `info` says)."""
        info.validate()
        self.info = info
        for name in ("condition_thresholds", "guidance_thresholds", "guidance_levels"):
            device = getattr(self, name).device if hasattr(self, name) else None
            values = torch.tensor(getattr(info, name), dtype=torch.float32, device=device)
            self.register_buffer(name, values, persistent=False)

    def guidance_thresholds_at(self, sigma: Tensor) -> Tensor:
        """Thresholds (B, K) of the guidance redirector at noise levels sigma (B,)."""
        return self.guidance_thresholds_of(log_snr_of(sigma))

    def guidance_thresholds_of(self, log_snr: Tensor) -> Tensor:
        """The same, where -2 ln sigma (B,) is known."""
        levels, thresholds = (buffer.to(log_snr.device) for buffer in (self.guidance_levels, self.guidance_thresholds))
        return thresholds[torch.bucketize(log_snr, levels)]
