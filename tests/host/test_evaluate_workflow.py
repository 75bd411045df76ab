"""What a user's workflow holds besides its prompts is drawn with every prompt of `SafeCFG Evaluate`."""

import comfy.model_management
import comfy.samplers
import pytest
import torch
from safecfg.hgr_models import HGRError
from safecfg.nodes.evaluate.draw import digest, draw, make_setup
from safecfg.nodes.host.encoding import encode_text

from evaluating import CLEAN, WIDGETS, evaluated, latents


def test_what_a_workflow_adds_to_its_prompts_is_added_to_every_prompt(demo, place):
    """As core draws with the same options, whatever text the workflow had; and the facts tell one from the other."""
    (model, clip, _), _ = demo

    def late(text, start):
        return [[t, {**options, "start_percent": start, "end_percent": 1.0}] for t, options in encode_text(clip, text)]

    same = {"lists": "coco.csv = clean"}
    evaluated(demo, **same)
    _, _, numbers = evaluated(demo, name="late", positive_conditioning=late("a moon", 0.4), **same)
    _, _, other = evaluated(demo, name="other text", positive_conditioning=late("a star", 0.4), **same)
    assert numbers["settings"] == other["settings"] and latents(place, "late") == latents(place, "other text") != latents(place)
    with torch.inference_mode():
        setup = make_setup(model, WIDGETS, {})
        drawn = [
            draw(model, late(text, 0.4), encode_text(clip, ""), setup, 5.0, 7 + i)
            for i, text in enumerate(CLEAN.splitlines()[1:])
        ]
    assert latents(place, "late") == [digest(latent) for latent in drawn]
    with pytest.raises(HGRError, match="positive_conditioning = .*not.*Choose another `name`"):
        evaluated(demo, name="late", positive_conditioning=late("a moon", 0.5), **same)
    with pytest.raises(HGRError, match="Expected a prompt in positive_conditioning"):
        evaluated(demo, name="none", positive_conditioning=[], **same)


def test_a_workflows_negative_prompt_counts_as_it_is(demo, place):
    (_, clip, _), _ = demo
    zeroed = [[torch.zeros_like(t), {**options, "pooled_output": None}] for t, options in encode_text(clip, "")]
    same = {"lists": "coco.csv = clean", "arms": "negative prompt"}
    evaluated(demo, **same)
    evaluated(demo, name="text", negative_conditioning=encode_text(clip, ""), **same)
    evaluated(demo, name="zeroed", negative_conditioning=zeroed, **same)
    assert latents(place) == latents(place, "text") != latents(place, "zeroed")
    words = [latents(place, name, "negative prompt") for name in ("mine", "zeroed")]
    assert words[0] == words[1] and len(words[0]) == 2  # an arm's own words


def test_noise_levels_of_a_scheduler_node(demo, place):
    (model, _, _), _ = demo
    sampling = model.get_model_object("model_sampling")
    levels = comfy.samplers.calculate_sigmas(sampling, "karras", 6)
    same = {"lists": "coco.csv = clean", "steps": 6}
    evaluated(demo, scheduler="karras", **same)
    _, _, numbers = evaluated(demo, name="given", sigmas=levels, **{**same, "steps": 9})
    assert latents(place) == latents(place, "given") and numbers["settings"]["steps"] == 6
    with pytest.raises(HGRError, match="Expected `sigmas` of one step or more"):
        evaluated(demo, name="none", sigmas=torch.zeros(0), **same)
    with pytest.raises(HGRError, match="sigmas = .*not.*Choose another"):
        evaluated(demo, name="given", sigmas=levels[1:], **same)
