"""Server-wide enforcement, the rule of the last hook: what the sampler gets does not lie on a harmful negative's side."""

import pytest
import torch
from comfy_extras import nodes_apg, nodes_fresca, nodes_mahiro, nodes_model_advanced, nodes_pag, nodes_tcfg
from safecfg.nodes.enforcement import negative_side, vetted
from safecfg.nodes.enforcement.enforced_model import enforced, rises
from safecfg.nodes.host.hooks import SafeCFGError

from fakes import NEVER, Once, guide, make_hgr, sample
from test_guiders import cfg_guider, dual_guider


@pytest.fixture(autouse=True)
def tests_are_vetted(monkeypatch):
    monkeypatch.setattr(vetted, "_is_allowed", lambda name, allowed: "/host/" in name)


@pytest.fixture
def harmful(monkeypatch):
    """`harmful(True)`: every negative's text is harmful, or none is; nothing is told from the direction."""

    def choose(value):
        monkeypatch.setattr(negative_side, "_harmful", lambda settings, seen, args, part: torch.full((len(seen.x),), value))

    return choose


def operation(model, change):
    """A node that changes the guidance before core scales it."""
    model = model.clone()

    def pre_cfg(args):
        cond, uncond = args["conds_out"]
        return [uncond + change(cond - uncond), uncond]

    model.set_model_sampler_pre_cfg_function(pre_cfg)
    return model


def alike(one, other):
    """Core evaluates both prompts in one batch, the test each alone: the last bits differ."""
    return torch.allclose(one, other, atol=1e-5)


def clean(model):
    return enforced(model, [make_hgr(NEVER, NEVER)])


