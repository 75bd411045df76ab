"""Facts of an HGR in words that are safe to show: in Markdown tables, on nodes and in messages. Files may hold anything."""

import re
from collections.abc import Mapping
from typing import Any

from . import calibration
from .errors import HGRError
from .hgr import HGRInfo

LONGEST = 200  # letters of a text from a file
NO_PROOF = "Its file does not say what its calibration proves."


def cell(value: object, longest: int = LONGEST) -> str:
    """A value of a file for one cell of a Markdown table: one line, no markup, cut when it is long."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a number of many digits"  # whose text Python refuses to make
    text = str(value).encode("utf-8", "replace").decode("utf-8")  # half a character cannot be written
    text = re.sub(r"[\s\x00-\x1f\x7f]+", " ", text).strip()
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    return re.sub(r"([\\`|*_\[\]])", r"\\\1", text).replace("<", "&lt;").replace(">", "&gt;")


def number(value: object) -> float | None:
    """A number of a file, or None for anything else, NaN and infinity too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e15:
        return None
    return float(value)


def percent(value: Any) -> str:
    """A share in [0, 1] as `6.5 %`; a dash for what is none."""
    share = number(value)
    return "–" if share is None else f"{100 * share:.1f} %"


def proof_in_words(proof: Any) -> list[str]:
    """`calibration.proof_in_words` of what a file says, which may be anything."""
    try:
        return [cell(line) for line in calibration.proof_in_words(proof)] or [NO_PROOF]
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return [NO_PROOF]


def bound_in_words(proof: Mapping) -> str:
    """What a calibration proves, in one line."""
    bounds = [(what, number(proof.get(f"upper_bound_{what}"))) for what in ("prompts", "runs", "pictures")]
    found = [f"{100 * bound:.2g} % of clean {what}" for what, bound in bounds if bound is not None]
    return f"false alarms, with 95 % confidence at most: {', '.join(found)}" if found else NO_PROOF


def encoder_in_words(info: HGRInfo) -> str:
    """The text encoder that an HGR was made with."""
    try:
        encoder = info.encoder_print()
    except HGRError:
        encoder = None
    return f"of tokens {info.token_width} wide" if encoder is None else cell(encoder.in_words())
