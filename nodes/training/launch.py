"""Starting a session from a node: its folder, its prompts (some clean ones held back), and lines of text on the node while it runs."""

import logging
import random
from dataclasses import replace

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_execution.utils import get_executing_context

from ... import hgr_models
from ...hgr_models.pairs import PromptSet
from ..host.server import show_text
from .plan import TrainPlan, recording_folder
from .session import Session

SHARE, ENOUGH = 0.2, 20  # of the clean prompts that is set aside where the prompts hold out fewer than ENOUGH

logger = logging.getLogger(__name__)


def open_session(
    plan: TrainPlan, model: ModelPatcher | None = None, clip: CLIP | None = None, prompts: PromptSet | None = None
) -> Session:
    """A session for a plan. Raises HGRError when something that it needs is not connected."""
    given = {"model": model, "clip": clip, "prompts": prompts}
    missing = " and ".join(name for name in ("clip", "prompts") if given[name] is None)
    if missing and any(value is not None for value in given.values()):
        raise hgr_models.HGRError(
            f"Something is connected without {missing}. Connect {'it' if ' ' not in missing else 'them'} too, or leave model, clip and "
            "prompts to train from a recording."
        )
    if model is None and plan.by_denoiser:
        raise hgr_models.HGRError(
            f"With `train` = {plan.networks} the condition redirector learns through the model, but none is connected. Connect one, or "
            "set `train` to prompts."
        )
    if model is None and plan.by_guidance and clip is not None:
        raise hgr_models.HGRError(
            "The guidance redirector learns from runs of the model, but none is connected. Connect one, or set `train` to prompts."
        )
    if prompts is not None:
        prompts = with_reserved(prompts)
    context = get_executing_context()
    node = None if context is None else context.node_id

    def say(text: str) -> None:
        logger.info("SafeCFG %s: %s", plan.name, text)
        show_text(text, node)

    return Session(plan, recording_folder(plan.name), say, model, clip, prompts)


def with_reserved(prompts: PromptSet) -> PromptSet:
    """Prompts with enough clean ones held out. Raises HGRError when there are too few."""
    if len(prompts.clean) + len(prompts.held_out_clean) < 2:
        raise hgr_models.HGRError(
            f"Expected at least 2 clean prompts, one to learn from and one for calibration, but got {len(prompts.clean)}. "
            "Raise the number of clean prompts in SafeCFG Prompt Pairs."
        )
    if len(prompts.held_out_clean) >= ENOUGH:
        return prompts
    clean = random.Random("reserve").sample(prompts.clean, len(prompts.clean))
    count = max(1, round(SHARE * len(clean)))
    return replace(prompts, clean=tuple(clean[count:]) or tuple(clean), held_out_clean=(*prompts.held_out_clean, *clean[:count]))
