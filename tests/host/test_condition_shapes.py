"""Conditions in every shape that core's own nodes give them: redirected as if the user had written the safe prompt."""

import dataclasses

import comfy.hooks
import pytest
import torch
from comfy_extras import nodes_custom_sampler, nodes_perpneg
from safecfg.nodes.host.hooks import NEGATIVE_ROLES, SafeCFGError
from safecfg.nodes.redirect import conditions
from safecfg.nodes.redirect.runs import Run

from fakes import ALWAYS, INFO, NEVER, AtEverySigma, apply_hgr, guide, make_hgr, make_settings, sample
from host_nodes import call
from test_conditions import BY_CONDITION, hgr_between, redirected

LEFT = torch.zeros(1, 64, 64).index_fill(2, torch.arange(32), 1.0)


def lora_hooks(model):
    """A LoRA that acts for one prompt alone."""
    key = "diffusion_model.middle_block.1.proj_out"
    weight = model.model.state_dict()[f"{key}.weight"]
    down, up = torch.ones(1, *weight.shape[1:]) * 0.1, torch.ones(weight.shape[0], 1, 1, 1) * 0.1
    lora = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    return comfy.hooks.create_hook_lora(lora, 1.0, 0.0)


SHAPES = {  # by the nodes that make them; a and b are prompts
    "Combine": lambda m, a, b: call("ConditioningCombine", conditioning_1=a, conditioning_2=b),
    "Concat": lambda m, a, b: call("ConditioningConcat", conditioning_to=a, conditioning_from=b),
    "Average": lambda m, a, b: call("ConditioningAverage", conditioning_to=a, conditioning_from=b, conditioning_to_strength=0.4),
    "SetArea": lambda m, a, b: call("ConditioningSetArea", conditioning=a, width=64, height=32, x=0, y=16, strength=0.7),
    "SetAreaPercentage": lambda m, a, b: call(
        "ConditioningSetAreaPercentage", conditioning=a, width=0.5, height=1.0, x=0.5, y=0.0, strength=1.0
    ),
    "SetAreaStrength": lambda m, a, b: call("ConditioningSetAreaStrength", conditioning=a, strength=0.6),
    "SetMask": lambda m, a, b: call("ConditioningSetMask", conditioning=a, mask=LEFT, strength=0.8, set_cond_area="mask bounds"),
    "SetTimestepRange": lambda m, a, b: (
        call("ConditioningSetTimestepRange", conditioning=a, start=0.0, end=0.4)[0]
        + call("ConditioningSetTimestepRange", conditioning=b, start=0.4, end=1.0)[0],
    ),
    "SetProperties": lambda m, a, b: call(
        "ConditioningSetProperties", cond_NEW=a, strength=0.9, set_cond_area="default", mask=LEFT, timesteps=(0.0, 0.8)
    ),
    "SetProperties, prompt hooks": lambda m, a, b: call(
        "ConditioningSetProperties", cond_NEW=a, strength=1.0, set_cond_area="default", hooks=lora_hooks(m)
    ),
    "SetPropertiesAndCombine": lambda m, a, b: call(
        "ConditioningSetPropertiesAndCombine", cond=b, cond_NEW=a, strength=1.0, set_cond_area="default", hooks=lora_hooks(m)
    ),
    "SetDefaultAndCombine": lambda m, a, b: call(
        "ConditioningSetDefaultCombine",
        cond=call("ConditioningSetMask", conditioning=a, mask=LEFT, strength=1.0, set_cond_area="default")[0],
        cond_DEFAULT=b,
    ),
    "ReferenceLatent": lambda m, a, b: call("ReferenceLatent", conditioning=a, latent={"samples": torch.ones(1, 4, 8, 8)}),
    "unCLIP": lambda m, a, b: call(
        "unCLIPConditioning", conditioning=a, clip_vision_output=object(), strength=1.0, noise_augmentation=0.1
    ),
    "FluxGuidance": lambda m, a, b: call("FluxGuidance", conditioning=a, guidance=3.5),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [{}, {"start_percent": 0.2, "end_percent": 0.6}], ids=["whole run", "a part of it"])
