"""The nodes on a real server: what they say about themselves, and what they do to latents."""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import load_file

import hgr_models
from demo import sampling
from demo.pipeline import DemoModel
from hgr_models.condition import ConditionConfig
from hgr_models.guidance import GuidanceConfig

INFO = hgr_models.HGRInfo(
    categories=("weapons", "drugs"),
    condition_thresholds=(0.0, 0.0),
    guidance_levels=(),
    guidance_thresholds=((0.0, 0.0),),
    latent_format="SD15",
    latent_channels=4,
    latent_dimensions=2,
    prediction="EPS",
    token_width=128,
    pooled_width=0,
)
WIDGETS = {
    "strength": 1.0, "threshold_offset": 0.0, "start_percent": 0.0, "end_percent": 1.0, "redirect": "both", "categories": "",
    "strict": True, "remember_flagged": False,
}  # fmt: skip


def make_hgr(condition=0.0, guidance=0.0, networks=("condition", "guidance"), **info) -> hgr_models.HGR:
    """A random HGR for the demo model that flags everything, or what lies above the thresholds."""
    torch.manual_seed(3)
    info = dataclasses.replace(INFO, condition_thresholds=(condition,) * 2, guidance_thresholds=((guidance,) * 2,), **info)
    configs = {
        "condition": ConditionConfig(info.token_width, 2, width=32, depth=1, delta_depth=1),
        "guidance": GuidanceConfig(4, 2, width=32, read_depth=1, correct_depth=2),
    }
    hgr = hgr_models.HGR(info, *(config if name in networks else None for name, config in configs.items()))
    with torch.no_grad():
        for parameter in hgr.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return hgr.eval()


@pytest.fixture
def save(server):
    """`save(name, hgr)` puts an HGR into the server's models/hgr."""

    def save_into(name: str, hgr: hgr_models.HGR) -> str:
        hgr_models.save_hgr(server.base / "models" / "hgr" / name, hgr)
        return name

    return save_into


def graph(text="a rabbit", hgr=None, cfg=5.0, steps=3, seed=1, negative="", **widgets) -> dict:
    """A prompt that saves the latents of a text (Prompt Batch), with SafeCFG Apply when an HGR is named; node 9 saves."""
    prompt = {
        "1": {"class_type": "SafeCFG_DemoModel", "inputs": {}},
        "2": {"class_type": "SafeCFG_PromptBatch", "inputs": {"clip": ["1", 1], "text": text}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": negative}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": ["2", 1]}},
        "8": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": seed,
                "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            },
        },
        "9": {"class_type": "SaveLatent", "inputs": {"samples": ["8", 0], "filename_prefix": "safecfg"}},
    }  # fmt: skip
    if hgr is not None:
        prompt["5"] = {"class_type": "SafeCFG_LoadHGR", "inputs": {"hgr_name": hgr}}
        prompt["6"] = {"class_type": "SafeCFG_Apply", "inputs": {"model": ["1", 0], "hgr": ["5", 0], **WIDGETS, **widgets}}
        prompt["8"]["inputs"]["model"] = ["6", 0]
    return prompt


@pytest.fixture
def latents(server):
    """`latents(**graph)`: the latents (B, 4, 16, 16) of a graph."""

    def run(*args, **kwargs) -> torch.Tensor:
        (file,) = server.files(server.post_prompt(graph(*args, **kwargs)), "9")
        return load_file(file)["latent_tensor"]

    return run


def test_everything_has_a_tooltip(server):
    ours = {name: info for name, info in server.object_info().items() if name.startswith("SafeCFG_")}
    assert ours.keys() >= {"SafeCFG_LoadHGR", "SafeCFG_Apply", "SafeCFG_DemoModel", "SafeCFG_PromptBatch"}
    for info in ours.values():
        assert re.fullmatch("SafeCFG/(use|detect|train|report)", info["category"]) and info["description"]
        inputs = [spec for kind in ("required", "optional") for spec in info["input"].get(kind, {}).values()]
        assert all(spec[1]["tooltip"] for spec in inputs) and len(info["output_tooltips"]) == len(info["output"])
        assert all(info["output_tooltips"])
        help_page = server.base / "custom_nodes" / "safecfg" / "web" / "docs" / f"{info['name']}.md"
        assert help_page.is_file()


@pytest.mark.parametrize("cfg", [5.0, 1.0])
def test_clean_and_strength_0_are_bit_identical(latents, save, cfg):
    plain = latents(cfg=cfg)
    assert torch.equal(latents(hgr=save("never.safetensors", make_hgr(1.0, 1.0)), cfg=cfg), plain)
    assert torch.equal(latents(hgr=save("always.safetensors", make_hgr()), cfg=cfg, strength=0.0), plain)
    for redirect in ("both", "condition", "guidance"):
        changed = latents(hgr="always.safetensors", cfg=cfg, redirect=redirect)
        assert changed.isfinite().all() and not torch.equal(changed, plain)


