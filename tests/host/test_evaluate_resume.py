"""`SafeCFG Evaluate` stops at any time, and leaves out what fails: the next run goes on to the same table."""

from dataclasses import replace

import comfy.model_management
import comfy.samplers
import pytest
import torch
from safecfg.hgr_models import HGRError
from safecfg.nodes.evaluate import own_judges
from safecfg.nodes.evaluate import session as session_module
from safecfg.nodes.evaluate.draw import decode

from evaluating import evaluated, records


def without_times(table: str) -> str:
    return table[: table.index("Seconds per picture")]


def test_stopped_at_any_time_it_goes_on_to_the_same_table(demo, place, monkeypatch):
    whole, sheet, numbers = evaluated(demo, name="whole")
    drawn = []
    real = session_module.draw

    def stops(*args, **kwargs):
        if len(drawn) == 3:
            raise comfy.model_management.InterruptProcessingException
        drawn.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(session_module, "draw", stops)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        evaluated(demo, name="halves")
    assert len(records(place, "halves")) == 3
    with (place / "output/safecfg/evaluations/halves/results.jsonl").open("ab") as file:
        file.write(b'{"key": "cut o')  # the machine stopped in the middle of a line
    drawn.clear()
    monkeypatch.setattr(session_module, "draw", lambda *a, **k: (drawn.append(1), real(*a, **k))[1])
    table, again, same = evaluated(demo, name="halves")
    assert len(drawn) == 8 - 3 and without_times(table) == without_times(whole).replace("# whole", "# halves")
    assert torch.equal(again, sheet) and {**same, "seconds": 0, "name": 0} == {**numbers, "seconds": 0, "name": 0}
    drawn.clear()
    assert evaluated(demo, name="halves")[0] == table and not drawn
    evaluated(demo, name="halves", arms="SafeCFG, negative prompt")
    assert len(drawn) == 4  # of the new arm


def test_other_settings_are_not_mixed(demo, place):
    evaluated(demo, lists="coco.csv = clean")
    with pytest.raises(HGRError, match="were made with steps = 8, not 9. Choose another `name`"):
        evaluated(demo, lists="coco.csv = clean", steps=9)
    with pytest.raises(
        HGRError, match='were made with steps = 8, not 9; cfg = 5.0, not 4.0; negative = "", not "blurry". Choose'
    ):
        evaluated(demo, lists="coco.csv = clean", steps=9, cfg=4.0, negative="blurry")
    _, _, numbers = evaluated(demo, lists="coco.csv = clean", steps=9, resume=False)
    assert numbers["settings"]["steps"] == 9


class BrokenVAE:
    """A VAE whose pictures with these numbers, from 1, are NaN."""

    def __init__(self, vae, *broken):
        self.vae, self.broken, self.count = vae, broken, 0

    def decode(self, latent):
        self.count += 1
        return self.vae.decode(latent) * (float("nan") if self.count in self.broken else 1.0)


def test_a_picture_without_numbers_is_left_out_and_tried_again(demo, place):
    (model, clip, vae), hgr = demo
    same = {"lists": "coco.csv = clean", "images_per_prompt": 2}
    whole, _, _ = evaluated(demo, name="whole", **same)
    table, _, numbers = evaluated(((model, clip, BrokenVAE(vae, 3)), hgr), **same)  # the plain arm's second picture
    plain, safe = numbers["clean"]
    assert (plain["n"], safe["n"], safe["bit_identical"]) == (3, 3, 1.0)
    assert (
        "Left out of every figure, and tried again by the next run: 1 of the pictures. The first: coco, row 1, plain: The VAE gave"
        in table
    )
    again, _, _ = evaluated(demo, **same)
    assert without_times(again) == without_times(whole).replace("# whole", "# mine")


def test_a_model_or_vae_that_gives_no_numbers_at_all_stops_it(demo, place):
    (model, clip, vae), hgr = demo
    with pytest.raises(HGRError, match="coco, row 1, plain: The VAE gave .*NaN.*--fp32-vae.* Stopped here .such pictures: 1."):
        evaluated(((model, clip, BrokenVAE(vae, *range(99))), hgr), lists="coco.csv = clean")
    with pytest.raises(HGRError, match="Stopped here .such pictures: 5."):
        evaluated(((model, clip, BrokenVAE(vae, *range(2, 99))), hgr), lists="coco.csv = clean", images_per_prompt=4)
    with pytest.raises(HGRError, match="The model gave values that are no numbers"):
        decode(vae, torch.full((1, 4, 16, 16), float("nan")))


def test_a_judge_that_fails_on_one_picture(demo, place, monkeypatch):
    real, seen = own_judges.demo_judge, []

    def fails(pictures):
        seen.append(1)
        if len(seen) == 4:
            raise IndexError("no face")
        return real().look(pictures)

    monkeypatch.setattr(own_judges, "demo_judge", lambda: replace(real(), look=fails))
    table, _, numbers = evaluated(demo, lists="coco.csv = clean", images_per_prompt=2)
    assert "The judge demo failed: IndexError: no face" in table and sum(row["n"] for row in numbers["rows"]) == 7


def test_the_first_picture_of_every_arm_comes_first(demo, place, monkeypatch):
    """What an arm lacks shows at once: a LoRA's file, or an HGR of another encoder, which only its own arm reads."""
    drawn = []
    real = session_module.draw
    monkeypatch.setattr(
        session_module, "draw", lambda model, *a, **k: (drawn.append(bool(model.additional_models)), real(model, *a, **k))[1]
    )
    evaluated(demo)
    assert drawn == [False, True, *[False], True, *[False] * 2, *[True] * 2]
