"""The condition redirector in core's runs: it is as if the user had written the safe prompt, and nothing else changes."""

import copy
import dataclasses

import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler
from safecfg import hgr_models
from safecfg.hgr_models import HGRError
from safecfg.nodes.host.hooks import SafeCFGError, is_active
from safecfg.nodes.redirect import conditions
from safecfg.nodes.redirect.runs import Run, Window

from fakes import ALWAYS, INFO, NEVER, AtEverySigma, apply_hgr, guide, make_hgr, make_settings, sample

BY_CONDITION = {"redirect": "condition"}


def hgr_between(*tokens: torch.Tensor):
    """An HGR that flags the first prompts' rows and not the last's: the threshold lies between their harmfulness.

    Its guidance redirector never flags."""
    hgr = make_hgr(ALWAYS, NEVER)
    levels = [float(hgr.patcher.model.condition.harmfulness(t).max()) for t in tokens]
    assert min(levels[:-1]) > levels[-1], "choose other seeds"
    middle = (min(levels[:-1]) + levels[-1]) / 2
    return make_hgr(middle, NEVER)


def redirected(hgr, conditioning):
    """The CONDITIONING that the user would have to write."""
    settings = hgr_models.CategorySettings((1.0, 1.0))
    return [
        [hgr_models.redirect_condition(hgr.patcher.model, c, None, settings).tokens, dict(extra)] for c, extra in conditioning
    ]


def make_basic(model, positive, _, cfg):
    guider = nodes_custom_sampler.Guider_Basic(model)
    guider.set_conds(positive)
    return guider


def make_cfg(model, positive, negative, cfg):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def make_dual(model, positive, negative, cfg):
    guider = nodes_custom_sampler.Guider_DualCFG(model)
    guider.set_conds(positive, positive, negative)
    guider.set_cfg(cfg, 2.0)
    return guider


@pytest.mark.parametrize("cfg", [5.0, 1.0])
@pytest.mark.parametrize("make", [make_cfg, make_basic, make_dual])
def test_equals_the_safe_prompt(tiny_model, tiny_cond, make, cfg):
    hgr, sigmas = make_hgr(), (3.0, 1.0, 0.0)
    wanted = guide(make(tiny_model, redirected(hgr, tiny_cond(1)), tiny_cond(2), cfg), AtEverySigma(), sigmas)
    got = guide(make(apply_hgr(tiny_model, hgr, **BY_CONDITION), tiny_cond(1), tiny_cond(2), cfg), AtEverySigma(), sigmas)
    plain = guide(make(tiny_model, tiny_cond(1), tiny_cond(2), cfg), AtEverySigma(), sigmas)
    for sigma in sigmas:
        assert torch.equal(got.outs[sigma], wanted.outs[sigma])
    assert (got.outs[3.0] - plain.outs[3.0]).abs().max() > 0.01


@pytest.mark.parametrize("cfg", [5.0, 1.0])
@pytest.mark.parametrize("redirect", ["both", "condition"])
def test_clean_is_bit_identical(tiny_model, tiny_cond, cfg, redirect):
    plain = sample(tiny_model, tiny_cond(1), tiny_cond(2), cfg)
    assert torch.equal(
        sample(apply_hgr(tiny_model, make_hgr(NEVER, NEVER), redirect=redirect), tiny_cond(1), tiny_cond(2), cfg), plain
    )


def test_rows_of_a_batch_are_judged_alone(tiny_model, tiny_cond):
    harmful, clean = tiny_cond(1)[0][0], tiny_cond(3)[0][0]
    if float(make_hgr().patcher.model.condition.harmfulness(harmful).max()) < float(
        make_hgr().patcher.model.condition.harmfulness(clean).max()
    ):
        harmful, clean = clean, harmful
    batch = [[torch.cat([clean, harmful, clean, harmful]), {}]]
    plain = sample(tiny_model, batch, tiny_cond(2), batch=4)
    safe = sample(apply_hgr(tiny_model, hgr_between(harmful, clean)), batch, tiny_cond(2), batch=4)
    assert [torch.equal(a, b) for a, b in zip(plain, safe, strict=True)] == [True, False, True, False]


def test_only_flagged_conditions_change_and_negatives_never(tiny_model, tiny_cond):
    seeds = sorted(range(1, 6), key=lambda s: -float(make_hgr().patcher.model.condition.harmfulness(tiny_cond(s)[0][0]).max()))
    harmful, clean = tiny_cond(seeds[0]), tiny_cond(seeds[-1])
    hgr = hgr_between(harmful[0][0], clean[0][0])
    safe = apply_hgr(tiny_model, hgr)
    assert torch.equal(sample(safe, clean, harmful), sample(tiny_model, clean, harmful))
    both = harmful + clean  # ConditioningCombine
    assert torch.equal(sample(safe, both, clean), sample(tiny_model, redirected(hgr, harmful) + clean, clean))