def test_it_is_the_safe_prompt(tiny_model, tiny_cond, caplog, shape, window):
    hgr = make_hgr()
    (positive,) = SHAPES[shape](tiny_model, tiny_cond(1), tiny_cond(3))
    before = [(tokens.clone(), dict(extras)) for tokens, extras in positive]
    plain = sample(tiny_model, positive, tiny_cond(2), steps=4)
    safe = sample(apply_hgr(tiny_model, hgr, **BY_CONDITION, strict=True, **window), positive, tiny_cond(2), steps=4)
    assert not torch.equal(safe, plain) and not [r for r in caplog.records if r.name.startswith("safecfg")]
    if not window:
        assert torch.equal(safe, sample(tiny_model, redirected(hgr, positive), tiny_cond(2), steps=4))
    assert len(positive) == len(before)
    for (tokens, extras), (old_tokens, old_extras) in zip(positive, before, strict=True):
        assert torch.equal(tokens, old_tokens) and extras.keys() == old_extras.keys()


@pytest.mark.parametrize("shape", SHAPES)
def test_clean_is_bit_identical(tiny_model, tiny_cond, shape):
    (positive,) = SHAPES[shape](tiny_model, tiny_cond(1), tiny_cond(3))
    safe = apply_hgr(tiny_model, make_hgr(NEVER, NEVER), start_percent=0.2, end_percent=0.6)
    assert torch.equal(sample(safe, positive, tiny_cond(2), steps=3), sample(tiny_model, positive, tiny_cond(2), steps=3))


def harmful_and_clean(cond):
    """Two prompts, and an HGR that flags the first alone."""
    network = make_hgr().patcher.model.condition
    seeds = sorted(range(1, 7), key=lambda seed: -float(network.harmfulness(cond(seed)[0][0]).max()))
    harmful, clean = cond(seeds[0]), cond(seeds[-1])
    return harmful, clean, hgr_between(harmful[0][0], clean[0][0])


def test_one_harmful_region(tiny_model, tiny_cond):
    harmful, clean, hgr = harmful_and_clean(tiny_cond)
    area = lambda c, x: call("ConditioningSetArea", conditioning=c, width=32, height=64, x=x, y=0, strength=1.0)[0]  # noqa: E731
    regions = lambda left: area(left, 0) + area(clean, 32)  # noqa: E731
    safe = sample(apply_hgr(tiny_model, hgr, strict=True), regions(harmful), tiny_cond(2), steps=1)
    plain = sample(tiny_model, regions(harmful), tiny_cond(2), steps=1)
    assert torch.equal(safe, sample(tiny_model, regions(redirected(hgr, harmful)), tiny_cond(2), steps=1))
    assert torch.equal(safe[..., 4:], plain[..., 4:]) and not torch.equal(safe[..., :4], plain[..., :4])


def dual(model, positive, middle, negative):
    guider = nodes_custom_sampler.Guider_DualCFG(model)
    guider.set_conds(positive, middle, negative)
    guider.set_cfg(3.0, 5.0)
    return guider


def perp_neg(model, positive, negative, empty):
    guider = nodes_perpneg.Guider_PerpNeg(model)
    guider.set_conds(positive, negative, empty)
    guider.set_cfg(4.0, 0.7)
    return guider


def outs(guider):
    return torch.stack(list(guide(guider, AtEverySigma(), (3.0, 0.5)).outs.values()))


@pytest.mark.parametrize("harmful_role", ["positive", "middle", "negative"])
def test_every_prompt_of_dual_cfg(tiny_model, tiny_cond, harmful_role):
    """The middle one is drawn, too."""
    harmful, clean, hgr = harmful_and_clean(tiny_cond)
    roles = {"positive": clean, "middle": clean, "negative": tiny_cond(2), harmful_role: harmful}
    safe, plain = outs(dual(apply_hgr(tiny_model, hgr), **roles)), outs(dual(tiny_model, **roles))
    if harmful_role == "negative":
        assert torch.equal(safe, plain)
    else:
        assert torch.equal(safe, outs(dual(tiny_model, **{**roles, harmful_role: redirected(hgr, harmful)})))
        assert not torch.equal(safe, plain)


