"""An HGR that its own check found weak: flagged runs get their category's concept row after the redirection, others nothing."""

import dataclasses

import pytest
import torch
from safecfg import hgr_models
from safecfg.nodes.host.settings import ApplySettings
from safecfg.nodes.redirect import concept_mode

from concept_fakes import (
    SEEDS,
    SIGMA,
    SOFT,
    WITH_CONCEPTS,
    KnownFlags,
    alone,
    basic_guider,
    cfg_guider,
    expected,
    record_rows,
)
from fakes import Once, apply_hgr, guide, make_hgr, sample
from test_concept_mode_node import FakeCLIP, run_node
from tiny import tiny_conditioning

SHORT = (SIGMA, 0.0)
OF_PROMPTS = dataclasses.replace(WITH_CONCEPTS, latent_format="", latent_channels=0, prediction="")
WEAK = dataclasses.replace(OF_PROMPTS, training={"forward_check": 0.4})


def weak_model(model, networks=("condition",), strict=True, **settings):
    redirect = "both" if "guidance" in networks else "condition"
    hgr = make_hgr(info=WEAK if redirect == "condition" else WITH_CONCEPTS, networks=networks)
    encoded = tuple(tiny_conditioning(SEEDS[name], tokens=5)[0] for name in WEAK.categories)
    return apply_hgr(model, hgr, redirect=redirect, strict=strict, concepts=encoded, **settings)


class Rewritten(KnownFlags):
    """Flags as told; the prompt becomes that of seed 9, and the guidance stays."""

    def redirect_condition(self, hgr, tokens, pooled, settings, mask=None):
        weights = self.prompt.expand(len(tokens), -1)
        safe = tiny_conditioning(9)[0][0] if (weights > 0).any() else tokens
        return hgr_models.ConditionResult(safe.expand_as(tokens), pooled, weights, weights)

    def redirect_guidance(self, hgr, cond_denoised, *args):
        result = super().redirect_guidance(hgr, cond_denoised, *args)
        return dataclasses.replace(result, cond_denoised=cond_denoised)


@pytest.mark.parametrize("cfg", [5.0, 1.0])
def test_one_step_is_the_corrected_prompt_less_the_concept(tiny_model, monkeypatch, cfg):
    Rewritten(monkeypatch, [(1.0, 0.0)])
    monkeypatch.setattr(concept_mode, "SLD", SOFT)
    result = guide(cfg_guider(weak_model(tiny_model), cfg), Once(), SHORT)
    safe = alone(tiny_model, 9)
    wanted = expected(result, [alone(tiny_model, SEEDS["red"])], cfg, SOFT, text=safe)
    torch.testing.assert_close(result.out, wanted, atol=2e-4, rtol=0)
    corrected = result.alone["negative"] + cfg * (safe - result.alone["negative"])
    assert (result.out - corrected).abs().max() > 0.05  # without the concept's row


@pytest.mark.parametrize("prompt, extra", [((0.0, 0.0), 0), ((1.0, 0.0), 1), ((1.0, 1.0), 2)])
@pytest.mark.parametrize("networks", [("condition",), ("condition", "guidance")])
def test_only_flagged_runs_pay_a_row(tiny_model, tiny_cond, monkeypatch, networks, prompt, extra):
    plain, rows = sample(tiny_model, tiny_cond(1), tiny_cond(2)), record_rows(tiny_model)
    Rewritten(monkeypatch, [prompt])
    safe = sample(weak_model(tiny_model, networks), tiny_cond(1), tiny_cond(2))
    assert rows.count([1]) == 6 * extra and len(rows) == 6 * (1 + extra)
    assert torch.equal(safe, plain) == (extra == 0) and safe.isfinite().all()


def test_at_cfg_1_nothing_is_evaluated_until_a_prompt_is_flagged(tiny_model, tiny_cond, monkeypatch):
    plain, rows = sample(tiny_model, tiny_cond(1), tiny_cond(2), cfg=1.0), record_rows(tiny_model)
    Rewritten(monkeypatch, [(0.0, 0.0)])
    assert torch.equal(sample(weak_model(tiny_model), tiny_cond(1), tiny_cond(2), cfg=1.0), plain)
    assert rows and not any(1 in row for row in rows)


def test_without_a_negative_the_prompt_is_corrected_all_the_same(tiny_model, monkeypatch):
    Rewritten(monkeypatch, [(1.0, 0.0)])
    out = guide(basic_guider(weak_model(tiny_model)), Once(), SHORT).out  # strict
    torch.testing.assert_close(out, alone(tiny_model, 9), atol=1e-5, rtol=0)


def test_it_is_another_picture_to_what_remembers_pictures():
    hgr = make_hgr(info=WEAK, networks=("condition",))
    settings = ApplySettings(hgr.info, hgr_models.CategorySettings((1.0, 1.0)), "condition")
    assert dataclasses.replace(settings, concepts=(tiny_conditioning(5)[0], None)).identity != settings.identity


@pytest.mark.parametrize("training, weak", [({"forward_check": 0.4}, True), ({"forward_check": 0.1}, False), ({}, False)])
def test_the_node_backs_a_weak_hgr_where_it_has_a_clip(tiny_model, tiny_cond, monkeypatch, caplog, training, weak):
    hgr = make_hgr(info=dataclasses.replace(OF_PROMPTS, training=training), networks=("condition",))
    Rewritten(monkeypatch, [(1.0, 0.0)])
    rows, clip = record_rows(tiny_model), FakeCLIP()
    out = {
        with_clip: sample(run_node(tiny_model, hgr, with_clip, redirect="both"), tiny_cond(1), tiny_cond(2))
        for with_clip in (clip, None)
    }
    assert torch.equal(out[clip], out[None]) != weak
    assert rows.count([1]) == (6 if weak else 0)
    assert ("concept row" in caplog.text) == weak and clip.prompts == ["blood", "sky"] * weak


def test_a_category_without_a_concept_prompt_has_no_row(tiny_model, tiny_cond, monkeypatch):
    info = dataclasses.replace(WEAK, concept_prompts={"blue": "sky"})
    Rewritten(monkeypatch, [(1.0, 0.0)])
    rows = record_rows(tiny_model)
    sample(
        run_node(tiny_model, make_hgr(info=info, networks=("condition",)), FakeCLIP(), redirect="both"),
        tiny_cond(1),
        tiny_cond(2),
    )
    assert rows.count([1]) == 0
