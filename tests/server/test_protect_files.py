"""`SafeCFG Protect` in a real server, with checkpoints and text encoders that core's own loaders read from files.

Encoders of real layouts, widths and tokenizers with few layers and random weights (`small_files`, `small_pack`). `PROTECT=1` takes
SD3 and Flux, too: minutes; `PROTECT=all` also SDXL, Qwen-Image and Z-Image: files of gigabytes.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clicks import CARDS, SMALL, Clicks, choose_checkpoint, open_template
from comfy_server import Server
from front_end import open_front_end
from hgr_models import load_hgr
from protect_graphs import MADE, NONE_YET, graph, latent, made, post, wait_for, write

FAMILIES = ("sd15", "sd3", "flux")
MORE = ("sdxl", "qwen_image", "z_image")
ASKED = os.environ.get("PROTECT")
TAKEN = FAMILIES + MORE if ASKED == "all" else FAMILIES if ASKED else FAMILIES[:1]
with_flux = pytest.mark.asked_for("PROTECT")
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


@pytest.fixture(scope="module")
def base(newest_host, tmp_path_factory) -> Path:
    """A base directory with the files of every family, another checkpoint of each small one, and another encoder."""
    base = tmp_path_factory.mktemp("protect")
    write(newest_host, base / "models", TAKEN)
    write(newest_host, base / "models", [family for family in TAKEN if family in FAMILIES], denoiser=1)
    write(newest_host, base / "models", ["sd15"], encoder=1)
    checkpoint = load_file(base / "models" / "checkpoints" / "sd15_0_0.safetensors")
    bare = {name: value for name, value in checkpoint.items() if not name.startswith("cond_stage_model.")}
    save_file(bare, base / "models" / "checkpoints" / "no_encoder.safetensors")
    (base / "models" / "loras").mkdir(exist_ok=True)
    save_file(lora(), base / "models" / "loras" / "style.safetensors")
    if "flux" in TAKEN:
        t5 = load_file(base / "models" / "text_encoders" / "t5xxl_0.safetensors")
        fp8 = {
            name: value.to(torch.float8_e4m3fn) if value.ndim > 1 and value.numel() > 1 else value for name, value in t5.items()
        }
        save_file(fp8, base / "models" / "text_encoders" / "t5xxl_fp8.safetensors")
    return base


def lora() -> dict[str, torch.Tensor]:
    """A LoRA of CLIP-L's layers, as trainers of Stable Diffusion 1.5 name them: it changes the encoder by some 40 %."""
    generator, found = torch.Generator().manual_seed(0), {}
    for layer in range(3):
        for name, (out, width) in {
            "self_attn_v_proj": (768, 768),
            "self_attn_out_proj": (768, 768),
            "mlp_fc1": (64, 768),
        }.items():
            key = f"lora_te_text_model_encoder_layers_{layer}_{name}"
            found[f"{key}.lora_up.weight"] = 0.1 * torch.randn(out, 4, generator=generator)
            found[f"{key}.lora_down.weight"] = width**-0.5 * torch.randn(4, width, generator=generator)
            found[f"{key}.alpha"] = torch.tensor(4.0)
    return found


