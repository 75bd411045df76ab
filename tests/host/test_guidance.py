"""The guidance redirector in core's guiders and samplers: every direction once, and nothing where nothing is flagged."""

import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler, nodes_easycache, nodes_perpneg
from safecfg.nodes.runs import SafeCFGError

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
    torch.testing.assert_close(result.out, form(**result.alone, R=turned), atol=1e-4, rtol=0)  # cfg 15 times rounding
    for wrong in (lambda g: g, lambda g: turned(turned(g))):  # the test would see a redirection that never or twice happened
        assert (result.out - form(**result.alone, R=wrong)).abs().max() > 1e-2


@pytest.mark.parametrize("name", GUIDERS)
def test_unflagged_is_bit_identical(tiny_model, tiny_cond, name):
    make = GUIDERS[name][0]
    plain = guide(make(tiny_model, tiny_cond), AtEverySigma(), (3.0, 1.0, 0.3))
    safe = guide(make(apply_hgr(tiny_model, make_hgr(NEVER, NEVER)), tiny_cond), AtEverySigma(), (3.0, 1.0, 0.3))
    assert all(torch.equal(safe.outs[sigma], out) for sigma, out in plain.outs.items())


@pytest.mark.parametrize("cfg", [5.0, 1.0])
def test_a_real_network_redirects(tiny_model, tiny_cond, cfg):
    plain = sample(tiny_model, tiny_cond(1), tiny_cond(2), cfg)
    safe = sample(apply_hgr(tiny_model, **ONLY_GUIDANCE), tiny_cond(1), tiny_cond(2), cfg)
    assert safe.isfinite().all() and (safe - plain).abs().max() > 0.01


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2s_ancestral", "dpmpp_2m", "lcm", "euler_cfg_pp", "uni_pc"])
def test_redirections_count_evaluations(tiny_model, tiny_cond, monkeypatch, sampler):
    known, evaluations = KnownRedirection(monkeypatch), []
    count = lambda apply_model, args: (evaluations.append(1), apply_model(args["input"], args["timestep"], **args["c"]))[1]  # noqa: E731
    tiny_model.set_model_unet_function_wrapper(count)
    sample(apply_hgr(tiny_model, **ONLY_GUIDANCE), tiny_cond(1), tiny_cond(2), sampler=sampler)
    assert known.count == len(evaluations) > 0


def test_rows_are_judged_alone(tiny_model, tiny_cond, monkeypatch):
    KnownRedirection(monkeypatch, rows={1, 3})
    plain = sample(tiny_model, tiny_cond(1, batch=4), tiny_cond(2), batch=4)
    safe = sample(apply_hgr(tiny_model, **ONLY_GUIDANCE), tiny_cond(1, batch=4), tiny_cond(2), batch=4)
    assert [torch.equal(a, b) for a, b in zip(plain, safe, strict=True)] == [True, False, True, False]


def test_cfg_1_clean_costs_three_probes(tiny_model, tiny_cond, monkeypatch):
    plain = sample(tiny_model, tiny_cond(1), tiny_cond(2), 1.0, steps=20)
    known = KnownRedirection(monkeypatch, rows=())
    safe = sample(apply_hgr(tiny_model, **ONLY_GUIDANCE), tiny_cond(1), tiny_cond(2), 1.0, steps=20)
    assert known.count == 3 and torch.equal(plain, safe)


