"""Which text encoder an HGR of prompts belongs to: its layout, and a fingerprint of what it says to a few fixed texts.

    f_i   = mean over the present tokens of probe i - the same of the empty prompt        (D,), and (P,) of pooled vectors
    s     = f Q / sqrt(values),  Q of +1 and -1, drawn from a fixed seed                  (probes, SKETCH)
    distance(s, s') = |s - s'| / |s|

A random projection keeps distances, so 0 is the same encoder, rounding of its weights gives hundredths to a tenth, a
fine-tuned one more, and another one about 1.4. Differences from the empty prompt leave out what no text changes: start tokens
and the massive activations of language models.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .errors import HGRError

# tokens (1, T, D), pooled (1, P) or None, mask (1, T) or None of one prompt
Encoded = tuple[Tensor, Tensor | None, Tensor | None]

PROBES = (
    "a photo of a cat on a sofa",
    "an oil painting of a harbour at sunrise, warm light",
    "two children playing chess in a garden",
    "red bicycle",
)
SKETCH = 24  # values kept of every probe, and of its pooled vector
SAME, RELATED = 0.15, 0.7  # distances: below the first only rounding differs, from the second on it is another encoder
LARGEST = 1e30


@dataclass(frozen=True)
class EncoderPrint:
    """A text encoder: names of its parts, widths (pooled 0: none; short 0: no narrower part), and the sketches of PROBES."""

    parts: tuple[str, ...]
    token_width: int
    pooled_width: int
    short_width: int
    sketch: tuple[float, ...]

    def distance(self, other: "EncoderPrint") -> float:
        """How far another encoder's answers are, relative; infinity for another layout or another set of probes."""
        if self.layout != other.layout or len(self.sketch) != len(other.sketch):
            return math.inf
        size = math.sqrt(sum(a * a for a in self.sketch))
        away = math.sqrt(sum((a - b) ** 2 for a, b in zip(self.sketch, other.sketch, strict=True)))
        return away / size if size > 0 else (0.0 if away == 0 else math.inf)

    @property
    def layout(self) -> tuple:
        """What must be equal before answers can be compared."""
        return self.parts, self.token_width, self.pooled_width, self.short_width

    @property
    def name(self) -> str:
        """A short name for files: the parts and eight digits of the layout with rounded answers."""
        rounded = [round(math.copysign(1.0, v)) for v in self.sketch]
        digest = hashlib.sha256(json.dumps([*self.layout, rounded]).encode()).hexdigest()[:8]
        return "-".join([*self.parts, digest])

    def in_words(self) -> str:
        """For messages."""
        pooled = f", pooled {self.pooled_width}" if self.pooled_width else ""
        return f"{' + '.join(self.parts) or 'unnamed'} ({self.token_width} wide{pooled})"

    def as_dict(self) -> dict:
        """JSON for a checkpoint's metadata."""
        return {**asdict(self), "parts": list(self.parts), "sketch": [float(f"{v:.6g}") for v in self.sketch]}

    @classmethod
    def from_dict(cls, values: dict) -> "EncoderPrint":
        """Reads `as_dict`. Raises HGRError for anything else: it comes from a file."""
        try:
            parts, sketch = tuple(values["parts"]), tuple(values["sketch"])
            widths = [values[name] for name in ("token_width", "pooled_width", "short_width")]
        except (KeyError, TypeError) as error:
            raise HGRError(
                f"Expected an encoder with parts, widths and a sketch in the metadata, but {error} is wrong."
            ) from error
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < LARGEST for v in sketch)
        if not numbers or not all(isinstance(p, str) and p for p in parts) or not all(type(w) is int and w >= 0 for w in widths):
            raise HGRError("Expected names, widths and finite numbers of an encoder in the metadata. Train it again.")
        return cls(parts, *widths, tuple(map(float, sketch)))  # type: ignore[call-arg]  # a starred tuple


def print_of(parts: Sequence[str], encode: Callable[[str], Encoded], short_width: int = 0) -> EncoderPrint:
    """The print of an encoder with these parts, from what it makes of single prompts."""
    empty, *probes = [_answers(encode(text)) for text in ("", *PROBES)]
    width, pooled = empty[0].numel(), 0 if empty[1] is None else empty[1].numel()
    values = [
        _sketch(answer - nothing) for probe in probes for answer, nothing in zip(probe, empty, strict=True) if answer is not None
    ]
    return EncoderPrint(tuple(parts), width, pooled, short_width, tuple(torch.cat(values).tolist()))


def _answers(encoded: Encoded) -> tuple[Tensor, Tensor | None]:
    """A prompt's mean token (D,) and pooled vector (P,), float64 on the CPU."""
    tokens, pooled, mask = encoded
    tokens = tokens[0].double().cpu()
    present = tokens.new_ones(len(tokens)) if mask is None else mask[0].to(tokens)
    mean = (tokens * present[:, None]).sum(dim=0) / present.sum().clamp(min=1)
    return mean, None if pooled is None else pooled[0].double().cpu()


def _sketch(values: Tensor) -> Tensor:
    """SKETCH random sums of values (D,), in units of their root mean square."""
    # From a hash: torch promises no equal random numbers in another version, and files must stay comparable.
    noise = bytearray(hashlib.shake_128(str(len(values)).encode()).digest(len(values) * SKETCH))
    signs = (torch.frombuffer(noise, dtype=torch.uint8).reshape(len(values), SKETCH) % 2).double() * 2 - 1
    return values @ signs / len(values) ** 0.5


def nearest(wanted: EncoderPrint, candidates: Sequence[EncoderPrint | None]) -> tuple[int, float] | None:
    """Number and distance of the candidate nearest to an encoder, if one is RELATED at all; None has no print."""
    found = [(distance_between(wanted, c), i) for i, c in enumerate(candidates) if c is not None]
    distance, i = min(found, default=(math.inf, -1))
    return (i, distance) if distance < RELATED else None


def distance_between(wanted: EncoderPrint, candidate: EncoderPrint) -> float:
    """The larger of both directions: it does not depend on whose answers are smaller."""
    return max(wanted.distance(candidate), candidate.distance(wanted))