def test_the_users_conditioning_stays_as_it_is(tiny_model, tiny_cond):
    positive = [[tiny_cond(1)[0][0], {"pooled_output": torch.ones(1, 8), "start_percent": 0.1}]]
    before = copy.deepcopy(positive)
    sample(apply_hgr(tiny_model, start_percent=0.2, end_percent=0.6), positive, tiny_cond(2))
    assert positive[0][1].keys() == before[0][1].keys()
    assert torch.equal(positive[0][0], before[0][0]) and torch.equal(positive[0][1]["pooled_output"], torch.ones(1, 8))


def test_zeroed_prompts_never_flag(tiny_model, tiny_cond):
    zero = [[torch.zeros_like(tiny_cond(1)[0][0]), {}]]
    model = apply_hgr(tiny_model, **BY_CONDITION)
    assert torch.equal(sample(model, zero, tiny_cond(2)), sample(tiny_model, zero, tiny_cond(2)))


def outputs(model, positive, negative, sigmas, cfg=4.0):
    return guide(make_cfg(model, positive, negative, cfg), AtEverySigma(), sigmas).outs


POSITIVES = {
    "whole": lambda c: [[c(1)[0][0], {}]],
    "with a time of its own": lambda c: [[c(1)[0][0], {"start_percent": 0.1, "end_percent": 0.6}], *c(3)],
    "with an area": lambda c: [[c(1)[0][0], {"area": (4, 8, 2, 0), "strength": 0.8}], *c(3)],
    "with a mask": lambda c: [[c(1)[0][0], {"mask": torch.eye(8)[None], "mask_strength": 0.9}], *c(3)],
}


@pytest.mark.parametrize("shape", POSITIVES)
@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_outside_the_window_the_prompt_acts_as_it_was(tiny_model, tiny_cond, scheduler, shape):
    """At every sigma a run with a window is, to the last bit, the plain run or the run that is redirected throughout."""
    hgr, positive, sampling = make_hgr(), POSITIVES[shape](tiny_cond), tiny_model.model.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, 5).tolist()
    sigmas += [sampling.percent_to_sigma(p) for p in (0.3, 0.7)]  # the window's own bounds
    plain, full = (outputs(m, positive, tiny_cond(2), sigmas) for m in (tiny_model, apply_hgr(tiny_model, hgr, **BY_CONDITION)))
    safe = outputs(apply_hgr(tiny_model, hgr, **BY_CONDITION, start_percent=0.3, end_percent=0.7), positive, tiny_cond(2), sigmas)
    inside = [s for s in safe if sampling.percent_to_sigma(0.7) < s <= sampling.percent_to_sigma(0.3)]
    assert inside and len(inside) < len(safe)
    for sigma, out in safe.items():
        assert torch.equal(out, (full if sigma in inside else plain)[sigma]), sigma


def test_an_area_of_the_negative_keeps_its_window_too(tiny_model, tiny_cond):
    """Core then gives the positive a copy with that area, which shares the redirected encoding."""
    hgr, sigmas = make_hgr(), (10.0, 2.0, 0.5)
    negative = [*tiny_cond(2), [tiny_cond(4)[0][0], {"area": (4, 8, 2, 0)}]]
    plain = outputs(tiny_model, tiny_cond(1), negative, sigmas)
    safe = outputs(apply_hgr(tiny_model, hgr, **BY_CONDITION, start_percent=0.3, end_percent=0.7), tiny_cond(1), negative, sigmas)
    assert [torch.equal(plain[s], safe[s]) for s in sigmas] == [True, False, True]


@pytest.mark.parametrize("start, end", [(0.0, 0.4), (0.4, 1.0), (0.25, 0.26), (0.2, 0.8)])
@pytest.mark.parametrize(
    "own", [{}, {"timestep_start": 5.0}, {"timestep_end": 1.0}, {"timestep_start": 3.3, "timestep_end": 0.7}]
)
def test_copies_never_meet(tiny_model, start, end, own):
    """At every float32 around every bound exactly one copy acts, or none where the condition itself does not."""
    window = Window.of(tiny_model.model.model_sampling, start, end)
    entry = {"cross_attn": 1, "model_conds": {"a": object()}, "uuid": 0, **own}
    parts = conditions._split(entry, {"cross_attn": 2}, window)
    names = [part["uuid"] for part in parts if part["cross_attn"] == 2]
    assert entry["uuid"] not in names  # caches keep results per name: the original prompt's are not the redirected's
    bounds = torch.tensor([b for b in (window.low, window.high, *own.values(), 0.0, 2.0, 14.6) if 0 <= b < 1e9])
    infinity = torch.tensor(float("inf"))
    for sigma in torch.cat([bounds, torch.nextafter(bounds, infinity), torch.nextafter(bounds, -infinity)]).clamp(min=0):
        acting = [part["cross_attn"] for part in parts if is_active([part], sigma)]
        expected = [1 if window.contains(sigma) else 2] if is_active([entry], sigma) else []
        assert acting == expected, (float(sigma), parts)