def test_cfg_1_goes_on_while_flagged(tiny_model, tiny_cond, monkeypatch):
    known = KnownRedirection(monkeypatch, calls=range(6))  # flagged in six evaluations, then clean
    sample(apply_hgr(tiny_model, **ONLY_GUIDANCE), tiny_cond(1), tiny_cond(2), 1.0, steps=20)
    assert known.count == 6 + 1 + 1  # the seventh finds it clean; one probe is left
    known = KnownRedirection(monkeypatch)
    sample(apply_hgr(tiny_model, **ONLY_GUIDANCE), tiny_cond(1), tiny_cond(2), 1.0, steps=20)
    assert known.count == 20


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_probes_do_not_advance_easycache(tiny_model, tiny_cond, monkeypatch, cfg):
    cached = nodes_easycache.EasyCacheNode.execute(tiny_model, 0.5, 0.1, 0.95, False).result[0]
    plain = sample(cached, tiny_cond(1), tiny_cond(2), cfg, steps=12)
    assert not torch.equal(plain, sample(tiny_model, tiny_cond(1), tiny_cond(2), cfg, steps=12))  # the cache does something
    KnownRedirection(monkeypatch, rows=())
    assert torch.equal(plain, sample(apply_hgr(cached, **ONLY_GUIDANCE), tiny_cond(1), tiny_cond(2), cfg, steps=12))


def test_remembered_flags_hold_for_one_run(tiny_model, tiny_cond, monkeypatch):
    model = apply_hgr(tiny_model, **ONLY_GUIDANCE, remember_flagged=True)
    for _ in range(2):
        known = KnownRedirection(monkeypatch, calls=[2])
        sample(model, tiny_cond(1), tiny_cond(2))
        assert [flags is not None and bool(flags.all()) for flags in known.remembered] == [False] * 3 + [True] * 3
    known = KnownRedirection(monkeypatch, calls=[2])
    sample(apply_hgr(tiny_model, **ONLY_GUIDANCE), tiny_cond(1), tiny_cond(2))
    assert known.remembered == [None] * 6


def test_window_limits_the_redirections(tiny_model, tiny_cond, monkeypatch):
    known = KnownRedirection(monkeypatch)
    model = apply_hgr(tiny_model, **ONLY_GUIDANCE, start_percent=0.3, end_percent=0.7)
    sample(model, tiny_cond(1), tiny_cond(2), steps=12)
    sampling = model.model.model_sampling
    assert known.count == 4
    assert all(sampling.percent_to_sigma(0.7) < sigma <= sampling.percent_to_sigma(0.3) for sigma in known.sigmas)


def test_a_negative_outside_its_time_gives_no_guidance(tiny_model, tiny_cond, monkeypatch):
    """Core's output of an inactive condition is zeros: no direction to judge."""
    known = KnownRedirection(monkeypatch)
    late = [[tiny_cond(2)[0][0], {"start_percent": 0.5}]]
    plain = sample(tiny_model, tiny_cond(1), late, steps=8)
    sample(apply_hgr(tiny_model, **ONLY_GUIDANCE), tiny_cond(1), late, steps=8)
    assert 0 < known.count < 8 and plain.isfinite().all()


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


@pytest.mark.parametrize("strict", [False, True])
def test_code_without_guiders_is_noticed(tiny_model, tiny_cond, monkeypatch, caplog, strict):
    known = KnownRedirection(monkeypatch)
    model = apply_hgr(tiny_model, strict=strict)

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
        assert known.count == 1 and any("bypasses" in r.message for r in caplog.records)


@pytest.mark.parametrize(
    "damage", [lambda hooks: [], lambda hooks: lambda args: args["conds_out"]], ids=["emptied", "bare callable"]
)
def test_hooks_that_a_later_node_overwrote_are_repaired(tiny_model, tiny_cond, monkeypatch, damage):
    known = KnownRedirection(monkeypatch)
    model = apply_hgr(tiny_model, **ONLY_GUIDANCE)
    wanted = sample(model, tiny_cond(1), tiny_cond(2))
    later = model.clone()
    later.model_options["sampler_pre_cfg_function"] = damage(later.model_options["sampler_pre_cfg_function"])
    known.count = 0
    assert torch.equal(sample(later, tiny_cond(1), tiny_cond(2)), wanted) and known.count == 6


