"""Wrappers around a whole sampling run: repair, strictness, the condition redirector, and a clean end."""

import logging

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ..concept import concept_mode
from ..families import check_family
from ..reporting import audit, traces
from . import conditions, guidance_hooks
from .finite import check_run
from .lent_negative import lend_negative
from .runs import KEY, NEGATIVE_ROLES, ApplySettings, Run, Window, patcher_of, run_of

PRE_CFG, CFG, POST_CFG = "sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function"

logger = logging.getLogger(__name__)


def put_hooks(model_options: dict, hooks: dict) -> None:
    """Makes our hooks the first of their lists, once, whatever another node made of the lists; {} removes them."""
    for name in (PRE_CFG, POST_CFG):
        others = model_options.get(name, [])
        others = list(others) if isinstance(others, (list, tuple)) else [others]
        ours = [hooks[name]] if name in hooks else []
        model_options[name] = ours + [f for f in others if not getattr(f, "_safecfg", False)]


def make_hooks(settings: ApplySettings) -> dict:
    """Our CFG hooks by list, tagged so that they can be found again."""
    hooks = {PRE_CFG: guidance_hooks.make_watch(settings)}
    if settings.by_guidance:
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


def make_outer_sample(settings: ApplySettings):
    """OUTER_SAMPLE wrapper: starts a run in the guider's own (per-run) model options, and ends it whatever happens."""

    def outer_sample(
        executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None, **kwargs
    ):
        guider, options = executor.class_obj, executor.class_obj.model_options
        if is_training(sampler):
            put_hooks(options, {})
            logger.warning("SafeCFG: not applied while training: a LoRA learns from the model as it is.")
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)
        check_family(guider.model_patcher, settings.info)  # a node after Apply may have patched the sampling
        put_hooks(options, make_hooks(settings))
        if settings.by_guidance and CFG in options:
            options[CFG] = guidance_hooks.wrap_cfg(options[CFG])
        run = options[KEY] = _start_run(settings, guider, sigmas)
        run.latent_shapes = tuple(kwargs.get("latent_shapes") or ())
        if settings.by_concept:
            concept_mode.start(run, sigmas, kwargs)
        lend_negative(guider, settings)
        try:
            _notice_missing_negative(run)
            _audit(run, [])
            callback = _keep_denoised(run, callback)
            output = executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)
            check_run(run, output)
            _finish(run, output, seed)
            return output
        finally:
            options.pop(KEY, None)
            run.clear()

    return outer_sample


def _start_run(settings: ApplySettings, guider, sigmas) -> Run:
    sampling = guider.model_patcher.get_model_object("model_sampling")
    window = Window.of(sampling, settings.start_percent, settings.end_percent)
    steps = sum(map(window.contains, sigmas[:-1].cpu()))
    run = Run(settings, guider, window, max(1, steps))
    run.meter.steps = max(1, len(sigmas) - 1)
    return run


def _keep_denoised(run: Run, callback):
    """A sampler's callback that keeps the last denoised latent for the run's end: SamplerCustom's second output is made of it."""
    if callback is None:
        return None

    def keep_denoised(step, x0, *args, **kwargs):
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
    run.meter.show_end(found)


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


def is_training(sampler) -> bool:
    """Whether core trains a LoRA with this sampler."""
    return bool(getattr(comfy.model_management, "in_training", False)) or type(sampler).__name__ == "TrainSampler"


def prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
    """PREPARE_SAMPLING wrapper: rewrites the run's conditions as soon as the HGR is loaded with the model."""
    real_model, conds, models = executor(model, noise_shape, conds, *args, **kwargs)
    run = run_of(kwargs.get("model_options") or (args[0] if args else None))
    if run is not None and run.settings.by_condition:
        if (patcher := patcher_of(model)) is None:
            run.notice(f"{run.guider_name}: another node removed the HGR from the model; its prompts are not redirected.")
        else:
            conds = conditions.redirect_conditions(run, patcher, conds)
    return real_model, conds, models


def sampler_sample(executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *args, **kwargs):
    """SAMPLER_SAMPLE wrapper: here the conditions are encoded, and those that act for a part of the run are split."""
    run = run_of(guider.model_options)
    if run is not None and run.split_roles:
        conditions.split_by_time(run, guider.conds)
    if run is not None and run.settings.by_concept:
        facts = {"latent_image": latent_image, "denoise_mask": denoise_mask, "seed": extra_args.get("seed")}
        concept_mode.encode(run, guider, noise, **facts)
    return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
