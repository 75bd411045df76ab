"""Mistakes that redirecting could have: each must turn a case of the coverage matrix red, for the reason that it is."""

import dataclasses
from collections import Counter

import pytest
import torch
from safecfg import hgr_models
from safecfg.nodes.host.hooks import POST_CFG, PRE_CFG
from safecfg.nodes.redirect import conditions, guidance_hooks, sampling_hooks
from safecfg.nodes.redirect.runs import Run

import matrix_check
from fakes import turned
from matrix import WAYS
from matrix_check import TALLY, check
from matrix_ideal import rewritten
from patches import case_of

REDIRECT = guidance_hooks.redirect
REWRITTEN, REDIRECT_CONDITIONS = conditions._rewritten, conditions.redirect_conditions
START_RUN, REDIRECT_LATE = sampling_hooks._start_run, guidance_hooks._redirect_late


def applied_twice(run, evaluation, cond_denoised, uncond_denoised, *direction):
    safe = REDIRECT(run, evaluation, cond_denoised, uncond_denoised, *direction)
    return REDIRECT(run, evaluation, safe, uncond_denoised, *direction)


def turned_twice(run, evaluation, cond_denoised, uncond_denoised, *direction):
    """With the right count."""
    safe = REDIRECT(run, evaluation, cond_denoised, uncond_denoised, *direction)
    return torch.where(safe == cond_denoised, safe, uncond_denoised + turned(safe - uncond_denoised))


def never(run, evaluation, cond_denoised, *_):
    return cond_denoised


def computed_in_vain(run, evaluation, cond_denoised, *rest):
    REDIRECT(run, evaluation, cond_denoised, *rest)
    return cond_denoised


def rebuilt(run, evaluation, cond_denoised, uncond_denoised, *direction):
    """Seen at cfg 1 and near the end: elsewhere core subtracts `u` again, and the bits come back."""
    return uncond_denoised + (REDIRECT(run, evaluation, cond_denoised, uncond_denoised, *direction) - uncond_denoised)


def second_direction_missed(run, evaluation, cond_denoised, uncond_denoised, direction="positive"):
    """DualCFGGuider's, which no CFG hook of core's sees."""
    if run.is_dual and direction == "positive":
        return cond_denoised
    return REDIRECT(run, evaluation, cond_denoised, uncond_denoised, direction)


def prompt_twice(original, result):
    return REWRITTEN(original, dataclasses.replace(result, tokens=rewritten(result.tokens)))


def clean_rows_touched(original, result):
    return REWRITTEN(original, dataclasses.replace(result, tokens=result.tokens * 1.000003))


def prompts_never(run, patcher, conds):
    run.saw_conditions = True
    return conds


class PromptsOfTheLastRun:
    """Takes every run's prompts for those of the first."""

    def __init__(self):
        self.conds = None

    def __call__(self, run, patcher, conds):
        self.conds = self.conds or REDIRECT_CONDITIONS(run, patcher, conds)
        run.saw_conditions = True
        return {role: [dict(entry) for entry in entries] for role, entries in self.conds.items()}


class FlagsOfTheLastRun:
    """A run that starts with what the one before remembered."""

    def __init__(self):
        self.flagged = {}

    def __call__(self, *args):
        run = START_RUN(*args)
        run.flagged = self.flagged
        return run


def categories_ignored(settings, *args):
    everything = hgr_models.CategorySettings((1.0,) * len(settings.info.categories))
    return START_RUN(dataclasses.replace(settings, categories=everything), *args)


def hooks_last(model_options, hooks):
    for name in (PRE_CFG, POST_CFG):
        others = [f for f in model_options.get(name, []) if not getattr(f, "_safecfg", False)]
        model_options[name] = others + [hooks[name] for _ in range(name in hooks)]


def later_hooks_see_harm(args, *conditions):
    return REDIRECT_LATE({**args, "cond_denoised": args["cond_denoised"].clone()}, *conditions)


GUIDANCE, PROMPTS = (guidance_hooks, "redirect"), (conditions, "redirect_conditions")
AT_CFG_1 = {"steps": 4, "cfg": 1.0}
NOT_CLOSE, CLEAN_ROW, CLEAN_RUN = "not close", "a clean picture changed", "a clean run after a harmful one changed"
MUTATIONS = {  # by name: where, what, in which case, what the matrix says
    "guidance redirected twice": (*GUIDANCE, applied_twice, ("KSampler", "none"), "2 redirections, not 1"),
    "guidance turned twice": (*GUIDANCE, turned_twice, ("KSampler", "none"), NOT_CLOSE),
    "guidance never redirected": (*GUIDANCE, never, ("PerpNegGuider", "none"), "0 redirections, not 1"),
    "guidance redirected in vain": (*GUIDANCE, computed_in_vain, ("KSampler", "none"), NOT_CLOSE),
    "guidance rebuilt as u + (c - u)": (*GUIDANCE, rebuilt, ("KSampler", "none"), CLEAN_ROW),
    "a direction missed": (*GUIDANCE, second_direction_missed, ("DualCFGGuider nested", "none"), "1 redirections, not 2"),
    "prompts rewritten twice": (conditions, "_rewritten", prompt_twice, ("BasicGuider", "none"), NOT_CLOSE),
    "prompts never rewritten": (*PROMPTS, prompts_never, ("BasicGuider", "none"), NOT_CLOSE),
    "clean prompts touched": (conditions, "_rewritten", clean_rows_touched, ("KSampler", "none"), CLEAN_ROW),
    "negative prompts rewritten": (conditions, "NEGATIVE_ROLES", (), ("KSampler", "none"), NOT_CLOSE),
    "flags kept from the last run": (sampling_hooks, "_start_run", FlagsOfTheLastRun, ("KSampler", "none"), CLEAN_RUN),
    "prompts kept from the last run": (*PROMPTS, PromptsOfTheLastRun, ("KSampler", "none"), CLEAN_RUN),
    "switched-off categories redirected": (sampling_hooks, "_start_run", categories_ignored, ("KSampler", "none"), "category switched off"),
    "other nodes first": (sampling_hooks, "put_hooks", hooks_last, ("KSampler", "APG"), NOT_CLOSE),
    "what a cfg function gave redirected": (guidance_hooks, "wrap_cfg", lambda function: function, ("DualModelGuider", "RescaleCFG"), NOT_CLOSE),
    "later hooks not told": (guidance_hooks, "_redirect_late", later_hooks_see_harm, ("DualModelGuider", "Mahiro"), NOT_CLOSE),
    "no alarm": (sampling_hooks, "_notice_missing_negative", lambda run: None, ("BasicGuider", "none"), "0 alarms"),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, mutation in MUTATIONS.items() if mutation[3][0] in WAYS])
def test_a_mutation_is_caught(monkeypatch, caplog, matrix_model, name):
    module, function, mutant, case, message = MUTATIONS[name]
    monkeypatch.setattr(matrix_check, "TALLY", Counter())  # a wrong case does not count
    monkeypatch.setattr(module, function, mutant() if isinstance(mutant, type) else mutant)
    if mutant is FlagsOfTheLastRun:
        monkeypatch.setattr(Run, "clear", lambda run: None)
    with pytest.raises(AssertionError, match=message):
        check(monkeypatch, caplog, matrix_model, case_of(*case, **(AT_CFG_1 if mutant is rebuilt else {})))
    TALLY["mutations caught"] += 1
