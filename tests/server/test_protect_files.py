"""`SafeCFG Protect` in a real server, with checkpoints and text encoders that core's own loaders read from files.

Encoders of real layouts, widths and tokenizers with few layers and random weights (`small_files`, `small_pack`). `PROTECT=all` takes
SDXL, Qwen-Image and Z-Image, too: files of gigabytes.
"""

import json
import os
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clicks import CARDS, SMALL, Clicks, choose_checkpoint, open_template
from comfy_server import Server
from front_end import open_front_end
from hgr_models import load_hgr
from small_files import loaders

ROOT = Path(__file__).parents[2]
FAMILIES = ("sd15", "sd3", "flux")
MORE = ("sdxl", "qwen_image", "z_image")
WIDTHS = {
    "sd15": ("encoder-l-", 768, 768), "sd3": ("encoder-g-l-t5xxl-", 4096, 2048), "flux": ("encoder-l-t5xxl-", 4096, 768),
    "sdxl": ("encoder-g-l-", 2048, 1280), "qwen_image": ("encoder-qwen25_7b-", 3584, 0), "z_image": ("encoder-qwen3_4b-", 2560, 0),
}  # fmt: skip
# Every text that shows on the node, as it comes.
WATCH = """() => {
  window.seen = new Set();
  new MutationObserver(() => {
    for (const line of document.body.innerText.split("\\n")) window.seen.add(line);
  }).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""
MADE, NONE_YET = "SafeCFG Protect: made ", "no HGR of this text encoder yet"


def write(host, models: Path, families, denoiser: int = 0, encoder: int = 0) -> None:
    command = [
        str(host.python),
        "tests/small_files.py",
        "--comfyui",
        str(host.path),
        "--models",
        str(models),
        "--family",
        *families,
    ]
    subprocess.run([*command, "--denoiser", str(denoiser), "--encoder", str(encoder)], check=True, cwd=ROOT, capture_output=True)


@pytest.fixture(scope="module")
def families() -> tuple[str, ...]:
    return FAMILIES + (MORE if os.environ.get("PROTECT") == "all" else ())


@pytest.fixture(scope="module")
def base(newest_host, families, tmp_path_factory) -> Path:
    """A base directory with the files of every family, another checkpoint of each small one, and another encoder."""
    base = tmp_path_factory.mktemp("protect")
    write(newest_host, base / "models", families)
    write(newest_host, base / "models", FAMILIES, denoiser=1)
    write(newest_host, base / "models", ["sd15"], encoder=1)
    return base


@pytest.fixture(scope="module")
def small_server(newest_host, base):
    server = Server(newest_host, base, [Path(__file__).parent / "small_pack"])
    try:
        server.wait_until_ready()
        server.post_prompt({"1": {"class_type": "FewPrompts", "inputs": {"pairs": 1, "clean": 24, "steps": 2}}})
        yield server
    finally:
        server.stop()


def graph(family: str, denoiser: int = 0, encoder: int = 0, seed: int = 0, **widgets) -> dict:
    """Core's loaders, SafeCFG Protect (3), and a small picture's latent (9)."""
    files = loaders(family, denoiser, encoder)
    found = {"1": files["checkpoint"]} if "checkpoint" in files else {"1": files["model"], "2": files["clip"]}
    model, clip = ["1", 0], ["1", 1] if "checkpoint" in files else ["2", 0]
    sizes = {"width": 64, "height": 64, "batch_size": 1}
    text = lambda words: {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": words}}  # noqa: E731
    sampled = {
        "model": ["3", 0], "positive": ["4", 0], "negative": ["5", 0], "latent_image": ["6", 0], "seed": seed, "steps": 1, "cfg": 4.0,
        "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    protect = {"model": model, "clip": clip, "strength": 1.0, "categories": "", "strict": True, **widgets}
    return {
        **found,
        "3": {"class_type": "SafeCFG_Protect", "inputs": protect},
        "4": text("two men fight in a bar"),
        "5": text(""),
        "6": {"class_type": "EmptyLatentImage" if "checkpoint" in files else "EmptySD3LatentImage", "inputs": sizes},
        "7": {"class_type": "KSampler", "inputs": sampled},
        "9": {"class_type": "SaveLatent", "inputs": {"samples": ["7", 0], "filename_prefix": family}},
    }


def made(server) -> list[str]:
    """Names of the HGRs in models/hgr."""
    return sorted(path.name for path in (server.base / "models" / "hgr").glob("*.safetensors"))


def latent(server, entry: dict) -> torch.Tensor:
    (file,) = server.files(entry, "9")
    return load_file(file)["latent_tensor"]


@pytest.mark.parametrize("family", FAMILIES + MORE)
def test_it_is_made_for_files_and_found_by_another_checkpoint_of_the_encoder(small_server, families, family):
    if family not in families:
        pytest.skip("PROTECT=all takes files of gigabytes")
    server, before, start = small_server, made(small_server), len(small_server.log())
    server.post_prompt(graph(family))
    (name,) = set(made(server)) - set(before)
    log = server.log()[start:]
    assert (
        NONE_YET in log
        and MADE in log
        and "takes about" in log
        and "asking the model" in log
        and "Please fix your code" not in log
    )
    info = load_hgr(server.base / "models" / "hgr" / name).info
    beginning, tokens, pooled = WIDTHS[family]
    assert name.startswith(beginning) and (info.token_width, info.pooled_width) == (tokens, pooled) and info.of_prompts
    assert not list((server.base / "output" / "safecfg" / "recordings").glob("*/*"))

    start = len(server.log())
    flagged = server.post_prompt(graph(family, 1 if family in FAMILIES else 0, threshold_offset=-1.0))
    clean = server.post_prompt(graph(family, 1 if family in FAMILIES else 0, threshold_offset=1.0))
    plain = server.post_prompt(graph(family, 1 if family in FAMILIES else 0, strength=0.0))
    assert NONE_YET not in server.log()[start:] and "redirected" in server.log()[start:]
    flagged, clean, plain = (latent(server, entry) for entry in (flagged, clean, plain))
    assert torch.isfinite(flagged).all() and not torch.equal(flagged, plain) and torch.equal(clean, plain)


def test_another_encoder_gets_its_own_and_clip_skip_does_not(small_server):
    server = small_server
    server.post_prompt(graph("sd15"))
    before = made(server)
    skipped = graph("sd15", seed=1)
    skipped["8"] = {"class_type": "CLIPSetLastLayer", "inputs": {"clip": ["1", 1], "stop_at_clip_layer": -2}}
    for node in ("3", "4", "5"):
        skipped[node]["inputs"]["clip"] = ["8", 0]
    server.post_prompt(skipped)
    assert made(server) == before
    server.post_prompt(graph("sd15", encoder=1))
    (other,) = set(made(server)) - set(before)
    assert other.startswith("encoder-l-")


def test_cancelled_it_goes_on_after_a_restart(small_server):
    """Cancel while it encodes, stop the server, start it again: what was encoded is there, and the next Run makes the file."""
    server = small_server
    server.post_prompt(graph("sd15", encoder=1))
    for name in made(server):
        (server.base / "models" / "hgr" / name).unlink()
    start = len(server.log())
    few = {"1": {"class_type": "FewPrompts", "inputs": {"pairs": 20, "clean": 200, "steps": 2}}}
    server.post_prompt(few)
    post(server, "/prompt", {"prompt": graph("sd15", strength=0.9)})
    wait_for(lambda: "encoding prompts" in server.log()[start:])
    post(server, "/interrupt", {})
    wait_for(lambda: not any(server.get("/queue").values()))
    (folder,) = (server.base / "output" / "safecfg" / "recordings").glob("encoder-l-*")
    kept = sorted(folder.glob("texts-*.safetensors"))
    assert kept and made(server) == [] and "execution_interrupted" in json.dumps(list(server.get("/history").values())[-1])
    server.stop()
    server.process = server._start()
    server.wait_until_ready()
    server.post_prompt(few)
    before = [path.stat().st_mtime_ns for path in kept]
    post(server, "/prompt", {"prompt": graph("sd15", strength=0.9)})
    wait_for(lambda: "step 1 of 2" in server.log())
    assert [path.stat().st_mtime_ns for path in kept] == before
    wait_for(lambda: made(server) and not any(server.get("/queue").values()))
    server.post_prompt(graph("sd15", strength=0.8))
    assert server.log().count(NONE_YET) == 1


def post(server, path: str, content: dict) -> None:
    request = urllib.request.Request(server.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).close()


def wait_for(there, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_another_models_clip_is_told_at_once(small_server, prompt_error):
    """A CLIP loader with another model's files: the first error that a user meets."""
    server, before = small_server, made(small_server)
    wrong = graph("flux", strength=0.7)
    wrong["2"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15_0_1.safetensors"}}
    for node in ("3", "4", "5"):
        wrong[node]["inputs"]["clip"] = ["2", 1]
    for name in before:
        if name.startswith("encoder-l-") and not name.startswith("encoder-l-t5xxl"):
            (server.base / "models" / "hgr" / name).unlink()
    with pytest.raises(prompt_error) as error:
        server.post_prompt(wrong)
    assert "cannot read this CLIP's prompts" in error.value.details["exception_message"]
    assert error.value.details["node_type"] == "SafeCFG_Protect"


def test_the_template_by_clicks(small_server, browser):
    """Template 02, a checkpoint that is chosen from the widget's list, Run: what it does shows on the node, and a picture comes."""
    server = small_server
    for path in (server.base / "models" / "hgr").glob("encoder-l-*"):
        path.unlink()
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    open_front_end(page, server.url)
    clicks = Clicks(page)
    open_template(clicks, CARDS["protect"])
    choose_checkpoint(clicks, "sd15_1_0.safetensors")
    page.evaluate(SMALL, [64, 1])
    page.evaluate(WATCH)
    start = len(server.log())
    clicks.on("Run", page.get_by_test_id("queue-button"))
    wait_for(lambda: MADE in server.log()[start:])
    wait_for(lambda: not any(server.get("/queue").values()))
    seen = page.evaluate("() => [...window.seen]")
    for words in ("making one, once", "takes about", "condition redirector from prompts: step", "asking the model"):
        assert any(words in text for text in seen), words
    assert list((server.base / "output").glob("SafeCFG*.png"))
    page.close()
