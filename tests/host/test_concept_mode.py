"""Redirect mode `concept` of `SafeCFG Apply` in runs: closed forms, rows, untouched pictures, and a clean end."""

import gc
import weakref
from types import SimpleNamespace

import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler
from safecfg import hgr_models
from safecfg.hgr_models import SLD_PRESETS
from safecfg.nodes.host.hooks import SafeCFGError
from safecfg.nodes.redirect import concept_mode, sampling_hooks

from concept_fakes import (
    SEEDS,
    SIGMA,
    SOFT,
    WITH_CONCEPTS,
    KnownFlags,
    alone,
    cfg_guider,
    concept_model,
    expected,
    record_rows,
)
from fakes import ALWAYS, NEVER, AtEverySigma, Once, apply_hgr, guide, make_hgr, sample
from tiny import tiny_conditioning

SHORT = (SIGMA, 0.0)  # one step: Strong's warm-up ends before the last
FLAGS = {  # prompt's weights, guidance's weights, the categories that are flagged
    "by the prompt": ((1.0, 0.0), (0.0, 0.0), ["red"]),
    "by the guidance": ((0.0, 0.0), (0.0, 1.0), ["blue"]),
    "by both": ((1.0, 0.0), (0.0, 1.0), ["red", "blue"]),
}


@pytest.mark.parametrize("cfg", [5.0, 1.0])
@pytest.mark.parametrize("name", FLAGS)
def test_one_step_is_the_closed_form(tiny_model, monkeypatch, name, cfg):
    prompt, guidance, categories = FLAGS[name]
    concepts = [alone(tiny_model, SEEDS[c]) for c in categories]
    plain = guide(cfg_guider(tiny_model, cfg), Once(), SHORT).out
    KnownFlags(monkeypatch, [prompt], [guidance])
    monkeypatch.setattr(concept_mode, "SLD", SOFT)
    result = guide(cfg_guider(concept_model(tiny_model), cfg), Once(), SHORT)
    torch.testing.assert_close(result.out, expected(result, concepts, cfg, SOFT), atol=2e-4, rtol=0)
    assert (result.out - plain).abs().max() > 0.05
    assert (result.out - expected(result, [alone(tiny_model, 8)], cfg, SOFT)).abs().max() > 0.01  # another concept would be seen


def test_its_setting_is_strong(tiny_model, monkeypatch):
    """On average: Strong's gates are so steep that rounding moves values at their edge."""
    KnownFlags(monkeypatch, [(1.0, 0.0)])
    result = guide(cfg_guider(concept_model(tiny_model)), Once(), SHORT)
    error = {
        name: (result.out - expected(result, [alone(tiny_model, 5)], 5.0, sld)).abs().mean() for name, sld in SLD_PRESETS.items()
    }
    assert error["Strong"] < 1e-3 < min(value for name, value in error.items() if name != "Strong")


def test_strength_scales_the_subtraction(tiny_model, monkeypatch):
    plain = guide(cfg_guider(tiny_model), Once(), SHORT).out
    outs = {}
    for strength in (1.0, 0.25):
        KnownFlags(monkeypatch, [(strength, 0.0)])
        outs[strength] = guide(cfg_guider(concept_model(tiny_model)), Once(), SHORT).out
    torch.testing.assert_close(outs[0.25] - plain, 0.25 * (outs[1.0] - plain), atol=1e-4, rtol=0)


def test_only_flagged_categories_are_candidates(tiny_model, monkeypatch):
    """The prompt itself is the best-aligned concept by far; it belongs to a category that is not flagged for row 0."""
    seeds = {"red": 5, "blue": 1}
    KnownFlags(monkeypatch, [(1.0, 0.0), (1.0, 1.0)])
    guider = comfy.samplers.CFGGuider(concept_model(tiny_model, concepts=seeds))
    guider.set_conds([[torch.cat([tiny_conditioning(1)[0][0]] * 2), {}]], tiny_conditioning(2))
    guider.set_cfg(5.0)
    both = guide(guider, Once(), SHORT, batch=2).out[0]
    KnownFlags(monkeypatch, [(1.0, 0.0)])
    guider.set_conds([[torch.cat([tiny_conditioning(1)[0][0]] * 2), {}]], tiny_conditioning(2))
    red = guide(guider, Once(), SHORT, batch=2).out[0]
    assert torch.equal(both, red)


