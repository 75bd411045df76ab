"""Server-wide enforcement, what the Enforced node makes of its value, in real sampling runs."""

import collections
import dataclasses

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler
from safecfg.hgr_models import HGRError
from safecfg.nodes.enforcement import enforce, enforced_model, settings, vetted
from safecfg.nodes.enforcement.enforced_model import check_guider_models, enforced, one_per_family
from safecfg.nodes.host.families import family_of_hgr
from safecfg.nodes.host.hooks import SafeCFGError

from enforce_fakes import save_hgr
from fakes import INFO, NEVER, Once, apply_hgr, guide, make_hgr, sample
from test_guiders import basic_guider, cfg_guider, dual_guider, perp_neg_guider


@pytest.fixture(autouse=True)
def tests_are_vetted(monkeypatch):
    """Samplers of these tests are no pack's."""
    monkeypatch.setattr(vetted, "_is_allowed", lambda name, allowed: "/host/" in name)


@pytest.mark.parametrize("weaken", [dict(strength=0.0), dict(redirect="condition"), dict(strict=False), dict(end_percent=0.1)])
def test_an_enforced_model_is_apply_at_its_strictest(tiny_model, tiny_cond, weaken):
    hgr, conds = make_hgr(), (tiny_cond(1), tiny_cond(2))
    strictest = apply_hgr(tiny_model, hgr, strict=True, remember_flagged=True)
    wanted = sample(strictest, *conds)
    weak = apply_hgr(tiny_model, hgr, **weaken)
    for model in (tiny_model, weak, enforced(weak, [hgr]), enforced(apply_hgr(tiny_model, make_hgr(NEVER, NEVER)), [hgr])):
        assert torch.equal(sample(enforced(model, [hgr]), *conds), wanted)
    assert not torch.equal(sample(tiny_model, *conds), wanted)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_clean_pictures_stay_bit_identical(tiny_model, tiny_cond, cfg):
    model = enforced(tiny_model, [make_hgr(NEVER, NEVER)])
    conds = tiny_cond(1), tiny_cond(2)
    assert torch.equal(sample(model, *conds, cfg=cfg), sample(tiny_model, *conds, cfg=cfg))


def test_models_inside_containers_are_found(tiny_model):
    hgrs, pair = [make_hgr()], collections.namedtuple("Pair", "model, clip")
    for wrap in (lambda m: (m, "clip"), lambda m: [1, [m]], lambda m: {"a": {"model": m}}, lambda m: pair(m, "clip")):
        text = repr(type(wrap(0)))
        (found,) = [m for m in _leaves(enforced(wrap(tiny_model), hgrs)) if hasattr(m, "model_options")]
        assert found is not tiny_model and found.wrappers and repr(type(enforced(wrap(tiny_model), hgrs))) == text
    nest = tiny_model
    for _ in range(40):
        nest = [nest]
    with pytest.raises(SafeCFGError, match="containers deep"):
        enforced(nest, hgrs)
    for other in ("text", 3, None, torch.zeros(2), hgrs[0].patcher):
        assert enforced(other, hgrs) is other


def _leaves(value):
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
    return [value] if children is None else [leaf for child in children for leaf in _leaves(child)]


def test_another_family_is_refused_and_several_hgrs_find_theirs(tiny_model, tmp_path):
    sdxl = make_hgr(info=dataclasses.replace(INFO, latent_format="SDXL"))
    with pytest.raises(HGRError, match="no HGR for a model of SD15 .*SDXL"):
        enforced(tiny_model, [sdxl])
    hgr = make_hgr()
    assert enforced(tiny_model, [sdxl, hgr]).get_additional_models_with_key("safecfg") == [hgr.patcher]
    same = [settings.load_hgr_model(str(save_hgr(tmp_path / name, make_hgr(level)))) for name, level in (("a", 0.1), ("b", 0.2))]
    groups = one_per_family([*same, sdxl])
    assert [family_of_hgr(g.info)[:4] for g in groups] == ["SD15", "SDXL"] and len(groups[0].info.categories) == 4


def test_a_guider_from_elsewhere_is_refused(tiny_model, tiny_cond):
    hgrs = [make_hgr()]
    good = cfg_guider(enforced(tiny_model, hgrs), tiny_cond)
    assert enforced(good, hgrs) is good
    for model in (tiny_model, apply_hgr(tiny_model)):
        with pytest.raises(SafeCFGError, match="did not go through SafeCFG"):
            enforced(cfg_guider(model, tiny_cond), hgrs)
    good.another_model = tiny_model
    with pytest.raises(SafeCFGError, match="did not go through"):
        check_guider_models(good)


def override(model, cfg):
    return nodes_custom_sampler.CFGOverride.execute(model, cfg, 0.0, 1.0).result[0]


def late(cond):
    return [[tokens, {**extras, "start_percent": 0.5, "end_percent": 1.0}] for tokens, extras in cond]


