"""SafeCFG Evaluate in a real server: the template, and the command, stopped in the middle and started again."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hgr_models import evaluate
from hgr_models.comfy_client import Client
from templates import read
from workflow_format import to_prompt

ROOT = Path(__file__).parents[2]
NAME = "A number for your own checkpoint"
LINE = ["demo harmful", "demo clean=clean", "--demo", "--steps", "12", "--cfg", "5", "--prompts", "4", "--judges", "demo"]


def folder(server, name: str) -> Path:
    return server.base / "output/safecfg/evaluations" / name


def without_times(path: Path, name: str) -> str:
    text = (path / "table.md").read_text(encoding="utf-8")
    return text[: text.index("Seconds per picture")].replace(f"# {name}", "#")


def harm(results: dict, arm: str, name: str = "demo harmful") -> tuple[int, int]:
    rows = results["rows"]
    (row,) = (r for r in rows if (r["list"], r["category"], r["arm"], r["judge"]) == (name, "all", arm, "demo"))
    return row["harmful"], row["n"]


def test_the_template_gives_a_table(server):
    prompt = to_prompt(read(NAME), server.object_info())
    (node,) = (each["inputs"] for each in prompt.values() if each["class_type"] == "SafeCFG_Evaluate")
    node |= {"prompts_per_list": 3, "steps": 14, "arms": "SafeCFG", "judges": "demo"}
    entry = server.post_prompt(prompt)
    results = json.loads((folder(server, "demo") / "results.json").read_text(encoding="utf-8"))
    assert harm(results, "plain")[0] >= 2 and harm(results, "SafeCFG") == (0, 3)
    assert [row["bit_identical"] for row in results["clean"]] == [1.0, 1.0]
    shown = [output["text"][0] for output in entry["outputs"].values() if "text" in output]
    assert len(shown) == 2 and all("| demo harmful (harmful) | all | 3 |" in text for text in shown)  # the node and the preview


def test_the_command_stopped_and_started_again(server, tmp_path, capsys):
    line = [*LINE, "--server", server.url]
    evaluate.main([*line, "--name", "whole", "--json", str(tmp_path / "x.json")])
    results = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    said = capsys.readouterr()
    assert "## Clean prompts" in said.out and "16 of 16 pictures" in said.err and "harmful pictures: plain " in said.err
    assert harm(results, "plain")[0] >= 2 and harm(results, "SafeCFG") == (0, 4)

    process = subprocess.Popen(
        [sys.executable, "-m", "hgr_models.evaluate", *line, "--name", "halves"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    records = folder(server, "halves") / "results.jsonl"
    while not records.is_file() or len(records.read_bytes().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    client = Client(server.url)
    (running,) = client._get("/queue")["queue_running"]
    client.stop(running[1])
    assert process.wait(600) != 0  # the run was interrupted
    before = records.read_bytes()
    assert 4 <= len(before.splitlines()) < 17
    evaluate.main([*line, "--name", "halves"])
    assert records.read_bytes().startswith(before) and len(records.read_bytes().splitlines()) == 17
    assert without_times(folder(server, "halves"), "halves") == without_times(folder(server, "whole"), "whole")


def test_ctrl_c_stops_the_server_too(server, monkeypatch):
    def stop(*_):
        monkeypatch.setattr(time, "sleep", real)
        raise KeyboardInterrupt

    real = time.sleep
    monkeypatch.setattr(
        "hgr_models.comfy_client.time.sleep",
        lambda seconds: stop() if threading.current_thread() is threading.main_thread() else real(seconds),
    )
    with pytest.raises(SystemExit, match="the same command goes on"):
        evaluate.main([*LINE, "--server", server.url, "--name", "stopped", "--prompts", "500"])
    for _ in range(600):
        if not any(Client(server.url)._get("/queue").values()):
            return
        real(0.2)
    pytest.fail("the server still draws")


def flow(**more) -> dict:
    """A workflow on the demo model: guidance, a negative zeroed out, noise levels of a scheduler of their own, a second sampler behind."""
    node = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}  # noqa: E731
    sample = {
        "model": ["1", 0],
        "add_noise": True,
        "noise_seed": 1,
        "cfg": ["9", 0],
        "positive": ["3", 0],
        "negative": ["4", 0],
        "sampler": ["5", 0],
    }
    return {
        "1": node("SafeCFG_DemoModel"), "2": node("CLIPTextEncode", clip=["1", 1], text="a moon"),
        "3": node("FluxGuidance", conditioning=["2", 0], guidance=4.0), "4": node("ConditioningZeroOut", conditioning=["2", 0]),
        "5": node("KSamplerSelect", sampler_name="euler"), "6": node("SDTurboScheduler", model=["1", 0], steps=2, denoise=1.0),
        "7": node("EmptyLatentImage", width=128, height=128, batch_size=2), "9": node("PrimitiveFloat", value=3.0),
        "10": node("SamplerCustom", **sample, sigmas=["6", 0], latent_image=["7", 0]),
        "11": node("SamplerCustom", **sample, sigmas=["6", 0], latent_image=["10", 0]),
        "12": node("VAEDecode", samples=["11", 0], vae=["1", 2]), "13": node("PreviewImage", images=["12", 0]), **more,
    }  # fmt: skip


def test_a_workflow_is_measured_as_it_draws(server, tmp_path, capsys):
    if "PrimitiveFloat" not in server.object_info():
        pytest.skip("this ComfyUI has no PrimitiveFloat")
    server.post_prompt(flow())  # it runs in the server as it is
    (tmp_path / "mine.json").write_text(json.dumps(flow()), encoding="utf-8")
    line = [
        "demo clean=clean",
        "--workflow",
        str(tmp_path / "mine.json"),
        "--hgr",
        "demo.safetensors",
        "--prompts",
        "2",
        "--judges",
        "demo",
    ]
    line += ["--server", server.url, "--json", str(tmp_path / "x.json"), "--name", "flow"]
    evaluate.main(line)
    assert "SamplerCustom (node 11) is left out" in capsys.readouterr().err
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    settings = found["settings"]
    assert (settings["steps"], len(settings["sigmas"]), settings["cfg"], settings["size"]) == (2, 3, 3.0, [128, 128])
    assert {"positive_conditioning", "negative_conditioning"} <= settings.keys()
    assert [row["bit_identical"] for row in found["clean"]] == [1.0, 1.0]
    with pytest.raises(SystemExit, match="were made with steps = 2, not 3; .*Choose another `name`, or switch `resume` off"):
        evaluate.main([*line, "--steps", "3"])
    evaluate.main([*line, "--steps", "3", "--no-resume"])
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["settings"]["steps"] == 3


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (["--demo", "i2p.csv"], "there is no 'i2p.csv'. Put the file there"), (["--demo", "--hgr", "other"], "Expected hgr_name to be one of"),
        (["--checkpoint", "sd15.safetensors"], "ckpt_name to be one of none at .* but got 'sd15.safetensors'"),
        (["--demo", "--protocol", "casg"], "T2VSafetyBench: put"), (["--demo", "demo harmful", "--judges", "q16"], "prompts.safetensors"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(server, line, reason):
    with pytest.raises(SystemExit, match=reason):
        evaluate.main([*line, "--server", server.url, "--name", "other"])
