"""`SafeCFG Text Encode` in the demo world: clean prompts bit for bit, harmful ones without the fewest words; and which words they are."""

import json

import pytest
import torch
from safecfg.hgr_models import HGRError
from safecfg.nodes.demo_world.demo_model import DemoModel
from safecfg.nodes.detection.detect_prompt import NO_WORDS, DetectPromptHarm
from safecfg.nodes.detection.text_encode import LEAVE_OUT, NEUTRAL_WORDS, TextEncode
from safecfg.nodes.loader import LoadHGR, register_folder

import nodes as core

WIDGETS = {"harmful_words": LEAVE_OUT, "threshold": 0.0, "categories": ""}


@pytest.fixture(scope="module")
def demo():
    register_folder()
    with torch.inference_mode():
        clip = DemoModel.execute().result[1]
        return clip, LoadHGR.execute("demo.safetensors").result[0]


def run(demo, text, **widgets):
    conditioning, new, scores = TextEncode.execute(text, *demo, **{**WIDGETS, **widgets}).result
    return conditioning, new, json.loads(scores)


def test_defaults_are_the_schemas():
    assert {i.id: i.default for i in TextEncode.define_schema().inputs if i.id in WIDGETS} == WIDGETS


@pytest.mark.parametrize("text", ["a frog and a strawberry", "", "(a rabbit:1.3) BREAK a rocket", " ".join(["a", "frog"] * 12)])
def test_clean_prompts_are_encoded_as_by_core(demo, text):
    with torch.inference_mode():
        conditioning, new, about = run(demo, text)
        expected = core.CLIPTextEncode().encode(demo[0], text)[0]
    assert new is text and not about["changed"] and about["left_out"] == [] and about["before"] == about["after"]
    assert len(conditioning) == 1 and torch.equal(conditioning[0][0], expected[0][0])
    assert conditioning[0][1].keys() == expected[0][1].keys()


@pytest.mark.parametrize(
    "text, new, left_out",
    [
        ("a knife and an apple", "an apple", ["knife"]),
        ("an apple, (a pistol:1.2), a frog", "an apple, a frog", ["pistol"]),
        ("a knife and a syringe", "", ["knife", "syringe"]),
    ],
)
def test_the_fewest_words_are_left_out(demo, text, new, left_out):
    with torch.inference_mode():
        conditioning, found, about = run(demo, text)
        expected = core.CLIPTextEncode().encode(demo[0], new)[0]
    assert (found, about["left_out"], about["changed"], about["clean"]) == (new, left_out, True, True)
    assert torch.equal(conditioning[0][0], expected[0][0])
    limits = about["categories"]
    assert any(about["before"][c] > limits[c] for c in limits) and all(about["after"][c] <= limits[c] for c in limits)


def test_categories_that_are_off_stay(demo):
    with torch.inference_mode():
        assert run(demo, "a knife and an apple", categories="weapons = off")[1] == "a knife and an apple"
        assert run(demo, "a knife and a syringe", categories="weapons = off")[1] == "a knife"
        assert run(demo, "a knife and an apple", harmful_words=NEUTRAL_WORDS)[1] == "an apple"  # the demo has no neutral words
    with pytest.raises(HGRError, match="Every category is off"):
        run(demo, "a", categories="weapons = off, drugs = off, death = off")
    with pytest.raises(ValueError, match="Expected a CLIP"):
        TextEncode.execute("a", None, demo[1], **WIDGETS)


def test_which_words_did_it(demo):
    clip, hgr = demo
    text = "an apple and a knife"
    with torch.inference_mode():
        prompt = core.CLIPTextEncode().encode(clip, text)[0]
        said = DetectPromptHarm.execute(prompt, hgr, 0.0, "", text=text, clip=clip).result
        clean = DetectPromptHarm.execute(
            core.CLIPTextEncode().encode(clip, "a frog")[0], hgr, 0.0, "", text="a frog", clip=clip
        ).result
        without = DetectPromptHarm.execute(prompt, hgr, 0.0, "").result
    assert said[2] and said[4].splitlines()[0] == "harmful by: knife" and said[4].splitlines()[1].startswith("knife: +")
    assert said[5].shape[0] == 1 and said[5].shape[3] == 3 and said[5].shape[1] > without[5].shape[1]
    red = lambda picture: ((picture[..., 0] > 0.6) & (picture[..., 1] < 0.4)).sum().item()  # noqa: E731
    assert red(said[5]) > red(clean[5])  # the bar and the word
    assert clean[4].splitlines()[0] == "clean" and without[4] == NO_WORDS and without[:4] == said[:4]
    with pytest.raises(ValueError, match="`text` and `clip` together"):
        DetectPromptHarm.execute(prompt, hgr, 0.0, "", text=text)
