"""Concept guidance beside SafeCFG Apply, in core's guiders, and how its concepts are encoded; what it cannot do is noticed."""

import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler, nodes_perpneg
from safecfg.nodes.host.concept_rows import concept_condition
from safecfg.nodes.host.hooks import SafeCFGError

from concept_fakes import CONCEPTS, SIGMA, SOFT, alone, basic_guider, cfg_guider, expected, guarded, published
from fakes import AtEverySigma, KnownRedirection, Once, apply_hgr, guide, make_hgr, sample, turned
from tiny import tiny_conditioning


@pytest.mark.parametrize("concept_first", [True, False])
def test_apply_redirects_first_wherever_it_stands(tiny_model, monkeypatch, concept_first):
    """SLD then works on the redirected guidance."""
    known = KnownRedirection(monkeypatch)
    with_apply = lambda model: apply_hgr(model, redirect="guidance", strict=True)  # noqa: E731
    with_concept = lambda model: guarded(model, strict=True)  # noqa: E731
    order = (with_concept, with_apply) if concept_first else (with_apply, with_concept)
    result = guide(cfg_guider(order[1](order[0](tiny_model))), Once())
    uncond = result.alone["negative"]
    safe = uncond + turned(result.alone["positive"] - uncond)
    concepts = [alone(tiny_model, 5)]
    assert known.count == 1
    torch.testing.assert_close(result.out, expected(result, concepts, text=safe), atol=2e-4, rtol=0)
    assert (result.out - expected(result, concepts)).abs().max() > 0.01


@pytest.mark.parametrize("concept_first", [True, False])
def test_applys_condition_redirector_leaves_the_concepts_alone(tiny_model, concept_first):
    """A concept's prompt is harmful on purpose: rewritten into a safe one, it would steer towards harm."""
    with_apply = lambda model: apply_hgr(model, make_hgr(), redirect="condition")  # noqa: E731
    order = (guarded, with_apply) if concept_first else (with_apply, guarded)
    result = guide(cfg_guider(order[1](order[0](tiny_model))), Once())
    torch.testing.assert_close(result.out, expected(result, [alone(tiny_model, 5)]), atol=2e-4, rtol=0)


def perp_neg_guider(model, cfg=4.0):
    guider = nodes_perpneg.Guider_PerpNeg(model)
    guider.set_conds(tiny_conditioning(1), tiny_conditioning(2), tiny_conditioning(4))
    guider.set_cfg(cfg, 0.7)
    return guider


def test_perp_neg_guides_from_the_empty_prompt(tiny_model):
    result = guide(perp_neg_guider(guarded(tiny_model, strict=True)), Once())
    positive, negative, empty = (result.alone[role] for role in ("positive", "negative", "empty_negative_prompt"))
    noise = lambda denoised: (result.x - denoised) / SIGMA  # noqa: E731
    gamma = published(noise(empty), noise(positive), noise(alone(tiny_model, 5)), SOFT)
    wanted = nodes_perpneg.perp_neg(None, positive + SIGMA * gamma, negative, empty, 0.7, 4.0)
    torch.testing.assert_close(result.out, wanted, atol=2e-4, rtol=0)


def dual_guider(model):
    guider = nodes_custom_sampler.Guider_DualCFG(model)
    guider.set_conds(tiny_conditioning(1), tiny_conditioning(3), tiny_conditioning(2))
    guider.set_cfg(3.0, 5.0, False)
    return guider


def dual_model_guider(model):
    guider = nodes_custom_sampler.Guider_DualModel(model, model)
    guider.set_conds(tiny_conditioning(1), tiny_conditioning(2))
    guider.set_cfg(5.0)
    return guider


