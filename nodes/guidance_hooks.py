"""The guidance redirector in a run: hooks that see every guidance direction of every guider exactly once.

    pre_cfg           sampling_function and PerpNegGuider: before any other node changes the guidance
    post_cfg          evaluations that skipped pre_cfg (DualModelGuider)
    calc_cond_batch   DualCFGGuider, whose second direction no CFG hook sees
    predict_noise     notices an evaluation that none of them saw

Unflagged rows come back bit for bit: the network's own `where` decides per row.
"""

import comfy.samplers
from torch import Tensor

from .. import hgr_models
from .runs import ApplySettings, Run, SafeCFGError, is_active, patcher_of, run_of

CACHES = frozenset({"easycache", "lazycache"})  # wrappers that count evaluations; a probe must not advance them


def make_pre_cfg(settings: ApplySettings):
    """The hook for `sampler_pre_cfg_function`."""

    def pre_cfg(args):
        outputs, conds, x, sigma = args["conds_out"], args["conds"], args["input"], args["sigma"]
        run = run_of(args["model_options"]) or _run_of_foreign_sampler(settings)
        run.mark_handled(x)
        base = 2 if len(outputs) == 3 else 1  # PerpNegGuider gives [positive, negative, empty] and guides away from empty
        if not run.window.contains(sigma) or not is_active(conds[0], sigma):
            return outputs
        if len(outputs) > base and conds[base] is not None:
            uncond_denoised = outputs[base] if is_active(conds[base], sigma) else None
        else:
            uncond_denoised = _probe(run, args["model"], x, sigma, args["model_options"], base)
        if uncond_denoised is None:
            return outputs
        return [redirect(run, args["model"], outputs[0], uncond_denoised, x, sigma), *outputs[1:]]

    return pre_cfg


def make_post_cfg(settings: ApplySettings):
    """The hook for `sampler_post_cfg_function`; it adds the scaled change, so nothing is added where nothing is flagged."""

    def post_cfg(args):
        x, sigma, run = args["input"], args["sigma"], run_of(args["model_options"])
        if run is None or run.handled_input is x:
            return args["denoised"]
        run.mark_handled(x)
        active = is_active(args["cond"], sigma) and is_active(args["uncond"], sigma)
        if not active or not run.window.contains(sigma):
            return args["denoised"]
        cond_denoised = args["cond_denoised"]
        safe = redirect(run, args["model"], cond_denoised, args["uncond_denoised"], x, sigma)
        return args["denoised"] + args["cond_scale"] * (safe - cond_denoised)

    return post_cfg


def predict_noise(executor, x, *args, **kwargs):
    """PREDICT_NOISE wrapper: an evaluation that no hook saw is noticed."""
    guider = executor.class_obj
    if (run := run_of(guider.model_options)) is None:
        return executor(x, *args, **kwargs)
    run.begin(x)
    try:
        out = executor(x, *args, **kwargs)
        missed = run.evaluated and not run.handled
    finally:
        run.end()
    if run.settings.by_condition and not run.saw_conditions:
        run.notice(f"{run.guider_name} samples without preparing its prompts through ComfyUI: they are not redirected.")
    if run.settings.by_guidance and missed:
        run.notice(f"{run.guider_name} evaluated the model without any guidance hook: the guidance redirector could not run.")
    return out


def calc_cond_batch(executor, model, conds, x, sigma, model_options):
    """CALC_COND_BATCH wrapper: redirects both directions of DualCFGGuider, negative -> middle -> positive."""
    out = executor(model, conds, x, sigma, model_options)
    if (run := run_of(model_options)) is None:
        return out
    run.evaluated = True
    if not run.settings.by_guidance or not run.is_dual or len(conds) != 3 or run.input is None:
        return out
    run.mark_handled(run.input)  # x is only a part of it under context windows
    return _redirect_dual(run, model, conds, out, x, sigma, model_options) if run.window.contains(sigma) else out


