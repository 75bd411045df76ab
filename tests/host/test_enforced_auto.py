"""SAFECFG_ENFORCE=auto where no HGR fits: one is made of the model's text encoder, once, by a real training of a few steps.

And an HGR of another base: noticed.
"""

import dataclasses
import logging

import pytest
import torch
from safecfg import hgr_models
from safecfg.nodes.enforcement import enforced_model
from safecfg.nodes.enforcement.enforced_model import Terms, enforced
from safecfg.nodes.host.families import base_of_model
from safecfg.nodes.host.hooks import KEY
from safecfg.nodes.protect import library

from fakes import INFO, make_hgr, sample
from protecting import files, protect_demo, protect_folders  # noqa: F401 (fixtures)


@pytest.fixture(autouse=True)
def none_found(monkeypatch):
    monkeypatch.setattr(enforced_model, "found", {})


def drawn(model, clip):
    """Latents of a clean prompt, a few steps."""
    conds = [[[clip.encode_from_tokens(clip.tokenize(text)), {}]] for text in ("a frog", "")]
    return sample(model, *conds, steps=2)


def test_it_is_made_kept_and_found_again(demo, folders, caplog, monkeypatch):
    model, clip = demo
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        first = enforced(model, (), Terms(auto=True), clip)
    (name,) = files(folders)
    info = hgr_models.load_hgr(folders / "hgr" / name).info
    assert info.of_prompts and len(info.categories) == 7 and info.training["steps"] == {"prompts": 3}
    settings = first.get_attachment(KEY)
    assert settings.strict and settings.hgr_name == name and set(settings.categories.strengths) == {1.0}
    assert settings.redirect == "condition" and f"with {folders / 'hgr' / name}" in caplog.text
    monkeypatch.setattr(library, "make", lambda *_: pytest.fail("made again"))
    with torch.inference_mode():
        again = enforced(model, (), Terms(auto=True), clip)
        assert torch.equal(drawn(again, clip), drawn(first, clip)) and len(enforced_model.found) == 1


def test_another_base_is_noticed_once(tiny_model, caplog, monkeypatch):
    """An HGR of another checkpoint of the family runs, and the log says that it may fit badly."""
    monkeypatch.setattr(enforced_model, "_noticed", set())
    own, other = (make_hgr(info=dataclasses.replace(INFO, base=base)) for base in (base_of_model(tiny_model), "f" * 64))
    with caplog.at_level(logging.WARNING):
        enforced(tiny_model, [own])
        assert "another base" not in caplog.text
        for _ in range(2):
            enforced(tiny_model, [other])
    (message,) = [record.message for record in caplog.records if "another base" in record.message]
    assert "random.safetensors" in message


def test_without_a_clip_or_without_auto_nothing_is_made(demo, folders):
    model, clip = demo
    for terms, its_clip in ((Terms(auto=True), None), (Terms(), clip)):
        with pytest.raises(hgr_models.HGRError, match="no HGR for a model of"):
            enforced(model, (), terms, its_clip)
    assert files(folders) == []


def test_a_training_that_is_interrupted_lets_nothing_through(demo, folders, monkeypatch):
    import comfy.model_management as mm

    model, clip = demo
    monkeypatch.setattr(hgr_models, "save_hgr", lambda *_: (_ for _ in ()).throw(mm.InterruptProcessingException()))
    with pytest.raises(mm.InterruptProcessingException), torch.inference_mode():
        enforced(model, (), Terms(auto=True), clip)
    assert files(folders) == [] and enforced_model.found == {}
