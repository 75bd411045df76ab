"""Wrappers around a whole sampling run: repair, strictness, the condition redirector, and a clean end."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.samplers import CFGGuider, Sampler

from ..host.families import check_family
from ..host.hooks import CFG, KEY, NEGATIVE_ROLES, POST_CFG, PRE_CFG, SafeCFGError, is_training, put_hooks
from ..host.settings import ApplySettings
from ..reporting import audit, status, traces
from . import concept_mode, conditions, guidance_hooks
from .conditions import lend_negative
from .nan_guard import check_run
from .others import guarded
from .patch_text import PatchText
from .runs import Probes, Run, Window, patcher_of, run_of, weight_patches

logger = logging.getLogger(__name__)


def make_hooks(settings: ApplySettings) -> dict:
    """Our CFG hooks by list, tagged so that they can be found again."""
    hooks: dict[str, Any] = {PRE_CFG: guidance_hooks.make_watch(settings)}
    if settings.sees_guidance:
        hooks = {PRE_CFG: guidance_hooks.make_pre_cfg(settings), POST_CFG: guidance_hooks.make_post_cfg(settings)}
    for hook in hooks.values():
        hook._safecfg = True
    return hooks


def make_wrappers(settings: ApplySettings) -> dict:
    """Our wrappers by core's name for their place."""
    return {
        WrappersMP.OUTER_SAMPLE: make_outer_sample(settings),
        WrappersMP.PREPARE_SAMPLING: prepare_sampling,
        WrappersMP.SAMPLER_SAMPLE: sampler_sample,
        WrappersMP.PREDICT_NOISE: guidance_hooks.predict_noise,
        WrappersMP.CALC_COND_BATCH: guidance_hooks.calc_cond_batch,
    }


def make_outer_sample(settings: ApplySettings) -> Callable:
    """OUTER_SAMPLE wrapper: starts a run in the guider's own (per-run) model options, and ends it whatever happens."""

    def outer_sample(
        executor: WrapperExecutor,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: Sampler,
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        callback: Callable | None = None,
        disable_pbar: bool = False,
        seed: int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        guider, options = executor.class_obj, executor.class_obj.model_options
        if is_training(sampler):
            put_hooks(options, {})
            logger.warning("SafeCFG: not applied while training: a LoRA learns from the model as it is.")
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)
        check_family(guider.model_patcher, settings.info)  # a node after Apply may have patched the sampling
        put_hooks(options, make_hooks(settings))
        if settings.sees_guidance and CFG in options:
            options[CFG] = guidance_hooks.wrap_cfg(options[CFG])
        run = options[KEY] = _start_run(settings, guider, sampler, sigmas, kwargs)
        if settings.by_concept:
            concept_mode.start(run, sigmas, kwargs)
        lend_negative(guider, settings)
        try:
            _notice_missing_negative(run)
            _notice_later_weights(run)
            _audit(run, [])
            callback = _keep_denoised(run, callback)
            output = executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)
            _check_path(run, sigmas)
            check_run(run, output)
            _finish(run, output, seed)
            return output
        except SafeCFGError as error:
            _stopped(run, str(error))
            raise
        finally:
            run.patch_text.restore(run)
            options.pop(KEY, None)
            run.clear()

    return outer_sample


def _start_run(settings: ApplySettings, guider: CFGGuider, sampler: Sampler, sigmas: torch.Tensor, kwargs: dict) -> Run:
    """The run that OUTER_SAMPLE starts, with its other arguments `kwargs`."""
    sampling = guider.model_patcher.get_model_object("model_sampling")
    window = Window.of(sampling, settings.start_percent, settings.end_percent)
    steps = sum(map(window.contains, sigmas[:-1].cpu()))
    shapes = tuple(kwargs.get("latent_shapes") or ())
    run = Run(settings, guider, sampler, window, shapes, PatchText(), probes=Probes(max(1, steps)))
    run.meter.steps = max(1, len(sigmas) - 1)
    return run


def _keep_denoised(run: Run, callback: Callable | None) -> Callable | None:
    """A sampler's callback that keeps the last denoised latent for the run's end: SamplerCustom's second output is made of it."""
    if callback is None:
        return None

    def keep_denoised(step: int, x0: torch.Tensor, *args, **kwargs) -> Any:
        run.last_denoised = x0
        return callback(step, x0, *args, **kwargs)

    return keep_denoised


