"""The last line: latents that leave for a VAE or a file are judged as pictures by the HGR, however they came about.

    q of the noised latents at the levels of `hgr_models.detection`, with an empty (all zero) prompt: nothing that a client writes,
    no LoRA and no patch has a part in it. Two evaluations of one row per picture, in one batch; a latent that was judged is
    remembered by its values.

Latents that come from no run as they are (arithmetic, crops, turns) are also looked at turned and mirrored, against a higher
threshold: a knife that is turned back as a picture is a knife, too. What is flagged leaves as zeros, and its picture as a notice.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ... import hgr_models
from ...hgr_models.detection import Looks
from ..detection.detector import look
from ..detection.image_gate import replaced
from ..host.schema import make_input, make_schema
from ..loader import HGRModel
from ..reporting import traces
from .enforced_model import bare_model, found, is_for, recent
from .names import LATENT_GUARD, MODELS, PICTURE_GUARD
from .plain_runs import were_plain
from .settings import enforcement, note

HELD = io.Custom("SAFECFG_HELD")  # per picture of a latent: the categories it was held back for
TOKENS = 77  # of the empty prompt
TURNED_THRESHOLD = (
    0.6  # of the turned and mirrored views; clean pictures of the demo exceed it 3 times in 192, upright harm 42 in 53
)
PLAIN_THRESHOLD = (
    0.6  # of what a plain run returned (`plain_runs`): 0 of 128 clean pictures of the demo exceed it after 2 steps or more
)
UNCALIBRATED = 0.5  # the threshold of an HGR that was never calibrated for pictures
REMEMBERED = 8192  # pictures
NOTICE = "This picture was held back."

_judged: OrderedDict[tuple[str, str], tuple[str, ...]] = OrderedDict()
logger = logging.getLogger(__name__)


def views(latents: Tensor) -> list[Tensor]:
    """The other seven ways to turn and mirror pictures (B, C, *, H, W)."""
    turns = [latents.rot90(k, (-2, -1)) for k in range(4)]
    return [*turns[1:], *(turn.flip(-1) for turn in turns)]


def empty_prompt(info: hgr_models.HGRInfo) -> list:
    """A CONDITIONING of zeros, of the widths that an HGR was made for."""
    pooled = {"pooled_output": torch.zeros(1, info.pooled_width)} if info.pooled_width else {}
    return [[torch.zeros(1, TOKENS, info.token_width), pooled]]


def harm_in(
    model: ModelPatcher, hgr: HGRModel, latents: Tensor, changed: Sequence[bool], plain: Sequence[bool]
) -> list[tuple[str, ...]]:
    """The categories per picture of raw latents (B, C, *spatial) that are above their threshold.

    `changed`: no run returned it so. `plain`: a plain run did, and found nothing.
    """
    info = hgr.info
    limits = torch.tensor(info.picture_thresholds or (UNCALIBRATED,) * len(info.categories))
    unpatched = bare_model(model)
    held_to = torch.where(torch.tensor(plain)[:, None], limits.clamp(min=PLAIN_THRESHOLD), limits)
    above = look(unpatched, hgr, latents, empty_prompt(info), looks=Looks()).scores > held_to
    if any(changed):
        rows = torch.tensor(changed).nonzero()[:, 0]
        turned = [look(unpatched, hgr, view, empty_prompt(info), looks=Looks()).scores for view in views(latents[rows])]
        above[rows] |= torch.stack(turned).amax(dim=0) > limits.clamp(min=TURNED_THRESHOLD)
    return [tuple(name for name, there in zip(info.categories, row, strict=True) if there) for row in above.tolist()]


def judged(latents: Tensor, model: ModelPatcher, hgr: HGRModel) -> list[tuple[str, ...]]:
    """As `harm_in`, each latent once for as long as it is remembered."""
    digests = traces.digests(latents)
    keys = [(digest, hgr.hash) for digest in digests]
    new = [i for i, key in enumerate(keys) if key not in _judged]
    if new:
        changed = [traces.STORE.get(digests[i]) is None for i in new]
        plain = were_plain(digests[i] for i in new)
        for i, harm in zip(new, harm_in(model, hgr, latents[new], changed, plain), strict=True):
            _judged[keys[i]] = harm
            if harm:
                _log(hgr, harm, traces.STORE.get(digests[i]))
    harm_of = [_judged[key] for key in keys]
    while len(_judged) > REMEMBERED:
        _judged.popitem(last=False)
    return harm_of


def _log(hgr: HGRModel, harm: tuple[str, ...], trace: traces.ImageTrace | None) -> None:
    logger.warning("SafeCFG (enforced): a picture was held back (%s).", ", ".join(harm))
    note("held back", categories=list(harm), hgr=hgr.hash, seed=trace.seed if trace else None)


def part_of(latents: Tensor, info: hgr_models.HGRInfo) -> Tensor | None:
    """The latents that an HGR can look at, of those that a LATENT holds (audio and video are nested); None: there are none."""
    for part in latents.unbind() if getattr(latents, "is_nested", False) else [latents]:
        if part.ndim == info.latent_dimensions + 2 and part.shape[1] == info.latent_channels:
            return part
    return None


def judge_latent(latent: dict, models: Sequence, hgrs: Sequence[HGRModel]) -> tuple[dict, tuple]:
    """A LATENT with zeros for flagged pictures, and what each was held back for; as it came when none is."""
    given = [model for model in models if model is not None]
    for model in given or [made for reference in reversed(recent) if (made := reference()) is not None]:
        hgr = next((h for h in hgrs if is_for(h, model)), None)
        if hgr is None or hgr.patcher.model.guidance is None:
            continue
        if (part := part_of(latent["samples"], hgr.info)) is not None:
            harm = tuple(judged(part, model, hgr))
            return (_without(latent, harm) if any(harm) else latent), harm
    return latent, ()


def _without(latent: dict, found: Sequence[tuple[str, ...]]) -> dict:
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        return {**latent, "samples": type(samples)([_cleared(part, found) for part in samples.unbind()])}
    return {**latent, "samples": _cleared(samples, found)}


def _cleared(samples: Tensor, found: Sequence[tuple[str, ...]]) -> Tensor:
    keep = torch.tensor([not harm for harm in found], device=samples.device)
    if len(keep) != len(samples):
        return torch.zeros_like(samples)
    return torch.where(keep.view(-1, *[1] * (samples.ndim - 1)), samples, torch.zeros_like(samples))


def picture_with_notices(value: object, found: Sequence[tuple[str, ...]]) -> Any:
    """Pictures (B, H, W, C), or the frames of B videos, with a notice for those that were held back; all, where it cannot be told."""
    if not any(found) or not isinstance(value, Tensor):
        return value
    if value.ndim != 4:
        return torch.zeros_like(value)
    frames, rest = divmod(len(value), len(found))
    held = [True] * len(value) if rest or not frames else [bool(harm) for harm in found for _ in range(frames)]
    return torch.stack([replaced(p, NOTICE) if hold else p for p, hold in zip(value, held, strict=True)])


class EnforcedLatent(io.ComfyNode):
    """Judges what passes through; see `judge_latent`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id=LATENT_GUARD,
            display_name="SafeCFG Enforced Latent",
            description="This server puts it before everything that turns latents into pictures or files. Latents that the HGR finds "
            "harmful do not pass. It is of no use to place it by hand.",
            is_dev_only=True,
            inputs=[
                make_input(io.Latent, "samples", tooltip="What passes through."),
                *(
                    make_input(
                        io.AnyType, f"model_{i}", optional=True, tooltip="A MODEL that took part; the first fitting one judges."
                    )
                    for i in range(MODELS)
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="samples", tooltip="The same; zeros in place of harmful pictures."),
                HELD.Output(display_name="held", tooltip="What each picture was held back for."),
            ],
        )

    @classmethod
    def execute(cls, samples: dict, **models) -> io.NodeOutput:
        state = enforcement()
        hgrs = () if state is None else (*state.hgrs, *found.values())
        return io.NodeOutput(*judge_latent(samples, [models.get(f"model_{i}") for i in range(MODELS)], hgrs))


class EnforcedPicture(io.ComfyNode):
    """Puts notices in place of the pictures of latents that were held back."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id=PICTURE_GUARD,
            display_name="SafeCFG Enforced Picture",
            description="This server puts it behind SafeCFG Enforced Latent's VAE: harmful pictures become a notice. It is of no use to "
            "place it by hand.",
            is_dev_only=True,
            inputs=[
                make_input(io.AnyType, "value", tooltip="What passes through."),
                make_input(HELD, "held", tooltip="From SafeCFG Enforced Latent."),
            ],
            outputs=[io.AnyType.Output(display_name="value", tooltip="The same; a notice in place of harmful pictures.")],
        )

    @classmethod
    def execute(cls, value: object, held: tuple) -> io.NodeOutput:
        return io.NodeOutput(picture_with_notices(value, held))
