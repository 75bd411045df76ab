"""The guidance redirector in a run: hooks that see every guidance direction of every guider exactly once.

    pre_cfg           sampling_function and PerpNegGuider: before any other node changes the guidance
    cfg, post_cfg     evaluations that skipped pre_cfg (DualModelGuider)
    calc_cond_batch   DualCFGGuider, whose second direction no CFG hook sees
    predict_noise     notices an evaluation that none of them saw

Unflagged rows come back bit for bit: the network's own `where` decides per row.
"""

import comfy.samplers
from torch import Tensor

from ... import hgr_models
from ..concept import concept_mode
from .finite import check_readings
from .packing import part_for
from .runs import ApplySettings, Evaluation, Run, SafeCFGError, is_active, patcher_of, run_of

CACHES = frozenset({"easycache", "lazycache"})  # wrappers that count evaluations; a probe must not advance them


def make_pre_cfg(settings: ApplySettings):
    """The hook for `sampler_pre_cfg_function`."""

    def pre_cfg(args):
        outputs, conds, sigma, evaluation = args["conds_out"], args["conds"], args["sigma"], _evaluation_of(args)
        followed = run_of(args["model_options"])
        run = followed or _run_of_foreign_sampler(settings)
        run.mark_handled(evaluation.x)
        base = 2 if len(outputs) == 3 else 1  # PerpNegGuider gives [positive, negative, empty] and guides away from empty
        if not run.window.contains(sigma) or not is_active(conds[0], sigma):
            return outputs
        if len(outputs) > base and conds[base] is not None:
            uncond_denoised = outputs[base] if is_active(conds[base], sigma) else None
        else:
            uncond_denoised = _probe(run, evaluation, base)
        if uncond_denoised is None:
            _notice_flagged_prompts(run)
            return outputs
        safe = redirect(run, evaluation, outputs[0], uncond_denoised)
        if followed is None:
            check_readings(run)  # such a sampler tells nobody when it ends
        return [safe, *outputs[1:]]

    return pre_cfg


def make_watch(settings: ApplySettings):
    """The hook for `sampler_pre_cfg_function` where guidance is not redirected: a sampler that prepares no prompts is noticed."""

    def watch(args):
        if run_of(args["model_options"]) is None:
            _run_of_foreign_sampler(settings)
        return args["conds_out"]

    return watch


def make_post_cfg(settings: ApplySettings):
    """The hook for `sampler_post_cfg_function`; it adds the scaled change, so nothing is added where nothing is flagged."""

    def post_cfg(args):
        change = _redirect_late(args, args["cond"], args["uncond"])
        return args["denoised"] if change is None else args["denoised"] + args["cond_scale"] * change

    return post_cfg


def wrap_cfg(function):
    """Another node's `sampler_cfg_function`, given redirected guidance where no pre_cfg hook did that: it may not be linear."""

    def cfg(args):
        if _redirect_late(args, args["input_cond"], args["input_uncond"]) is not None:
            args = {**args, "cond": args["input"] - args["cond_denoised"]}  # as core computes it
        return function(args)

    return cfg


def _redirect_late(args: dict, cond: list[dict] | None, uncond: list[dict] | None) -> Tensor | None:
    """What a CFG hook adds to `cond_denoised` in an evaluation that skipped pre_cfg; None where there is nothing to redirect.

    The tensor itself is redirected: core gives it to every later hook of the evaluation (PAG, CFGZero*, Mahiro read it).
    """
    x, sigma, run = args["input"], args["sigma"], run_of(args["model_options"])
    if run is None or run.handled_input is x:
        return None
    run.mark_handled(x)
    if not is_active(cond, sigma) or not run.window.contains(sigma):
        return None
    if not is_active(uncond, sigma):
        _notice_flagged_prompts(run)
        return None
    cond_denoised = args["cond_denoised"]
    safe = redirect(run, _evaluation_of(args), cond_denoised, args["uncond_denoised"])
    change = safe - cond_denoised
    cond_denoised.copy_(safe)
    return change


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
    evaluation = Evaluation(model, x, sigma, model_options)
    return _redirect_dual(run, evaluation, conds, out) if run.window.contains(sigma) else out


def _redirect_dual(run: Run, evaluation: Evaluation, conds, out) -> list[Tensor]:
    """[uncond, middle, positive] with middle redirected from uncond and positive from the raw middle."""
    (uncond, middle, positive), sigma = out, evaluation.sigma
    if conds[0] is None:
        uncond = _probe(run, evaluation, 1)
    elif not is_active(conds[0], sigma):
        uncond = None
    if uncond is None:
        _notice_flagged_prompts(run)
    if not is_active(conds[1], sigma):
        safe = uncond is not None and is_active(conds[2], sigma) and conds[1] is None
        return [out[0], middle, redirect(run, evaluation, positive, uncond) if safe else positive]
    safe_middle = middle if uncond is None else redirect(run, evaluation, middle, uncond, "middle")
    if is_active(conds[2], sigma):
        # Plus exactly 0 where the middle is not flagged.
        positive = redirect(run, evaluation, positive, middle) + (safe_middle - middle)
    return [out[0], safe_middle, positive]