@pytest.mark.parametrize("harmful_role", ["positive", "negative", "empty"])
def test_every_prompt_of_perp_neg(tiny_model, tiny_cond, harmful_role):
    """A harmful negative, or empty, prompt stays: it is what the picture is led away from."""
    harmful, clean, hgr = harmful_and_clean(tiny_cond)
    roles = {"positive": clean, "negative": tiny_cond(2), "empty": tiny_cond(4), harmful_role: harmful}
    safe, plain = outs(perp_neg(apply_hgr(tiny_model, hgr), **roles)), outs(perp_neg(tiny_model, **roles))
    if harmful_role == "positive":
        assert torch.equal(safe, outs(perp_neg(tiny_model, **{**roles, "positive": redirected(hgr, harmful)})))
        assert not torch.equal(safe, plain)
    else:
        assert torch.equal(safe, plain)


def redirect_entries(hgr, roles, **settings):
    conds = {role: [{"uuid": i, "model_conds": {}, **entry} for i, entry in enumerate(found)] for role, found in roles.items()}
    return conds, conditions.redirect_conditions(Run(make_settings(hgr, **settings)), hgr.patcher, conds)


def test_roles_of_any_guider(tiny_cond):
    """A guider of another pack names its prompts as it likes: all but the two known negatives are drawn."""
    entry = {"cross_attn": tiny_cond(1)[0][0]}
    before, after = redirect_entries(make_hgr(), {role: [entry] for role in (*NEGATIVE_ROLES, "positive", "third", "middle")})
    same = {role for role in before if torch.equal(before[role][0]["cross_attn"], after[role][0]["cross_attn"])}
    assert same == set(NEGATIVE_ROLES) and all(after[role][0] is before[role][0] for role in NEGATIVE_ROLES)


def test_everything_but_the_text_is_kept(tiny_cond):
    """GLIGEN's boxes and unCLIP's pictures stay where they are, also where they cannot be redirected and are noticed."""
    kept = {
        "gligen": ("position", object(), [(torch.ones(1, 16), 4, 4, 0, 0)]), "unclip_conditioning": [{"strength": 1.0}],
        "reference_latents": [torch.ones(1, 4, 8, 8)], "hooks": object(), "control": object(), "guidance": 3.5,
        "note": "by another pack", "pooled_output": torch.ones(1, 8), "area": (4, 4, 0, 0), "strength": 0.5,
    }  # fmt: skip
    before, after = redirect_entries(make_hgr(), {"positive": [{"cross_attn": tiny_cond(1)[0][0], **kept}]})
    (old,), (new,) = before["positive"], after["positive"]
    assert new.keys() == old.keys() and not torch.equal(new["cross_attn"], old["cross_attn"])
    assert all(new[key] is value for key, value in kept.items())
    with pytest.raises(SafeCFGError, match="GLIGEN's boxes"):
        redirect_entries(make_hgr(), {"positive": [{"cross_attn": tiny_cond(1)[0][0], **kept}]}, strict=True)


def test_prompts_of_a_pooled_vector_alone(caplog):
    entry = {"pooled_output": torch.ones(1, 8)}
    before, after = redirect_entries(make_hgr(), {"positive": [entry]}, strict=True)  # this family reads no pooled vector
    assert after["positive"][0] is before["positive"][0]
    hgr = make_hgr(info=dataclasses.replace(INFO, pooled_width=8))
    redirect_entries(hgr, {"positive": [entry]})
    assert "cannot redirect a pooled vector without tokens" in caplog.text
    with pytest.raises(SafeCFGError, match="a pooled vector without tokens"):
        redirect_entries(hgr, {"positive": [entry]}, strict=True)


def test_batches_of_other_lengths(tiny_model, tiny_cond):
    """Core repeats a prompt's rows over the batch, and pads prompts of other lengths to one."""
    hgr = make_hgr(ALWAYS, NEVER)
    positive = tiny_cond(1, tokens=7, batch=2) + tiny_cond(3, tokens=14)
    safe = sample(apply_hgr(tiny_model, hgr), positive, tiny_cond(2), steps=2, batch=4)
    assert torch.equal(safe, sample(tiny_model, redirected(hgr, positive), tiny_cond(2), steps=2, batch=4))
