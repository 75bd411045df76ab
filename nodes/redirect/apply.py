"""`SafeCFG Apply`: a MODEL whose harmful guidance is redirected in every sampler that uses it."""

import logging
from dataclasses import replace

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ... import hgr_models
from ..host.concept_rows import encode_prompt
from ..host.families import check_family, other_base, read_text
from ..host.hooks import KEY, put_hooks, remove
from ..host.more_tokens import TOKENS
from ..host.schema import make_schema
from ..host.settings import ApplySettings
from ..loader import HGRModel, NoHGR, check_there
from ..reporting import audit
from .apply_inputs import apply_inputs
from .runs import weight_patches
from .sampling_hooks import make_hooks, make_wrappers

logger = logging.getLogger(__name__)


def install(model: ModelPatcher, hgr: HGRModel, settings: ApplySettings) -> None:
    """Puts SafeCFG into a MODEL that the caller owns: the only place that does, whoever asks. The HGR acts on the model's device."""
    settings = replace(settings, weights=weight_patches(model))
    model.set_additional_models(KEY, [hgr.on(model.load_device).patcher])
    model.set_attachments(KEY, settings)  # SafeCFG Report asks for it
    put_hooks(model.model_options, make_hooks(settings))
    for kind, wrapper in make_wrappers(settings).items():
        model.add_wrapper_with_key(kind, KEY, wrapper)


def apply(model: ModelPatcher, hgr: HGRModel, settings: ApplySettings) -> ModelPatcher:
    """A clone of a MODEL with SafeCFG; with every strength 0 it has none, and draws what the model alone draws.

    Raises HGRError when the HGR was trained for another family, or lacks a network that `settings` need.
    """
    check_family(model, settings.info)
    settings = replace(_with_networks(hgr, settings), hgr_name=hgr.path)
    model = model.clone()
    if remove(model):
        logger.warning("SafeCFG: this model went through SafeCFG Apply before; only the last one (%s) counts.", hgr.path)
    if any(settings.categories.strengths):
        install(model, hgr, settings)
    return model


def _with_networks(hgr: HGRModel, settings: ApplySettings) -> ApplySettings:
    """Settings that need only networks which the HGR has: `both` goes on with one, unless it is strict; `concept` takes what there is."""
    networks = {"condition": settings.by_condition, "guidance": settings.by_guidance}
    if settings.judges_only and hgr.patcher.model.redirectors:
        return settings  # whatever there is of the two judges
    for name, wanted in networks.items():
        if not wanted or name in hgr.patcher.model.redirectors:
            continue
        other = "guidance" if name == "condition" else "condition"
        if settings.redirect == "both" and not settings.strict:
            logger.warning("SafeCFG: %s has no %s redirector; only its %s redirector acts.", hgr.path, name, other)
            return replace(settings, redirect=other)
        raise hgr_models.HGRError(
            f"Redirecting by {settings.redirect!r} needs a {name} redirector, but {hgr.path} has none. "
            f"Set `redirect` to {other}, or load another HGR."
        )
    return settings


def _encode_concepts(clip: CLIP | None, hgr: HGRModel, strengths: tuple[float, ...]) -> tuple[list | None, ...]:
    """The HGR's concept prompts per category, encoded; None where a category is off. Raises HGRError when something is missing."""
    on = {name for name, strength in zip(hgr.info.categories, strengths, strict=True) if strength > 0}
    prompts = {name: hgr.info.concept_prompts.get(name, "").strip() for name in hgr.info.categories if name in on}
    if missing := [name for name, prompt in prompts.items() if not prompt]:
        raise hgr_models.HGRError(
            f"Redirecting by 'concept' needs a concept prompt for {', '.join(missing)}, but {hgr.path} has none. "
            "Set `redirect` to both, switch these categories off, or load another HGR."
        )
    if prompts and clip is None:
        raise hgr_models.HGRError(
            "Redirecting by 'concept' needs a CLIP to encode the HGR's concept prompts, but none is connected. "
            "Connect the model's own CLIP to `clip`, or set `redirect` to both."
        )
    encoded = {name: encode_prompt(clip, prompt) for name, prompt in prompts.items()}
    for tokens, extras in encoded.values():
        read_text({TOKENS: tokens, **extras}, hgr.info)  # raises for another family's CLIP
    return tuple(encoded.get(name) for name in hgr.info.categories)


def backing(clip: CLIP | None, hgr: HGRModel, strengths: tuple[float, ...]) -> tuple[list | None, ...]:
    """The concepts that act beside the redirectors of an HGR that its own check found weak; () for any other, or without a CLIP.

    A category without a concept prompt has none.
    """
    if clip is None or not hgr.info.weak:
        return ()
    named = [bool(hgr.info.concept_prompts.get(name, "").strip()) for name in hgr.info.categories]
    found = _encode_concepts(clip, hgr, tuple(s * known for s, known in zip(strengths, named, strict=True)))
    if not any(found):
        return ()
    logger.warning(
        "SafeCFG: %s left much harm when it was checked; flagged runs also get their category's concept row, one row more per step. More "
        "prompt_steps, or `train` = thorough, makes a better one.",
        hgr.path,
    )
    return found


class Apply(io.ComfyNode):
    """Patches a MODEL; see `apply`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_Apply",
            display_name="SafeCFG Apply",
            description="Makes a model's guidance safe: what the HGR recognises as harmful is turned into the safe version of the "
            "same prompt. Pictures that are not flagged stay identical to the last bit. Put it last before the sampler.",
            search_aliases=["safety", "nsfw filter", "safe guidance", "safe latent diffusion"],
            inputs=apply_inputs(),
            outputs=[io.Model.Output(tooltip="The model with SafeCFG, for any sampler or guider.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # two equal nodes have a meter each
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, hgr: HGRModel | NoHGR, strength: float = 1.0, threshold_offset: float = 0.0, start_percent: float = 0.0,
        end_percent: float = 1.0, redirect: str = "both", categories: str = "", strict: bool = False, remember_flagged: bool = True,
        audit_log: str = audit.OFF, clip: CLIP | None = None, negative: list | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if not start_percent < end_percent:
            raise ValueError(f"Expected start_percent below end_percent, but got {start_percent} and {end_percent}.")
        check_there(hgr, model, clip)
        strengths = hgr_models.parse_categories(categories, hgr.info.categories, strength)
        chosen = hgr_models.CategorySettings(strengths, threshold_offset)
        concepts = {"concept": _encode_concepts, "both": backing}.get(redirect, lambda *_: ())(clip, hgr, strengths)
        settings = ApplySettings(
            hgr.info, chosen, redirect, start_percent, end_percent, strict, remember_flagged,
            audit_log, hgr.hash, getattr(cls.hidden, "unique_id", None), concepts, negative=negative,
        )  # fmt: skip
        safe = apply(model, hgr, settings)
        if (difference := other_base(model, hgr.info)) is not None:
            logger.warning("SafeCFG: %s (%s)", difference, hgr.path)
        return io.NodeOutput(safe)