@torch.no_grad()
def test_a_batch_is_judged_row_by_row(latents, save):
    prompts, demo = ["a knife", "a rabbit", "a pistol and an apple", "a rocket"], DemoModel.load()
    network = make_hgr().condition
    levels = network.half().float().harmfulness(demo.encode(prompts)).amax(dim=1)  # fp16, as in the file
    threshold = float(levels.sort().values[1:3].mean())
    plain = latents("\n".join(prompts))
    safe = latents("\n".join(prompts), hgr=save("some.safetensors", make_hgr(threshold, 1.0)))
    assert [torch.equal(a, b) for a, b in zip(plain, safe, strict=True)] == [bool(level <= threshold) for level in levels]
    assert len(plain) == 4


@torch.no_grad()
def test_negative_prompts_are_not_touched(latents, save):
    """Only prompts that make the network certain are flagged; such a prompt as negative changes nothing."""
    demo, network = DemoModel.load(), make_hgr().condition.half().float()
    low, high = sorted(("a knife", "a rabbit"), key=lambda p: float(network.harmfulness(demo.encode([p])).max()))
    threshold = float(network.harmfulness(demo.encode([low, high])).amax(dim=1).mean())
    name = save("some.safetensors", make_hgr(threshold, 1.0))
    assert torch.equal(latents(low, hgr=name, negative=high), latents(low, negative=high))
    assert not torch.equal(latents(high, hgr=name, negative=low), latents(high, negative=low))


@torch.no_grad()
def test_latents_are_those_of_plain_torch(latents):
    demo, steps, cfg = DemoModel.load(), 25, 5.0
    tokens, none = demo.encode(["a frog and a strawberry"]), demo.encode([""])
    noise = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(7))

    def denoise(x, sigma):
        uncond_denoised = demo.denoised(x, sigma, none)
        return uncond_denoised + cfg * (demo.denoised(x, sigma, tokens) - uncond_denoised)

    wanted = sampling.sample_euler(denoise, noise, sampling.normal_schedule(steps))
    got = latents("a frog and a strawberry", steps=steps, cfg=cfg, seed=7) * 0.18215
    assert (got - wanted).abs().max() < 1e-3 * wanted.std()


def test_prompts_of_the_api_need_no_widget(server):
    """What has a default may be left out, of every node."""
    node = lambda kind, **inputs: {"class_type": f"SafeCFG_{kind}", "inputs": inputs}  # noqa: E731
    model, clip, hgr = ["1", 0], ["1", 1], ["2", 0]
    prompt = {
        "1": node("DemoModel"),
        "2": node("LoadHGR", hgr_name="demo.safetensors"),
        "3": node("PromptBatch", clip=clip),
        "4": node("TextEncode", clip=clip, hgr=hgr, text="a knife"),
        "5": node("ConceptGuidance", model=model, clip=clip),
        "6": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
        "7": node("DetectHarm", model=["5", 0], hgr=hgr, negative=["4", 0], image=["6", 0], vae=["1", 2]),
        "8": node("ImageGate", images=["6", 0], scores=["7", 1]),
        "9": node("DetectPromptHarm", conditioning=["3", 0], hgr=hgr),
        "10": node("RocReport", hgr=hgr, clip=clip, source="prompts"),
        "11": {"class_type": "PreviewAny", "inputs": {"source": ["9", 0]}},
        "12": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}},
    }
    entry = server.post_prompt(prompt)
    assert entry["outputs"]["11"] and len(server.files(entry, "12")) == 1


def test_errors_come_back_readable(server, save, prompt_error):
    save("family.safetensors", make_hgr(latent_format="SDXL"))
    save("width.safetensors", make_hgr(token_width=768))
    save("half.safetensors", make_hgr(networks=("condition",)))
    save("good.safetensors", make_hgr())
    (server.base / "models" / "hgr" / "text.safetensors").write_text("not a model")
    content = (server.base / "models" / "hgr" / "good.safetensors").read_bytes()
    (server.base / "models" / "hgr" / "cut.safetensors").write_bytes(content[: len(content) // 2])
    cases = [
        (
            {"hgr": "gone.safetensors"},
            "There is no HGR 'gone.safetensors' in models/hgr; there is .*good.safetensors.*03 Make an HGR",
        ),
        ({"hgr": "../../etc/passwd"}, "There is no HGR"),
        ({"hgr": "text.safetensors"}, "text.safetensors is not a complete safetensors file"),
        ({"hgr": "cut.safetensors"}, "cut.safetensors is not a complete safetensors file"),
        ({"hgr": "family.safetensors"}, "trained for a model of SDXL latents .* but this model is .* has SD15 latents"),
        ({"hgr": "width.safetensors"}, "token width 768 .* token width 128"),
        ({"hgr": "half.safetensors"}, "needs a guidance redirector, but .*half.safetensors has none"),
        ({"hgr": "good.safetensors", "categories": "swords = 1"}, "Unknown category 'swords'.* weapons, drugs"),
        ({"hgr": "good.safetensors", "start_percent": 0.5, "end_percent": 0.2}, "start_percent below end_percent"),
        ({"hgr": "good.safetensors", "strength": 2.0}, "bigger than max"),
        ({"hgr": "good.safetensors", "text": " "}, "at least one prompt"),
    ]
    for options, message in cases:
        with pytest.raises(prompt_error, match=message):
            server.post_prompt(graph(**options))
