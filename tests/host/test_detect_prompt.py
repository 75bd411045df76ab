"""`SafeCFG Detect Prompt Harm`: every prompt on its own, and nothing unread passes for clean."""

import json
import logging

import pytest
import torch
from safecfg.hgr_models import HGRError
from safecfg.nodes.detection.detect_prompt import DetectPromptHarm
from safecfg.nodes.detection.detector import detect_prompts

from fakes import INFO, make_hgr

WIDGETS = {"threshold": 0.0, "categories": ""}


def harmfulness(hgr, tokens, *rest):
    with torch.no_grad():
        return hgr.patcher.model.condition.harmfulness(tokens, *rest)


def test_defaults_are_the_schemas():
    assert {i.id: i.default for i in DetectPromptHarm.define_schema().inputs if i.id in WIDGETS} == WIDGETS


def test_every_prompt_has_its_scores(tiny_cond):
    hgr = make_hgr(condition=0.5)
    prompts = tiny_cond(1, batch=2) + tiny_cond(2)
    expected = torch.cat([harmfulness(hgr, tokens) for tokens, _ in prompts])
    worst, text, harmful, flagged, *_ = DetectPromptHarm.execute(prompts, hgr, **WIDGETS).result
    content = json.loads(text)
    assert worst == pytest.approx(expected.max().item(), abs=1e-6) and content["categories"] == {"red": 0.5, "blue": 0.5}
    rows = [[p["scores"]["red"], p["scores"]["blue"]] for p in content["prompts"]]
    torch.testing.assert_close(torch.tensor(rows), expected, atol=1e-6, rtol=0)
    assert flagged == [bool(row) for row in (expected > 0.5).any(dim=1)] == [p["flagged"] for p in content["prompts"]]
    assert harmful == any(flagged) and [p["harmfulness"] for p in content["prompts"]] == pytest.approx(
        expected.amax(dim=1).tolist(), abs=1e-6
    )


def test_thresholds_and_categories(tiny_cond):
    hgr, prompt = make_hgr(condition=1.0), tiny_cond(1)
    red, blue = harmfulness(hgr, prompt[0][0])[0].tolist()
    run = lambda **widgets: DetectPromptHarm.execute(prompt, hgr, **{**WIDGETS, **widgets}).result[:4]  # noqa: E731
    assert run()[2:] == (False, [False])
    assert run(threshold=min(red, blue) / 2)[2:] == (True, [True])
    only = run(threshold=0.001, categories="red = off")
    assert only[0] == pytest.approx(blue, abs=1e-6) and json.loads(only[1])["categories"] == {"red": None, "blue": 0.001}
    with pytest.raises(HGRError, match="Every category is off"):
        run(categories="red = off, blue = 0")
    with pytest.raises(HGRError, match="Unknown category 'green'"):
        run(categories="green = off")


def test_attention_masks_are_read(tiny_cond):
    hgr, ((tokens, _),) = make_hgr(), tiny_cond(1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0]])
    found = detect_prompts(hgr, [[tokens, {"attention_mask": mask}]])
    torch.testing.assert_close(found, harmfulness(hgr, tokens, None, mask))
    assert not torch.allclose(found, harmfulness(hgr, tokens))


def test_zeroed_prompts_are_clean():
    assert not detect_prompts(make_hgr(), [[torch.zeros(1, 7, 16), {}]]).any()


def test_text_that_is_not_read_is_said(tiny_cond, caplog):
    ((tokens, _),) = tiny_cond(1)
    with caplog.at_level(logging.WARNING):
        detect_prompts(make_hgr(), [[tokens, {"conditioning_llama3": torch.ones(1, 3)}]])
    assert "prompt 1 is judged without HiDream's Llama embeddings" in caplog.text
    with pytest.raises(ValueError, match="Prompt 2 has no text .*no tokens"):
        detect_prompts(make_hgr(), [[tokens, {}], [None, {}]])
    with pytest.raises(ValueError, match="Prompt 1 has no text .*unknown key 'odd'"):
        detect_prompts(make_hgr(), [[None, {"odd": torch.ones(1)}]])
    with pytest.raises(ValueError, match="conditioning is empty"):
        detect_prompts(make_hgr(), [])


def test_what_does_not_fit_is_said(tiny_cond):
    with pytest.raises(HGRError, match="token width 16 .* token width 8"):
        detect_prompts(make_hgr(), [[torch.randn(1, 7, 8), {}]])
    with pytest.raises(HGRError, match="needs a condition redirector, but random.safetensors has none"):
        detect_prompts(make_hgr(networks=("guidance",)), tiny_cond(1))
    with pytest.raises(ValueError, match="prompt 1 is not finite"):
        detect_prompts(make_hgr(info=INFO), [[torch.full((1, 7, 16), float("nan")), {}]])
