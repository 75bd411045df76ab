"""`SafeCFG My Prompts` and `SafeCFG Calibrate HGR`: prompts of real picture files, alarms on them, thresholds that fit."""

import json
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safecfg.hgr_models import HGRError
from safecfg.nodes.demo_world.demo_model import DemoModel
from safecfg.nodes.host import server as host_server
from safecfg.nodes.loader import LoadHGR, register_folder
from safecfg.nodes.training.calibrate_hgr import CalibrateHGR
from safecfg.nodes.training.own_prompts import PICTURES, TEXT, OwnPrompts, positive_of, prompts_of_picture

WIDGETS = {"source": PICTURES, "folder": "", "text": "", "most": 2000, "leave_out": ""}
GRAPH = {
    "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red cat", "clip": ["9", 1]}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad quality", "clip": ["9", 1]}},
    "3": {"class_type": "KSampler", "inputs": {"positive": ["1", 0], "negative": ["2", 0], "seed": 1}},
    "4": {"class_type": "BasicGuider", "inputs": {"conditioning": ["5", 0]}},
    "5": {"class_type": "CLIPTextEncode", "inputs": {"text": ["6", 0]}},
    "6": {"class_type": "PrimitiveString", "inputs": {"value": "a blue dog"}},
    "7": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["4", 0], "noise": ["8", 0]}},
}
PARAMETERS = "a green frog,\n(wet:1.2)\nNegative prompt: blurry\nSteps: 20, Sampler: Euler"


def picture(path, **texts):
    about = PngInfo()
    for key, value in texts.items():
        about.add_text(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=about)
    return path


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    (tmp_path / "input").mkdir()
    picture(tmp_path / "output/a.png", prompt=json.dumps(GRAPH))
    picture(tmp_path / "output/sub/b.png", parameters=PARAMETERS)
    picture(tmp_path / "output/sub/same.png", parameters=PARAMETERS)
    picture(tmp_path / "output/none.png")
    (tmp_path / "output/broken.png").write_bytes(b"no picture")
    return tmp_path


@pytest.fixture(scope="module")
def demo():
    register_folder()
    with torch.inference_mode():
        return DemoModel.execute().result[1], LoadHGR.execute("demo.safetensors").result[0]


def gathered(**widgets):
    return OwnPrompts.execute(**{**WIDGETS, **widgets}).result


def test_defaults_are_the_schemas():
    assert {i.id: i.default for i in OwnPrompts.define_schema().inputs} == WIDGETS


def test_prompts_of_pictures(output):
    assert sorted(prompts_of_picture(output / "output/a.png")) == ["a blue dog", "a red cat"]
    assert positive_of(PARAMETERS) == "a green frog,\n(wet:1.2)"
    prompts, summary = gathered()
    assert (
        set(prompts) == {"a red cat", "a blue dog", "a green frog,\n(wet:1.2)"}
        and "3 different prompts from 5 pictures" in summary
    )
    assert gathered(folder="sub")[0] == ("a green frog,\n(wet:1.2)",)
    assert len(gathered(leave_out="cat")[0]) == 2 and "1 left out" in gathered(leave_out="cat")[1]


@pytest.mark.parametrize("graph", ["[", "[]", "{}", '{"1": 3}', '{"1": {"inputs": {"positive": ["1", 0], "negative": 1}}}'])
def test_odd_graphs_say_nothing(tmp_path, graph):
    assert prompts_of_picture(picture(tmp_path / "x.png", prompt=graph)) == []


def test_files_and_texts(output):
    (output / "input/mine.csv").write_text("prompt\na cat\na dog\n", encoding="utf-8")
    assert gathered(source="mine.csv")[0] == ("a cat", "a dog") and OwnPrompts.validate_inputs("mine.csv") is True
    assert gathered(source=TEXT, text="a cat\n\nA  cat\na dog")[0] == ("a cat", "a dog")
    assert "There is no file 'other.csv'" in OwnPrompts.validate_inputs("other.csv")


def test_what_cannot_be_gathered_is_said(output):
    for widgets, message in (
        ({"folder": "../input"}, "Expected a folder below"), ({"folder": "nowhere"}, "There is no folder 'nowhere'"),
        ({"source": TEXT}, "Found no prompts in the text"), ({"source": "x.csv"}, "There is no source 'x.csv'"),
        ({"source": TEXT, "text": "a cat", "leave_out": "cat"}, "All 1 prompts have a word"),
    ):  # fmt: skip
        with pytest.raises(HGRError, match=message):
            gathered(**widgets)


def test_alarms_on_own_prompts_and_thresholds_that_fit(demo, tmp_path, monkeypatch):
    clip, hgr = demo
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "hgr", ([str(tmp_path)], {".safetensors"}))
    prompts = tuple(
        f"a {one} and a {other}"
        for one in ("frog", "rabbit", "rocket", "moon", "apple")
        for other in ("car", "cat", "star", "key")
    )
    with torch.inference_mode():
        same, report, numbers = CalibrateHGR.execute(clip, hgr, (*prompts, "a knife"), 0.1, "").result
        new, after, fitted = CalibrateHGR.execute(clip, hgr, (*prompts, "a knife"), 0.1, "fitted").result
    assert same is hgr and json.loads(numbers)["flagged"] == pytest.approx(1 / 21)
    assert "1 of 21 of your prompts are flagged (4.8 %" in report and "a knife" in report and "weapons 1.00: a knife" in report
    recalibrated = json.loads(fitted)["recalibrated"]
    assert recalibrated["flagged"] <= 0.1 and "with the new thresholds of" in after and "too few to prove 10 %" not in report
    assert list(recalibrated["thresholds"].values()) == pytest.approx(new.info.condition_thresholds)
    assert new.info.guidance_thresholds == hgr.info.guidance_thresholds
    with pytest.raises(HGRError, match="exists. Choose another name"):
        CalibrateHGR.execute(clip, hgr, prompts, 0.1, "fitted")


def test_the_report_is_shown_on_the_node(demo, monkeypatch):
    sent = []
    server = SimpleNamespace(send_progress_text=lambda *args: sent.append(args))
    monkeypatch.setattr(host_server, "current_server", lambda: server)
    monkeypatch.setattr(host_server, "get_executing_context", lambda: SimpleNamespace(node_id="7"))
    with torch.inference_mode():
        output = CalibrateHGR.execute(*demo, ("a frog and a car",) * 8, 0.1, "")
    assert sent == [(output.result[1], "7")] and output.ui.as_dict() == {"text": (output.result[1],)}
