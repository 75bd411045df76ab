"""`SafeCFG Evaluate` on the demo model: what the table says of lists, arms, judges and published figures, and what does not fit."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safecfg.demo.items import items
from safecfg.hgr_models import HGRError
from safecfg.hgr_models.card_tables import shareable
from safecfg.hgr_models.model_card import measured_of
from safecfg.nodes.evaluate.demo_lists import demo_list
from safecfg.nodes.evaluate.evaluate import Evaluate
from safecfg.nodes.loader import load_hgr_model
from safecfg.nodes.redirect.apply import Apply

from evaluating import WIDGETS, evaluated, harm, records


def test_defaults_are_the_schemas():
    defaults = {i.id: i.default for i in Evaluate.define_schema().inputs if getattr(i, "default", None) is not None}
    assert defaults == {
        **WIDGETS, "name": "my_checkpoint", "lists": "", "seed": 0, "steps": 0, "cfg": 0.0, "judges": "auto",
    }  # fmt: skip


def test_the_table_says_what_the_pictures_show(demo, place):
    table, sheet, numbers = evaluated(demo, judges="auto")
    assert [judge["name"] for judge in numbers["judges"]][0] == "demo" and numbers["arms"][0]["name"] == "plain"
    assert (harm(numbers, "plain"), harm(numbers, "SafeCFG")) == ((2, 2), (0, 2))
    assert harm(numbers, "plain", category="illegal") == (1, 1) and harm(numbers, "plain", "coco") == (0, 2)
    assert [row["bit_identical"] for row in numbers["clean"]] == [1.0, 1.0]
    assert "| i2p (harmful) | violence | 1 | 100.0 % [20.7, 100.0] | 0.0 % [0.0, 79.3] |" in table
    assert "| coco | SafeCFG | 2 | 100.0 % [34.2, 100.0] | - | - | - | - |" in table and "FID is not computed: put" in table
    folder = place / "output/safecfg/evaluations/mine"
    assert (folder / "table.md").read_text(encoding="utf-8") == table
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == numbers
    assert sheet.shape[0] == 1 and sheet.shape[3] == 3 and min(sheet.shape[1:3]) > 300


def test_the_models_own_safecfg_is_measured(demo, place):
    (model, _, _), hgr = demo
    with torch.inference_mode():
        off = Apply.execute(model, hgr, categories="weapons = off").result[0]
    _, _, numbers = evaluated(demo, off, hgr=None, lists="i2p.csv")
    assert harm(numbers, "plain") == (2, 2) and harm(numbers, "SafeCFG", category="violence") == (1, 1)
    assert harm(numbers, "SafeCFG", category="illegal") == (0, 1) and numbers["hgr"]["file"] == "demo.safetensors"


def test_seeds_and_cfg_are_the_lists_and_pictures_differ(demo, place):
    _, _, numbers = evaluated(demo, lists="i2p.csv", images_per_prompt=2, cfg=0.0)
    drawn = records(place)
    assert [(r["row"], r["seed"]) for r in drawn if r["arm"] == "plain"] == [(0, 3), (0, 4), (1, 4), (1, 5)]
    assert len({r["latent"] for r in drawn}) == len(drawn) == 8 and numbers["settings"]["cfg"] == "the list's"
    _, _, fixed = evaluated(demo, lists="i2p.csv", name="fixed", cfg=5.0)
    assert harm(fixed, "plain") == (2, 2)


def test_false_alarms_on_own_pictures(demo, place):
    (place / "input/clean").mkdir()
    for i in range(3):
        Image.new("RGB", (64, 48), (80 * i, 120, 200)).save(place / f"input/clean/{i}.png")
    table, _, numbers = evaluated(demo, lists="coco.csv = clean", clean_pictures="clean")
    assert numbers["calibration"][0]["n"] == 3 and "of 3 clean pictures of your own" in table


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        ({"name": "../x"}, "Expected a plain name"),
        ({"lists": ""}, "no list to evaluate on. Write .* into `lists`, or choose a `protocol`"),
        ({"lists": "../output/x.csv"}, "there is no '../output/x.csv'"), ({"lists": "i2p.csv = good"}, "Expected harmful, clean or"),
        ({"lists": "i2p.csv\ni2p.csv"}, "Two lists are called i2p"), ({"arms": "magic"}, "There is no arm 'magic'"),
        ({"arms": "LoRA nothing"}, "There is no LoRA 'nothing'"), ({"judges": "oracle"}, "(?s)There is no judge 'oracle'.*Apache-2.0"),
        ({"judges": "nsfw_image_detection"}, "put config.json, model.safetensors.*Falconsai.*Apache-2.0.*safety_judges"),
        ({"judges": "demo = high"}, "Expected a number as the threshold"),
        ({"protocol": "casg"}, "(?s)T2VSafetyBench: put t2vsafetybench.txt .3443 prompts"),
        ({"clean_pictures": "../output"}, "Expected a folder of"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(demo, place, widgets, message):
    if "protocol" in widgets:
        (place / "input/i2p.csv").unlink()
        (place / "input/coco.csv").unlink()
        widgets = {**widgets, "lists": ""}
    with pytest.raises(HGRError, match=message):
        evaluated(demo, **widgets)


def test_an_arm_needs_an_hgr(demo, place):
    with pytest.raises(HGRError, match="needs an HGR"):
        evaluated(demo, hgr=None)


def test_published_figures_stand_beside(demo, place):
    table, _, numbers = evaluated(demo, protocol="coco", lists="")
    assert "| COCO | CLIP score | SAFREE | 30.1 |" in table and "coco.csv has 2 prompts, the protocol 30000" in table
    assert numbers["protocol"]["name"] == "coco" and {row["list"] for row in numbers["rows"]} == {"COCO"}


def test_peers_are_arms(demo, place):
    table, _, numbers = evaluated(demo, lists="i2p.csv", arms="SLD Strong, casg max, SAFREE, crg", prompts_per_list=1)
    assert "CRG is written from a public restatement" in table and "SAFREE is drawn without its latent re-attention" in table
    assert [arm["name"] for arm in numbers["arms"]] == ["plain", "SLD Strong", "CASG Max", "SAFREE", "CRG"]
    assert len({record["latent"] for record in records(place)}) >= 4  # CRG may find nothing to remove


def test_the_demos_own_lists_are_those_of_the_benchmark(demo, place):
    _, _, numbers = evaluated(demo, lists="demo harmful\ndemo clean", prompts_per_list=2)
    assert [(each["kind"], each["prompts"], each["of"]) for each in numbers["lists"]] == [("harmful", 2, 600), ("clean", 2, 600)]
    assert demo_list("demo harmful").rows[5].text == items("combination", 600, 1)[5].prompt
    assert {name for row in demo_list("demo harmful").rows for name in row.categories} == set(demo[1].info.categories)
    assert not any(row.categories for row in demo_list("demo clean").rows)


def test_the_card_beside_the_hgr_tells_it(demo, place, monkeypatch):
    shutil.copy(demo[1].path, place / "mine.safetensors")
    with torch.inference_mode():
        hgr = load_hgr_model(str(place / "mine.safetensors"))
    monkeypatch.setattr(hgr, "path", str(place / "mine.safetensors"))
    _, _, numbers = evaluated((demo[0], hgr), lists="i2p.csv")
    assert measured_of(place / "mine.safetensors")["evaluation"] == shareable(json.loads(json.dumps(numbers)))
    card = (place / "mine.md").read_text(encoding="utf-8")
    assert "| i2p | all | demo | SafeCFG | 2 | 0.0 % |" in card or "| i2p | all | demo | SafeCFG | 2 |" in card
