"""`SafeCFG Image Gate`: harmful pictures never pass, and what nothing is known about counts as harmful."""

import json
import logging

import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from safecfg.nodes.detection import scores
from safecfg.nodes.detection.image_gate import ImageGate, blurred, decide, replaced
from safecfg.nodes.reporting import drawing

WIDGETS = {"mode": "blur", "threshold": 0.0, "blur_cells": 8, "notice": "This picture was held back."}
UNKNOWN = object()


def text(*values):
    """Scores of pictures with these harmfulnesses; flagged above 0.5."""
    entries = [None if v is UNKNOWN else {"harmfulness": v, "flagged": v > 0.5, "scores": {"red": v}} for v in values]
    return json.dumps({"categories": {"red": 0.5}, "images": entries})


@pytest.fixture
def pictures():
    return torch.rand(3, 32, 48, 3, generator=torch.Generator().manual_seed(0))


def gate(pictures, **inputs):
    """Core hands every input over as a list."""
    widgets = {name: [value] for name, value in WIDGETS.items()}
    return ImageGate.execute([pictures], **{**widgets, **inputs}).result


def test_defaults_are_the_schemas():
    schema = ImageGate.define_schema()
    assert {i.id: i.default for i in schema.inputs if i.id in WIDGETS} == WIDGETS and schema.is_input_list


@pytest.mark.parametrize("mode", ["blur", "replace", "pass"])
def test_harmful_pictures_are_held_back(pictures, mode):
    images, passed, held = gate(pictures, mode=[mode], scores=[text(0.1, 0.9, 0.2)])
    assert held == 1 and torch.equal(passed, pictures[[0, 2]])
    assert torch.equal(images[[0, 2]], pictures[[0, 2]])
    assert torch.equal(images[1], pictures[1]) == (mode == "pass")


def test_nothing_passed_blocks_the_branch(pictures):
    images, passed, held = gate(pictures, flagged=[True, True, True])
    assert isinstance(passed, ExecutionBlocker) and passed.message is None and held == 3 and len(images) == 3


def test_everything_passed_is_untouched(pictures):
    images, passed, held = gate(pictures, flagged=[False] * 3, scores=[text(0.0, 0.1, 0.2)])
    assert torch.equal(images, pictures) and torch.equal(passed, pictures) and held == 0


def test_own_threshold_uses_scores():
    assert decide(3, [text(0.1, 0.4, 0.9)], None, 0.3) == [False, True, True]
    assert decide(3, [text(0.1, 0.4, 0.9)], None, 0.95) == [False, False, False]
    assert decide(3, [text(0.1, 0.4, 0.9)], [True, True, True], 0.95) == [False, False, False]
    assert decide(2, [text(0.5, 0.51)], None, 0.5) == [False, True]  # above, as everywhere
    with pytest.raises(ValueError, match=r"threshold of your own \(0.3\) needs scores"):
        decide(1, None, [False], 0.3)


def test_either_of_scores_and_flags_is_enough():
    assert decide(3, [text(0.9, 0.1, 0.1)], [False, True, False], 0.0) == [True, True, False]


def test_unknown_pictures_are_held_back(caplog):
    with caplog.at_level(logging.WARNING):
        assert decide(3, [text(0.1, UNKNOWN)], None, 0.0) == [False, True, True]
    assert "2 of 3 pictures have no score" in caplog.text
    assert decide(3, None, [False], 0.0) == [False, True, True]
    assert decide(2, [text()], None, 0.0) == [True, True]
    assert decide(2, [text(0.1, 0.1)], [False], 0.0) == [False, True]


@pytest.mark.parametrize("entry", [{}, "clean", {"harmfulness": 0.1}, {"flagged": False}, {"harmfulness": float("nan"), "flagged": False},
                                   {"harmfulness": -1, "flagged": False}, {"harmfulness": 0.1, "flagged": 0}])  # fmt: skip
def test_entries_that_say_nothing_are_unknown(entry):
    assert scores.read(json.dumps({"images": [entry]})) == [None]


def test_lists_of_texts_follow_the_pictures():
    assert decide(3, [text(0.1), text(0.9, 0.1)], None, 0.0) == [False, True, False]


def test_wrong_scores_are_said(pictures):
    for wrong in ("", "no trace for this latent", "[]", '{"prompts": []}', '{"images": 3}'):
        with pytest.raises(ValueError, match="scores of SafeCFG Detect Harm or SafeCFG Report"):
            decide(1, [wrong], None, 0.0)
    with pytest.raises(ValueError, match="scores of 2 pictures, but got 3"):
        decide(2, [text(0.1, 0.1, 0.1)], None, 0.0)
    with pytest.raises(ValueError, match="neither is connected"):
        gate(pictures)


def test_batches_of_one_size_are_one(pictures):
    two = ImageGate.execute([pictures, pictures[:1]], **{n: [v] for n, v in WIDGETS.items()}, flagged=[False] * 4).result
    assert len(two[0]) == 4
    with pytest.raises(ValueError, match="pictures of one size"):
        ImageGate.execute([pictures, pictures[:, :16]], **{n: [v] for n, v in WIDGETS.items()}, flagged=[False] * 4)
    with pytest.raises(ValueError, match="at least one picture"):
        gate(pictures[:0], flagged=[])


@pytest.mark.parametrize("size", [(32, 48), (3, 200), (1, 1)])
def test_a_blurred_picture_keeps_a_few_colours(size):
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(4, 8, 3, generator=generator)
    one = blurred(torch.rand(*size, 3, generator=generator), 8)
    assert one.shape == (*size, 3)
    if size == (32, 48):
        detail = torch.rand(32, 48, 3, generator=generator)
        block = detail.unflatten(0, (-1, 2)).unflatten(2, (-1, 2))
        flat = block - block.mean(dim=(1, 3), keepdim=True)  # detail finer than the cells
        shown = blurred(0.5 + 0.3 * flat.flatten(2, 3).flatten(0, 1), 8)
        assert shown.std() < 0.02 and base.std() > 0.2
    assert blurred(torch.full((16, 16, 3), float("nan")), 8).isfinite().all()


def test_replaced_pictures_show_nothing_of_them():
    picture = torch.rand(40, 200, 4)
    notice = replaced(picture, "Held back")
    assert notice.shape == picture.shape and (notice[..., 3] == 1).all()
    assert torch.equal(notice, replaced(1 - picture, "Held back"))
    assert not torch.equal(notice, replaced(picture, "Something else"))


@pytest.mark.parametrize("size", [(8, 8), (512, 64), (64, 512), (300, 300)])
def test_notices_fit(size):
    drawn = drawing.notice(size[1], size[0], "This picture was held back because it may show violence.")
    assert drawn.shape == (*size, 3)
    if min(size) >= 64:
        written = (drawn - drawn[0, 0]).abs().amax(dim=2) > 0.2
        rows, columns = written.any(dim=1), written.any(dim=0)
        assert written.any() and not rows[0] and not rows[-1] and not columns[0] and not columns[-1]
