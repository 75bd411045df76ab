"""Guiders without a negative (BasicGuider): the one that SafeCFG Apply lends them, and what the report says without one."""

import json

import pytest
import torch
from safecfg.nodes.host.hooks import LENT, SafeCFGError
from safecfg.nodes.redirect.conditions import lend_negative
from safecfg.nodes.reporting import report_drawing, traces
from safecfg.nodes.reporting.drawing import HARM
from safecfg.nodes.reporting.report import Report

from fakes import KnownRedirection, apply_hgr, make_hgr, make_settings
from host_nodes import call
from matrix import Scene

STEPS = 20


def draw(model, positive, guider="BasicGuider", **inputs):
    """A run of a guider through core's own nodes: the LATENT, and the guider."""
    named = {"conditioning": positive} if guider == "BasicGuider" else {"positive": positive, **inputs}
    (made,) = call(guider, model=model, **named)
    scene = Scene.make(steps=STEPS)
    noise, sampler = call("RandomNoise", noise_seed=0)[0], call("KSamplerSelect", sampler_name="euler")[0]
    latent = call(
        "SamplerCustomAdvanced", noise=noise, guider=made, sampler=sampler, sigmas=scene.sigmas(model), latent_image=scene.latent
    )
    return latent[0], made


def test_clean_pictures_stay_and_cost_three_probes(tiny_model, tiny_cond, monkeypatch):
    plain, _ = draw(tiny_model, tiny_cond(1))
    known, negative = KnownRedirection(monkeypatch, rows=()), tiny_cond(2)
    model = apply_hgr(tiny_model, redirect="guidance", strict=True, negative=negative)
    before = negative[0][0].clone()
    safe, guider = draw(model, tiny_cond(1))
    assert torch.equal(safe["samples"], plain["samples"]) and known.count == 3
    assert torch.equal(negative[0][0], before) and negative[0][1] == {} and LENT not in guider.original_conds


def test_harm_is_redirected_as_with_a_negative_of_its_own(tiny_model, tiny_cond, monkeypatch):
    plain, _ = draw(tiny_model, tiny_cond(1))
    known = KnownRedirection(monkeypatch)
    safe, _ = draw(apply_hgr(tiny_model, redirect="guidance", strict=True, negative=tiny_cond(2)), tiny_cond(1))
    assert known.count == STEPS
    wanted, _ = draw(apply_hgr(tiny_model, redirect="guidance"), tiny_cond(1), "CFGGuider", negative=tiny_cond(2), cfg=1.0)
    assert torch.equal(safe["samples"], wanted["samples"]) and not torch.equal(safe["samples"], plain["samples"])


def test_without_one_the_run_stops_or_the_report_says_so(tiny_model, tiny_cond, monkeypatch):
    monkeypatch.setattr(traces, "STORE", traces.TraceStore())
    with pytest.raises(SafeCFGError, match="Connect `negative`"):
        draw(apply_hgr(tiny_model, redirect="guidance", strict=True), tiny_cond(1))
    said, pictures = {}, {}
    for name, negative in (("lent", tiny_cond(2)), ("none", None)):
        model = apply_hgr(tiny_model, redirect="guidance", negative=negative)
        picture, text = Report.execute(model, draw(model, tiny_cond(1))[0]).result
        said[name], pictures[name] = json.loads(text)["images"][0]["not_redirected"], picture[0]
    assert said["lent"] == [] and len(said["none"]) == 1 and "no negative prompt" in said["none"][0]
    line = slice(report_drawing.MARGIN + 2 * report_drawing.ROW - 4, report_drawing.TOP - 24)
    red = {name: (picture[line] == torch.tensor(HARM) / 255).all(dim=-1).any() for name, picture in pictures.items()}
    assert red["none"] and not red["lent"]


class Guider:
    def __init__(self, **conds):
        self.conds = conds


def test_what_both_directions_share_is_shared(tiny_cond):
    positive = {"cross_attn": torch.zeros(1, 7, 16), "guidance": 3.5, "unclip_conditioning": [{}], "uuid": "its own"}
    settings = make_settings(make_hgr(), negative=tiny_cond(2))
    guider = Guider(positive=[positive])
    lend_negative(guider, settings)
    (entry,) = guider.conds[LENT]
    assert entry["guidance"] == 3.5 and entry["prompt_type"] == "negative" and entry["uuid"] != "its own"
    assert (
        torch.equal(entry["cross_attn"], tiny_cond(2)[0][0]) and "unclip_conditioning" not in entry
    )  # an image prompt is a prompt


@pytest.mark.parametrize("has_one", ["negative", "empty_negative_prompt"])
def test_guiders_with_a_negative_keep_theirs(tiny_cond, has_one):
    guider = Guider(positive=[{}], **{has_one: [{"cross_attn": torch.zeros(1, 7, 16)}]})
    lend_negative(guider, make_settings(make_hgr(), negative=tiny_cond(2)))
    assert LENT not in guider.conds


def test_the_condition_redirector_needs_none(tiny_cond):
    guider = Guider(positive=[{}])
    lend_negative(guider, make_settings(make_hgr(), redirect="condition", negative=tiny_cond(2)))
    assert LENT not in guider.conds
