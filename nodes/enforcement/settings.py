"""What the environment asks for: which HGRs are enforced, what may run besides, and where it is written down.

SAFECFG_ENFORCE         HGR files of models/hgr, by name (with or without .safetensors) or path, separated by commas
SAFECFG_ENFORCE_ALLOW   nodes and packs that may run besides; files:<kind>, models from folders that clients can write into
SAFECFG_ENFORCE_JUDGE   0: finished latents are not judged
SAFECFG_AUDIT           off, scores, or "scores and prompt"
SAFECFG_AUDIT_FILE      where; else safecfg_audit.jsonl in ComfyUI's user folder, which no client can read
"""

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import folder_paths

from ... import hgr_models
from ..host import known_hgrs
from ..loader import HGRModel, hgr_file, load_hgr_model, register_folder
from ..reporting import audit
from .enforced_model import Terms, one_per_family

VARIABLE, ALLOW, JUDGE = "SAFECFG_ENFORCE", "SAFECFG_ENFORCE_ALLOW", "SAFECFG_ENFORCE_JUDGE"
AUDIT, AUDIT_FILE = "SAFECFG_AUDIT", "SAFECFG_AUDIT_FILE"
SUFFIX, AUTO = ".safetensors", "auto"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Enforcement:
    """What the environment asks for. The HGRs are read once: a file that changes later changes nothing."""

    hgrs: tuple[HGRModel, ...]
    allowed: frozenset[str]
    problem: str = ""  # why no prompt can run
    judge: bool = True  # finished latents are looked at
    audit_log: str = audit.OFF
    auto: bool = False  # HGRs are found, or made, by text encoder

    @property
    def terms(self) -> Terms:
        """What every run is held to."""
        return Terms(self.allowed, self.audit_log, self.auto)

    @property
    def by_clip(self) -> bool:
        """Whether a MODEL's CLIP decides about its HGR."""
        return self.auto or sum(hgr.info.of_prompts for hgr in self.hgrs) > 1


@cache
def enforcement() -> Enforcement | None:
    """What is enforced in this process; None where the variable is not set."""
    if VARIABLE not in os.environ:
        return None
    allowed = frozenset(_names(os.environ.get(ALLOW, "")))
    try:
        names = _names(os.environ[VARIABLE])
        hgrs = tuple(one_per_family([load_hgr_model(_path(name)) for name in names if name != AUTO]))
        if not names:
            raise hgr_models.HGRError(f"{VARIABLE} is set, but empty. Name an HGR file, or unset it.")
        state = Enforcement(hgrs, allowed, judge=_judge(hgrs), audit_log=_audit_log(), auto=AUTO in names)
    except Exception as error:  # whatever it is: nothing may run
        logger.error("SafeCFG: %s=%r: %s. No prompt will run.", VARIABLE, os.environ[VARIABLE], error)
        return Enforcement((), allowed, "this server is to enforce SafeCFG, but cannot. Its log says why.")
    about = [f"{hgr.path} ({', '.join(hgr.info.categories)})" for hgr in hgrs]
    named = "; ".join([*about, *(["the HGR of each model's text encoder"] if state.auto else [])])
    logger.warning("SafeCFG: enforced for every prompt with %s; allowed besides: %s", named, ", ".join(sorted(allowed)) or "none")
    logger.warning("SafeCFG: finished latents %s.", "are judged" if state.judge else "are not judged")
    return state


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _path(name: str) -> str:
    """The file of a name in models/hgr, with or without its ending, or of a path."""
    register_folder()
    for candidate in (name, f"{name}{SUFFIX}"):
        with suppress(hgr_models.HGRError):
            return hgr_file(candidate)
        if os.path.isfile(candidate):
            return candidate
    there = ", ".join(known_hgrs.names()) or "none"
    raise hgr_models.HGRError(f"there is no HGR {name!r} in models/hgr, and no such file; there is {there}")


def _judge(hgrs: tuple[HGRModel, ...]) -> bool:
    """Whether finished latents are judged; says which HGRs cannot."""
    text = os.environ.get(JUDGE, "1").strip()
    if text not in ("0", "1"):
        raise hgr_models.HGRError(f"expected {JUDGE} to be 0 or 1, but got {text!r}")
    for hgr in hgrs if text == "1" else ():
        if hgr.patcher.model.guidance is None:
            logger.warning("SafeCFG: %s has no guidance redirector: it cannot judge pictures.", hgr.path)
        elif not hgr.info.picture_thresholds:
            logger.warning("SafeCFG: %s was never calibrated for pictures: they are judged at 0.5.", hgr.path)
    return text == "1"


def _audit_log() -> str:
    """The level of the audit log; keeps it where no client can read it."""
    level = os.environ.get(AUDIT, audit.OFF).strip()
    if level not in audit.LEVELS:
        raise hgr_models.HGRError(f"expected {AUDIT} to be one of {', '.join(audit.LEVELS)}, but got {level!r}")
    if level != audit.OFF:
        place = os.environ.get(AUDIT_FILE)
        audit.keep_at(Path(place) if place else Path(folder_paths.get_user_directory()) / audit.FILE)
        audit.append([])  # an operator who wants a log must have one
    return level


def note(event: str, **facts) -> None:
    """Writes a line into the audit log, where there is one; a log that cannot be written is an error in ComfyUI's own."""
    state = enforcement()
    if state is None or state.audit_log == audit.OFF:
        return
    try:
        audit.append([audit.event(event=event, **facts)])
    except OSError as error:
        logger.error("SafeCFG: the audit log %s cannot be written (%s).", audit.path(), error)
