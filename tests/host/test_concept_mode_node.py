"""What `SafeCFG Apply` needs for redirect mode `concept`, and its warning of another base."""

import dataclasses
import logging
import zlib

import pytest
import torch
from safecfg.hgr_models import HGRError
from safecfg.nodes.host.families import base_of_model
from safecfg.nodes.redirect.apply import Apply

from concept_fakes import WITH_CONCEPTS, KnownFlags
from fakes import INFO, make_hgr, sample
from test_apply_node import WIDGETS
from tiny import make_tiny_model


class FakeCLIP:
    """A CLIP for the tiny model: random tokens by prompt."""

    def __init__(self, width=16):
        self.prompts, self.width = [], width

    def tokenize(self, text):
        self.prompts.append(text)
        return text

    def encode_from_tokens_scheduled(self, text):
        return [[torch.randn(1, 5, self.width, generator=torch.Generator().manual_seed(zlib.crc32(text.encode()))), {}]]


def run_node(model, hgr, clip=None, **widgets):
    return Apply.execute(model, hgr, **{**WIDGETS, "redirect": "concept", **widgets}, clip=clip).result[0]


def test_the_node_encodes_the_hgrs_concepts(tiny_model, tiny_cond, monkeypatch):
    clip, hgr = FakeCLIP(), make_hgr(info=WITH_CONCEPTS)
    model = run_node(tiny_model, hgr, clip, categories="blue = off", strict=True)
    assert clip.prompts == ["blood"]  # a category that is off needs none
    KnownFlags(monkeypatch, [(1.0, 0.0)])
    assert not torch.equal(sample(model, tiny_cond(1), tiny_cond(2)), sample(tiny_model, tiny_cond(1), tiny_cond(2)))
    run_node(tiny_model, hgr, clip, redirect="both")
    assert clip.prompts == ["blood"]  # other modes need no concepts


def test_what_is_missing_is_said(tiny_model):
    with pytest.raises(HGRError, match="none is connected. Connect the model's own CLIP"):
        run_node(tiny_model, make_hgr(info=WITH_CONCEPTS))
    half = dataclasses.replace(INFO, concept_prompts={"red": "blood", "blue": " "})
    for info, missing in ((INFO, "red, blue"), (half, "blue")):
        with pytest.raises(HGRError, match=f"a concept prompt for {missing}, but random.safetensors has none"):
            run_node(tiny_model, make_hgr(info=info), FakeCLIP())
    run_node(tiny_model, make_hgr(info=half), FakeCLIP(), categories="blue = off")
    with pytest.raises(HGRError, match="token width 16 .* token width 8"):
        run_node(tiny_model, make_hgr(info=WITH_CONCEPTS), FakeCLIP(width=8))


def test_an_hgr_of_prompts_alone_judges_too(tiny_model, tiny_cond):
    """Its condition redirector says which prompts are flagged; a picture that is not is the model's own, to the last bit."""
    of_prompts = dataclasses.replace(WITH_CONCEPTS, latent_format="", latent_channels=0, prediction="")
    hgr = make_hgr(info=of_prompts, networks=("condition",))
    flagged, clean = (run_node(tiny_model, hgr, FakeCLIP(), threshold_offset=offset, strict=True) for offset in (-1.0, 1.0))
    plain = sample(tiny_model, tiny_cond(1), tiny_cond(2))
    assert torch.equal(sample(clean, tiny_cond(1), tiny_cond(2)), plain)
    assert not torch.equal(sample(flagged, tiny_cond(1), tiny_cond(2)), plain)


def other_base_warnings(model, base, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run_node(model, make_hgr(info=dataclasses.replace(INFO, base=base)), redirect="both")
    return [r.message for r in caplog.records if "another base" in r.message]


def test_another_base_is_warned_of(tiny_model, caplog):
    base = base_of_model(tiny_model)
    assert not other_base_warnings(tiny_model, base, caplog) and not other_base_warnings(tiny_model, "", caplog)
    (message,) = other_base_warnings(make_tiny_model(seed=1), base, caplog)
    assert "random.safetensors" in message
    patched = tiny_model.clone()
    name, weight = next((k, w) for k, w in tiny_model.model.state_dict().items() if k.endswith("attn2.to_k.weight"))
    assert patched.add_patches({name: ("diff", (torch.ones_like(weight),))})
    assert len(other_base_warnings(patched, base, caplog)) == 1


def test_a_lora_in_another_clone_is_no_other_base(tiny_model):
    """Clones share their weights, which hold a LoRA for as long as core leaves it there."""
    base, weights = base_of_model(tiny_model), tiny_model.model.state_dict()
    patched = tiny_model.clone()
    patched.add_patches({k: (torch.ones_like(v),) for k, v in weights.items() if k.startswith("diffusion_model.")}, 1.0)
    before = weights["diffusion_model.out.2.bias"].clone()
    patched.patch_model()
    try:
        assert not torch.equal(tiny_model.model.state_dict()["diffusion_model.out.2.bias"], before)
        assert base_of_model(tiny_model) == base
    finally:
        patched.unpatch_model()
