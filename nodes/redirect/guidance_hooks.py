"""The guidance redirector in a run: hooks that see every guidance direction of every guider exactly once.

    pre_cfg           sampling_function and PerpNegGuider: before any other node changes the guidance
    cfg, post_cfg     evaluations that skipped pre_cfg (DualModelGuider)
    calc_cond_batch   DualCFGGuider, whose second direction no CFG hook sees
    predict_noise     notices an evaluation that none of them saw

Unflagged rows come back bit for bit: the network's own `where` decides per row.
"""

from collections.abc import Callable

from comfy.model_base import BaseModel
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor

from ... import hgr_models
from ..host.hooks import SafeCFGError, is_active
from ..host.packed_latents import part_for
from ..host.settings import ApplySettings
from . import concept_mode
from .nan_guard import check_readings
from .negative_rows import extra_row, negative_row
from .others import guarded
from .runs import Evaluation, Run, patcher_of, run_of

ROLES = {"cond": "positive", "uncond": "negative"}


def _path_of(args: dict) -> tuple:
    run = run_of(args.get("model_options"))
    return args.get("model_options"), run.guider if run is not None else None


def make_pre_cfg(settings: ApplySettings) -> Callable:
    """The hook for `sampler_pre_cfg_function`."""

    @guarded("redirect the guidance", _path_of)
    def pre_cfg(args: dict) -> list[Tensor]:
        followed = run_of(args.get("model_options"))
        run = followed or _run_of_foreign_sampler(settings)
        outputs = _redirect_early(run, args)
        if followed is None:
            check_readings(run)  # such a sampler tells nobody when it ends
        return outputs

    return pre_cfg


def _redirect_early(run: Run, args: dict) -> list[Tensor]:
    """`conds_out` with the guidance redirected. An evaluation counts as handled only when it was read, or draws nothing."""
    outputs, evaluation = args["conds_out"], _evaluation_of(args)
    sigma, conds = evaluation.sigma, args.get("conds") or [_role(run, "positive"), _role(run, "negative")]
    if not run.window.contains(sigma):
        run.current.mark_handled(evaluation.x)
        return outputs
    if not is_active(conds[0], sigma):
        if conds[0] or not is_active(_role(run, "positive"), sigma):
            run.current.mark_handled(evaluation.x)  # nothing is drawn
        else:
            run.current.withheld = True  # another node took the prompt away: what it draws later is not seen here
        return outputs
    if outputs[0].shape != evaluation.x.shape:
        return outputs  # several predictions stacked: the CFG function gets them one by one, and so do our later hooks
    base = 2 if len(outputs) == 3 else 1  # PerpNegGuider gives [positive, negative, empty] and guides away from empty
    negative = conds[base] if len(outputs) > base and len(conds) > base else None
    role = "empty_negative_prompt" if base == 2 else "negative"
    active = negative is not None and is_active(negative, sigma)
    uncond_denoised = outputs[base] if active else negative_row(run, evaluation, role, negative)
    run.current.mark_handled(evaluation.x)
    if uncond_denoised is None:
        _notice_flagged_prompts(run)
        return outputs
    safe = redirect(run, evaluation, outputs[0], uncond_denoised)
    run.consistency.returned(uncond_denoised, outputs[0], safe)
    return [safe, *outputs[1:]]


def make_watch(settings: ApplySettings) -> Callable:
    """The hook for `sampler_pre_cfg_function` where guidance is not redirected: a sampler that prepares no prompts is noticed."""

    def watch(args: dict) -> list[Tensor]:
        if run_of(args.get("model_options")) is None:
            _run_of_foreign_sampler(settings)
        return args["conds_out"]

    return watch