def test_our_hook_comes_first(tiny_model, tiny_cond, monkeypatch):
    """Other nodes see redirected guidance, wherever they stand."""
    KnownRedirection(monkeypatch)
    halve = lambda args: [args["conds_out"][1] + 0.5 * (args["conds_out"][0] - args["conds_out"][1]), args["conds_out"][1]]  # noqa: E731
    before, after = tiny_model.clone(), apply_hgr(tiny_model, **ONLY_GUIDANCE)
    before.set_model_sampler_pre_cfg_function(halve)
    after.set_model_sampler_pre_cfg_function(halve)
    before = apply_hgr(before, **ONLY_GUIDANCE)
    assert torch.equal(*(sample(m, tiny_cond(1), tiny_cond(2)) for m in (before, after)))


def test_chained_apply_counts_once_and_says_so(tiny_model, tiny_cond, monkeypatch, caplog):
    known = KnownRedirection(monkeypatch)
    model = apply_hgr(apply_hgr(tiny_model, **ONLY_GUIDANCE), **ONLY_GUIDANCE)
    sample(model, tiny_cond(1), tiny_cond(2))
    assert known.count == 6 and any("only the last one" in r.message for r in caplog.records)


def test_strength_0_is_no_node(tiny_model, tiny_cond):
    plain = sample(tiny_model, tiny_cond(1), tiny_cond(2))
    for model in (apply_hgr(tiny_model, strength=0.0), apply_hgr(apply_hgr(tiny_model), strength=0.0)):
        assert not model.additional_models and not any(model.wrappers.values())
        assert torch.equal(sample(model, tiny_cond(1), tiny_cond(2)), plain)


def test_the_users_model_stays_as_it_is(tiny_model, tiny_cond):
    plain = sample(tiny_model, tiny_cond(1), tiny_cond(2))
    safe = apply_hgr(tiny_model)
    sample(safe, tiny_cond(1), tiny_cond(2))
    assert (
        tiny_model.model_options == {"transformer_options": {}} and not tiny_model.wrappers and not tiny_model.additional_models
    )
    assert torch.equal(sample(tiny_model, tiny_cond(1), tiny_cond(2)), plain)


def test_runs_are_independent(tiny_model, tiny_cond):
    model = apply_hgr(tiny_model, remember_flagged=True)
    first = sample(model, tiny_cond(1), tiny_cond(2))
    sample(model, tiny_cond(7), tiny_cond(2), 1.0, steps=3)
    assert torch.equal(sample(model, tiny_cond(1), tiny_cond(2)), first)


def test_nothing_outlives_a_run(tiny_model, tiny_cond, monkeypatch):
    import gc
    import weakref

    from safecfg.nodes import sampling_hooks

    runs, start = [], sampling_hooks._start_run
    monkeypatch.setattr(sampling_hooks, "_start_run", lambda *a: (runs.append(weakref.ref(run := start(*a))), run)[1])
    sample(apply_hgr(tiny_model, remember_flagged=True), tiny_cond(1), tiny_cond(2))
    gc.collect()
    assert len(runs) == 1 and runs[0]() is None


@pytest.mark.parametrize("strict", [False, True])
def test_not_finite_is_noticed(tiny_model, tiny_cond, monkeypatch, caplog, strict):
    KnownRedirection(monkeypatch, value=float("nan"))
    model = apply_hgr(tiny_model, **ONLY_GUIDANCE, strict=strict)
    if strict:
        with pytest.raises(SafeCFGError, match="not finite"):
            sample(model, tiny_cond(1), tiny_cond(2))
    else:
        sample(model, tiny_cond(1), tiny_cond(2))
        assert any("not finite" in r.message for r in caplog.records)


def test_a_hgr_that_another_node_removed_is_noticed(tiny_model, tiny_cond):
    model = apply_hgr(tiny_model, strict=True)
    model.remove_additional_models("safecfg")
    with pytest.raises(SafeCFGError, match="another node removed the HGR"):
        sample(model, tiny_cond(1), tiny_cond(2))
