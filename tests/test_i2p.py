"""I2P for real checkpoints: both arms, resuming, the tables and every error, on a stand-in that draws the graph's seed."""

import json
import threading
from pathlib import Path

import pytest

from benchmarks import i2p
from benchmarks.comfy_client import Client, ComfyError
from fake_comfy import I2P, FakeComfy, command, written


@pytest.fixture
def i2p_csv(tmp_path) -> Path:
    return written(tmp_path, I2P)


@pytest.fixture
def comfy():
    """The stand-in for a server."""
    server = FakeComfy()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def line(comfy, csv: Path, *options) -> list[str]:
    known = ["--server", comfy.url, "--checkpoint", "sd15.safetensors", "--hgr", "mine.safetensors", "--images", "2"]
    return [str(csv), *known, "--out", str(csv.parent / "out"), *map(str, options)]


def test_draws_both_arms_and_writes_the_tables(comfy, i2p_csv, capsys):
    i2p.main(line(comfy, i2p_csv, "--classifier", command(i2p_csv.parent), "--cfg", "csv"))
    out = i2p_csv.parent / "out"
    found = json.loads((out / "i2p.json").read_text())["categories"]
    assert list(found) == ["hate", "self-harm", "violence", "all"]
    assert (found["violence"]["plain"], found["violence"]["safecfg"], found["violence"]["same"]) == (1, 0, 0)
    assert (found["hate"]["plain"], found["hate"]["pictures"], found["hate"]["prompts"]) == (0.5, 4, 2)
    assert found["hate"]["plain_interval"] == pytest.approx([0.1500, 0.8500], abs=1e-4)  # Wilson, by hand: 2 of 4
    assert found["all"]["same"] == pytest.approx(2 / 3)
    text = (out / "i2p.md").read_text()
    assert "| violence | 1 | 2 | 100.0 % [34.2, 100.0] | 0.0 % [0.0, 65.8] | 0.0 % [0.0, 65.8] |" in text
    assert text in capsys.readouterr().out
    samplers = [(g["2"]["inputs"]["text"], g["7"]["inputs"]["seed"], g["7"]["inputs"]["cfg"], "6" in g) for g in comfy.graphs]
    assert samplers[:4] == [
        ("a fight, at night", 2**64 - 1, 7.0, False),
        ("a fight, at night", 2**64 - 1, 7.0, True),
        ("a fight, at night", 0, 7.0, False),
        ("a fight, at night", 0, 7.0, True),
    ]
    safe = comfy.graphs[1]["6"]["inputs"]
    assert safe == {"strength": 0.75, "strict": True, "redirect": "both", "model": ["1", 0], "hgr": ["5", 0]}


def test_concept_mode_gets_the_clip(comfy, tmp_path):
    i2p.main(line(comfy, written(tmp_path, "prompt,categories\na scene,x\n"), "--redirect", "concept"))
    assert [g["6"]["inputs"]["clip"] for g in comfy.graphs if "6" in g] == [["1", 1]] * 2


def test_goes_on_where_it_stopped(comfy, i2p_csv, capsys):
    i2p.main(line(comfy, i2p_csv))
    out, count = i2p_csv.parent / "out", len(comfy.graphs)
    assert count == 12
    lost = out / "safecfg" / "00001_1.png"
    before = lost.read_bytes()
    lost.unlink()
    i2p.main(line(comfy, i2p_csv))
    assert len(comfy.graphs) == count + 1 and lost.read_bytes() == before
    assert "1 pictures drawn, 11 were there" in capsys.readouterr().out
    i2p.main(line(comfy, i2p_csv, "--images", 3))
    assert len(comfy.graphs) == count + 1 + 6
    with pytest.raises(SystemExit, match="drawn with steps = 25, not 9. Name another --out"):
        i2p.main(line(comfy, i2p_csv, "--steps", 9))


def test_what_was_drawn_before_a_failure_is_kept(comfy, tmp_path):
    csv = written(tmp_path, "prompt,categories\na scene,x\nit fails,x\n")
    with pytest.raises(SystemExit, match="failed to draw a picture: KSampler: out of memory$"):
        i2p.main(line(comfy, csv))
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == [
        "00000_0.png",
        "00000_0.png",
        "00000_1.png",
        "00000_1.png",
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--checkpoint", "other"], "ckpt_name to be one of sd15.safetensors at http.*, but got 'other'"),
        (["--hgr", "other"], "hgr_name to be one of demo.safetensors, mine.safetensors .* got 'other'"),
        (["--sampler", "other"], "sampler_name to be one of euler"),
        (["--scheduler", "other"], "scheduler to be one of normal"),
        (["--steps", 101], r"refused: Prompt failed; KSampler: Value bigger than max \(steps\)"),
        (["--categories", "other"], "but got other"),
    ],
)
def test_settings_that_do_not_fit(comfy, i2p_csv, options, reason):
    with pytest.raises(SystemExit, match=reason):
        i2p.main(line(comfy, i2p_csv, *options))


def test_a_server_that_cannot_draw_both_arms(comfy, i2p_csv):
    comfy.nodes["SafeCFG_Enforced"] = {}
    with pytest.raises(SystemExit, match="enforces SafeCFG for every prompt"):
        i2p.main(line(comfy, i2p_csv))
    del comfy.nodes["SafeCFG_LoadHGR"]
    with pytest.raises(SystemExit, match="has no node SafeCFG_LoadHGR"):
        i2p.main(line(comfy, i2p_csv))


def test_a_run_that_the_server_loses(comfy, tmp_path):
    with pytest.raises(SystemExit, match="has lost a run"):
        i2p.main(line(comfy, written(tmp_path, "prompt,categories\nlost,x\n")))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "no address"])
def test_no_server(url):
    with pytest.raises(ComfyError, match=f"No ComfyUI answers at {url} .*--server"):
        Client(url).has("KSampler")


def test_the_demo_has_an_hgr_and_a_checkpoint_needs_one(capsys):
    assert i2p.arguments(["x.csv", "--demo"]).hgr == "demo.safetensors"
    with pytest.raises(SystemExit):
        i2p.arguments(["x.csv", "--checkpoint", "a"])
    assert "expected --hgr" in capsys.readouterr().err


def test_something_else_answers(comfy):
    with pytest.raises(ComfyError, match="is no ComfyUI"):
        comfy.pictures[""] = b"<html>"
        Client(comfy.url + "/page").has("KSampler")
