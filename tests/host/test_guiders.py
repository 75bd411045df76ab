"""Core's guiders: every guidance direction is redirected once, against closed forms; what cannot be redirected is noticed."""

import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler, nodes_perpneg
from safecfg.nodes.host.hooks import SafeCFGError

from fakes import NEVER, AtEverySigma, KnownRedirection, Once, apply_hgr, guide, make_hgr, sample, turned

ONLY_GUIDANCE = {"redirect": "guidance"}


def cfg_guider(model, cond, cfg=7.0):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(cond(1), cond(2))
    guider.set_cfg(cfg)
    return guider


def dual_guider(model, cond, cfg1=3.0, cfg2=5.0, nested=False):
    guider = nodes_custom_sampler.Guider_DualCFG(model)
    guider.set_conds(cond(1), cond(3), cond(2))
    guider.set_cfg(cfg1, cfg2, nested)
    return guider


def perp_neg_guider(model, cond, cfg=4.0, neg_scale=0.7):
    guider = nodes_perpneg.Guider_PerpNeg(model)
    guider.set_conds(cond(1), cond(2), cond(4))
    guider.set_cfg(cfg, neg_scale)
    return guider


def dual_model_guider(model, cond, cfg=6.0):
    guider = nodes_custom_sampler.Guider_DualModel(model, model)
    guider.set_conds(cond(1), cond(2))
    guider.set_cfg(cfg)
    return guider


def basic_guider(model, cond):
    guider = nodes_custom_sampler.Guider_Basic(model)
    guider.set_conds(cond(1))
    return guider


def cfg_form(cfg):
    return lambda positive, negative, R: negative + cfg * R(positive - negative)


def regular_form(cfg1, cfg2):
    return lambda positive, middle, negative, R: negative + cfg2 * R(middle - negative) + cfg1 * R(positive - middle)


def nested_form(cfg1, cfg2):
    def form(positive, middle, negative, R):
        text = negative + R(middle - negative) + cfg1 * R(positive - middle)
        return negative + cfg2 * (text - negative)

    return form


def positive_only(positive, middle, negative, R):
    return negative + R(positive - negative)


def perp_neg_form(cfg, neg_scale):
    def form(positive, negative, empty_negative_prompt, R):
        safe = empty_negative_prompt + R(positive - empty_negative_prompt)
        return nodes_perpneg.perp_neg(None, safe, negative, empty_negative_prompt, neg_scale, cfg)

    return form


GUIDERS = {  # guider, its closed form, its directions
    "CFGGuider 7": (cfg_guider, cfg_form(7.0), 1),
    "CFGGuider 1": (lambda m, c: cfg_guider(m, c, 1.0), cfg_form(1.0), 1),
    "DualCFG regular": (dual_guider, regular_form(3.0, 5.0), 2),
    "DualCFG regular, cfg 1 and 1": (lambda m, c: dual_guider(m, c, 1.0, 1.0), positive_only, 1),
    "DualCFG regular, cfg2 1": (lambda m, c: dual_guider(m, c, 3.0, 1.0), regular_form(3.0, 1.0), 2),
    "DualCFG nested": (lambda m, c: dual_guider(m, c, nested=True), nested_form(3.0, 5.0), 2),
    "PerpNeg": (perp_neg_guider, perp_neg_form(4.0, 0.7), 1),
    "PerpNeg, cfg 1": (lambda m, c: perp_neg_guider(m, c, 1.0, 0.0), perp_neg_form(1.0, 0.0), 1),
}  # fmt: skip
if hasattr(nodes_custom_sampler, "Guider_DualModel"):
    GUIDERS["DualModel"] = (dual_model_guider, cfg_form(6.0), 1)


@pytest.mark.parametrize("name", GUIDERS)
def test_every_direction_is_redirected_once(tiny_model, tiny_cond, monkeypatch, name):
    make, form, directions = GUIDERS[name]
    known = KnownRedirection(monkeypatch)
    result = guide(make(apply_hgr(tiny_model, **ONLY_GUIDANCE), tiny_cond), Once())
    assert known.count == directions
    assert torch.equal(known.x_in, result.x / (3.0**2 + 1) ** 0.5)  # core's input scaling
    torch.testing.assert_close(result.out, form(**result.alone, R=turned), atol=1e-4, rtol=0)  # cfg 15 times rounding
    for wrong in (lambda g: g, lambda g: turned(turned(g))):  # the test would see a redirection that never or twice happened
        assert (result.out - form(**result.alone, R=wrong)).abs().max() > 1e-2


