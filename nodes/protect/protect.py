"""`SafeCFG Protect`: a safe MODEL from a MODEL and its CLIP alone."""

import logging

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ... import hgr_models
from ..host.families import refuse_image_to_image
from ..host.schema import make_input, make_schema
from ..host.settings import ApplySettings
from ..redirect.apply import apply, backing
from ..reporting import audit
from .library import find_or_make

logger = logging.getLogger(__name__)


def protect(model: ModelPatcher, clip: CLIP | None, settings: dict, node_id: str | None = None) -> ModelPatcher:
    """A clone of a MODEL with SafeCFG by the HGR of its text encoder, which is made where there is none.

    `settings`: strength, categories, strict, threshold_offset, audit_log. Raises HGRError for a model or an encoder that
    SafeCFG cannot act on.
    """
    refuse_image_to_image(model)  # before minutes are spent
    hgr = find_or_make(clip, model)
    strengths = hgr_models.parse_categories(settings["categories"], hgr.info.categories, settings["strength"])
    chosen = hgr_models.CategorySettings(strengths, settings["threshold_offset"])
    networks = "both" if hgr.patcher.model.guidance is not None else "condition"
    wanted = ApplySettings(
        hgr.info, chosen, networks, strict=settings["strict"], remember_flagged=True, audit_log=settings["audit_log"],
        hgr_hash=hgr.hash, node_id=node_id, concepts=backing(clip, hgr, strengths),
    )  # fmt: skip
    return apply(model, hgr, wanted)


class Protect(io.ComfyNode):
    """Finds or makes the HGR and patches a MODEL; see `protect`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_Protect",
            display_name="SafeCFG Protect",
            description="Makes any model's guidance safe, with nothing to choose: it takes the HGR of the model's text encoder from models/hgr, or "
            "makes one at first use, from prompts alone, in minutes. Every model with this encoder then shares it. Pictures that are not flagged "
            "stay identical to the last bit. Put it last before the sampler.",
            search_aliases=["safety", "nsfw filter", "safe guidance", "protect checkpoint"],
            inputs=_inputs(),
            outputs=[io.Model.Output(tooltip="The model with SafeCFG, for any sampler or guider.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # two equal nodes have a meter each
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP | None, strength: float = 1.0, categories: str = "", strict: bool = False,
        threshold_offset: float = 0.0, audit_log: str = audit.OFF,
    ) -> io.NodeOutput:  # fmt: skip
        values = {
            "strength": strength, "categories": categories, "strict": strict, "threshold_offset": threshold_offset, "audit_log": audit_log,
        }  # fmt: skip
        return io.NodeOutput(protect(model, clip, values, getattr(cls.hidden, "unique_id", None)))


def _inputs() -> list:
    return [
        make_input(io.Model, "model", tooltip="The model to make safe. LoRAs and other patches come before this node."),
        make_input(io.Clip, "clip", tooltip="The CLIP that belongs to the model: the one that encodes your prompts."),
        make_input(
            io.Float, "strength", default=1.0, min=0.0, max=1.0, step=0.05,
            tooltip="0 to 1. How far a flagged prompt is turned towards its safe version: 1 all the way, 0 switches SafeCFG off.",
        ),
        make_input(
            io.String, "categories", default="", multiline=True, placeholder="all on; NAME = off or NAME = 0.5",
            tooltip="Strength per category, 0 to 1 or on / off. Categories that are not named stay on. Empty: all on. There are hate, harassment, "
            "violence, self-harm, sexual, shocking and illegal.",
        ),
        make_input(
            io.Boolean, "strict", default=False,
            tooltip="What SafeCFG cannot redirect (an unknown kind of prompt, latents that are not finite) stops the run with an error. Off: a "
            "warning in the log.",
        ),
        make_input(
            io.Float, "threshold_offset", default=0.0, min=-1.0, max=1.0, step=0.01, optional=True, advanced=True,
            tooltip="-1 to 1. Added to every threshold: below 0 flags more (and more clean pictures by mistake), above 0 flags less.",
        ),
        make_input(
            io.Combo, "audit_log", options=list(audit.LEVELS), default=audit.OFF, optional=True, advanced=True,
            tooltip="Appends a line per image to output/safecfg_audit.jsonl: time, seed, HGR, scores per category, redirected or not.",
        ),
    ]  # fmt: skip
