"""SAFREE and CRG in `SafeCFG Concept Guidance`: one step beside its equations, what they leave alone, and what they cannot do."""

import zlib

import pytest
import torch
from safecfg.hgr_models import SLD_PRESETS, HGRError
from safecfg.hgr_models.concept_removal import CRGSettings
from safecfg.nodes.concept import safree, safree_hooks
from safecfg.nodes.concept.concept_guidance import ConceptGuidance, guard, guard_prompt
from safecfg.nodes.concept.concept_hooks import ConceptSettings
from safecfg.nodes.concept.safree import read_prompt
from safecfg.nodes.demo_world.demo_model import DemoModel
from safecfg.nodes.host.hooks import SafeCFGError

from concept_fakes import SIGMA, alone, basic_guider, cfg_guider, record_rows
from fakes import AtEverySigma, Once, guide, sample
from tiny import tiny_conditioning

WIDGETS = {
    "preset": "Strong", "warm_up": 0.14, "safety_scale": 2000.0, "threshold": 0.025, "momentum_scale": 0.5, "momentum_beta": 0.7,
    "strict": True,
}  # fmt: skip
PROMPT, HARM = "a knife and an apple on a table", "knife, gun, dagger"


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return DemoModel.execute().result[:2]


def run_node(model, clip, method, concepts=HARM, **widgets):
    with torch.inference_mode():
        return ConceptGuidance.execute(model, clip, method, **{**WIDGETS, **widgets}, concepts=concepts).result[0]


def removing(model, threshold=0.0, scale=1.0, strict=True):
    concept = tiny_conditioning(5, tokens=5)[0]
    return guard(model, ConceptSettings(SLD_PRESETS["Max"], (concept,), strict, CRGSettings(threshold, scale)))


def presence(result, concept):
    """CP of a first step, in noise units, from what the tiny model predicts alone."""
    uncond, text = result.alone["negative"], result.alone["positive"]
    return float(((text - uncond).square().sum() - (text - concept).square().sum()) / SIGMA**2 / 2)


def test_one_step_of_crg_is_the_closed_form(tiny_model):
    concept = alone(tiny_model, 5)
    plain = guide(cfg_guider(tiny_model), Once())
    tau = presence(plain, concept) - 3.0
    result = guide(cfg_guider(removing(tiny_model, tau)), Once())
    uncond, text = result.alone["negative"], result.alone["positive"]
    omega = 3.0 / float((concept - uncond).square().sum() / SIGMA**2)
    safe = text - omega * (concept - uncond)
    torch.testing.assert_close(result.out, uncond + 5.0 * (safe - uncond), atol=2e-4, rtol=0)
    assert (result.out - plain.out).abs().max() > 0.01


def test_crg_leaves_what_shows_no_evidence_to_the_last_bit(tiny_model):
    concept, plain = alone(tiny_model, 5), guide(cfg_guider(tiny_model), Once())
    assert torch.equal(guide(cfg_guider(removing(tiny_model, presence(plain, concept) + 1.0)), Once()).out, plain.out)
    off = removing(tiny_model, -100.0, scale=0.0)
    assert not off.wrappers and torch.equal(guide(cfg_guider(off), Once()).out, plain.out)


def test_crg_collects_evidence_along_a_run_and_forgets_it_after(tiny_model):
    sigmas = (9.0, 6.0, SIGMA, 1.0, 0.0)
    model = removing(tiny_model, -1e4)  # acts everywhere: what differs is the sum
    long, again = (guide(cfg_guider(model), AtEverySigma(), sigmas).outs for _ in range(2))
    short = guide(cfg_guider(model), AtEverySigma(), sigmas[2:]).outs
    assert all(torch.equal(long[s], again[s]) for s in sigmas[:-1])
    assert (long[SIGMA] - short[SIGMA]).abs().max() > 1e-3


def test_crg_takes_one_row_and_needs_an_unconditional(tiny_model, tiny_cond):
    rows = record_rows(tiny_model)
    sample(removing(tiny_model), tiny_cond(1), tiny_cond(2), steps=4)
    assert rows.count([1]) == 4 and len(rows) == 8
    with pytest.raises(SafeCFGError, match="without an unconditional"):
        guide(basic_guider(removing(tiny_model)), Once())


@pytest.mark.parametrize("method", ["SAFREE", "CRG"])
def test_the_node_runs_on_the_demo(demo, method):
    model, clip = demo
    draw = lambda m: drawn(m, clip)  # noqa: E731
    safe = run_node(model, clip, method, prompt=PROMPT)
    changed = draw(safe)
    assert changed.isfinite().all() and (changed - draw(model)).abs().max() > 1e-3
    assert torch.equal(draw(safe), changed)  # nothing outlives a run
    assert run_node(safe, clip, "SLD").wrappers and not model.wrappers


def drawn(model, clip, text=PROMPT, tokens=None, steps=6):
    with torch.inference_mode():
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in (text, ""))
        if tokens is not None:
            positive = [[tokens, positive[0][1]]]
        return sample(model, positive, negative, steps=steps)


