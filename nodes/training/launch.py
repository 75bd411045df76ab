"""Starting a session from a node: its folder, its prompts, and lines of text on the node while it runs."""

import logging

from comfy_execution.utils import get_executing_context

from ... import hgr_models
from ..reporting.meter import current_server
from .plan import TrainPlan, recording_folder
from .reserve import with_reserved
from .session import Session

logger = logging.getLogger(__name__)


def open_session(plan: TrainPlan, model=None, clip=None, prompts=None) -> Session:
    """A session for a plan. Raises HGRError when a model comes without CLIP or prompts."""
    if model is not None and (clip is None or prompts is None):
        missing = " and ".join(name for name, value in (("clip", clip), ("prompts", prompts)) if value is None)
        raise hgr_models.HGRError(
            f"A model is connected without {missing}. Connect them too, or leave all three to train from a recording."
        )
    if model is None and plan.by_condition:
        raise hgr_models.HGRError(
            "The condition redirector learns through the model, but none is connected. Connect one, or set `train` to guidance."
        )
    if prompts is not None:
        prompts = with_reserved(prompts)
    context = get_executing_context()
    node = None if context is None else context.node_id

    def say(text: str) -> None:
        logger.info("SafeCFG %s: %s", plan.name, text)
        if node is not None and (server := current_server()) is not None:
            server.send_progress_text(text, node)

    return Session(plan, recording_folder(plan.name), say, model, clip, prompts)
