"""Every family by its own facts: an HGR for it acts there, any other is refused with both families named."""

import dataclasses

import comfy.latent_formats
import comfy.model_base
import comfy.model_sampling
import pytest
import torch
from safecfg.hgr_models import HGRError
from safecfg.nodes.host.families import family_of_hgr, prediction_of
from safecfg.nodes.host.packed_latents import Part, part_for
from safecfg.nodes.training.plan import recording_facts

import families
from fakes import INFO, NEVER, KnownRedirection, apply_hgr, make_hgr, sample
from families import FAMILIES, make_model


@pytest.mark.parametrize(
    "change, words",
    [
        ({"latent_format": "SDXL"}, "SDXL latents (4 channels, 2-D)"),
        ({"latent_channels": 16, "latent_format": "Flux"}, "Flux latents (16 channels, 2-D)"),
        ({"latent_dimensions": 3}, "SD15 latents (4 channels, 3-D)"),
        ({"prediction": "V"}, "V prediction"),
    ],
)
def test_other_families_are_refused(tiny_model, change, words):
    with pytest.raises(HGRError) as caught:
        apply_hgr(tiny_model, make_hgr(info=dataclasses.replace(INFO, **change)))
    assert words in str(caught.value) and "SD15 latents (4 channels, 2-D) with EPS prediction" in str(caught.value)


def test_a_later_patch_of_the_sampling_is_seen(tiny_model, tiny_cond):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model = ModelSamplingDiscrete().patch(apply_hgr(tiny_model), "v_prediction", False)[0]
    with pytest.raises(HGRError, match="EPS prediction, but this model is .* V prediction"):
        sample(model, tiny_cond(1), tiny_cond(2))


@pytest.mark.parametrize(
    "name, ours",
    [("EPS", "EPS"), ("V_PREDICTION", "V"), ("EDM", "EDM"), ("CONST", "FLOW"), ("X0", "X0"), ("IMG_TO_IMG", "IMG_TO_IMG")],
)
def test_predictions_are_told_from_their_bases(name, ours):
    assert prediction_of(getattr(comfy.model_sampling, name)()) == ours


@pytest.mark.parametrize(
    "redirect, lacking", [("both", "guidance"), ("both", "condition"), ("guidance", "guidance"), ("condition", "condition")]
)
def test_a_missing_network_is_said(tiny_model, redirect, lacking):
    other = "guidance" if lacking == "condition" else "condition"
    with pytest.raises(HGRError, match=f"needs a {lacking} redirector.*Set `redirect` to {other}"):
        apply_hgr(tiny_model, make_hgr(networks=(other,)), redirect=redirect, strict=True)


@pytest.mark.parametrize("redirect", ["guidance", "condition"])
def test_one_network_is_enough_for_its_mode(tiny_model, tiny_cond, redirect):
    model = apply_hgr(tiny_model, make_hgr(networks=(redirect,)), redirect=redirect, strict=True)
    assert not sample(model, tiny_cond(1), tiny_cond(2)).equal(sample(tiny_model, tiny_cond(1), tiny_cond(2)))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_told_from_every_other(name):
    model = make_model(FAMILIES[name])
    for other, family in FAMILIES.items():
        hgr = make_hgr(info=family.info)
        if other == name:
            apply_hgr(model, hgr)
            continue
        with pytest.raises(HGRError) as caught:
            apply_hgr(model, hgr)
        assert all(family_of_hgr(found.info) in str(caught.value) for found in (family, FAMILIES[name]))


@pytest.mark.parametrize("cfg", [4.0, 1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_redirected(name, monkeypatch, cfg):
    family = FAMILIES[name]
    model = make_model(family)
    plain = families.sample(model, family, cfg)
    clean = families.sample(apply_hgr(model, make_hgr(NEVER, NEVER, family.info), strict=True), family, cfg)
    assert all(torch.equal(a, b) for a, b in zip(clean, plain, strict=True))
    hgr = make_hgr(info=family.info)
    for redirect in ("condition", "guidance"):
        picture, *others = families.sample(apply_hgr(model, hgr, redirect=redirect, strict=True), family, cfg)
        assert picture.isfinite().all() and (picture - plain[0]).abs().amax(dim=tuple(range(1, picture.ndim))).min() > 1e-3
        assert all(torch.equal(a, b) for a, b in zip(others, plain[1:], strict=True))  # the audio is not the HGR's
    known = KnownRedirection(monkeypatch, rows={1})
    picture, *_ = families.sample(apply_hgr(model, hgr, redirect="guidance", strict=True), family, cfg)
    assert known.count == 3 and known.x_in.shape == family.shapes[0]
    assert torch.equal(picture[0], plain[0][0]) and not torch.equal(picture[1], plain[0][1])


@pytest.mark.parametrize("kind", ["IMG_TO_IMG", "IMG_TO_IMG_FLOW"])
def test_image_to_image_prediction_is_refused(kind):
    if not hasattr(comfy.model_base.ModelType, kind):
        pytest.skip(f"this host has no {kind} models")
    model = make_model(FAMILIES["SD1.5"], comfy.model_base.ModelType[kind])
    own = dataclasses.replace(INFO, prediction=kind)
    with pytest.raises(HGRError, match=rf"turns one picture into another \({kind}\)"):
        apply_hgr(model, make_hgr(info=own))
    with pytest.raises(HGRError, match="turns one picture into another"):  # nor is one trained for it
        recording_facts(model, None, None, None)


def test_parts_of_packed_latents():
    video, audio = torch.randn(2, 128, 2, 4, 6), torch.randn(2, 8, 5, 16)
    shapes, info = (audio.shape, video.shape), dataclasses.replace(INFO, latent_channels=128, latent_dimensions=3)
    packed = torch.cat([audio.flatten(1), video.flatten(1)], dim=1)[:, None]
    part = part_for(packed, shapes, info)
    assert torch.equal(part.take(packed), video) and torch.equal(part.put(packed, video), packed)
    changed = part.put(packed, video + 1)
    assert torch.equal(part.take(changed), video + 1) and torch.equal(
        changed[..., : audio[0].numel()], packed[..., : audio[0].numel()]
    )
    assert part_for(video, (), info) == Part() and part_for(packed[..., 1:], shapes, info) is None
    assert part_for(packed, (), info) is None and part_for(packed, shapes, INFO) is None
