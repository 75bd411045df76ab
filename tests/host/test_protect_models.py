"""`SafeCFG Protect` on core's denoiser classes beside core's text-encoder classes: one HGR for all checkpoints of an encoder.

Denoisers are shrunk and random, and their weights, fp8 and GGUF-like ones too, stay what they were to the last byte.
"""

from dataclasses import replace

import comfy.samplers
import pytest
import torch
from safecfg import hgr_models
from safecfg.nodes.host.hooks import KEY
from safecfg.nodes.protect import library
from safecfg.nodes.protect.protect import Protect

from protecting import files, protect_folders  # noqa: F401 (fixture)
from test_quantised import gguf_like, plain_fp8
from text_encoders import FAMILIES, small_clip
from zoo_models import build, latents
from zoo_pictures import PICTURES

ZOO = {variant.name: variant for variant in PICTURES}


@pytest.fixture(autouse=True)
def small_runs(monkeypatch):
    """Of the check by the model: 8 x 8 latents instead of 64 x 64."""
    monkeypatch.setitem(library.RUNS, "sizes", "128x128")


def resized(name, **changes):
    return replace(ZOO[name], config={**ZOO[name].config, **changes})


WIDE_TEXT = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64}}
MODELS = {  # as wide as `LAYOUTS` of test_protect_families says
    "SD1.5": resized("SD15", context_dim=32),
    "SDXL": resized("SDXL", context_dim=80, adm_in_channels=48 + 1536),
    "SD3": resized("SD3", context_size=4096, context_embedder_config=WIDE_TEXT, adm_in_channels=80),
    "Flux": resized("Flux", context_in_dim=128, vec_in_dim=32),
    "Qwen-Image": resized("QwenImage", joint_attention_dim=64),
    "Z-Image": resized("ZImage", cap_feat_dim=32),
}


def protected(model, clip, **widgets):
    with torch.inference_mode():
        return Protect.execute(model, clip, **widgets).result[0]


def run(model, clip, variant, prompt):
    """A run of core's CFGGuider; the finished latents."""
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*(clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")))
        guider.set_cfg(4.0)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
        euler = comfy.samplers.sampler_object("euler")
        return guider.sample(latents(variant), latents(variant, value=0.0), euler, sigmas, disable_pbar=True, seed=0)


def bytes_of(model):
    return {name: value.detach().clone().contiguous().view(torch.uint8) for name, value in _stored(model)}


def _stored(model):
    return [(name, value) for name, value in model.model.diffusion_model.state_dict().items() if value.ndim]


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_checkpoints_share_what_another_one_had_made(family, folders, monkeypatch):
    variant, clip = MODELS[family], small_clip(family)
    protected(build(variant), clip)
    (name,) = files(folders)
    info = hgr_models.load_hgr(folders / "hgr" / name).info
    assert info.of_prompts and 0 < info.training["forward_check"] < 2
    monkeypatch.setattr(library, "make", lambda *_: pytest.fail("made again"))
    for quantise in (plain_fp8, *([gguf_like] if family == "Qwen-Image" else [])):
        stays_what_it_is(quantise(variant), small_clip(family), variant, name)  # another checkpoint's own copy of the encoder
    with torch.inference_mode():
        assert library.find(small_clip(family, 1), build(variant)) is None


def stays_what_it_is(model, clip, variant, name):
    """A checkpoint takes the HGR of that name; its weights, and pictures that are not flagged, stay to the last bit."""
    before, prompt = bytes_of(model), "a knife on a table"
    flagged, clean = (protected(model, clip, threshold_offset=offset, strict=True) for offset in (-1.0, 1.0))
    assert flagged.get_attachment(KEY).hgr_name.endswith(name)
    plain = run(model, clip, variant, prompt)
    assert torch.equal(run(clean, clip, variant, prompt), plain) and plain.isfinite().all()
    safe = run(flagged, clip, variant, prompt)
    assert safe.isfinite().all() and not torch.equal(safe, plain)
    after = bytes_of(model)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
