"""The inputs of `SafeCFG Apply`, in the order that saved workflows know: new ones go to the end.

All but the two sockets are optional: a prompt of the API names what differs from the defaults.
"""

from comfy_api.latest import io

from ..host.schema import HGR_TYPE, make_input
from ..reporting import audit


def apply_inputs() -> list:
    """All of them."""
    return [*_model_inputs(), *_strength_inputs(), *_time_inputs(), *_how_inputs(), _audit_input(), *_optional_inputs()]


def _model_inputs() -> list:
    return [
        make_input(io.Model, "model", tooltip="The model to make safe. LoRAs and other patches come before this node."),
        make_input(HGR_TYPE, "hgr", tooltip="From SafeCFG Load HGR; it must have been trained for this model's family."),
    ]


def _strength_inputs() -> list:
    return [
        make_input(
            io.Float,
            "strength",
            default=1.0,
            optional=True,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="0 to 1. How far flagged guidance is turned towards the safe version: 1 all the way, 0 switches SafeCFG off "
            "(then the pictures are those of the model alone, bit for bit).",
        ),
        make_input(
            io.Float,
            "threshold_offset",
            default=0.0,
            optional=True,
            min=-1.0,
            max=1.0,
            step=0.01,
            tooltip="-1 to 1. Added to every calibrated threshold: below 0 flags more (and more clean pictures by mistake), "
            "above 0 flags less.",
        ),
    ]


def _time_inputs() -> list:
    return [
        make_input(
            io.Float,
            "start_percent",
            default=0.0,
            optional=True,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="0 to 1, below end_percent. Where in the sampling schedule SafeCFG begins; the subject of a picture is decided "
            "early, so a late start lets harm through.",
        ),
        make_input(
            io.Float,
            "end_percent",
            default=1.0,
            optional=True,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="0 to 1, above start_percent. Where in the sampling schedule SafeCFG ends; after it the prompt acts as it was.",
        ),
    ]


def _how_inputs() -> list:
    return [
        make_input(
            io.Combo,
            "redirect",
            options=["both", "condition", "guidance", "concept"],
            default="both",
            optional=True,
            tooltip="condition: rewrites a harmful prompt's tokens once per run, at any cfg, at no cost. guidance: looks at the guidance "
            "in every step, for what the prompt hides. both: the safest. concept: both judge; a flagged picture is steered away from "
            "its category's concept prompt, which costs a model row per flagged category and step, and needs `clip`.",
        ),
        make_input(
            io.String,
            "categories",
            default="",
            optional=True,
            multiline=True,
            placeholder="all on; NAME = off or NAME = 0.5",
            tooltip="Strength per category, 0 to 1 or on / off: `sexual = 1, hate = 0.5, violence = off`. Categories that are not "
            "named stay on. Empty: all on. Names are those of the HGR; a wrong one gives an error that lists them.",
        ),
        make_input(
            io.Boolean,
            "strict",
            default=False,
            optional=True,
            tooltip="What SafeCFG cannot redirect (a guider without negative, an unknown kind of prompt, latents that are not finite) "
            "stops the run with an error. Off: a warning in the log.",
        ),
        make_input(
            io.Boolean,
            "remember_flagged",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Once the guidance redirector has flagged a category of a picture, it stays flagged to the end of the run. Off: every step "
            "is judged alone; a picture near the threshold is then redirected in some steps only.",
        ),
    ]


def _audit_input() -> io.Input:
    return make_input(
        io.Combo,
        "audit_log",
        options=list(audit.LEVELS),
        default=audit.OFF,
        optional=True,
        advanced=True,
        tooltip="Appends a line per image to output/safecfg_audit.jsonl: time, seed, HGR, scores per category, redirected or not. "
        "scores and prompt: the text of the positive prompts too. Whoever can see the output folder can read it.",
    )


def _optional_inputs() -> list:
    return [
        make_input(
            io.Clip,
            "clip",
            optional=True,
            tooltip="Optional: the model's own CLIP, which encodes the concept prompts stored in the HGR, for redirect = concept, and for both with "
            "an HGR whose own check found it weak.",
        ),
        make_input(
            io.Conditioning,
            "negative",
            optional=True,
            tooltip="Optional, for guiders without a negative prompt (BasicGuider): what the guidance is measured against, such as an empty "
            "prompt. It is evaluated at a few steps and never drawn. Unused where the guider has a negative.",
        ),
    ]