@pytest.mark.parametrize("name", GUIDERS)
def test_unflagged_is_bit_identical(tiny_model, tiny_cond, name):
    make = GUIDERS[name][0]
    plain = guide(make(tiny_model, tiny_cond), AtEverySigma(), (3.0, 1.0, 0.3))
    safe = guide(make(apply_hgr(tiny_model, make_hgr(NEVER, NEVER)), tiny_cond), AtEverySigma(), (3.0, 1.0, 0.3))
    assert all(torch.equal(safe.outs[sigma], out) for sigma, out in plain.outs.items())


def test_basic_guider_is_noticed(tiny_model, tiny_cond, caplog):
    guide(basic_guider(apply_hgr(tiny_model), tiny_cond), Once())
    assert [r.message for r in caplog.records if "Guider_Basic has no negative" in r.message]
    caplog.clear()
    guide(basic_guider(apply_hgr(tiny_model, redirect="condition"), tiny_cond), Once())
    assert not [r for r in caplog.records if "SafeCFG" in r.message]


def test_strict_stops_the_run_and_leaves_the_model_usable(tiny_model, tiny_cond, monkeypatch):
    model = apply_hgr(tiny_model, strict=True)
    with pytest.raises(SafeCFGError, match="Guider_Basic has no negative"):
        guide(basic_guider(model, tiny_cond), Once())
    KnownRedirection(monkeypatch, rows=())
    before = sample(apply_hgr(tiny_model, strict=False), tiny_cond(1), tiny_cond(2))
    assert torch.equal(sample(model, tiny_cond(1), tiny_cond(2)), before)


class BypassingGuider(comfy.samplers.CFGGuider):
    """As other packs write them: its own CFG, none of core's hooks."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        conds = [self.conds["positive"], self.conds["negative"]]
        cond, uncond = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return uncond + 5 * (cond - uncond)


@pytest.mark.parametrize("strict", [False, True])
def test_a_guider_without_hooks_is_noticed(tiny_model, tiny_cond, caplog, strict):
    guider = BypassingGuider(apply_hgr(tiny_model, strict=strict))
    guider.set_conds(tiny_cond(1), tiny_cond(2))
    if strict:
        with pytest.raises(SafeCFGError, match="BypassingGuider evaluated the model without any guidance hook"):
            guide(guider, AtEverySigma(), (3.0, 1.0, 0.3))
    else:
        guide(guider, AtEverySigma(), (3.0, 1.0, 0.3))
        assert sum("BypassingGuider" in r.message for r in caplog.records) == 1  # once per run


@pytest.mark.parametrize("redirect", ["both", "condition"])
@pytest.mark.parametrize("strict", [False, True])
def test_code_without_guiders_is_noticed(tiny_model, tiny_cond, monkeypatch, caplog, strict, redirect):
    known = KnownRedirection(monkeypatch)
    model = apply_hgr(tiny_model, strict=strict, redirect=redirect)

    class Foreign(comfy.samplers.CFGGuider):
        """Prepares as core does, then calls the sampling function with the MODEL's own options."""

        def predict_noise(self, x, timestep, model_options=None, seed=None):
            options = self.model_patcher.model_options
            conds = self.conds
            return comfy.samplers.sampling_function(
                self.inner_model, x, timestep, conds["negative"], conds["positive"], 5.0, options
            )

    guider = Foreign(model)
    guider.set_conds(tiny_cond(1), tiny_cond(2))
    if strict:
        with pytest.raises(SafeCFGError, match="bypasses"):
            guide(guider, Once())
    else:
        guide(guider, Once())
        assert known.count == (redirect == "both")
        (notice,) = [r.message for r in caplog.records if "bypasses" in r.message]
        assert ("nothing is" in notice) == (redirect == "condition")