def redirect(
    run: Run, evaluation: Evaluation, cond_denoised: Tensor, uncond_denoised: Tensor, direction: str = "positive"
) -> Tensor:
    """`cond_denoised` (B, C, *spatial) with flagged rows redirected; as it came when the redirector cannot run."""
    model, x, sigma = evaluation.model, evaluation.x, evaluation.sigma
    patcher, info = patcher_of(model.current_patcher), run.settings.info
    if patcher is None:
        run.notice(f"{run.guider_name}: another node removed the HGR from the model; its guidance is not redirected.")
        return cond_denoised
    if (part := part_for(x, run.latent_shapes, info)) is None:
        run.notice(f"{run.guider_name} samples latents of shape {tuple(x.shape)}, which this HGR was not made for.")
        return cond_denoised
    x_in = model.model_sampling.calculate_input(sigma, x)
    sigmas = sigma.flatten().expand(len(x)) if sigma.numel() == 1 else sigma
    tensors = [part.take(t).to(patcher.load_device) for t in (cond_denoised, uncond_denoised, x_in)]
    tensors.append(sigmas.to(patcher.load_device))
    flagged = run.flagged.get(direction)
    flagged = flagged if flagged is not None and len(flagged) == len(x) else None
    run.networks.add(patcher.model)
    result = hgr_models.redirect_guidance(patcher.model, *tensors, run.settings.categories, flagged)
    if run.settings.remember_flagged:
        run.flagged[direction] = result.weights
    if run.probing:
        run.flagged_probe.put((result.weights > 0).any())
        run.probing = False
    if run.settings.by_concept:
        guidance = tensors[0], tensors[1], tensors[3]
        extra_row = lambda conditions: part.take(_extra_row(evaluation, conditions))  # noqa: E731
        result = concept_mode.redirect(run, evaluation, guidance, result, direction, extra_row)
    run.meter.show_step(run.evaluation, run.readings.add(run.evaluation, tensors[3], tensors[0], tensors[1], result))
    return part.put(cond_denoised, result.cond_denoised.to(cond_denoised))


def _evaluation_of(args: dict) -> Evaluation:
    return Evaluation(args["model"], args["input"], args["sigma"], args["model_options"])


def _notice_flagged_prompts(run: Run) -> None:
    """Redirect mode concept acts through the guidance alone: without one, a flagged prompt passes."""
    if run.concepts.prompts:
        run.notice(
            f"{run.guider_name} has no active negative prompt in a part of the run: a flagged prompt is not redirected there. "
            "Let the negative act in the whole run, or set `redirect` to both."
        )


def _probe(run: Run, evaluation: Evaluation, base: int) -> Tensor | None:
    """The uncond_denoised that core saved itself (cfg 1), at a few evaluations of the run; else None."""
    negative = run.negative("empty_negative_prompt" if base == 2 else "negative")
    if not is_active(negative, evaluation.sigma) or not run.probe_due():
        return None
    run.probing = True
    return _extra_row(evaluation, negative)


def _extra_row(evaluation: Evaluation, conditions: list[dict]) -> Tensor:
    """The x0 prediction (B, C, *spatial) of conditions that core did not evaluate itself."""
    model, x, sigma, options = evaluation.model, evaluation.x, evaluation.sigma, without_caches(evaluation.model_options)
    # [None, conditions]: patches that tell the rows apart see an unconditional one.
    return comfy.samplers.calc_cond_batch(model, [None, conditions], x, sigma, options)[1]


def without_caches(model_options: dict) -> dict:
    """Model options for an extra evaluation, which caches must neither count nor answer."""
    transformer_options = dict(model_options.get("transformer_options", {}))
    wrappers = transformer_options.get("wrappers", {})
    transformer_options["wrappers"] = {
        kind: {key: list(functions) for key, functions in by_key.items() if key not in CACHES}
        for kind, by_key in wrappers.items()
    }
    return {**model_options, "transformer_options": transformer_options}


def _run_of_foreign_sampler(settings: ApplySettings) -> Run:
    """A run of one evaluation, for code that calls core's sampling function without its guiders."""
    message = "this sampler bypasses ComfyUI's guiders: prompts are not redirected"
    message += ", only its guidance is." if settings.by_guidance else ", and `redirect` is condition: nothing is."
    if settings.strict:
        raise SafeCFGError(f"SafeCFG (strict): {message}")
    run = Run(settings)
    run.notice(message)
    return run