def redirect_entry(entry, hgr=None, **settings):
    """One positive condition through the condition redirector."""
    hgr = hgr or make_hgr()
    conds = {"positive": [{"uuid": 0, "model_conds": {}, **entry}]}
    return conditions.redirect_conditions(Run(make_settings(hgr, **settings)), hgr.patcher, conds)["positive"][0]


@pytest.mark.parametrize("key", ["conditioning_llama3", "gligen", "some_new_text"])
def test_text_that_cannot_be_redirected_is_noticed(tiny_cond, key):
    with pytest.raises(SafeCFGError, match=key):
        redirect_entry({"cross_attn": tiny_cond(1)[0][0], key: (torch.ones(1, 2),)}, strict=True)


def test_other_keys_are_not_noticed(tiny_model, tiny_cond, caplog):
    extra = {"guidance": 3.5, "reference_latents": [torch.ones(1, 4, 8, 8)], "note": "by another pack", "pooled_output": None}
    sample(apply_hgr(tiny_model, strict=True), [[tiny_cond(1)[0][0], extra]], tiny_cond(2))
    assert not [r for r in caplog.records if "SafeCFG" in r.message]


def test_masks_reach_the_network(tiny_model, tiny_cond, monkeypatch):
    seen, redirect = [], hgr_models.redirect_condition
    monkeypatch.setattr(hgr_models, "redirect_condition", lambda *a: (seen.append(a[4]), redirect(*a))[1])
    tokens, mask = tiny_cond(1, tokens=6, batch=2)[0][0], torch.tensor([[1, 1, 1, 0, 0, 0]])
    safe = redirect_entry({"cross_attn": tokens, "attention_mask": mask})["cross_attn"]
    assert torch.equal(seen[0], mask.expand(2, -1))
    assert torch.equal(safe[:, 3:], tokens[:, 3:]) and not torch.equal(safe[:, :3], tokens[:, :3])


@pytest.mark.parametrize("strict", [False, True])
def test_a_mask_that_does_not_fit_is_noticed(tiny_cond, caplog, strict):
    entry = {"cross_attn": tiny_cond(1)[0][0], "attention_mask": torch.ones(1, 3)}
    if strict:
        with pytest.raises(SafeCFGError, match="attention mask"):
            redirect_entry(entry, strict=True)
    else:
        redirect_entry(entry)
        assert any("attention mask" in r.message for r in caplog.records)


def test_pooled_vectors_are_redirected(tiny_cond):
    hgr = make_hgr(info=dataclasses.replace(INFO, pooled_width=8))
    pooled = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    entry = {"cross_attn": tiny_cond(1)[0][0].half(), "pooled_output": pooled}
    safe = redirect_entry(entry, hgr)
    assert safe["cross_attn"].dtype == torch.float16 and not torch.equal(safe["pooled_output"], pooled)
    with pytest.raises(HGRError, match="pooled width 8 .*pooled width none"):
        redirect_entry({**entry, "pooled_output": None}, hgr)


def test_another_token_width_is_refused(tiny_model):
    wrong = [[torch.randn(1, 7, 24), {}]]
    with pytest.raises(HGRError, match=r"token width 16 .*SD15 latents.*token width 24"):
        sample(apply_hgr(tiny_model), wrong, wrong)


def test_prompts_that_core_does_not_prepare_are_noticed(tiny_model, tiny_cond):
    """A guider of another pack that loads and encodes by itself."""

    class OwnPreparation(comfy.samplers.CFGGuider):
        def outer_sample(
            self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None, **_
        ):
            self.inner_model = self.model_patcher.model
            self.model_patcher.pre_run()
            return self.inner_sample(
                noise, latent_image, noise.device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed
            )

    guider = OwnPreparation(apply_hgr(tiny_model, strict=True))
    guider.set_conds(tiny_cond(1), tiny_cond(2))
    with pytest.raises(SafeCFGError, match="OwnPreparation samples without preparing"):
        guide(guider, AtEverySigma())