@pytest.mark.parametrize("prompt, extra", [((0.0, 0.0), 0), ((1.0, 0.0), 1), ((1.0, 1.0), 2)])
def test_extra_rows(tiny_model, tiny_cond, monkeypatch, prompt, extra):
    """Only flagged categories cost a row, and other patches know it as unconditional."""
    plain, rows = sample(tiny_model, tiny_cond(1), tiny_cond(2)), record_rows(tiny_model)
    KnownFlags(monkeypatch, [prompt])
    safe = sample(concept_model(tiny_model), tiny_cond(1), tiny_cond(2))
    assert rows.count([1]) == 6 * extra and len(rows) == 6 * (1 + extra)
    assert torch.equal(safe, plain) == (extra == 0) and safe.isfinite().all()


def test_a_flag_acts_in_its_own_step_and_is_remembered(tiny_model, tiny_cond, monkeypatch):
    rows = record_rows(tiny_model)
    for remember, wanted in ((False, 1), (True, 4)):
        rows.clear()
        KnownFlags(monkeypatch, guidance=[(1.0, 0.0)], calls=[2])
        sample(concept_model(tiny_model, remember_flagged=remember), tiny_cond(1), tiny_cond(2))
        assert rows.count([1]) == wanted


def test_unflagged_pictures_stay_in_a_mixed_batch(tiny_model, tiny_cond, monkeypatch):
    """Rows 1 and 3, one by its prompt and one by its guidance."""
    arguments = (tiny_cond(1, batch=4), tiny_cond(2))
    plain = sample(tiny_model, *arguments, batch=4)
    KnownFlags(monkeypatch, [(0, 0), (1.0, 0), (0, 0), (0, 0)], [(0, 0), (0, 0), (0, 0), (0, 1.0)])
    safe = sample(concept_model(tiny_model), *arguments, batch=4)
    assert [torch.equal(a, b) for a, b in zip(plain, safe, strict=True)] == [True, False, True, False]


def test_a_late_flag_does_not_depend_on_the_batch(tiny_model, tiny_cond, monkeypatch):
    """Row 0 is flagged from the third step on; until then row 1, flagged from the start, must not build up its momentum."""
    last = {}
    for other in (0.0, 1.0):
        flags = KnownFlags(monkeypatch, [(0.0, 0.0), (other, 0.0)])
        told = flags.redirect_guidance

        def late(*args, flags=flags, told=told):
            flags.guidance = torch.tensor([(1.0 if flags.count >= 2 else 0.0, 0.0), (0.0, 0.0)])
            return told(*args)

        monkeypatch.setattr(hgr_models, "redirect_guidance", late)
        last[other] = sample(concept_model(tiny_model), tiny_cond(1, batch=2), tiny_cond(2), batch=2)
    torch.testing.assert_close(last[0.0][0], last[1.0][0], atol=1e-5, rtol=0)
    assert (last[0.0][1] - last[1.0][1]).abs().max() > 0.01


def test_real_networks_decide(tiny_model, tiny_cond):
    encoded = tuple(tiny_conditioning(seed, tokens=5)[0] for seed in SEEDS.values())
    plain = sample(tiny_model, tiny_cond(1), tiny_cond(2))
    for condition, guidance in ((ALWAYS, NEVER), (NEVER, ALWAYS), (NEVER, NEVER)):
        hgr = make_hgr(condition, guidance, WITH_CONCEPTS)
        safe = sample(apply_hgr(tiny_model, hgr, redirect="concept", concepts=encoded), tiny_cond(1), tiny_cond(2))
        assert safe.isfinite().all() and torch.equal(safe, plain) == (condition == guidance == NEVER)


def test_the_window_and_the_prompts_time_limit_it(tiny_model, tiny_cond, monkeypatch):
    rows = record_rows(tiny_model)
    KnownFlags(monkeypatch, [(1.0, 0.0)])
    sample(concept_model(tiny_model, start_percent=0.3, end_percent=0.7), tiny_cond(1), tiny_cond(2), steps=12)
    assert rows.count([1]) == 4
    rows.clear()
    split = [[tiny_cond(1)[0][0], {"end_percent": 0.5}], [tiny_cond(3, tokens=14)[0][0], {"start_percent": 0.5}]]
    monkeypatch.setattr(hgr_models, "redirect_condition", _only_long_prompts)
    sample(concept_model(tiny_model), split, tiny_cond(2), steps=12)
    assert 4 <= rows.count([1]) <= 8  # the first half's prompt is clean


def _only_long_prompts(hgr, tokens, pooled, settings, mask=None):
    weights = torch.tensor([[float(tokens.shape[1] == 14), 0.0]])
    return hgr_models.ConditionResult(tokens, pooled, weights, weights)