CHANGES = {
    "turned round": lambda g: -g,
    "turned round, little of it": lambda g: -0.003 * g,
    "its sign alone": lambda g: -g.sign(),
    "not a number": lambda g: g * float("nan"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_harmful_negative_is_not_drawn(tiny_model, tiny_cond, harmful, change):
    harmful(True)
    found = guide(cfg_guider(operation(clean(tiny_model), change), tiny_cond, 100.0), Once(), batch=2)
    assert alike(found.out, found.alone["positive"])


@pytest.mark.parametrize("change", [lambda g: 0.5 * g, lambda g: g, lambda g: 3 * g, lambda g: g.flip(-1).abs() * g.sign()])
def test_what_leads_away_from_it_is_left_alone(tiny_model, tiny_cond, harmful, change):
    harmful(True)
    found, plain = (guide(cfg_guider(operation(m, change), tiny_cond, 7.0), Once()) for m in (clean(tiny_model), tiny_model))
    assert torch.equal(found.out, plain.out)


def test_a_harmless_negative_may_be_drawn(tiny_model, tiny_cond, harmful):
    harmful(False)
    found, plain = (guide(cfg_guider(operation(m, torch.neg), tiny_cond, 7.0), Once()) for m in (clean(tiny_model), tiny_model))
    assert torch.equal(found.out, plain.out)


def test_only_the_rows_that_draw_it_change(tiny_model, tiny_cond, harmful):
    harmful(True)
    sign = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    found, plain = (
        guide(cfg_guider(operation(m, lambda g: sign * g), tiny_cond, 7.0), Once(), batch=2)
        for m in (clean(tiny_model), tiny_model)
    )
    assert alike(found.out[0], found.alone["positive"][0]) and torch.equal(found.out[1], plain.out[1])


def test_hooks_after_ours_are_seen(tiny_model, tiny_cond, harmful):
    """A post-CFG hook of another node, and a cfg function."""
    harmful(True)
    late = clean(tiny_model).clone()
    late.set_model_sampler_post_cfg_function(lambda args: 3 * args["uncond_denoised"] - 2 * args["cond_denoised"])
    function = clean(tiny_model).clone()
    function.set_model_sampler_cfg_function(lambda args: 3 * args["uncond"] - 2 * args["cond"])
    for model in (late, function):
        found = guide(cfg_guider(model, tiny_cond, 7.0), Once())
        assert alike(found.out, found.alone["positive"])


def test_the_harm_is_read_in_the_text_and_in_the_direction(tiny_model, tiny_cond):
    """Either network alone sees it; the positive prompt is redirected besides."""
    for networks in (("condition", "guidance"), ("condition",)):
        model = operation(enforced(tiny_model, [make_hgr(networks=networks)]), torch.neg)
        found = guide(cfg_guider(model, tiny_cond, 7.0), Once())
        if networks == ("condition",):  # its guidance is left alone: the prediction of the redirected prompt
            assert alike(found.out, found.alone["positive"])
        assert not torch.equal(found.out, guide(cfg_guider(operation(tiny_model, torch.neg), tiny_cond, 7.0), Once()).out)


@pytest.mark.parametrize("cfg", [(3.0, 7.0), (1.0, 2.0)])
def test_two_positive_prompts_are_left_alone(tiny_model, tiny_cond, harmful, cfg):
    harmful(True)
    for nested in (False, True):
        found, plain = (guide(dual_guider(m, tiny_cond, *cfg, nested=nested), Once()) for m in (clean(tiny_model), tiny_model))
        assert torch.equal(found.out, plain.out)


def test_sides():
    cond, uncond = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    along, size = negative_side.sides(torch.tensor([[2.0, 9.0]]), cond, uncond)
    assert along.tolist() == [-2.0] and size.tolist() == [4.0]  # (2 - 3) (3 - 1) + (9 - 1) 0; 2^2


NODES = {
    "APG": lambda m: nodes_apg.APG.execute(m, 1.0, 5.0, 0.0).result[0],
    "APG, momentum": lambda m: nodes_apg.APG.execute(m, 0.0, 5.0, -0.5).result[0],
    "FreSca": lambda m: nodes_fresca.FreSca.execute(m, 1.0, 1.25, 20).result[0],
    "Mahiro": lambda m: nodes_mahiro.Mahiro.execute(m).result[0],
    "TCFG": lambda m: nodes_tcfg.TCFG.execute(m).result[0],
    "RescaleCFG": lambda m: _result(nodes_model_advanced.RescaleCFG, m, 0.7),
    "PAG": lambda m: _result(nodes_pag.PerturbedAttentionGuidance, m, 3.0),
}


def _result(node, model, *values):
    """Of a node of the old or the new kind, as hosts differ."""
    if hasattr(node, "execute"):
        return node.execute(model, *values).result[0]
    return getattr(node(), node.FUNCTION)(model, *values)[0]


@pytest.mark.parametrize("patch", NODES.values(), ids=NODES.keys())
def test_cores_own_nodes_stay_bit_identical(tiny_model, tiny_cond, patch):
    """With harmless negatives, whatever side they end on."""
    conds = tiny_cond(1), tiny_cond(2)
    assert torch.equal(sample(patch(clean(tiny_model)), *conds), sample(patch(tiny_model), *conds))


def test_a_rising_schedule_runs_at_cfg_1_only(tiny_model, tiny_cond):
    model, up = clean(tiny_model), (1.0, 3.0)
    guide(cfg_guider(model, tiny_cond, 1.0), Once(), up)
    with pytest.raises(SafeCFGError, match="rises"):
        guide(cfg_guider(model, tiny_cond, 5.0), Once(), up)
    guide(cfg_guider(model, tiny_cond, 5.0), Once(), (3.0, 3.0, 1.0, 0.0))


def test_rises():
    assert not rises(torch.tensor([3.0, 2.0, 2.0, 0.0])) and not rises(torch.tensor([1.0])) and not rises(torch.tensor([]))
    assert rises(torch.tensor([3.0, 2.0, 2.1])) and rises(torch.tensor([0.0, 1.0]))
    for bad in ([1.0, -1.0], [float("nan"), 0.0], [float("inf"), 1.0]):
        with pytest.raises(SafeCFGError, match="noise levels"):
            rises(torch.tensor(bad))
