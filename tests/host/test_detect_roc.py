"""`SafeCFG ROC Report`: its figures, its files, and clear errors."""

import dataclasses
import json
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from safecfg.nodes.demo_world.demo_model import demo_clip
from safecfg.nodes.detection import roc_report
from safecfg.nodes.detection.detector import detect_prompts
from safecfg.nodes.detection.roc_report import RocReport, batches, points, read_picture, report

from fake_vae import Vae
from fakes import INFO, make_hgr

WIDGETS = {
    "source": "pictures", "false_positive_rate": 0.01, "folder": "roc", "longest_side": 0, "harmful_prompts": "a knife",
    "clean_prompts": "an apple",
}  # fmt: skip


@pytest.fixture
def folder():
    """A new folder with pictures of two sizes inside this host's input folder."""
    place = Path(folder_paths.get_input_directory()) / "roc"
    generator = np.random.default_rng(0)
    for kind, sizes in (("harmful", [(16, 24)] * 2 + [(16, 16)]), ("clean", [(16, 16)] * 4)):
        (place / kind).mkdir(parents=True)
        for i, (height, width) in enumerate(sizes):
            Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(place / kind / f"{i}.png")
        (place / kind / "notes.txt").write_text("no picture")
    yield place
    for file in sorted(place.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    place.rmdir()


def run(hgr, **inputs):
    return RocReport.execute(hgr, **{**WIDGETS, **inputs}).result


def test_defaults_are_the_schemas():
    assert {i.id: i.default for i in RocReport.define_schema().inputs if i.id in WIDGETS} == WIDGETS


def test_figures_by_hand():
    found = {"harmful": torch.tensor([[0.9, 0.0], [0.0, 0.7], [0.3, 0.0]]), "clean": torch.tensor([[0.1, 0.2], [0.4, 0.0]])}
    figures, curve, each = report(("red", "blue"), found, 0.5)
    assert figures["auroc"] == pytest.approx(5 / 6) and figures["threshold"] == pytest.approx(0.2)
    assert figures["false_positive_rate"] == 0.5 and figures["true_positive_rate"] == 1.0
    assert figures["false_positive_rate_upper_bound"] > 0.5 and figures["auroc_per_category"]["red"] == 0.5
    assert points(curve)[0] == (0.0, 0.0) and points(curve)[-1] == (1.0, 1.0)
    strict, _, _ = report(("red", "blue"), found, 0.0)
    assert strict["threshold"] == pytest.approx(0.4) and strict["true_positive_rate"] == pytest.approx(2 / 3)


def test_pictures_of_a_folder(tiny_model, tiny_cond, folder):
    hgr = make_hgr(info=dataclasses.replace(INFO))
    picture, threshold, auroc, text = run(hgr, model=tiny_model, vae=Vae(), negative=tiny_cond(1), false_positive_rate=0.25)
    content = json.loads(text)
    assert (content["harmful"], content["clean"], content["source"], content["hgr"]) == (3, 4, "pictures", hgr.hash)
    assert content["auroc"] == auroc and content["threshold"] == threshold and content["false_positive_rate"] <= 0.25
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and picture.std() > 0.05


def test_pictures_of_one_size_are_looked_at_together(folder, monkeypatch):
    files = roc_report.picture_files("roc")
    assert [b.shape for b in batches(files["harmful"])] == [(2, 16, 24, 3), (1, 16, 16, 3)]
    monkeypatch.setattr(roc_report, "BATCH", 3)
    assert [len(b) for b in batches(files["clean"])] == [3, 1]
    torch.testing.assert_close(
        next(batches(files["clean"]))[0], torch.tensor(np.asarray(Image.open(files["clean"][0])) / 255, dtype=torch.float32)
    )


def test_prompts_one_per_line():
    hgr, clip = make_hgr(info=dataclasses.replace(INFO, token_width=128)), demo_clip()
    harmful = "a knife\n\n" + "a pistol and an apple " * 6
    *_, text = run(hgr, source="prompts", clip=clip, harmful_prompts=harmful, clean_prompts="an apple\na rocket\na frog")
    content = json.loads(text)
    assert (content["harmful"], content["clean"]) == (2, 3)
    scores = [
        detect_prompts(hgr, clip.encode_from_tokens_scheduled(clip.tokenize(p))).max() for p in ("an apple", "a rocket", "a frog")
    ]
    assert content["threshold"] == pytest.approx(float(max(scores)))


def test_a_changed_folder_is_read_again(folder):
    before = RocReport.fingerprint_inputs(**WIDGETS)
    assert RocReport.fingerprint_inputs(**WIDGETS) == before
    (folder / "clean" / "0.png").unlink()
    assert RocReport.fingerprint_inputs(**WIDGETS) != before
    assert RocReport.fingerprint_inputs(**{**WIDGETS, "folder": None}) and RocReport.fingerprint_inputs(source="prompts") == ""


def test_what_is_missing_is_said(tiny_model, folder):
    hgr = make_hgr()
    with pytest.raises(ValueError, match="needs vae, negative as well"):
        run(hgr, model=tiny_model)
    with pytest.raises(ValueError, match="needs a clip"):
        run(hgr, source="prompts")
    with pytest.raises(ValueError, match="at least one clean prompt"):
        roc_report.score_prompts({"clean": " \n"}, hgr, demo_clip())
    for wrong in ("../../etc", "/etc", "nothing"):
        with pytest.raises(ValueError, match="inside ComfyUI's input folder|no pictures in"):
            roc_report.picture_files(wrong)
    broken = folder / "clean" / "9.png"
    broken.write_bytes(b"no picture at all")
    with pytest.raises(ValueError, match="9.png is no complete picture"):
        read_picture(broken)


def test_transparent_and_turned_pictures(tmp_path):
    Image.new("RGBA", (4, 6), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").shape == (6, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (4, 6)).save(tmp_path / "b.jpg", exif=exif)
    assert read_picture(tmp_path / "b.jpg").shape == (4, 6, 3)