@pytest.fixture(scope="module")
def small_server(newest_host, base):
    server = Server(newest_host, base, [Path(__file__).parent / "small_pack"])
    try:
        server.wait_until_ready()
        server.post_prompt({"1": {"class_type": "FewPrompts", "inputs": {"pairs": 1, "clean": 24, "steps": 2}}})
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("family", TAKEN)
def test_it_is_made_for_files_and_found_by_another_checkpoint_of_the_encoder(small_server, family):
    server, before, start = small_server, made(small_server), len(small_server.log())
    server.post_prompt(graph(family))
    (name,) = set(made(server)) - set(before)
    log = server.log()[start:]
    assert (
        NONE_YET in log
        and MADE in log
        and "takes about" in log
        and "asking the model, run" in log
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


def forget_sd15(server) -> None:
    """Removes the HGRs of CLIP-L alone."""
    for path in (server.base / "models" / "hgr").glob("encoder-l-*"):
        if not path.name.startswith("encoder-l-t5xxl"):
            path.unlink()


def with_lora(strength: float, kind: str = "LoraLoader", **widgets) -> dict:
    prompt = graph("sd15", **widgets)
    inputs = {
        "model": ["1", 0],
        "clip": ["1", 1],
        "lora_name": "style.safetensors",
        "strength_model": 1.0,
        "strength_clip": strength,
    }
    prompt["8"] = {"class_type": kind, "inputs": inputs}
    prompt["3"]["inputs"]["model"] = ["8", 0]
    for node in ("3", "4", "5"):
        prompt[node]["inputs"]["clip"] = ["8", 1]
    return prompt


def test_every_strength_of_a_lora_shares_the_encoders_own(small_server):
    """Also where none is there yet: it is made for the encoder beneath, once."""
    server, told = small_server, "without this CLIP's LoRAs"
    forget_sd15(server)
    before, start = made(server), len(server.log())
    server.post_prompt(with_lora(1.0))
    there = made(server)
    assert len(set(there) - set(before)) == 1 and told in server.log()[start:]
    for prompt in (with_lora(0.7), with_lora(1.0, "LoraLoaderBypass")):
        start = len(server.log())
        server.post_prompt(prompt)
        assert made(server) == there and told in server.log()[start:] and NONE_YET not in server.log()[start:]
    start = len(server.log())
    server.post_prompt(graph("sd15", 1, seed=1))
    assert made(server) == there and told not in server.log()[start:] and NONE_YET not in server.log()[start:]


@with_flux
def test_an_fp8_file_shares_what_the_fp16_one_had_made(small_server):
    server = small_server
    server.post_prompt(graph("flux", seed=1))
    before, start = made(server), len(server.log())
    rounded = graph("flux", threshold_offset=-1.0, seed=1)
    rounded["2"]["inputs"]["clip_name2"] = "t5xxl_fp8.safetensors"
    flagged = latent(server, server.post_prompt(rounded))
    assert made(server) == before and NONE_YET not in server.log()[start:] and "redirected" in server.log()[start:]
    assert torch.isfinite(flagged).all()


def renamed(prompt: dict) -> dict:
    """A prompt whose nodes have other ids, to stand beside it in one graph."""
    other = lambda value: [f"1{value[0]}", value[1]] if isinstance(value, list) else value  # noqa: E731
    return {
        f"1{node}": {**content, "inputs": {name: other(value) for name, value in content["inputs"].items()}}
        for node, content in prompt.items()
    }


def test_two_prompts_and_two_nodes_make_it_once_and_redirect_once(small_server):
    """Two checkpoints of one encoder in one graph, another prompt queued behind it; then two nodes in a row on one model."""
    server = small_server
    forget_sd15(server)
    start = len(server.log())
    both = {**graph("sd15", strength=0.9, seed=2), **renamed(graph("sd15", 1, strength=0.9, seed=2))}
    post(server, "/prompt", {"prompt": both})
    post(server, "/prompt", {"prompt": graph("sd15", 1, strength=0.8, seed=2)})
    wait_for(lambda: not any(server.get("/queue").values()))
    log = server.log()[start:]
    assert log.count(MADE) == log.count(NONE_YET) == 1 and "went through" not in log
    once = graph("sd15", threshold_offset=-1.0, seed=2)
    twice = {**once, "2": once["3"], "3": {**once["3"], "inputs": {**once["3"]["inputs"], "model": ["2", 0]}}}
    drawn = []
    for prompt in (once, twice, graph("sd15", strength=0.0, seed=2)):
        start = len(server.log())
        drawn.append(latent(server, server.post_prompt(prompt)))
        assert ("went through" in server.log()[start:]) == (prompt is twice)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_checkpoint_without_a_text_encoder_says_so(small_server, prompt_error):
    prompt = graph("sd15")
    prompt["2"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "no_encoder.safetensors"}}
    prompt["3"]["inputs"]["clip"] = ["2", 1]
    with pytest.raises(prompt_error) as error:
        small_server.post_prompt(prompt)
    assert "this checkpoint has no text encoder" in error.value.details["exception_message"]


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


@with_flux
def test_another_models_clip_is_told_at_once(small_server, prompt_error):
    """A CLIP loader with another model's files: the first error that a user meets."""
    server = small_server
    wrong = graph("flux", strength=0.7)
    wrong["2"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15_0_1.safetensors"}}
    for node in ("3", "4", "5"):
        wrong[node]["inputs"]["clip"] = ["2", 1]
    forget_sd15(server)
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
    for words in ("making one, once", "takes about", "condition redirector from prompts: step", "asking the model, run"):
        assert any(words in text for text in seen), words
    assert list((server.base / "output").glob("SafeCFG*.png"))
    page.close()