def _redirect_dual(run: Run, model, conds, out, x: Tensor, sigma: Tensor, model_options) -> list[Tensor]:
    """[uncond, middle, positive] with middle redirected from uncond and positive from the raw middle."""
    uncond, middle, positive = out
    if conds[0] is None:
        uncond = _probe(run, model, x, sigma, model_options, 1)
    elif not is_active(conds[0], sigma):
        uncond = None
    if not is_active(conds[1], sigma):
        safe = uncond is not None and is_active(conds[2], sigma) and conds[1] is None
        return [out[0], middle, redirect(run, model, positive, uncond, x, sigma) if safe else positive]
    safe_middle = middle if uncond is None else redirect(run, model, middle, uncond, x, sigma, "middle")
    if is_active(conds[2], sigma):
        # Plus exactly 0 where the middle is not flagged.
        positive = redirect(run, model, positive, middle, x, sigma) + (safe_middle - middle)
    return [out[0], safe_middle, positive]


def redirect(
    run: Run, model, cond_denoised: Tensor, uncond_denoised: Tensor, x: Tensor, sigma: Tensor, direction: str = "positive"
) -> Tensor:
    """`cond_denoised` (B, C, *spatial) with flagged rows redirected; as it came when the redirector cannot run."""
    patcher, info = patcher_of(model.current_patcher), run.settings.info
    if patcher is None:
        run.notice(f"{run.guider_name}: another node removed the HGR from the model; its guidance is not redirected.")
        return cond_denoised
    if x.ndim != info.latent_dimensions + 2 or x.shape[1] != info.latent_channels:
        run.notice(f"{run.guider_name} samples latents of shape {tuple(x.shape)}, which this HGR was not made for.")
        return cond_denoised
    x_in = model.model_sampling.calculate_input(sigma, x)
    sigmas = sigma.flatten().expand(len(x)) if sigma.numel() == 1 else sigma
    tensors = [t.to(patcher.load_device) for t in (cond_denoised, uncond_denoised, x_in, sigmas)]
    flagged = run.flagged.get(direction)
    flagged = flagged if flagged is not None and len(flagged) == len(x) else None
    result = hgr_models.redirect_guidance(patcher.model, *tensors, run.settings.categories, flagged)
    run.meter.show_step(run.evaluation, run.readings.add(run.evaluation, tensors[3], tensors[0], tensors[1], result))
    if run.settings.remember_flagged:
        run.flagged[direction] = result.weights
    if run.probing:
        run.flagged_probe.put((result.weights > 0).any())
        run.probing = False
    return result.cond_denoised.to(cond_denoised)


def _probe(run: Run, model, x: Tensor, sigma: Tensor, model_options: dict, base: int) -> Tensor | None:
    """The uncond_denoised that core saved itself (cfg 1), at a few evaluations of the run; else None."""
    negative = run.negative("empty_negative_prompt" if base == 2 else "negative")
    if not is_active(negative, sigma) or not run.probe_due():
        return None
    run.probing = True
    # [None, negative]: patches that tell the rows apart see an unconditional one.
    return comfy.samplers.calc_cond_batch(model, [None, negative], x, sigma, _without_caches(model_options))[1]


def _without_caches(model_options: dict) -> dict:
    transformer_options = dict(model_options.get("transformer_options", {}))
    wrappers = transformer_options.get("wrappers", {})
    transformer_options["wrappers"] = {
        kind: {key: list(functions) for key, functions in by_key.items() if key not in CACHES}
        for kind, by_key in wrappers.items()
    }
    return {**model_options, "transformer_options": transformer_options}


def _run_of_foreign_sampler(settings: ApplySettings) -> Run:
    """A run of one evaluation, for code that calls core's sampling function without its guiders."""
    message = "this sampler bypasses ComfyUI's guiders: prompts are not redirected, only its guidance is."
    if settings.strict:
        raise SafeCFGError(f"SafeCFG (strict): {message}")
    run = Run(settings)
    run.notice(message)
    return run
