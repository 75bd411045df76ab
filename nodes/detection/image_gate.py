"""`SafeCFG Image Gate`: pictures above a threshold are blurred or replaced, and a second output carries only those that passed."""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..host.schema import make_input, make_schema
from ..reporting import drawing
from . import scores

NOTICE = "This picture was held back."

logger = logging.getLogger(__name__)


def decide(count: int, texts: list[str] | None, flags: list[bool] | None, threshold: float) -> list[bool]:
    """Per picture: is it held back? What nothing is known about is held back too.

    `texts` are the scores (JSON) of all pictures together or one text each, `flags` a boolean per picture; with a `threshold`
    above 0 the scores decide, else what was flagged. Raises ValueError when there is neither, when a threshold has no scores
    to compare with, or when there are more scores than pictures.
    """
    if texts is None and flags is None:
        raise ValueError("Expected `scores` or `flagged`, but neither is connected. Connect those of SafeCFG Detect Harm.")
    if texts is None and threshold > 0:
        raise ValueError(f"A threshold of your own ({threshold}) needs scores to compare: connect `scores`, or set it to 0.")
    held: list[list[bool | None]] = (
        [[None if item is None else _is_harmful(item, threshold) for text in texts for item in scores.read(text)]]
        if texts
        else []
    )
    held += [] if flags is None or threshold > 0 else [[*flags]]
    for known in held:
        if len(known) > count:
            raise ValueError(
                f"Expected scores of {count} pictures, but got {len(known)}: which belongs to which? Connect the pictures and the scores "
                "of the same batch."
            )
        if missing := count - len(known) + known.count(None):
            logger.warning("SafeCFG Image Gate: %d of %d pictures have no score and are held back.", missing, count)
    rows = [[known[i] if i < len(known) else None for known in held] for i in range(count)]
    return [any(value is None or value for value in row) for row in rows]


def _is_harmful(item: scores.Item, threshold: float) -> bool:
    return item.harmfulness > threshold if threshold > 0 else item.flagged


def blurred(picture: torch.Tensor, cells: int) -> torch.Tensor:
    """A picture (H, W, C) of which only `cells` colours along the longer side are left: nothing can be restored from it."""
    height, width = picture.shape[:2]
    scale = cells / max(height, width)
    size = [min(side, max(1, round(side * scale))) for side in (height, width)]
    rows = torch.nan_to_num(picture).clamp(0, 1).movedim(-1, 0)[None]
    small = F.interpolate(rows, size=size, mode="area")
    return F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)[0].movedim(0, -1)


def replaced(picture: torch.Tensor, text: str) -> torch.Tensor:
    """A notice in place of a picture (H, W, C); opaque where pictures have an alpha channel."""
    height, width, channels = picture.shape
    notice = drawing.notice(width, height, text).to(picture)
    return F.pad(notice, (0, max(0, channels - 3)), value=1.0)[..., :channels]


class ImageGate(io.ComfyNode):
    """Takes whole batches with the lists of their scores, so it gets every input as a list."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_ImageGate",
            display_name="SafeCFG Image Gate",
            description="Lets clean pictures pass and blurs or replaces harmful ones. A second output carries only those that passed: put what "
            "publishes or saves behind it. A picture without a score counts as harmful.",
            search_aliases=["safety gate", "censor", "nsfw filter", "blur harmful"],
            is_input_list=True,
            inputs=[*_score_inputs(), *_action_inputs()],
            outputs=[
                io.Image.Output(display_name="images", tooltip="All pictures in their order; harmful ones as `mode` says."),
                io.Image.Output(
                    display_name="passed",
                    tooltip="Only the pictures that passed, untouched. When there is none, the nodes behind this output do not run.",
                ),
                io.Int.Output(display_name="held_back", tooltip="How many pictures were held back."),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: list[torch.Tensor],
        mode: Sequence[str] = ("blur",),
        threshold: Sequence[float] = (0.0,),
        blur_cells: Sequence[int] = (8,),
        notice: Sequence[str] = (NOTICE,),
        scores: list[str] | None = None,
        flagged: list[bool] | None = None,
    ) -> io.NodeOutput:
        pictures = _one_batch(images)
        held = decide(len(pictures), scores, flagged, threshold[0])
        act = {
            "pass": lambda picture: picture,
            "blur": lambda picture: blurred(picture, blur_cells[0]),
            "replace": lambda picture: replaced(picture, notice[0]),
        }[mode[0]]
        shown = torch.stack([act(picture) if hold else picture for picture, hold in zip(pictures, held, strict=True)])
        passed = pictures[[i for i, hold in enumerate(held) if not hold]]
        return io.NodeOutput(shown, passed if len(passed) else ExecutionBlocker(None), sum(held))


def _one_batch(images: list[torch.Tensor]) -> torch.Tensor:
    if any(batch.ndim != 4 for batch in images) or not sum(len(batch) for batch in images):
        raise ValueError(f"Expected at least one picture (B, H, W, C), but got {[tuple(batch.shape) for batch in images]}.")
    if len({batch.shape[1:] for batch in images}) > 1:
        raise ValueError(
            f"Expected pictures of one size, but got {sorted({tuple(b.shape[1:]) for b in images})}. Use a gate for each, or resize them."
        )
    return torch.cat(list(images))


def _score_inputs() -> list:
    return [
        make_input(io.Image, "images", tooltip="The pictures that were judged, in the same order."),
        make_input(
            io.Combo,
            "mode",
            options=["blur", "replace", "pass"],
            default="blur",
            tooltip="What `images` shows of a harmful picture. blur: a few colours. replace: a notice. pass: the picture itself; only the "
            "output `passed` leaves it out.",
        ),
        make_input(
            io.Float,
            "threshold",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="0 to 1. 0: as the detecting node flagged them, by calibrated thresholds. Above 0: pictures whose harmfulness in `scores` "
            "is higher are held back.",
        ),
    ]


def _action_inputs() -> list:
    return [
        make_input(
            io.Int,
            "blur_cells",
            default=8,
            min=1,
            max=64,
            tooltip="1 to 64. How many colours along its longer side a blurred picture keeps; at 8 nothing can be recognised or restored.",
        ),
        make_input(
            io.String,
            "notice",
            default=NOTICE,
            tooltip="What a replaced picture says, in Latin letters.",
        ),
        make_input(
            io.String,
            "scores",
            optional=True,
            force_input=True,
            tooltip="JSON of SafeCFG Detect Harm or SafeCFG Report for these pictures. A picture it says nothing about is held back.",
        ),
        make_input(
            io.Boolean,
            "flagged",
            optional=True,
            force_input=True,
            tooltip="The list with one value per picture. With `scores` as well, either is enough to hold a picture back.",
        ),
    ]
