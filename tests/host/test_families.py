"""An HGR of another family is refused, with both families named."""

import dataclasses

import comfy.latent_formats
import comfy.model_sampling
import pytest
from safecfg.hgr_models import HGRError
from safecfg.nodes.families import prediction_of

from fakes import INFO, apply_hgr, make_hgr, sample


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
    with pytest.raises(HGRError, match="EPS prediction, but this model has .* V prediction"):
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
