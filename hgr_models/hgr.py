"""The Harmful Guidance Redirector: two networks and what is known about the model they belong to."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .condition import ConditionConfig, ConditionRedirector
from .encoders import EncoderPrint
from .errors import HGRError
from .guidance import GuidanceConfig, GuidanceRedirector
from .metadata import check_facts
from .redirection import limits, log_snr_of, noise_level

LARGEST = 1e9  # of any number in the metadata
WEAK = 0.15  # of the check by the model: .02 to .06 is good, .4 to 1 does next to nothing
# What the facts of a recording say where it belongs to a text encoder, and no model is known.
NO_LATENTS = {
    "latent_format": "", "latent_channels": 0, "latent_dimensions": 2, "prediction": "", "guidance_levels": [], "base": "",
    "architecture": "",
}  # fmt: skip


def facts_of_text(facts: Any) -> Any:
    """What a recording's facts say of its prompts and their encoder alone, whatever model they name."""
    return {key: value for key, value in facts.items() if key not in NO_LATENTS} if isinstance(facts, dict) else facts


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
    encoder: dict = field(default_factory=dict)  # `EncoderPrint.as_dict`; {}: a file of before
    architecture: str = ""  # of the base model, as people call it: "Flux.1"; "": a file of before, or of prompts alone

    def limits(self, log_snr: Tensor | None = None, offset: float = 0.0) -> Tensor:
        """The harmfulness above which a category is flagged, float32 in [0, 1]: of prompts (K,), or, where log_snr = -2 ln sigma
        (B,) is given, of the guidance (B, K). `offset` in [-1, 1] is the user's."""
        if log_snr is None:
            return limits(torch.tensor(self.condition_thresholds), offset)
        rows = noise_level(log_snr, torch.tensor(self.guidance_levels))
        return limits(torch.tensor(self.guidance_thresholds)[rows], offset)

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
        if self.encoder:
            self._check_encoder(file)
        if any(low >= high for low, high in pairwise(self.guidance_levels)):
            raise HGRError(f"Expected ascending guidance levels in {file}, but got {self.guidance_levels}. Calibrate it again.")

    @property
    def of_prompts(self) -> bool:
        """Whether this is an HGR of a text encoder, for every model that reads it: it knows no latents."""
        return not self.latent_format

    @property
    def weak(self) -> bool:
        """Whether a model's own answer to corrected prompts stayed too far from the safe one when its training was checked."""
        ratio = self.training.get("forward_check")
        return isinstance(ratio, Real) and not isinstance(ratio, bool) and ratio > WEAK

    def encoder_print(self) -> EncoderPrint | None:
        """The text encoder that this HGR was trained with; None for a file of before."""
        return EncoderPrint.from_dict(self.encoder) if self.encoder else None

    def _check_encoder(self, file: str) -> None:
        try:
            found = EncoderPrint.from_dict(self.encoder)
        except HGRError as error:
            raise HGRError(f"{file}: {error}") from error
        if (found.token_width, found.pooled_width) != (self.token_width, self.pooled_width):
            raise HGRError(f"Expected an encoder {self.token_width} wide in {file}, but got {found.token_width}. Train it again.")

    def _check_types(self, file: str) -> None:
        """Values from a file may be anything that JSON knows; an integer there may have thousands of digits."""
        numbers = (self.guidance_levels, self.condition_thresholds, self.picture_thresholds, *self.guidance_thresholds)
        sizes = (self.latent_channels, self.latent_dimensions, self.token_width, self.pooled_width)
        wrong: dict[str, list] = {
            "texts": [
                v
                for v in (*self.categories, self.latent_format, self.prediction, self.base, self.architecture)
                if not isinstance(v, str)
            ],
            "finite numbers": [
                v for row in numbers for v in row if not isinstance(v, Real) or isinstance(v, bool) or not abs(v) < LARGEST
            ],
            "sizes": [v for v in sizes if type(v) is not int or not 0 <= v < LARGEST],
            "objects": [v for v in (self.concept_prompts, self.training, self.encoder) if not isinstance(v, dict)],
        }
        prompts = self.concept_prompts if isinstance(self.concept_prompts, dict) else {}
        wrong["texts"] += [v for pair in prompts.items() for v in pair if not isinstance(v, str)]
        for what, values in wrong.items():
            if values:
                raise HGRError(f"Expected {what} in the metadata of {file}, but got {str(values[0])[:80]!r}. Train it again.")


def uncalibrated_info(facts: Mapping) -> HGRInfo:
    """The metadata of an HGR for a recording, before calibration; `facts` are what its shards say about the model.

    Raises HGRError when they lack something, or say something impossible.
    """
    check_facts(facts)
    known = {f.name for f in fields(HGRInfo)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k in known}
    k, levels = len(facts["categories"]), len(facts["guidance_levels"]) + 1
    return HGRInfo(**values, condition_thresholds=(0.5,) * k, guidance_thresholds=((0.5,) * k,) * levels)


class Redirectors(nn.Module):
    """Both redirectors, either of which may be absent, with their thresholds as buffers, so that they move with the weights.

    What `redirect_condition`, `redirect_guidance` and detection take: an `HGR`, or several that act as one (`CombinedHGR`).
    """

    condition: Any  # ConditionRedirector, CombinedCondition or None
    guidance: Any  # GuidanceRedirector, CombinedGuidance or None
    condition_thresholds: Tensor  # buffers: (K,), (L, K) and (L - 1,)
    guidance_thresholds: Tensor
    guidance_levels: Tensor

    def __init__(self, info: HGRInfo, condition: nn.Module | None, guidance: nn.Module | None):
        super().__init__()
        if condition is None and guidance is None:
            raise HGRError("Expected a condition redirector, a guidance redirector or both, but got neither.")
        self.condition, self.guidance = condition, guidance
        self.calibrate(info)

    @property
    def redirectors(self) -> tuple[str, ...]:
        """Which redirectors it has: `condition`, `guidance` or both."""
        found = {"condition": self.condition, "guidance": self.guidance}
        return tuple(name for name, network in found.items() if network is not None)

    def calibrate(self, info: HGRInfo) -> None:
        """Takes over other thresholds (and whatever else `info` says)."""
        info.validate()
        self.info = info
        there = dict(self.named_buffers(recurse=False))
        for name in ("condition_thresholds", "guidance_thresholds", "guidance_levels"):
            before = there.get(name)
            values = torch.tensor(vars(info)[name], dtype=torch.float32, device=None if before is None else before.device)
            self.register_buffer(name, values, persistent=False)

    def guidance_thresholds_at(self, sigma: Tensor) -> Tensor:
        """Thresholds (B, K) of the guidance redirector at noise levels sigma (B,)."""
        return self.guidance_thresholds_of(log_snr_of(sigma))

    def guidance_thresholds_of(self, log_snr: Tensor) -> Tensor:
        """The same, where -2 ln sigma (B,) is known."""
        levels, thresholds = (buffer.to(log_snr.device) for buffer in (self.guidance_levels, self.guidance_thresholds))
        return thresholds[noise_level(log_snr, levels)]


class HGR(Redirectors):
    """The redirectors of one checkpoint. Raises HGRError for an `info` that contradicts itself, or without any network."""

    def __init__(self, info: HGRInfo, condition: ConditionConfig | None, guidance: GuidanceConfig | None, ops: Any = nn):
        info.validate()
        super().__init__(
            info,
            ConditionRedirector(condition, ops) if condition else None,
            GuidanceRedirector(guidance, ops) if guidance else None,
        )