def test_safree_draws_the_changed_tokens(demo, monkeypatch):
    """In all steps: then the run is that of the changed prompt, bit for bit. In the first ones: then it is neither."""
    model, clip = demo
    read = read_prompt(clip, PROMPT, [HARM])
    assert read.acts and not read.found.triggers.all()
    safe, wanted = guard_prompt(model, read, True), drawn(model, clip, tokens=read.safe)
    partly = drawn(safe, clip)
    monkeypatch.setattr(safree_hooks, "filtered_steps", lambda distance, steps: steps)
    assert torch.equal(drawn(safe, clip), wanted)
    assert not torch.equal(partly, wanted) and not torch.equal(partly, drawn(model, clip))


def test_safree_acts_in_the_first_steps(tiny_model, tiny_cond, monkeypatch):
    positive = tiny_cond(1)
    plain = positive[0][0]
    found = type("Found", (), {"distance": 0.5, "triggers": torch.tensor([True])})()
    prompt = safree.SafreePrompt(plain, plain + 1.0, found)
    monkeypatch.setattr(safree_hooks, "filtered_steps", lambda distance, steps: 2)
    sigmas = (9.0, 6.0, SIGMA, 1.0, 0.0)
    outs = lambda m: guide(cfg_guider(m), AtEverySigma(), sigmas).outs  # noqa: E731
    safe, alone_ = outs(guard_prompt(tiny_model, prompt, True)), outs(tiny_model)
    assert [torch.equal(safe[s], alone_[s]) for s in sigmas[:-1]] == [False, False, True, True]


def test_a_prompt_that_safree_leaves_alone_is_the_models_own(demo, monkeypatch):
    model, clip = demo
    monkeypatch.setattr(safree, "filter_tokens", lambda *args: none_of(*args))
    safe = run_node(model, clip, "SAFREE", prompt=PROMPT)
    assert not safe.wrappers and torch.equal(drawn(safe, clip), drawn(model, clip))
    assert not read_prompt(clip, "(((", [HARM]).acts  # no word that the encoder knows


def none_of(tokens, words, *rest):
    from safecfg.hgr_models.safree import Filtered

    return Filtered(tokens, torch.zeros(len(words), dtype=torch.bool), 0.0)


def test_safree_says_when_the_run_draws_another_prompt(demo, caplog):
    model, clip = demo
    with pytest.raises(SafeCFGError, match="no positive prompt of this run is the text in `prompt`"):
        drawn(run_node(model, clip, "SAFREE", prompt=PROMPT), clip, text="a dog and a tree")
    lenient = run_node(model, clip, "SAFREE", prompt=PROMPT, strict=False)
    assert torch.equal(drawn(lenient, clip, text="a dog and a tree"), drawn(model, clip, text="a dog and a tree"))
    assert "SAFREE did not act" in caplog.text


class Clip:
    """A CLIP of one or two encoders, whose pooled vector may be of another width."""

    def __init__(self, names=("l",), pooled=16):
        self.names, self.pooled = names, pooled

    def tokenize(self, text):
        ids = [[1, *(zlib.crc32(w.encode()) % 900 + 10 for w in text.split()), 2, *[2] * 20][:20]]
        return {name: [[(i, 1.0) for i in chunk] for chunk in ids] for name in self.names}

    def encode_from_tokens(self, tokens, return_pooled=False):
        ids = torch.tensor([i for i, _ in tokens["l"][0]], dtype=torch.float32)
        encoded = torch.sin(ids[:, None] * torch.arange(1, 17))[None]
        return encoded, torch.sin(ids @ torch.sin(torch.arange(20 * self.pooled).view(20, -1).float()))[None]


@pytest.mark.parametrize(
    "clip, prompt, said",
    [
        (Clip(("l", "g")), PROMPT, "one text encoder.*l \\+ g"),
        (Clip(pooled=8), PROMPT, "8 and 16 values"),
        (Clip(), " ", "`prompt` is empty"),
        (None, PROMPT, "Expected a CLIP"),
    ],
)
def test_what_safree_is_not_defined_for(clip, prompt, said):
    with pytest.raises(HGRError, match=said):
        read_prompt(clip, prompt, [HARM])


def test_words_are_masked_one_by_one_and_padding_is_not():
    clip, asked = Clip(), []
    encode = clip.encode_from_tokens
    clip.encode_from_tokens = lambda tokens, return_pooled: asked.append(tokens["l"][0]) or encode(tokens)
    read = read_prompt(clip, "a red knife", [HARM, "blood"])
    ids = [i for i, _ in clip.tokenize("a red knife")["l"][0]]
    masked = [[0 if i == place else old for i, old in enumerate(ids)] for place in (1, 2, 3)]
    assert [[i for i, _ in chunk] for chunk in asked[1:4]] == masked and len(asked) == 1 + 3 + 4  # phrases: three and one
    assert read.plain.shape == read.safe.shape == (1, 20, 16) and len(read.found.triggers) == 3
