"""The node `SafeCFG Apply` itself: what its widgets do."""

import pytest
import torch
from safecfg.hgr_models import HGRError
from safecfg.nodes.host.hooks import KEY, SafeCFGError
from safecfg.nodes.redirect.apply import Apply

from fakes import NEVER, apply_hgr, make_hgr, sample
from host_nodes import call

WIDGETS = {
    "strength": 1.0, "threshold_offset": 0.0, "start_percent": 0.0, "end_percent": 1.0, "redirect": "both", "categories": "",
    "strict": False, "remember_flagged": True,
}  # fmt: skip


def settings_of(model):
    """What SafeCFG was asked for in a MODEL."""
    return model.get_attachment(KEY)


def run(model, **widgets):
    return Apply.execute(model, make_hgr(), **{**WIDGETS, **widgets}).result[0]


def test_defaults_are_the_schemas():
    schema = Apply.define_schema()
    assert {i.id: i.default for i in schema.inputs if i.id in WIDGETS} == WIDGETS


def test_prompts_of_the_api_need_no_widget(tiny_model):
    inputs = Apply.INPUT_TYPES()
    assert list(inputs["required"]) == ["model", "hgr"]
    assert list(inputs["optional"])[: len(WIDGETS)] == list(WIDGETS)  # saved workflows know widgets by their place
    hgr = make_hgr()
    short, long = Apply.execute(tiny_model, hgr).result[0], Apply.execute(tiny_model, hgr, **WIDGETS).result[0]
    assert settings_of(short) == settings_of(long)


def test_widgets_become_settings(tiny_model):
    widgets = {"strength": 0.5, "threshold_offset": -0.1, "categories": "red = 0.5; blue = off", "start_percent": 0.1}
    settings = settings_of(run(tiny_model, **widgets, redirect="guidance", strict=True, remember_flagged=False))
    assert settings.categories.strengths == (0.25, 0.0) and settings.categories.threshold_offset == -0.1
    assert (settings.start_percent, settings.end_percent, settings.redirect) == (0.1, 1.0, "guidance")
    assert settings.strict and not settings.remember_flagged and settings.by_guidance and not settings.by_condition


def test_all_categories_off_is_no_node(tiny_model):
    assert not run(tiny_model, categories="red = off, blue = 0").additional_models


@pytest.mark.parametrize("text", ["green = 1", "red = 2", "red = high", "red, red"])
def test_wrong_categories_are_said(tiny_model, text):
    with pytest.raises(HGRError, match="red|green"):
        run(tiny_model, categories=text)


def test_an_empty_window_is_refused(tiny_model):
    with pytest.raises(ValueError, match="start_percent below end_percent, but got 0.5 and 0.5"):
        run(tiny_model, start_percent=0.5, end_percent=0.5)


def test_both_with_one_network_warns_or_stops(tiny_model, caplog):
    hgr = make_hgr()
    hgr.patcher.model.guidance = None
    settings = settings_of(Apply.execute(tiny_model, hgr, **WIDGETS).result[0])
    assert settings.redirect == "condition" and "has no guidance redirector; only its condition redirector acts" in caplog.text
    with pytest.raises(HGRError, match="'both' needs a guidance redirector"):
        Apply.execute(tiny_model, hgr, **{**WIDGETS, "strict": True})


def with_lora(model):
    patched = model.clone()
    name, weight = next((k, w) for k, w in model.model.state_dict().items() if k.endswith("attn2.to_k.weight"))
    assert patched.add_patches({name: ("diff", (torch.ones_like(weight),))})
    return patched


def test_a_lora_behind_the_node_is_noticed(tiny_model, tiny_cond, caplog):
    hgr, prompts = make_hgr(NEVER, NEVER), (tiny_cond(1), tiny_cond(2))
    for right in (apply_hgr(with_lora(tiny_model), hgr, strict=True), apply_hgr(tiny_model, hgr, strict=True).clone()):
        sample(right, *prompts)
    assert "behind SafeCFG Apply" not in caplog.text
    sample(with_lora(apply_hgr(with_lora(tiny_model), hgr)), *prompts)
    assert caplog.text.count("weights were patched behind SafeCFG Apply") == 1
    with pytest.raises(SafeCFGError, match="Put SafeCFG Apply last"):
        sample(with_lora(apply_hgr(tiny_model, hgr, strict=True)), *prompts)


def test_a_merge_behind_the_node_keeps_the_hooks_of_model1(tiny_model, tiny_cond):
    safe, prompts = apply_hgr(tiny_model, make_hgr(NEVER, NEVER), strict=True), (tiny_cond(1), tiny_cond(2))
    merge = lambda one, two: call("ModelMergeSimple", model1=one, model2=two, ratio=0.5)[0]  # noqa: E731
    with pytest.raises(SafeCFGError, match="a merge"):
        sample(merge(safe, tiny_model), *prompts)
    assert settings_of(merge(tiny_model, safe)) is None  # lost, as the help page says
    sample(apply_hgr(merge(safe, tiny_model), make_hgr(NEVER, NEVER), strict=True), *prompts)