def make_post_cfg(settings: ApplySettings) -> Callable:
    """The hook for `sampler_post_cfg_function`; it adds the scaled change, so nothing is added where nothing is flagged."""

    @guarded("redirect the guidance", _path_of)
    def post_cfg(args: dict) -> Tensor:
        run = run_of(args.get("model_options"))
        if run is not None and not run.consistency.used(args["cond_denoised"]) and run.foreign:
            run.consistency.add(args["denoised"])
        change = _redirect_late(args, "cond", "uncond")
        if change is None:
            return args["denoised"]
        scale = args.get("cond_scale", getattr(run.guider, "cfg", 1.0))
        return args["denoised"] + scale * change

    return post_cfg


def wrap_cfg(function: Callable) -> Callable:
    """Another node's `sampler_cfg_function`, given redirected guidance where no pre_cfg hook did that: it may not be linear."""

    redirect_late = guarded("redirect the guidance", lambda args, *_: _path_of(args))(_redirect_late)

    def cfg(args: dict) -> Tensor:
        if redirect_late(args, "input_cond", "input_uncond") is not None:
            args = {**args, "cond": args["input"] - args["cond_denoised"]}  # as core computes it
        return function(args)

    cfg._safecfg_wraps = function  # type: ignore[attr-defined]
    return cfg


def _redirect_late(args: dict, cond: str, uncond: str) -> Tensor | None:
    """What a CFG hook adds to `cond_denoised` in an evaluation that skipped pre_cfg; None where there is nothing to redirect.

    The tensor itself is redirected: core gives it to every later hook of the evaluation (PAG, CFGZero*, Mahiro read it).
    """
    run = run_of(args.get("model_options"))
    if run is None or run.current.handled_input is args["input"] or run.current.withheld:
        return None
    evaluation, cond_denoised = _evaluation_of(args), args["cond_denoised"]
    if any(done is cond_denoised for done in run.current.handled_late):
        return None
    run.current.handled = True
    sigma, conditions, negative = evaluation.sigma, *(_conditions(run, args, name) for name in (cond, uncond))
    if not is_active(conditions, sigma) or not run.window.contains(sigma):
        return None
    active = is_active(negative, sigma)
    uncond_denoised = args["uncond_denoised"] if active else negative_row(run, evaluation, given=negative)
    if uncond_denoised is None:
        _notice_flagged_prompts(run)
        return None
    run.current.handled_late.append(cond_denoised)  # one evaluation may have several: each is redirected once
    safe = redirect(run, evaluation, cond_denoised, uncond_denoised)
    change = safe - cond_denoised
    cond_denoised.copy_(safe)
    return change


def _conditions(run: Run, args: dict, name: str) -> list[dict] | None:
    """The conditions of a CFG hook's argument; where another pack's code leaves it out, the guider's own."""
    return args[name] if name in args else _role(run, ROLES[name.removeprefix("input_")])


def _role(run: Run, role: str) -> list[dict] | None:
    return getattr(run.guider, "conds", {}).get(role)


def predict_noise(executor: WrapperExecutor, x: Tensor, *args, **kwargs) -> Tensor:
    """PREDICT_NOISE wrapper: an evaluation that no hook saw is noticed."""
    guider = executor.class_obj
    if (run := run_of(guider.model_options)) is None:
        return executor(x, *args, **kwargs)
    run.begin(x)
    try:
        out = executor(x, *args, **kwargs)
        if run.foreign:
            run.consistency.add(out)
    finally:
        run.current.close()
    if run.settings.by_condition and not run.saw_conditions:
        run.notice(f"{run.guider_name} samples without preparing its prompts through ComfyUI: they are not redirected.")
    if run.settings.by_guidance and run.current.missed and run.current.withheld:
        run.notice(
            f"{run.path} took the prompt out of an evaluation and draws it elsewhere: the guidance redirector could not run."
        )
    elif run.settings.by_guidance and run.current.missed:
        run.notice(f"{run.path} evaluated the model without any guidance hook: the guidance redirector could not run.")
    return out


