"""How a prompt of a list becomes what the sampler gets: as core's CLIP Text Encode makes it, with what a workflow adds to its own."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...hgr_models import HGRError
from ..host.concept_rows import TEXT
from ..host.encoding import encode_text

POSITIVE, NEGATIVE = "positive", "negative"
FACTS = ("strength", "timestep_percent_range", "cond_hint_original")  # of a ControlNet
DIGITS = 12


@dataclass(frozen=True)
class Prompts:
    """`positive`: a CONDITIONING whose options (guidance, sizes, ControlNet, reference pictures) every prompt gets, its text is not used.

    `negative`: a CONDITIONING that is the negative of every arm without negative words of its own; such words get its options.
    """

    clip: object
    positive: list | None = None
    negative: list | None = None

    def __post_init__(self) -> None:
        if any(given is not None and not given for given in (self.positive, self.negative)):
            raise HGRError("Expected a prompt in positive_conditioning and negative_conditioning, but got an empty one.")

    def encode(self, role: str, text: str, own_words: bool = False) -> list:
        """The CONDITIONING of a text; `own_words`: the text is more than the negative prompt of all arms."""
        if role == NEGATIVE and self.negative is not None and not own_words:
            return self.negative
        options = _options(self.positive if role == POSITIVE else self.negative)
        return [[tokens, {**options, **own}] for tokens, own in encode_text(self.clip, text)]

    def facts(self) -> dict:
        """What of the connected prompts decides about pictures; {} without any."""
        found = {}
        if self.positive is not None:
            found["positive_conditioning"] = _digest(_options(self.positive))
        if self.negative is not None:
            found["negative_conditioning"] = _digest(self.negative)
        return found


def _options(conditioning: list | None) -> dict:
    """What the first entry of a CONDITIONING holds besides its text."""
    return {} if conditioning is None else {name: value for name, value in conditioning[0][1].items() if name not in TEXT}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:DIGITS]


def _plain(value: object) -> Any:
    """A value as JSON has it: the same for the same numbers, whatever objects hold them."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        return [str(data.dtype), list(data.shape), hashlib.sha256(data.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()]
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items() if name != "uuid"}
    if isinstance(value, (list, tuple, set)):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return [type(value).__name__, *(_plain(getattr(value, name, None)) for name in FACTS)]
