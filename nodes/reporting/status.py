"""A run in one line, for the log and for the node that the user looks at."""

import logging
from collections.abc import Sequence

import numpy as np
from comfy_execution.utils import get_executing_context

from ..host.server import current_server, show_text
from .traces import ImageTrace

logger = logging.getLogger(__name__)


def describe(images: Sequence[ImageTrace], notices: Sequence[str] = ()) -> str:
    """What was redirected, by what, and what could not be, such as `1 of 2 images redirected: weapons (prompt, guidance)`."""
    redirected = sum(bool(image.redirected.any()) for image in images)
    count = f"{len(images)} image{'s' * (len(images) != 1)}"
    line = f"{redirected} of {count} redirected: {_categories(images)}" if redirected else f"nothing redirected in {count}"
    return "; ".join([line, *(f"NOT REDIRECTED: {notice}" for notice in notices)])


def _categories(images: Sequence[ImageTrace]) -> str:
    by_prompt = np.any(
        [[p.weights > 0 for p in image.prompts] or [np.zeros(len(image.categories), bool)] for image in images], axis=(0, 1)
    )
    by_guidance = np.any([(image.weights > 0).any(axis=0) for image in images], axis=0)
    names = images[0].categories
    ways = {
        name: ", ".join(way for way, found in (("prompt", p), ("guidance", g)) if found)
        for name, p, g in zip(names, by_prompt, by_guidance, strict=True)
    }
    return ", ".join(f"{name} ({way})" for name, way in ways.items() if way)


def report(node_id: str | None, line: str) -> None:
    """Ends a run: one INFO line with the nodes it belongs to; where no SafeCFG Apply has a meter for it, the sampler shows it too."""
    context = get_executing_context()
    sampler = context.node_id if context is not None else None
    places = [f"{what} {number}" for what, number in (("SafeCFG Apply", node_id), ("sampler", sampler)) if number is not None]
    logger.info("SafeCFG%s: %s", f" ({', '.join(places)})" if places else "", line)
    if node_id is None:
        show_text(f"SafeCFG: {line}", sampler, getattr(current_server(), "client_id", None))
