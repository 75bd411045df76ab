"""SAFREE in a run: in its first steps the prompt's condition is exchanged for one with the changed tokens."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.samplers
from comfy.model_base import BaseModel
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.samplers import CFGGuider, Sampler
from torch import Tensor

from ...hgr_models.safree import filtered_steps
from ..host.concept_rows import SIGMA_ROUNDING, run_facts
from ..host.hooks import SafeCFGError, is_training
from ..host.more_tokens import TOKENS
from .safree import SafreePrompt

KEY = "safecfg_safree"  # of wrappers and of the run in model_options
ALIKE = 1e-2  # a prompt that was encoded elsewhere differs by rounding, in units of its tokens' spread

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class SafreeRun:
    """One sampling run: the conditions that are exchanged, by their uuid, above the noise level `limit`."""

    prompt: SafreePrompt
    limit: float
    extra: dict
    strict: bool
    exchanged: dict = field(default_factory=dict)
    used: bool = False

    def __deepcopy__(self, memo: dict) -> "SafreeRun":
        """Itself: core copies model options."""
        return self

    def notice(self, message: str) -> None:
        """Warns; in strict mode raises SafeCFGError."""
        if self.strict:
            raise SafeCFGError(f"SafeCFG Concept Guidance (strict): {message}")
        logger.warning("SafeCFG Concept Guidance: %s", message)


def make_wrappers(prompt: SafreePrompt, strict: bool) -> dict:
    """Our wrappers by core's name for their place."""
    return {
        WrappersMP.OUTER_SAMPLE: make_outer_sample(prompt, strict),
        WrappersMP.SAMPLER_SAMPLE: sampler_sample,
        WrappersMP.CALC_COND_BATCH: calc_cond_batch,
    }


def make_outer_sample(prompt: SafreePrompt, strict: bool) -> Callable:
    """OUTER_SAMPLE wrapper: starts a run in the guider's own (per-run) model options, and ends it whatever happens."""

    def outer_sample(
        executor: WrapperExecutor, noise: Tensor, latent_image: Tensor, sampler: Sampler, sigmas: Tensor, *args, **kwargs
    ) -> Tensor:
        options = executor.class_obj.model_options
        if is_training(sampler):
            logger.warning("SafeCFG Concept Guidance: not applied while training: a LoRA learns from the model as it is.")
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        steps = len(sigmas) - 1
        last = filtered_steps(prompt.found.distance, steps)
        run = SafreeRun(prompt, float(sigmas[last]) * (1 + SIGMA_ROUNDING), run_facts(kwargs), strict)
        options[KEY] = run
        try:
            out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            options.pop(KEY, None)
        if run.exchanged and not run.used:
            run.notice(f"{type(executor.class_obj).__name__} never evaluated the changed prompt: SAFREE did not act.")
        return out

    return outer_sample


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
    """SAMPLER_SAMPLE wrapper: core has encoded the run's conditions for the model; so are the changed ones, in the same way."""
    run = guider.model_options.get(KEY)
    if run is not None:
        facts = {"latent_image": latent_image, "denoise_mask": denoise_mask, "seed": extra_args.get("seed"), **run.extra}
        for name, entries in getattr(guider, "conds", {}).items():
            ours = [] if "negative" in name else [entry for entry in entries if is_prompt(entry.get(TOKENS), run.prompt.plain)]
            changed = [{**entry, TOKENS: run.prompt.safe.to(entry[TOKENS]), "model_conds": {}} for entry in ours]
            encode = guider.inner_model.extra_conds
            encoded = comfy.samplers.encode_model_conds(encode, changed, noise, noise.device, "positive", **facts)
            run.exchanged.update({entry["uuid"]: entry["model_conds"] for entry in encoded})
        if not run.exchanged:
            run.notice(
                "no positive prompt of this run is the text in `prompt`: SAFREE did not act. Give both the same text and the same CLIP; "
                "behind SafeCFG Apply and text nodes that weigh or combine prompts it cannot know its prompt again."
            )
    return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)


def is_prompt(tokens: object, plain: Tensor) -> bool:
    """Whether a condition's tokens are an encoding (1, T, D) of the prompt, but for rounding and repetition over a batch."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1:] != plain.shape[1:]:
        return False
    difference = (tokens.float().cpu() - plain.float()).abs().max()
    return bool(difference <= ALIKE * plain.float().std())


def calc_cond_batch(
    executor: WrapperExecutor,
    model: BaseModel,
    conds: list[list[dict] | None],
    x: Tensor,
    sigma: Tensor,
    model_options: dict | None,
) -> list[Tensor]:
    """CALC_COND_BATCH wrapper: exchanges the prompt's conditions in the first steps."""
    run = (model_options or {}).get(KEY)
    if run is not None and run.exchanged and float(sigma.max()) > run.limit:
        conds = [None if entries is None else [_exchanged(run, entry) for entry in entries] for entries in conds]
    return executor(model, conds, x, sigma, model_options)


def _exchanged(run: SafreeRun, entry: dict) -> dict:
    other = run.exchanged.get(entry.get("uuid"))
    if other is None:
        return entry
    run.used = True
    return {**entry, "model_conds": other}
