"""`SafeCFG Concept Guidance`: a training-free guard for models that have no HGR yet."""

import logging

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ... import hgr_models
from ..schema import HGR_TYPE, make_input, make_schema
from .concept_hooks import KEY, ConceptSettings, make_pre_cfg, make_wrappers, put_hook
from .concept_rows import encode_prompt

CUSTOM = "custom"

logger = logging.getLogger(__name__)


def remove(model) -> bool:
    """Takes concept guidance out of a MODEL that the caller owns; whether it was there."""
    was_there = KEY in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {})
    for kind in list(model.wrappers):
        model.remove_wrappers_with_key(kind, KEY)
    if was_there:
        put_hook(model.model_options)
    return was_there


def guard(model, settings: ConceptSettings):
    """A clone of a MODEL with concept guidance; with safety scale 0 it has none, and draws what the model alone draws."""
    model = model.clone()
    if remove(model):
        logger.warning("SafeCFG Concept Guidance: this model went through the node before; only the last one counts.")
    if settings.sld.scale > 0:
        put_hook(model.model_options, make_pre_cfg(settings))
        for kind, wrapper in make_wrappers(settings).items():
            model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


def prompts_of(hgr, concepts: str) -> dict[str, str]:
    """Concept prompts by category: the HGR's own, or, without an HGR, those of the text. Raises HGRError when there are none."""
    if hgr is None:
        return hgr_models.parse_concepts(concepts)
    prompts = {c: hgr.info.concept_prompts[c] for c in hgr.info.categories if hgr.info.concept_prompts.get(c, "").strip()}
    if not prompts:
        raise hgr_models.HGRError(
            f"{hgr.path} holds no concept prompts. Disconnect it from SafeCFG Concept Guidance, and write the concepts into the node."
        )
    return prompts


class ConceptGuidance(io.ComfyNode):
    """Patches a MODEL; see `guard`."""

    @classmethod
    def define_schema(cls):
        return make_schema(
            node_id="SafeCFG_ConceptGuidance",
            display_name="SafeCFG Concept Guidance",
            description="Steers a model away from concepts that you name, without training: by Safe Latent Diffusion (SLD), or by CASG, its "
            "variant by category. For models that have no HGR yet. It acts on every picture, also on clean ones; SafeCFG Apply with an HGR "
            "does not.",
            search_aliases=["safe latent diffusion", "SLD", "CASG", "safety", "nsfw filter", "negative concept"],
            inputs=[*_model_inputs(), *_method_inputs(), *_custom_inputs(), *_concept_inputs()],
            outputs=[
                io.Model.Output(tooltip="The guarded model, for samplers and guiders with a negative prompt and cfg above 1.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        method,
        preset,
        warm_up,
        safety_scale,
        threshold,
        momentum_scale,
        momentum_beta,
        concepts,
        strict,
        hgr=None,
    ):
        custom = (warm_up, safety_scale, threshold, momentum_scale, momentum_beta)
        sld = hgr_models.SLDSettings(*custom) if preset == CUSTOM else hgr_models.SLD_PRESETS[preset]
        prompts = list(prompts_of(hgr, concepts).values())
        if method == "SLD":
            prompts = [", ".join(prompts)]
        encoded = tuple(encode_prompt(clip, prompt) for prompt in prompts)
        return io.NodeOutput(guard(model, ConceptSettings(sld, encoded, strict)))


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
            options=["SLD", "CASG"],
            default="SLD",
            tooltip="SLD: all concepts in one prompt, one extra model row per step. CASG: one row per category; in each step the category "
            "that the picture follows most is subtracted. Better with many categories, and slower.",
        ),
        make_input(
            io.Combo,
            "preset",
            options=[*hgr_models.SLD_PRESETS, CUSTOM],
            default="Strong",
            tooltip="How hard it steers away. Weak, Medium, Strong and Max are those of the paper (Max changes clean pictures most); "
            "custom takes the five values below.",
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


def _number(name: str, default: float, high: float, step: float, tooltip: str, low: float = 0.0):
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