GUIDERS = {
    "cfg 0": lambda m, c: cfg_guider(m, c, 0.0),
    "cfg 0.5": lambda m, c: cfg_guider(m, c, 0.5),
    "cfg below 0": lambda m, c: cfg_guider(m, c, -7.0),
    "cfg not a number": lambda m, c: cfg_guider(m, c, float("nan")),
    "cfg infinite": lambda m, c: cfg_guider(m, c, float("inf")),
    "DualCFG": lambda m, c: dual_guider(m, c, 3.0, 0.5),
    "DualCFG nested": lambda m, c: dual_guider(m, c, 3.0, 0.0, nested=True),
    "PerpNeg": lambda m, c: perp_neg_guider(m, c, 4.0, -1.0),
    "the positive prompt comes late": lambda m, c: cfg_guider(m, lambda seed: late(c(seed)) if seed == 1 else c(seed)),
}


@pytest.mark.parametrize("guider", GUIDERS.values(), ids=GUIDERS.keys())
def test_what_draws_the_negative_prompt_stops_the_run(tiny_model, tiny_cond, guider):
    model = enforced(tiny_model, [make_hgr(NEVER, NEVER)])
    with pytest.raises(SafeCFGError, match="enforced"):
        guide(guider(model, tiny_cond), Once())
    guide(cfg_guider(model, tiny_cond), Once())  # the model stays usable


@pytest.mark.skipif(not hasattr(nodes_custom_sampler, "CFGOverride"), reason="this host has no CFG Override")
def test_an_overridden_cfg_counts(tiny_model, tiny_cond):
    with pytest.raises(SafeCFGError, match="cfg 0"):
        guide(cfg_guider(enforced(override(tiny_model, 0.0), [make_hgr(NEVER, NEVER)]), tiny_cond), Once())


def test_strict_holds_where_nothing_can_be_seen(tiny_model, tiny_cond):
    model = enforced(tiny_model, [make_hgr()])
    with pytest.raises(SafeCFGError, match=r"no negative prompt.* \[safecfg:not-redirected\]$"):
        guide(basic_guider(model, tiny_cond), Once())
    only = enforced(tiny_model, [make_hgr(networks=("condition",))])
    guide(basic_guider(only, tiny_cond), Once())


def test_the_enforced_node_lets_numbers_within_limits_through(monkeypatch):
    monkeypatch.setattr(enforce, "enforcement", lambda: settings.Enforcement((), frozenset()))
    assert enforce.Enforced.execute(5, 0.0, 10.0).result[0] == 5 and enforce.Enforced.execute(5, low=0.0).result[0] == 5
    for value in (-1, 11, float("nan"), "5", None, torch.tensor(5.0)):
        with pytest.raises(SafeCFGError, match="from 0 to 10"):
            enforce.Enforced.execute(value, 0.0, 10.0)


def test_a_loop_without_guiders_is_stopped(tiny_model, tiny_cond):
    model, x = enforced(tiny_model, [make_hgr()]), torch.randn(1, 4, 8, 8)
    conds = {name: comfy.sampler_helpers.convert_cond(tiny_cond(seed)) for name, seed in (("positive", 1), ("negative", 2))}
    conds = comfy.samplers.process_conds(model.model, x, conds, x.device)
    comfy.model_management.load_models_gpu([model])
    model.pre_run()
    with pytest.raises(SafeCFGError, match=r"bypasses ComfyUI.s guiders.*safecfg:not-redirected"):
        comfy.samplers.sampling_function(
            model.model, x, torch.tensor([5.0]), conds["negative"], conds["positive"], 5.0, model.model_options
        )


def test_auto_finds_the_hgr_of_the_text_encoder(tiny_model, monkeypatch):
    """Only where no HGR that was named is of the model's family, and only with a CLIP."""
    named, chosen = make_hgr(info=dataclasses.replace(INFO, latent_format="SDXL")), make_hgr()
    asked = []
    monkeypatch.setattr(enforced_model, "find_or_make", lambda clip, model: asked.append((clip, model)) or chosen)
    terms = enforced_model.Terms(auto=True)
    assert enforced(tiny_model, [named], terms, "clip").get_additional_models_with_key("safecfg") == [chosen.patcher]
    assert asked == [("clip", tiny_model)]
    with pytest.raises(HGRError, match="no-hgr"):
        enforced(tiny_model, [named], terms)
    with pytest.raises(HGRError, match="no-hgr"):
        enforced(tiny_model, [named], enforced_model.Terms(), "clip")
    assert enforced(tiny_model, [chosen], terms, "clip") and len(asked) == 1


def test_an_hgr_of_prompts_alone_fits_every_model(tiny_model):
    of_prompts = make_hgr(
        networks=("condition",), info=dataclasses.replace(INFO, latent_format="", latent_channels=0, prediction="")
    )
    found = enforced(tiny_model, [of_prompts])
    assert found.get_additional_models_with_key("safecfg") == [of_prompts.patcher]
