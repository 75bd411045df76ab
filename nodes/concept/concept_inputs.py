"""The inputs of `SafeCFG Concept Guidance`, in the order that saved workflows know: new ones go to the end."""

from comfy_api.latest import io

from ... import hgr_models
from ..host.schema import HGR_TYPE, make_input

CUSTOM = "custom"
METHODS = ("SLD", "CASG", "SAFREE", "CRG")


def concept_inputs() -> list:
    """All of them."""
    return [*_model_inputs(), *_method_inputs(), *_custom_inputs(), *_concept_inputs(), *_peer_inputs()]


def _model_inputs() -> list:
    return [
        make_input(io.Model, "model", tooltip="The model to guard. LoRAs and other patches come before this node."),
        make_input(io.Clip, "clip", tooltip="The model's own CLIP; it encodes the concepts."),
        make_input(
            HGR_TYPE,
            "hgr",
            optional=True,
            tooltip="Optional. The concepts are then those stored in the HGR, one per category, and the text below is not used.",
        ),
    ]


def _method_inputs() -> list:
    return [
        make_input(
            io.Combo,
            "method",
            options=list(METHODS),
            default="SLD",
            tooltip="SLD: all concepts in one prompt, one extra model row per step. CASG: one row per category; in each step the category "
            "that the picture follows most is subtracted. Better with many categories, and slower. SAFREE: changes the words of `prompt` "
            "that are near the concepts, without an extra row. CRG: as SLD, but only as far as the concept is being drawn.",
        ),
        make_input(
            io.Combo,
            "preset",
            options=[*hgr_models.SLD_PRESETS, CUSTOM],
            default="Strong",
            tooltip="How hard it steers away. Weak, Medium, Strong and Max are those of the paper (Max changes clean pictures most); "
            "custom takes the five values below. Of SLD and CASG.",
        ),
    ]


def _custom_inputs() -> list:
    strong = hgr_models.SLD_PRESETS["Strong"]
    return [
        _number(
            "warm_up",
            strong.warm_up,
            0.95,
            0.01,
            "0 to 0.95, for preset custom. The fraction of the run's steps before it acts: early steps decide the composition.",
        ),
        _number(
            "safety_scale",
            strong.scale,
            10000.0,
            10.0,
            "0 to 10000, for preset custom. How soon a difference from the concept counts in full; 0 switches the node off.",
        ),
        _number(
            "threshold",
            strong.threshold,
            1.0,
            0.005,
            "-1 to 1, for preset custom. Values of the latent that exceed the concept's by this much are left alone; higher guards more.",
            -1.0,
        ),
        _number(
            "momentum_scale",
            strong.momentum_scale,
            1.0,
            0.05,
            "0 to 1, for preset custom. How much of the earlier steps' correction is added, also that of the warm-up.",
        ),
        _number(
            "momentum_beta",
            strong.momentum_beta,
            0.99,
            0.01,
            "0 to 0.99, for preset custom. How long the momentum lasts: the share of it that each step keeps.",
        ),
    ]


def _number(name: str, default: float, high: float, step: float, tooltip: str, low: float = 0.0) -> io.Input:
    return make_input(io.Float, name, default=default, min=low, max=high, step=step, advanced=True, tooltip=tooltip)


def _concept_inputs() -> list:
    return [
        make_input(
            io.String,
            "concepts",
            default=hgr_models.DEFAULT_CONCEPTS,
            multiline=True,
            tooltip="What to steer away from: one line `category: words, words` per category, or plain words for a single concept. "
            "Not used when an HGR is connected.",
        ),
        make_input(
            io.Boolean,
            "strict",
            default=False,
            tooltip="Where the node cannot act (cfg 1, no negative prompt, a guider without the hook it needs) the run stops with an error. "
            "Off: a warning in the log.",
        ),
    ]


def _peer_inputs() -> list:
    return [
        make_input(
            io.String,
            "prompt",
            optional=True,
            force_input=True,
            tooltip="For SAFREE only: the text of the positive prompt, word for word as it is encoded. Connect one text to both.",
        ),
        make_input(
            io.Float,
            "presence_threshold",
            default=0.0,
            min=-1000.0,
            max=1000.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="-1000 to 1000, for CRG only. The evidence of the concept that is tolerated; lower guards more. 0: as much as of nothing.",
        ),
        make_input(
            io.Float,
            "removal_scale",
            default=1.0,
            min=0.0,
            max=10.0,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="0 to 10, for CRG only. 1 removes the concept down to the threshold, more goes beyond; 0 switches the node off.",
        ),
    ]
