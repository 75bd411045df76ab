"""Code of other packs in the place of core's: redirected exactly, or noticed; never a crash of ours, never in silence."""

import copy

import comfy.samplers
import pytest
import torch
from safecfg.nodes.host.hooks import SafeCFGError

import foreign
from fakes import NEVER, AtEverySigma, KnownRedirection, Once, apply_hgr, guide, make_hgr, sample, turned
from host_nodes import call
from test_guiders import cfg_guider

ONLY_GUIDANCE = {"redirect": "guidance"}
SIGMAS = (3.0, 1.0, 0.3)


@pytest.mark.parametrize("node", [None, "RescaleCFG", "APG"])
@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_a_sampling_function_with_fewer_keys_is_redirected_as_cores(tiny_model, tiny_cond, monkeypatch, node, cfg):
    patch = (lambda model: call(node, model=model)[0]) if node else lambda model: model
    KnownRedirection(monkeypatch)
    model = patch(apply_hgr(tiny_model, strict=True, **ONLY_GUIDANCE))
    wanted = guide(cfg_guider(model, tiny_cond, cfg), AtEverySigma(), SIGMAS).outs
    monkeypatch.setattr(comfy.samplers, "sampling_function", foreign.fewer_keys)
    found = guide(cfg_guider(model, tiny_cond, cfg), AtEverySigma(), SIGMAS).outs
    assert all(torch.equal(found[sigma], wanted[sigma]) for sigma in wanted)


def test_hooks_that_deep_copy_the_model_options_do_no_harm(tiny_model, tiny_cond, monkeypatch):
    """Some packs do, in every step, to draw a term of their own."""

    def pre_cfg(args):
        options = copy.deepcopy({k: v for k, v in args["model_options"].items() if k != "multigpu_clones"})
        (term,) = comfy.samplers.calc_cond_batch(args["model"], [args["conds"][0]], args["input"], args["sigma"], options)
        return [args["conds_out"][0] + 0.1 * (args["conds_out"][0] - term), *args["conds_out"][1:]]

    known = KnownRedirection(monkeypatch)
    model = apply_hgr(tiny_model, strict=True, **ONLY_GUIDANCE)
    model.set_model_sampler_pre_cfg_function(pre_cfg)
    assert sample(model, tiny_cond(1), tiny_cond(2), steps=3).isfinite().all() and known.count == 3


@pytest.mark.parametrize("name", ["fewer_keys", "ignoring"])
def test_clean_pictures_stay_as_they_are_under_foreign_code(tiny_model, tiny_cond, monkeypatch, name):
    monkeypatch.setattr(comfy.samplers, "sampling_function", getattr(foreign, name))
    plain = sample(tiny_model, tiny_cond(1), tiny_cond(2))
    assert torch.equal(sample(apply_hgr(tiny_model, make_hgr(NEVER, NEVER), strict=True), tiny_cond(1), tiny_cond(2)), plain)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("name", "says"),
    [("ignoring", "does not use the redirected guidance"), ("withholding", "took the prompt out of an evaluation")],
)
def test_foreign_code_that_goes_its_own_way_is_noticed(tiny_model, tiny_cond, monkeypatch, caplog, name, says, strict):
    KnownRedirection(monkeypatch)
    monkeypatch.setattr(comfy.samplers, "sampling_function", getattr(foreign, name))
    model = apply_hgr(tiny_model, strict=strict, **ONLY_GUIDANCE)
    if strict:
        with pytest.raises(SafeCFGError, match=rf"CFGGuider \(foreign replaced ComfyUI's sampling code\).*{says}"):
            sample(model, tiny_cond(1), tiny_cond(2))
    else:
        sample(model, tiny_cond(1), tiny_cond(2))
        assert caplog.text.count(says) == 1  # once in a run


def test_stacked_conditions_are_redirected_one_by_one(tiny_model, tiny_cond, monkeypatch):
    weights = (0.7, 0.3)
    alone = [
        guide(cfg_guider(tiny_model, lambda s, seed=seed: tiny_cond(seed if s == 1 else s)), Once()).alone for seed in (1, 3)
    ]
    monkeypatch.setattr(comfy.samplers, "sampling_function", foreign.stacked(weights))
    known = KnownRedirection(monkeypatch)
    guider = comfy.samplers.CFGGuider(apply_hgr(tiny_model, strict=True, **ONLY_GUIDANCE))
    guider.set_conds(tiny_cond(1) + tiny_cond(3), tiny_cond(2))
    guider.set_cfg(5.0)
    result = guide(guider, Once())
    assert known.count == 2
    uncond = alone[0]["negative"]
    terms = [5.0 * weight * turned(each["positive"] - uncond) for weight, each in zip(weights, alone, strict=True)]
    torch.testing.assert_close(result.out, uncond + sum(terms), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("sampler", "says"),
    [
        (foreign.AsksTheModel(asks=True), "AsksTheModel|the sampler asks the model itself, past its guider"),
        (foreign.AsksTheModel(asks=False), "the sampler asks the model itself, past its guider"),
        (foreign.AsksTheModel(asks=False, options=False), "drew without asking its guider"),
    ],
)
def test_samplers_that_ask_the_model_themselves_are_noticed(tiny_model, tiny_cond, caplog, sampler, says):
    guide(cfg_guider(apply_hgr(tiny_model, make_hgr(NEVER, NEVER)), tiny_cond), sampler)
    assert caplog.text.count(says.split("|")[-1]) == 1
    with pytest.raises(SafeCFGError, match=says):
        guide(cfg_guider(apply_hgr(tiny_model, make_hgr(NEVER, NEVER), strict=True), tiny_cond), sampler)


def test_what_breaks_in_our_hooks_names_the_other_nodes(tiny_model, tiny_cond, monkeypatch):
    def broken(model, x, timestep, uncond, cond, cond_scale, model_options=None, **_):
        for function in model_options["sampler_pre_cfg_function"]:
            function({"conds_out": [x, x], "model": model, "model_options": model_options, "sigma": timestep, "input": None})

    monkeypatch.setattr(comfy.samplers, "sampling_function", broken)
    model = call("PerturbedAttentionGuidance", model=apply_hgr(tiny_model))[0]
    with pytest.raises(
        SafeCFGError, match=r"could not redirect the guidance: AttributeError.*comfy_extras\.nodes_pag, .*test_foreign"
    ):
        sample(model, tiny_cond(1), tiny_cond(2))
    assert torch.isfinite(sample_again(monkeypatch, model, tiny_cond)).all()  # the model stays usable


def sample_again(monkeypatch, model, tiny_cond):
    monkeypatch.undo()
    return sample(model, tiny_cond(1), tiny_cond(2))
