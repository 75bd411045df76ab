"""The model cards of HGRs that nodes make and measure: written beside the file, never in the way of the work itself."""

import logging
import os
from collections.abc import Mapping

from comfy.model_patcher import ModelPatcher

from ... import hgr_models
from ...hgr_models.model_card import write_card
from ..host.architecture import architecture_of
from ..host.families import base_of_model
from ..loader import SHIPPED, is_shipped

logger = logging.getLogger(__name__)


def refresh(path: str | os.PathLike, digest: str | None = None, **measured: Mapping) -> None:
    """Writes the card of an HGR's file, with what was measured with it; see `model_card.write_card`.

    Only for a plain file that is still the one of `digest`, and not for one that ships with the pack. What hinders it is logged:
    what was trained or measured stands without a card, too.
    """
    if not os.path.isfile(path) or (is_shipped(path) and os.path.samefile(os.path.dirname(path) or ".", SHIPPED)):
        return
    try:
        if digest is None or hgr_models.file_hash(path) == digest:
            write_card(path, **measured)
    except (hgr_models.HGRError, OSError) as error:
        logger.warning("SafeCFG: no model card was written: %s", error)


def of_model(numbers: Mapping, model: ModelPatcher) -> dict:
    """Numbers of a check with the name of what it ran on."""
    patched = ", patched" if model.patches else ""
    return {**numbers, "model": f"{architecture_of(model)}, base {base_of_model(model)[:12]}{patched}"}
