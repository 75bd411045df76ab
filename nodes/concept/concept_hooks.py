"""Concept guidance in a run: a hook that evaluates the concepts' rows and steers the guidance away from them.

It can stand beside SafeCFG Apply on one model, under keys of its own. Its hook comes after Apply's, whichever node comes first:
the HGR judges the guidance as the model gave it, and the concepts act on what is left.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.samplers
from comfy.model_base import BaseModel
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.samplers import CFGGuider, Sampler
from torch import Tensor

from ... import hgr_models
from ...hgr_models.concept_removal import ConceptRemoval, CRGSettings, noise_ratio
from ..host.concept_rows import encode_rows, past_warm_up, run_facts, unconditional_of, units_of, warm_up_limit
from ..host.families import prediction_of
from ..host.hooks import PRE_CFG, SafeCFGError, is_active, is_training, without_caches

KEY = "safecfg_concept"  # of wrappers and of the run in model_options

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ConceptSettings:
    """What a node was asked for. `concepts`: an encoded prompt [tokens, extras] each, which belong to the MODEL, not to a run."""

    sld: hgr_models.SLDSettings
    concepts: tuple[list, ...]
    strict: bool = False
    crg: CRGSettings | None = None  # instead of SLD and CASG: of the first concept

    @property
    def acts(self) -> bool:
        """Whether the settings change anything."""
        return (self.sld if self.crg is None else self.crg).scale > 0


@dataclass(eq=False)
class ConceptRun:
    """One sampling run. Evaluation: one call of the model with all its conditions."""

    settings: ConceptSettings
    guider: object
    limit: float  # the highest sigma after the warm-up
    extra: dict  # what this host's core gives a condition's encoding besides the usual
    guard: hgr_models.ConceptGuard | ConceptRemoval | None
    conditions: list[dict] = field(default_factory=list)  # the concepts, encoded for the model
    evaluated: bool = False  # this evaluation: the model ran
    handled: bool = False  # this evaluation: our hook saw the guidance
    noticed: set[str] = field(default_factory=set)

    def __deepcopy__(self, memo: dict) -> "ConceptRun":
        """Itself, as `Run`."""
        return self

    @property
    def guider_name(self) -> str:
        return type(self.guider).__name__

    def notice(self, message: str) -> None:
        """Warns once in this run; in strict mode raises SafeCFGError."""
        if self.settings.strict or message not in self.noticed:
            self.noticed.add(message)
            _notice(self.settings, message)

    def notice_no_unconditional(self) -> None:
        self.notice(
            f"{self.guider_name} samples without an unconditional (no negative prompt, or cfg 1), which concept guidance needs: "
            "the concepts are not guarded against. Use a guider with a negative prompt and a cfg other than 1."
        )


def _notice(settings: ConceptSettings, message: str) -> None:
    if settings.strict:
        raise SafeCFGError(f"SafeCFG Concept Guidance (strict): {message}")
    logger.warning("SafeCFG Concept Guidance: %s", message)


def run_of(model_options: dict | None) -> ConceptRun | None:
    """The run that these model options belong to; None outside a run that concept guidance follows."""
    return (model_options or {}).get(KEY)


def put_hook(model_options: dict, hook: Callable | None = None) -> None:
    """Makes our hook the first of its list but for SafeCFG Apply's, once, whatever other nodes made of the list; None removes it."""
    others = model_options.get(PRE_CFG, [])
    others = list(others) if isinstance(others, (list, tuple)) else [others]
    others = [f for f in others if not getattr(f, "_safecfg_concept", False)]
    first = [f for f in others if getattr(f, "_safecfg", False)]
    model_options[PRE_CFG] = first + ([hook] if hook else []) + [f for f in others if f not in first]


def make_wrappers(settings: ConceptSettings) -> dict:
    """Our wrappers by core's name for their place."""
    return {
        WrappersMP.OUTER_SAMPLE: make_outer_sample(settings),
        WrappersMP.SAMPLER_SAMPLE: sampler_sample,
        WrappersMP.PREDICT_NOISE: predict_noise,
        WrappersMP.CALC_COND_BATCH: calc_cond_batch,
    }


def make_outer_sample(settings: ConceptSettings) -> Callable:
    """OUTER_SAMPLE wrapper: starts a run in the guider's own (per-run) model options, and ends it whatever happens."""

    def outer_sample(
        executor: WrapperExecutor, noise: Tensor, latent_image: Tensor, sampler: Sampler, sigmas: Tensor, *args, **kwargs
    ) -> Tensor:
        guider, options = executor.class_obj, executor.class_obj.model_options
        if is_training(sampler):
            put_hook(options)
            logger.warning("SafeCFG Concept Guidance: not applied while training: a LoRA learns from the model as it is.")
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        put_hook(options, make_pre_cfg(settings))
        run = ConceptRun(
            settings, guider, warm_up_limit(settings.sld, sigmas), run_facts(kwargs), _guard(settings, guider, sigmas)
        )
        options[KEY] = run
        try:
            if unconditional_of(guider) is None:
                run.notice_no_unconditional()
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            options.pop(KEY, None)
            run.guider = run.guard = None
            run.conditions = []

    return outer_sample