def _finish(run: Run, output: torch.Tensor, seed: int | None) -> None:
    """Stores what happened, by every latent that the sampler node may return for this run; tells the log and the front end."""
    settings = run.settings
    found = run.readings.finish(len(output), seed, settings.hgr_hash, tuple(sorted(run.noticed)))
    latents = [output]
    intermediate_dtype = getattr(comfy.model_management, "intermediate_dtype", lambda: output.dtype)()
    if intermediate_dtype != output.dtype:
        latents.append(output.to(intermediate_dtype))  # as a host with such latents returns it
    if run.last_denoised is not None:
        latents.append(run.guider.model_patcher.model.process_latent_out(run.last_denoised.cpu()))  # as SamplerCustom does
    traces.remember(found, settings.identity, latents)
    _audit(run, found)
    notices = tuple(sorted(run.noticed))  # that of the audit log among them
    run.meter.show_end(found, notices)
    status.report(settings.node_id, status.describe(found, notices))


def _stopped(run: Run, reason: str) -> None:
    run.meter.show_stopped(reason)
    status.report(run.settings.node_id, f"the run was stopped: {reason}")


def _audit(run: Run, found: list[traces.ImageTrace]) -> None:
    """Writes a run's images to the audit log, or, before it has any, only sees whether that will be possible."""
    level = run.settings.audit_log
    if level == audit.OFF:
        return
    try:
        audit.append(audit.records(found, level))
    except OSError as error:
        run.notice(
            f"the audit log {audit.path()} cannot be written ({error}): this run is not recorded. "
            "Make the folder writable, or set `audit_log` to off."
        )


def _notice_missing_negative(run: Run) -> None:
    conds = getattr(run.guider, "conds", {})
    if run.settings.by_guidance and not any(conds.get(role) for role in NEGATIVE_ROLES):
        run.notice(
            f"{run.guider_name} has no negative prompt, so there is no guidance to look at: the guidance redirector cannot run. "
            "Connect `negative` to SafeCFG Apply, use CFGGuider with cfg 1, or set `redirect` to condition."
        )


def _check_path(run: Run, sigmas: torch.Tensor) -> None:
    """For the end of a run: whether its evaluations came to us, and what became of our results."""
    if run.evaluations == 0 and len(sigmas) > 1:
        run.notice(f"{run.path}: {type(run.sampler).__name__} drew without asking its guider: nothing was redirected.")
    if run.consistency.ignored():
        run.notice(f"{run.path} does not use the redirected guidance that it was given: this picture is not redirected.")


def _notice_later_weights(run: Run) -> None:
    """A LoRA or a merge behind SafeCFG: nobody compared its weights with the HGR's base."""
    if weight_patches(run.guider.model_patcher) != run.settings.weights:
        run.notice(
            "the model's weights were patched behind SafeCFG Apply (a LoRA, a merge), which nobody compared with what the HGR was "
            "trained for. Put SafeCFG Apply last: behind every LoRA and merge, before the sampler."
        )


@guarded("redirect the prompts", lambda run, *_: (run.guider.model_options, run.guider))
def _redirect_prompts(run: Run, patcher: ModelPatcher, conds: dict[str, list[dict]]) -> dict[str, list[dict]]:
    conds = conditions.redirect_conditions(run, patcher, conds)
    run.patch_text.find_all(run, patcher, conds)
    return conds


def prepare_sampling(
    executor: WrapperExecutor, model: ModelPatcher, noise_shape: Sequence[int], conds: dict[str, list[dict]], *args, **kwargs
) -> tuple[BaseModel, dict[str, list[dict]], list[ModelPatcher]]:
    """PREPARE_SAMPLING wrapper: rewrites the run's conditions as soon as the HGR is loaded with the model."""
    real_model, conds, models = executor(model, noise_shape, conds, *args, **kwargs)
    run = run_of(kwargs.get("model_options") or (args[0] if args else None))
    if run is not None and run.settings.by_condition:
        if (patcher := patcher_of(model)) is None:
            run.notice(f"{run.guider_name}: another node removed the HGR from the model; its prompts are not redirected.")
        else:
            conds = _redirect_prompts(run, patcher, conds)
    return real_model, conds, models


def sampler_sample(
    executor: WrapperExecutor,
    guider: CFGGuider,
    sigmas: torch.Tensor,
    extra_args: dict,
    callback: Callable | None,
    noise: torch.Tensor,
    latent_image: torch.Tensor | None = None,
    denoise_mask: torch.Tensor | None = None,
    *args,
    **kwargs,
) -> torch.Tensor:
    """SAMPLER_SAMPLE wrapper: here the conditions are encoded, and those that act for a part of the run are split."""
    run = run_of(guider.model_options)
    if run is not None and run.split_roles:
        conditions.split_by_time(run, guider.conds)
    if run is not None and run.settings.by_concept:
        facts = {"latent_image": latent_image, "denoise_mask": denoise_mask, "seed": extra_args.get("seed")}
        concept_mode.encode(run, guider, noise, **facts)
    return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