@pytest.mark.parametrize("middle_flagged", [False, True])
def test_dual_cfg_judges_each_prompt_alone(tiny_model, monkeypatch, middle_flagged):
    """Each direction is steered for its own prompt's flags, and has a momentum of its own; the positive's starts at the middle."""
    guider = nodes_custom_sampler.Guider_DualCFG(concept_model(tiny_model))
    monkeypatch.setattr(concept_mode, "SLD", SOFT)
    middle_tokens = 14 if middle_flagged else 7
    guider.set_conds(tiny_conditioning(1, tokens=14), tiny_conditioning(3, tokens=middle_tokens), tiny_conditioning(2))
    guider.set_cfg(3.0, 5.0, False)
    KnownFlags(monkeypatch)
    monkeypatch.setattr(hgr_models, "redirect_condition", _only_long_prompts)
    result = guide(guider, Once(), SHORT)
    uncond, middle, positive = (result.alone[role] for role in ("negative", "middle", "positive"))
    step = lambda start, end: SimpleNamespace(x=result.x, alone={"negative": start, "positive": end})  # noqa: E731
    safe = expected(step(middle, positive), [alone(tiny_model, 5)], 1.0, SOFT)
    safe_middle = expected(step(uncond, middle), [alone(tiny_model, 5)], 1.0, SOFT) if middle_flagged else middle
    wanted = uncond + 5.0 * (safe_middle - uncond) + 3.0 * (safe - middle)
    torch.testing.assert_close(result.out, wanted, atol=4e-4, rtol=0)


@pytest.mark.parametrize("prompt, extra", [((0.0, 0.0), 3), ((1.0, 0.0), 40)])
def test_cfg_1_costs_the_negative_while_a_prompt_is_flagged(tiny_model, tiny_cond, monkeypatch, prompt, extra):
    rows = record_rows(tiny_model)
    KnownFlags(monkeypatch, [prompt])
    sample(concept_model(tiny_model), tiny_cond(1), tiny_cond(2), 1.0, steps=20)
    assert rows.count([0]) == 20 and rows.count([1]) == extra  # three probes; or the negative and the concept in every step


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_a_negative_outside_its_time_leaves_no_step_unguarded(tiny_model, tiny_cond, monkeypatch, cfg):
    KnownFlags(monkeypatch, [(1.0, 0.0)])
    late, steered = [[tiny_cond(2)[0][0], {"start_percent": 0.5}]], []
    real = concept_mode.redirect
    monkeypatch.setattr(concept_mode, "redirect", lambda *args: (steered.append(1), real(*args))[1])
    assert sample(concept_model(tiny_model, strict=True), tiny_cond(1), late, cfg=cfg, steps=6).isfinite().all()
    assert len(steered) == 6


def test_without_its_rows_it_says_so(tiny_model, monkeypatch):
    KnownFlags(monkeypatch, [(1.0, 0.0)])
    monkeypatch.setattr(concept_mode, "encode", lambda *args, **facts: None)
    with pytest.raises(SafeCFGError, match="its concept could not be encoded"):
        guide(cfg_guider(concept_model(tiny_model)), Once(), SHORT)


def test_the_warm_up_is_a_fraction_of_the_run(tiny_model, monkeypatch):
    sigmas = [*torch.linspace(10.0, 0.5, 8).tolist(), 0.0]
    plain = guide(cfg_guider(tiny_model), AtEverySigma(), sigmas).outs
    KnownFlags(monkeypatch, [(1.0, 0.0)])
    safe = guide(cfg_guider(concept_model(tiny_model)), AtEverySigma(), sigmas).outs
    assert [torch.equal(safe[s], plain[s]) for s in plain if s > 0] == [True] + [False] * 7


def test_nothing_outlives_a_run(tiny_model, tiny_cond, monkeypatch):
    alive, start = [], sampling_hooks._start_run

    def started(*args):
        run = start(*args)
        alive.extend([weakref.ref(run), weakref.ref(run.concepts)])
        return run

    monkeypatch.setattr(sampling_hooks, "_start_run", started)
    model = concept_model(tiny_model, remember_flagged=True)
    KnownFlags(monkeypatch, [(1.0, 0.0)])
    first = sample(model, tiny_cond(1), tiny_cond(2))
    gc.collect()
    assert len(alive) == 2 and all(reference() is None for reference in alive)
    sample(model, tiny_cond(7), tiny_cond(2), steps=3)
    assert torch.equal(sample(model, tiny_cond(1), tiny_cond(2)), first)