def _guard(settings: ConceptSettings, guider: CFGGuider, sigmas: Tensor) -> hgr_models.ConceptGuard | ConceptRemoval:
    """What steers a run over `sigmas` (S + 1,)."""
    if settings.crg is None:
        return hgr_models.ConceptGuard(settings.sld)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    return ConceptRemoval(settings.crg, noise_ratio(sigmas, prediction_of(sampling)))


def sampler_sample(
    executor: WrapperExecutor,
    guider: CFGGuider,
    sigmas: Tensor,
    extra_args: dict,
    callback: Callable | None,
    noise: Tensor,
    latent_image: Tensor | None = None,
    denoise_mask: Tensor | None = None,
    *args,
    **kwargs,
) -> Tensor:
    """SAMPLER_SAMPLE wrapper: core has encoded the run's conditions for the model; so are the concepts, in the same way."""
    if (run := run_of(guider.model_options)) is not None:
        facts = {"latent_image": latent_image, "denoise_mask": denoise_mask, "seed": extra_args.get("seed"), **run.extra}
        run.conditions = encode_rows(guider, list(run.settings.concepts), noise, facts)
    return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)


def make_pre_cfg(settings: ConceptSettings) -> Callable:
    """The hook for `sampler_pre_cfg_function`."""

    def pre_cfg(args: dict) -> list[Tensor]:
        outputs, conds, sigma = args["conds_out"], args["conds"], args["sigma"]
        run = run_of(args["model_options"])
        if run is None:
            _notice(settings, "this sampler bypasses ComfyUI's guiders: the concepts are not guarded against.")
            return outputs
        run.handled = True
        base = 2 if len(outputs) == 3 else 1  # PerpNegGuider gives [positive, negative, empty] and guides away from empty
        if not is_active(conds[0], sigma):
            return outputs  # nothing is drawn
        if len(outputs) <= base or not conds[base]:
            run.notice_no_unconditional()
        elif not is_active(conds[base], sigma):
            run.notice("the negative prompt is not active in a part of the run: the concepts are not guarded against there.")
        elif not run.conditions:
            run.notice(
                f"{run.guider_name} samples without preparing its prompts through ComfyUI: the concepts are not guarded against."
            )
        else:
            return [_steer(run, args, outputs[base]), *outputs[1:]]
        return outputs

    pre_cfg._safecfg_concept = True  # type: ignore[attr-defined]
    return pre_cfg


def _steer(run: ConceptRun, args: dict, uncond_denoised: Tensor) -> Tensor:
    """The prompt's prediction (B, C, *spatial), steered away from the concepts."""
    model, x, sigma, cond_denoised = args["model"], args["input"], args["sigma"], args["conds_out"][0]
    removes = isinstance(run.guard, ConceptRemoval)
    active = None if removes else past_warm_up(sigma, run.limit)
    if run.settings.sld.memoryless and active is not None and not active.any():
        return cond_denoised  # nothing to build up: the rows are saved
    options = without_caches(args["model_options"])
    # One row at a time needs no more memory than plain CFG. [None, concept]: patches that tell the rows apart see an unconditional.
    concepts = [comfy.samplers.calc_cond_batch(model, [None, [c]], x, sigma, options)[1] for c in run.conditions]
    if removes:
        ratio = noise_ratio(sigma.flatten(), prediction_of(model.model_sampling))
        return run.guard.steer(cond_denoised, uncond_denoised, concepts[0], ratio)
    return run.guard.steer(cond_denoised, uncond_denoised, concepts, units_of(model, sigma), active)


def predict_noise(executor: WrapperExecutor, *args, **kwargs) -> Tensor:
    """PREDICT_NOISE wrapper: an evaluation that our hook did not see is noticed."""
    if (run := run_of(executor.class_obj.model_options)) is None:
        return executor(*args, **kwargs)
    run.evaluated = run.handled = False
    out = executor(*args, **kwargs)
    if run.evaluated and not run.handled:
        run.notice(f"{run.guider_name} does not call the hook that concept guidance needs: the concepts are not guarded against.")
    return out


def calc_cond_batch(
    executor: WrapperExecutor,
    model: BaseModel,
    conds: list[list[dict] | None],
    x: Tensor,
    sigma: Tensor,
    model_options: dict | None,
) -> list[Tensor]:
    """CALC_COND_BATCH wrapper: the model runs (a cache may skip it)."""
    if (run := run_of(model_options)) is not None:
        run.evaluated = True
    return executor(model, conds, x, sigma, model_options)
