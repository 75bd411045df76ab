"""`SafeCFG Report`: pictures and JSON of traces, and what it says when there is none."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safecfg.nodes.detection import scores
from safecfg.nodes.reporting import report_drawing, traces
from safecfg.nodes.reporting.drawing import COLOURS, HARM
from safecfg.nodes.reporting.report import Report
from safecfg.nodes.reporting.traces import ImageTrace, PromptReading, TraceStore

import nodes
from fakes import NEVER, KnownRedirection, apply_hgr, make_hgr


@pytest.fixture(autouse=True)
def empty_store(monkeypatch):
    monkeypatch.setattr(traces, "STORE", TraceStore())


def run(model, cond, batch=2, seed=3):
    latent = {"samples": torch.zeros(batch, 4, 8, 8)}
    return nodes.common_ksampler(model, seed, 6, 5.0, "euler", "normal", cond(1), cond(2), latent)[0]


def report(model, latent):
    output = Report.execute(model, latent)
    picture, text = output.result
    assert picture.dtype == torch.float32 and picture.min() >= 0 and picture.max() <= 1
    assert len(output.ui.as_dict()["images"]) == len(picture)
    return picture, text


def make_trace(level=0.5, steps=8, heat=None, k=2, **changes) -> ImageTrace:
    """A trace of made-up readings: the first category at `level`."""
    harmfulness = np.zeros((steps, k), np.float32)
    harmfulness[:, 0] = level
    thresholds = np.full((steps, k), 0.3, np.float32)
    thresholds[:, 0] = 0.99
    trace = ImageTrace(
        categories=tuple(f"category {i}" for i in range(k)),
        strengths=(1.0,) * k,
        prompts=(PromptReading("positive", np.full(k, 0.2, np.float32), np.zeros(k, np.float32)),),
        prompt_thresholds=np.full(k, 0.9, np.float32),
        evaluations=np.arange(1, steps + 1),
        sigmas=np.linspace(14, 0.1, steps).astype(np.float32),
        harmfulness=harmfulness,
        thresholds=thresholds,
        weights=np.zeros((steps, k), np.float32),
        turned=np.zeros(steps, np.float32),
        heat_map=np.zeros((8, 8), np.float32) if heat is None else heat,
    )
    return dataclasses.replace(trace, **changes)


def where(picture: torch.Tensor, colour, columns) -> np.ndarray:
    """The rows of a picture that hold pixels of a colour, in some columns."""
    pixels = (picture[:, columns] * 255).round().to(torch.uint8).numpy()
    return np.flatnonzero((pixels == np.array(colour, np.uint8)).all(axis=-1).any(axis=1))


PLOTS, RIGHT_SIDE = slice(0, report_drawing.RIGHT - 20), slice(report_drawing.RIGHT, None)


def test_a_batch(tiny_model, tiny_cond, monkeypatch):
    KnownRedirection(monkeypatch, rows={1})
    model = apply_hgr(tiny_model, make_hgr(condition=NEVER))
    picture, text = report(model, run(model, tiny_cond))
    content = json.loads(text)
    assert picture.shape == (2, *report_drawing.size(2)[::-1], 3) and not torch.equal(picture[0], picture[1])
    clean, harmful = content["images"]
    assert content["categories"] == {"red": 1.0, "blue": 1.0}
    assert clean["found"] and not clean["flagged"] and clean["redirected"] == [] and clean["seed"] == 3
    assert harmful["flagged"] and harmful["harmfulness"] == 1.0 and harmful["redirected"] == ["red", "blue"]
    assert len(harmful["steps"]) == 6 and harmful["steps"][0]["turned"] > 0.1 and clean["steps"][0]["turned"] == 0
    assert harmful["steps"][0].keys() == {"evaluation", "sigma", "turned", "harmfulness", "thresholds", "weights"}
    assert clean["prompts"][0]["role"] == "positive" and set(clean["prompts"][0]["weights"].values()) == {0.0}
    assert [item.flagged for item in scores.read(text)] == [False, True]  # what SafeCFG Image Gate reads


def test_a_miss_says_so(tiny_model, tiny_cond):
    model = apply_hgr(tiny_model)
    latent = run(model, tiny_cond)
    changed = {"samples": torch.cat([latent["samples"][:1], latent["samples"][1:] * 1.01])}
    picture, text = report(model, changed)
    found, lost = json.loads(text)["images"]
    assert found["found"] and lost["found"] is False and "no trace for this latent" in lost["reason"] and len(picture) == 2
    assert scores.read(text)[1] is None
    other = apply_hgr(tiny_model, strength=0.5)
    assert [image["found"] for image in json.loads(report(other, latent)[1])["images"]] == [False, False]


def test_a_model_without_safecfg_is_reported_as_such(tiny_model, tiny_cond):
    """A comparison with strength 0 goes on; an image gate knows nothing of these pictures."""
    latent = run(tiny_model, tiny_cond)
    for model in (tiny_model, apply_hgr(tiny_model, strength=0.0), apply_hgr(apply_hgr(tiny_model), strength=0.0)):
        picture, text = Report.execute(model, latent).result
        assert len(picture) == 2 and picture.std() > 0.01
        assert scores.read(text) == [None, None]
        assert all("no SafeCFG" in image["reason"] and not image["found"] for image in json.loads(text)["images"])


def test_a_model_that_gives_nan(tiny_model, tiny_cond):
    tiny_model.set_model_unet_function_wrapper(lambda apply, a: apply(a["input"], a["timestep"], **a["c"]) * float("nan"))
    model = apply_hgr(tiny_model, redirect="guidance")
    picture, text = report(model, run(model, tiny_cond, batch=1))
    (image,) = json.loads(text)["images"]
    assert image["steps"][0]["turned"] is None and picture.isfinite().all()
    assert image["flagged"] and scores.read(text)[0] is None  # an image gate holds it back


def test_a_switched_off_category_does_not_count():
    trace = make_trace(strengths=(0.0, 1.0), thresholds=np.full((8, 2), 0.1, np.float32))
    assert trace.flagged.tolist() == [True, False]
    summary = trace.summary()
    assert not summary["flagged"] and summary["harmfulness"] == pytest.approx(0.2) and summary["scores"]["category 0"] == 0.5


def test_the_curve_is_as_high_as_the_harmfulness():
    rows = {level: where(report_drawing.report(make_trace(level), "x"), COLOURS[0], PLOTS) for level in (0.1, 0.5, 0.9)}
    top, height = report_drawing.TOP, report_drawing.CURVES
    for level, found in rows.items():
        curve = found[found > top + 0.05 * height]  # without the ticks of the threshold, 0.99
        assert abs(np.median(curve) - (top + (1 - level) * height)) <= 2
        assert abs(found.min() - (top + 0.01 * height)) <= 2


def test_bars_stand_where_something_was_turned():
    turned = np.array([0, 0, 0.2, 0.4, 0, 0, 0, 0], np.float32)
    assert not len(where(report_drawing.report(make_trace(), "x"), HARM, PLOTS))
    picture = report_drawing.report(make_trace(turned=turned), "x")
    assert abs(len(where(picture, HARM, PLOTS)) - report_drawing.BARS) <= 2  # the highest bar fills its plot
    columns = np.flatnonzero((picture[:, PLOTS] * 255).round().eq(torch.tensor(HARM)).all(dim=-1).any(dim=0).numpy())
    assert columns.min() > 0.2 * report_drawing.RIGHT and columns.max() < 0.6 * report_drawing.RIGHT


def test_the_heat_map_shows_the_place():
    heat = np.zeros((16, 32), np.float32)
    heat[:8, 16:] = 3.0  # upper right
    difference = report_drawing.report(make_trace(heat=heat), "x") - report_drawing.report(make_trace(), "x")
    y = report_drawing.TOP + 4 * report_drawing.ROW + 4
    map_ = difference[y : y + report_drawing.HEAT // 2, RIGHT_SIDE][:, : report_drawing.HEAT].abs().sum(dim=-1)
    quarters = [part.mean() for rows in map_.chunk(2, dim=0) for part in rows.chunk(2, dim=1)]
    assert quarters[1] > 5 * max(quarters[0], quarters[2], quarters[3])


@pytest.mark.parametrize("trace", [
    make_trace(steps=1), make_trace(steps=300), make_trace(k=1), make_trace(k=12), make_trace(prompts=()),
    make_trace(steps=0, heat=np.zeros((0, 0), np.float32)), make_trace(heat=np.ones((1, 32), np.float32)),
], ids=["one step", "many steps", "one category", "many categories", "no prompt", "no steps", "a line"])  # fmt: skip
def test_anything_can_be_drawn(trace):
    k = len(trace.categories)
    picture = report_drawing.report(trace, "a title")
    assert picture.shape == (*report_drawing.size(k)[::-1], 3) == report_drawing.miss(k, "nothing").shape
    assert picture.std() > 0.02