class ForeignGuider(comfy.samplers.CFGGuider):
    """Prepares as core does, then calls the sampling function with the MODEL's own options."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        options, conds = self.model_patcher.model_options, self.conds
        return comfy.samplers.sampling_function(self.inner_model, x, timestep, conds["negative"], conds["positive"], 5.0, options)


def foreign_guider(model):
    guider = ForeignGuider(model)
    guider.set_conds(tiny_conditioning(1), tiny_conditioning(2))
    return guider


POWERLESS = {
    "no negative": (basic_guider, "Guider_Basic samples without an unconditional"),
    "cfg 1": (lambda model: cfg_guider(model, 1.0), "CFGGuider samples without an unconditional"),
    "DualCFG": (dual_guider, "Guider_DualCFG does not call the hook"),
    "foreign": (foreign_guider, "bypasses ComfyUI's guiders"),
}
if hasattr(nodes_custom_sampler, "Guider_DualModel"):
    POWERLESS["DualModel"] = (dual_model_guider, "Guider_DualModel does not call the hook")


@pytest.mark.parametrize("name", POWERLESS)
def test_where_it_cannot_act_it_says_so(tiny_model, caplog, name):
    make, message = POWERLESS[name]
    plain = guide(make(tiny_model), AtEverySigma(), (SIGMA, 1.0, 0.3)).outs
    outs = guide(make(guarded(tiny_model)), AtEverySigma(), (SIGMA, 1.0, 0.3)).outs
    assert all(torch.equal(outs[sigma], plain[sigma]) for sigma in plain)
    said = [r.message for r in caplog.records if "SafeCFG Concept Guidance" in r.message]
    assert said and all(message in m for m in said) and (name == "foreign" or len(said) == 1)
    with pytest.raises(SafeCFGError, match=message):
        guide(make(guarded(tiny_model, strict=True)), Once())


def test_a_negative_outside_its_time_is_noticed(tiny_model, tiny_cond, caplog):
    late = [[tiny_cond(2)[0][0], {"start_percent": 0.5}]]
    safe = sample(guarded(tiny_model), tiny_cond(1), late, steps=8)
    assert safe.isfinite().all() and any("not active in a part of the run" in r.message for r in caplog.records)


def test_training_is_left_alone(tiny_model, caplog):
    class TrainSampler(Once):
        pass

    plain = guide(cfg_guider(tiny_model), Once()).out
    assert torch.equal(guide(cfg_guider(guarded(tiny_model)), TrainSampler()).out, plain)
    assert any("not applied while training" in r.message for r in caplog.records)


def test_a_concept_takes_all_but_the_text_from_the_unconditional():
    unconditional = {
        "cross_attn": torch.zeros(1, 7, 16), "pooled_output": torch.zeros(1, 8), "attention_mask": torch.ones(1, 7),
        "conditioning_llama3": torch.zeros(1), "guidance": 3.5, "width": 512, "control": "net", "hooks": "hooks", "area": (1, 1, 0, 0),
        "mask": torch.ones(1), "strength": 0.5, "timestep_start": 1.0, "end_percent": 0.5, "model_conds": {"y": 1}, "uuid": 1,
    }  # fmt: skip
    tokens, pooled = torch.ones(1, 5, 16), torch.ones(1, 8)
    made = concept_condition(unconditional, [tokens, {"pooled_output": pooled}])
    assert made.pop("cross_attn") is tokens and made.pop("pooled_output") is pooled and made.pop("uuid") != 1
    assert made == {"guidance": 3.5, "width": 512, "control": "net", "hooks": "hooks", "model_conds": {}}


def test_concepts_are_encoded_with_what_core_gives_the_negative(tiny_model, monkeypatch):
    seen = []
    real = tiny_model.model.extra_conds
    monkeypatch.setattr(tiny_model.model, "extra_conds", lambda **facts: (seen.append(facts), real(**facts))[1])
    guider = comfy.samplers.CFGGuider(guarded(tiny_model, concepts=CONCEPTS))
    guider.set_conds(tiny_conditioning(1), [[tiny_conditioning(2)[0][0], {"guidance": 2.5, "area": (4, 4, 0, 0)}]])
    guider.set_cfg(5.0)
    guide(guider, Once())
    negative = next(facts for facts in seen if facts["prompt_type"] == "negative")
    concepts = seen[-3:]
    assert [facts["cross_attn"].shape[1] for facts in concepts] == [5, 5, 5]
    for facts in concepts:
        assert negative.keys() - facts.keys() == {"area"} and facts["guidance"] == 2.5 and "area" not in facts
        assert all(facts[key] is negative[key] or facts[key] == negative[key] for key in ("seed", "device", "width", "height"))
        assert facts["prompt_type"] == "negative" and facts["noise"] is negative["noise"]