@guarded("look for prompts in patches", lambda run, *_: (run.guider.model_options, run.guider))
def _before_batch(
    run: Run, model: BaseModel, conds: list[list[dict] | None], x: Tensor, sigma: Tensor, model_options: dict
) -> None:
    """For every batch of conditions: whether a guider asked for it, and whether other nodes brought prompts in the meantime."""
    if run.current.x is None and any(is_active(c, sigma) for c in conds if c is not None and c is not _role(run, "negative")):
        run.notice(f"{run.path}: the sampler asks the model itself, past its guider, and gets what is not redirected.")
    if run.settings.by_condition and run.saw_conditions and (patcher := patcher_of(model.current_patcher)) is not None:
        run.patch_text.find_new(run, patcher, model_options, x, sigma)


def calc_cond_batch(
    executor: WrapperExecutor,
    model: BaseModel,
    conds: list[list[dict] | None],
    x: Tensor,
    sigma: Tensor,
    model_options: dict | None,
) -> list[Tensor]:
    """CALC_COND_BATCH wrapper: redirects both directions of DualCFGGuider, negative -> middle -> positive."""
    if (run := run_of(model_options)) is None:
        return executor(model, conds, x, sigma, model_options)
    _before_batch(run, model, conds, x, sigma, model_options)
    out = executor(model, conds, x, sigma, model_options)
    run.current.model_ran = True
    if not run.settings.sees_guidance or not run.is_dual or len(conds) != 3 or run.current.x is None:
        return out
    if not run.window.contains(sigma):
        run.current.mark_handled(run.current.x)  # x is only a part of it under context windows
        return out
    return _redirect_dual(run, Evaluation(model, x, sigma, model_options), conds, out)


def _dual_path(run: Run, evaluation: Evaluation, *_) -> tuple:
    return evaluation.model_options, run.guider


@guarded("redirect the guidance", _dual_path)
def _redirect_dual(run: Run, evaluation: Evaluation, conds: list[list[dict] | None], out: list[Tensor]) -> list[Tensor]:
    """[uncond, middle, positive] with middle redirected from uncond and positive from the raw middle."""
    uncond: Tensor | None
    (uncond, middle, positive), sigma = out, evaluation.sigma
    if conds[0] is None or not is_active(conds[0], sigma):
        uncond = negative_row(run, evaluation, given=conds[0])
    run.current.mark_handled(run.current.x)
    if uncond is None:
        _notice_flagged_prompts(run)
    if not is_active(conds[1], sigma):
        safe = uncond is not None and is_active(conds[2], sigma)
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
    if run.current.probing:
        run.probes.flagged.put((result.weights > 0).any())
        run.current.probing = False
    if run.settings.by_concept:
        guidance = tensors[0] if run.settings.judges_only else result.cond_denoised, tensors[1], tensors[3]
        concept_row = lambda conditions: part.take(extra_row(evaluation, conditions))  # noqa: E731
        result = concept_mode.redirect(run, evaluation, guidance, result, direction, concept_row)
    run.meter.show_step(run.evaluations, run.readings.add(run.evaluations, tensors[3], tensors[0], tensors[1], result))
    return part.put(cond_denoised, result.cond_denoised.to(cond_denoised))


def _evaluation_of(args: dict) -> Evaluation:
    return Evaluation(args["model"], args["input"], args.get("sigma", args.get("timestep")), args.get("model_options") or {})


def _notice_flagged_prompts(run: Run) -> None:
    """Redirect mode concept acts through the guidance alone: without one, a flagged prompt passes."""
    if run.concepts.prompts and run.settings.judges_only:
        run.notice(
            f"{run.guider_name} has no active negative prompt in a part of the run: a flagged prompt is not redirected there. "
            "Let the negative act in the whole run, or set `redirect` to both."
        )


def _run_of_foreign_sampler(settings: ApplySettings) -> Run:
    """A run of one evaluation, for code that calls core's sampling function without its guiders."""
    message = "this sampler bypasses ComfyUI's guiders: prompts are not redirected"
    message += ", only its guidance is." if settings.by_guidance else ", and `redirect` is condition: nothing is."
    if settings.strict:
        raise SafeCFGError(f"SafeCFG (strict): {message}{settings.refusal}")
    run = Run(settings)
    run.notice(message)
    return run
