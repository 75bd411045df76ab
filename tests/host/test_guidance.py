"""The guidance redirector in runs of core's samplers: when it acts, what it remembers, and what stays as it was."""

import gc
import weakref

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_easycache
from safecfg import hgr_models
from safecfg.nodes.host.hooks import SafeCFGError
from safecfg.nodes.redirect import sampling_hooks
from safecfg.nodes.redirect.runs import EvaluationState, Run

from fakes import NEVER, KnownRedirection, Once, apply_hgr, guide, make_hgr, make_settings, sample, turned
from test_guiders import cfg_guider

ONLY_GUIDANCE = {"redirect": "guidance"}


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
    known, rows = KnownRedirection(monkeypatch, rows=()), []

    def record(apply_model, args):
        rows.append(args["cond_or_uncond"])
        return apply_model(args["input"], args["timestep"], **args["c"])

    tiny_model.set_model_unet_function_wrapper(record)
    safe = sample(apply_hgr(tiny_model, **ONLY_GUIDANCE), tiny_cond(1), tiny_cond(2), 1.0, steps=20)
    assert known.count == 3 and torch.equal(plain, safe)
    assert rows.count([0]) == 20 and rows.count([1]) == 3 and len(rows) == 23  # other patches know a probe as unconditional


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


def test_probes_do_not_pass_through_caches(tiny_model, tiny_cond, monkeypatch):
    KnownRedirection(monkeypatch, rows=())
    calls, model = [], apply_hgr(tiny_model, **ONLY_GUIDANCE)
    cache = lambda executor, *args, **kwargs: (calls.append(1), executor(*args, **kwargs))[1]  # noqa: E731
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "easycache", cache)
    sample(model, tiny_cond(1), tiny_cond(2), 1.0, steps=20)
    assert len(calls) == 20


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


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_a_negative_outside_its_time_is_looked_away_from_all_the_same(tiny_model, tiny_cond, monkeypatch, cfg):
    """Core's output of an inactive condition is zeros, no direction to judge: the negative is evaluated without its bounds."""
    known = KnownRedirection(monkeypatch)
    late = [[tiny_cond(2)[0][0], {"start_percent": 0.5}]]
    model = apply_hgr(tiny_model, **ONLY_GUIDANCE, strict=True)
    sample(model, tiny_cond(1), late, steps=8, cfg=cfg)
    assert known.count == 8  # every step, in its time and outside
    result = guide(cfg_guider(model, lambda seed: late if seed == 2 else tiny_cond(seed), cfg), Once(), sigmas=(12.0, 0.0))
    free = guide(cfg_guider(tiny_model, tiny_cond), Once(), sigmas=(12.0, 0.0)).alone
    safe = free["negative"] + turned(free["positive"] - free["negative"])
    torch.testing.assert_close(result.out, cfg * safe, atol=1e-3, rtol=0)  # core takes the inactive negative for zeros


def test_a_clean_picture_with_a_late_negative_is_bit_identical(tiny_model, tiny_cond):
    late = [[tiny_cond(2)[0][0], {"start_percent": 0.5}]]
    for cfg in (1.0, 5.0):
        plain = sample(tiny_model, tiny_cond(1), late, steps=4, cfg=cfg)
        assert torch.equal(
            sample(apply_hgr(tiny_model, make_hgr(NEVER, NEVER), strict=True), tiny_cond(1), late, steps=4, cfg=cfg), plain
        )


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
    """Other nodes work on redirected guidance, wherever they stand."""
    order, known = [], KnownRedirection(monkeypatch)
    redirect = hgr_models.redirect_guidance
    monkeypatch.setattr(hgr_models, "redirect_guidance", lambda *a: (order.append("ours"), redirect(*a))[1])

    def other(args):
        order.append("other")
        cond_denoised, uncond_denoised = args["conds_out"]
        return [uncond_denoised + 0.5 * (cond_denoised - uncond_denoised), uncond_denoised]

    before, after = tiny_model.clone(), apply_hgr(tiny_model, **ONLY_GUIDANCE)
    before.set_model_sampler_pre_cfg_function(other)
    after.set_model_sampler_pre_cfg_function(other)
    before = apply_hgr(before, **ONLY_GUIDANCE)
    assert torch.equal(*(sample(m, tiny_cond(1), tiny_cond(2)) for m in (before, after)))
    assert order == ["ours", "other"] * 12 and known.count == 12


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
    runs, start = [], sampling_hooks._start_run
    monkeypatch.setattr(sampling_hooks, "_start_run", lambda *a: (runs.append(weakref.ref(run := start(*a))), run)[1])
    sample(apply_hgr(tiny_model, remember_flagged=True), tiny_cond(1), tiny_cond(2))
    gc.collect()
    assert len(runs) == 1 and runs[0]() is None


def test_a_hgr_that_another_node_removed_is_noticed(tiny_model, tiny_cond):
    model = apply_hgr(tiny_model, strict=True)
    model.remove_additional_models("safecfg")
    with pytest.raises(SafeCFGError, match="another node removed the HGR"):
        sample(model, tiny_cond(1), tiny_cond(2))


def test_an_evaluation_leaves_nothing_to_the_next():
    run, first, second = Run(make_settings(make_hgr())), torch.zeros(1), torch.ones(1)
    run.begin(first)
    run.current.mark_handled(first)
    run.current.handled_late.append(first)
    run.current.model_ran = run.current.withheld = run.current.probing = True
    ended = run.current
    ended.close()
    assert ended.x is None and ended.handled_input is None and not ended.handled_late  # no tensor is kept between the two
    run.begin(second)
    assert run.current.x is second and run.evaluations == 2
    assert vars(run.current) == vars(EvaluationState(second))
