"""The node `SafeCFG Apply` itself: what its widgets do."""

import pytest
from comfy.patcher_extension import WrappersMP
from safecfg.hgr_models import HGRError
from safecfg.nodes.redirect.apply import Apply

from fakes import make_hgr

WIDGETS = {
    "strength": 1.0, "threshold_offset": 0.0, "start_percent": 0.0, "end_percent": 1.0, "redirect": "both", "categories": "",
    "strict": False, "remember_flagged": True,
}  # fmt: skip


def settings_of(model):
    """What the hooks of a MODEL close over."""
    (hook,) = model.model_options["sampler_pre_cfg_function"]
    return next(cell.cell_contents for cell in hook.__closure__)


def run(model, **widgets):
    return Apply.execute(model, make_hgr(), **{**WIDGETS, **widgets}).result[0]


def test_defaults_are_the_schemas():
    schema = Apply.define_schema()
    assert {i.id: i.default for i in schema.inputs if i.id in WIDGETS} == WIDGETS


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
    settings = settings_of_wrappers(Apply.execute(tiny_model, hgr, **WIDGETS).result[0])
    assert settings.redirect == "condition" and "has no guidance redirector; only its condition redirector acts" in caplog.text
    with pytest.raises(HGRError, match="'both' needs a guidance redirector"):
        Apply.execute(tiny_model, hgr, **{**WIDGETS, "strict": True})


def settings_of_wrappers(model):
    """What the wrappers of a MODEL without CFG hooks close over."""
    ((wrapper,),) = [by_key.values() for kind, by_key in model.wrappers.items() if kind == WrappersMP.OUTER_SAMPLE]
    return next(c.cell_contents for c in wrapper[0].__closure__)
