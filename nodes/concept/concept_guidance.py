"""`SafeCFG Concept Guidance`: a training-free guard for models that have no HGR yet."""

import logging

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sd import CLIP
from comfy_api.latest import io

from ... import hgr_models
from ...hgr_models.concept_removal import CRGSettings
from ..host.concept_rows import encode_prompt
from ..host.schema import make_schema
from ..loader import HGRModel
from . import safree_hooks
from .concept_hooks import KEY, ConceptSettings, make_pre_cfg, make_wrappers, put_hook
from .concept_inputs import CUSTOM, concept_inputs
from .safree import SafreePrompt, read_prompt

STRONG = hgr_models.SLD_PRESETS["Strong"]

logger = logging.getLogger(__name__)


def remove(model: ModelPatcher) -> bool:
    """Takes concept guidance out of a MODEL that the caller owns; whether it was there."""
    there = model.wrappers.get(WrappersMP.OUTER_SAMPLE, {})
    was_there = KEY in there or safree_hooks.KEY in there
    for kind in list(model.wrappers):
        for key in (KEY, safree_hooks.KEY):
            model.remove_wrappers_with_key(kind, key)
    if was_there:
        put_hook(model.model_options)
    return was_there


def guard(model: ModelPatcher, settings: ConceptSettings) -> ModelPatcher:
    """A clone of a MODEL with concept guidance; with safety scale 0 it has none, and draws what the model alone draws."""
    model = _without_guard(model)
    if settings.acts:
        put_hook(model.model_options, make_pre_cfg(settings))
        for kind, wrapper in make_wrappers(settings).items():
            model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


def guard_prompt(model: ModelPatcher, prompt: SafreePrompt, strict: bool) -> ModelPatcher:
    """A clone of a MODEL that draws SAFREE's version of a prompt; of one that SAFREE leaves alone it draws what the model alone draws."""
    model = _without_guard(model)
    if prompt.acts:
        for kind, wrapper in safree_hooks.make_wrappers(prompt, strict).items():
            model.add_wrapper_with_key(kind, safree_hooks.KEY, wrapper)
    return model


def _without_guard(model: ModelPatcher) -> ModelPatcher:
    model = model.clone()
    if remove(model):
        logger.warning("SafeCFG Concept Guidance: this model went through the node before; only the last one counts.")
    return model


def prompts_of(hgr: HGRModel | None, concepts: str) -> dict[str, str]:
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
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_ConceptGuidance",
            display_name="SafeCFG Concept Guidance",
            description="Steers a model away from concepts that you name, without training: by Safe Latent Diffusion (SLD), CASG, its "
            "variant by category, SAFREE or CRG. For models that have no HGR yet. It acts on every picture, also on clean ones; SafeCFG "
            "Apply with an HGR does not.",
            search_aliases=["safe latent diffusion", "SLD", "CASG", "SAFREE", "CRG", "safety", "nsfw filter", "negative concept"],
            inputs=concept_inputs(),
            outputs=[
                io.Model.Output(tooltip="The guarded model, for samplers and guiders with a negative prompt and cfg above 1.")
            ],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP | None, method: str = "SLD", preset: str = "Strong", warm_up: float = STRONG.warm_up,
        safety_scale: float = STRONG.scale, threshold: float = STRONG.threshold, momentum_scale: float = STRONG.momentum_scale,
        momentum_beta: float = STRONG.momentum_beta, concepts: str = hgr_models.DEFAULT_CONCEPTS, strict: bool = False,
        hgr: HGRModel | None = None, prompt: str = "", presence_threshold: float = 0.0, removal_scale: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        custom = (warm_up, safety_scale, threshold, momentum_scale, momentum_beta)
        sld = hgr_models.SLDSettings(*custom) if preset == CUSTOM else hgr_models.SLD_PRESETS[preset]
        wanted = list(prompts_of(hgr, concepts).values())
        if method == "SAFREE":
            return io.NodeOutput(guard_prompt(model, read_prompt(clip, prompt, wanted), strict))
        if method in ("SLD", "CRG"):
            wanted = [", ".join(wanted)]
        encoded = tuple(encode_prompt(clip, words) for words in wanted)
        crg = CRGSettings(presence_threshold, removal_scale) if method == "CRG" else None
        return io.NodeOutput(guard(model, ConceptSettings(sld, encoded, strict, crg)))
