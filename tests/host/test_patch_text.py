"""Prompts that other nodes keep in patches, hooks and objects: redirected like any other, and put back."""

import dataclasses
from types import SimpleNamespace

import comfy.samplers
import pytest
import torch
from safecfg import hgr_models
from safecfg.nodes.host.hooks import SafeCFGError
from safecfg.nodes.redirect import patch_text
from safecfg.nodes.redirect.patch_text import PatchText
from safecfg.nodes.redirect.places import identities_of
from safecfg.nodes.redirect.search import Search
from safecfg.nodes.reporting import traces

from fakes import NEVER, AtEverySigma, apply_hgr, guide, make_hgr, sample
from held_prompts import HOLDERS, Region
from matrix import COUPLED, WAYS, Prompts, Scene, with_safecfg
from matrix import sample as sample_by
from matrix_ideal import Known, prompt, rewritten

ROWS = {1}  # the harmful picture of two
SCENE = Scene.make(steps=2)
NONE = torch.zeros(2, 2)  # flags


def held_tokens() -> torch.Tensor:
    return prompt(7, 2)[0][0]


def clean_prompts() -> Prompts:
    return Prompts(*(prompt(seed, 2, harmful=False) for seed in (1, 3, 2, 4)))


@pytest.fixture
def draw(matrix_model):
    """`draw(hold, tokens, order, way)`: a picture with held tokens, SafeCFG before or after the node that holds them, or without."""

    def run(hold, tokens, order="without", way="KSampler", **apply):
        prompts, model = clean_prompts(), matrix_model
        if order == "before":
            model = with_safecfg(model, **apply)
        model, positive = hold(model, prompts.positive, tokens)
        if order == "after":
            model = with_safecfg(model, **apply)
        return sample_by(way, model, dataclasses.replace(prompts, positive=positive), SCENE)

    return run


@pytest.fixture
def seen(monkeypatch) -> list:
    """What the condition redirector reads."""
    known, found = Known(monkeypatch, ROWS), []
    known.start()
    read = known.redirect_condition
    monkeypatch.setattr(hgr_models, "redirect_condition", lambda hgr, t, *rest: (found.append(t), read(hgr, t, *rest))[1])
    return found


def check(monkeypatch, draw, hold, way="KSampler"):
    """Redirected exactly once in both node orders, as if the holder had held the safe prompt; clean pictures as they were."""
    tokens, strict = held_tokens(), way != "BasicGuider"
    plain, wanted = draw(hold, tokens, way=way), draw(hold, rewritten(tokens), way=way)
    assert (plain - wanted)[1].abs().max() > 1e-2 and (way in COUPLED or torch.equal(plain[0], wanted[0]))
    known, before = Known(monkeypatch, ROWS), tokens.clone()
    monkeypatch.setattr(hgr_models, "redirect_guidance", lambda hgr, cond, *rest: hgr_models.GuidanceResult(cond, NONE, NONE))
    for order in ("before", "after"):
        known.start()
        safe = draw(hold, tokens, order, way, strict=strict)
        torch.testing.assert_close(safe, wanted, atol=1e-5, rtol=0, msg=lambda text, order=order: f"SafeCFG {order}: {text}")
        known.start(on=False)
        assert torch.equal(draw(hold, tokens, order, way, strict=strict), plain), "a clean picture changed"
    assert torch.equal(tokens, before)


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, way) for name in HOLDERS for way in ("KSampler", "BasicGuider")), *(("a closure", way) for way in WAYS)],
)
def test_a_held_prompt_is_redirected_once(monkeypatch, draw, name, way):
    check(monkeypatch, draw, HOLDERS[name], way)


class Copying(Region):
    """Keeps copies of what it last read."""

    def patch(self, q, k, v, extra_options):
        self.conds = [(name, t.clone()) for name, t in self.conds]
        return super().patch(q, k, v, extra_options)


def copying(model, conditioning, tokens):
    region, model = Copying(tokens), model.clone()
    model.set_model_attn2_patch(lambda *args: region.patch(*args))
    return model, conditioning


@pytest.mark.parametrize("name", [*HOLDERS, "a holder that copies"])
def test_outside_the_window_a_held_prompt_acts_as_it_was(monkeypatch, matrix_model, name):
    """Every evaluation is, to the last bit, the plain one or the one that is redirected throughout; also when noise rises again."""
    Known(monkeypatch, ROWS).start()
    hold, tokens, sampling = HOLDERS.get(name, copying), held_tokens(), matrix_model.model.model_sampling
    sigmas = [14.0, 8.0, 3.0, 1.5, 0.8, 0.3, 2.0, 10.0, 2.5, 0.0]

    def outs(safe_from=None, safe_to=1.0):
        prompts, model = clean_prompts(), matrix_model
        model, positive = hold(model, prompts.positive, tokens)
        if safe_from is not None:
            model = apply_hgr(model, redirect="condition", start_percent=safe_from, end_percent=safe_to)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, prompts.negative)
        guider.set_cfg(4.0)
        return guide(guider, AtEverySigma(), sigmas, batch=2).outs

    plain, full, part = outs(), outs(0.0), outs(0.3, 0.7)
    inside = [s for s in part if sampling.percent_to_sigma(0.7) < s <= sampling.percent_to_sigma(0.3)]
    assert 2 < len(inside) < len(sigmas) - 2 and not torch.equal(plain[inside[0]], full[inside[0]])
    for sigma, out in part.items():
        assert torch.equal(out, (full if sigma in inside else plain)[sigma]), sigma


def twice(value, tokens):
    return SHAPED_AS(value, rewritten(tokens))


def in_place(value, tokens):
    return value.copy_(tokens)


SHAPED_AS = patch_text._shaped_as
MUTATIONS = {  # where, what, in which case, what the check says
    "never searched": (PatchText, "_finish", lambda *_: None, "a closure", "not close"),
    "searched at the start only": (PatchText, "find_new", lambda *_: None, "a patch that comes later", "not close"),
    "redirected twice": (patch_text, "_shaped_as", twice, "a closure", "not close"),
    "the holder's own tokens overwritten": (patch_text, "_shaped_as", in_place, "a closure", "a clean picture changed"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(monkeypatch, draw, name):
    owner, attribute, mutant, holder, message = MUTATIONS[name]
    monkeypatch.setattr(owner, attribute, mutant)
    with pytest.raises(AssertionError, match=message):
        check(monkeypatch, draw, HOLDERS[holder])


def test_what_is_not_put_back_is_seen(monkeypatch, draw):
    monkeypatch.setattr(PatchText, "restore", lambda *_: None)
    with pytest.raises(AssertionError, match="not put back"):
        test_a_holder_gets_its_tokens_back_whatever_it_did_with_them(monkeypatch, draw)


def test_a_holder_gets_its_tokens_back_whatever_it_did_with_them(monkeypatch, draw):
    """A pack may copy them to other devices, or into other lists, while the run goes on."""
    known, tokens = Known(monkeypatch, ROWS), held_tokens()
    region = Copying(tokens)

    def hold(model, conditioning, _):
        model = model.clone()
        model.set_model_attn2_patch(lambda *args: region.patch(*args))  # a function: older hosts copy objects for each run
        return model, conditioning

    known.start()
    assert not torch.equal(draw(hold, tokens, "after"), draw(hold, tokens))
    assert torch.equal(region.conds[0][1], tokens), "not put back"


def test_what_cannot_be_exchanged_is_noticed(monkeypatch, draw, caplog):
    Known(monkeypatch, ROWS).start()

    def hold(model, conditioning, tokens):
        held = frozenset({tokens})
        model = model.clone()
        model.model_options["transformer_options"]["regions"] = held
        return model, conditioning

    draw(hold, held_tokens(), "after", strict=False)
    assert caplog.text.count("a harmful prompt in regions cannot be redirected") == 1
    with pytest.raises(SafeCFGError, match="regions cannot be redirected"):
        draw(hold, held_tokens(), "after")


@pytest.mark.parametrize("key", ["regions", "tokens"])
def test_an_unknown_key_is_understood_where_all_of_it_can_be_read(monkeypatch, draw, key):
    """Tokens of the HGR's width are judged; whatever else is there is noticed, as before."""
    Known(monkeypatch, ROWS).start(on=False)
    hold = lambda model, conditioning, tokens: (model, [[t, {**e, key: [tokens, *more]}] for t, e in conditioning])  # noqa: E731
    more = []
    draw(hold, held_tokens(), "after")
    more = [torch.zeros(1, 7, 24)]
    with pytest.raises(SafeCFGError, match=f"unknown key '{key}'"):
        draw(hold, held_tokens(), "after")


@pytest.mark.parametrize(
    "held",
    [
        lambda t: {"nag_negative": [[t, {}]]},  # by its name
        lambda t: {"conds": clean_prompts().negative[0][0].clone()},  # the guider's own, copied
        lambda t: {"mask": t.abs()},  # no values below 0: a mask of the tokens' width
        lambda t: {"lora": {"attn2.to_k.weight": t[0]}, "pooled_output": t[:, 0]},
    ],
)
def test_negatives_masks_and_weights_stay(draw, seen, held):
    tokens = held_tokens()

    def hold(model, conditioning, _):
        model = model.clone()
        model.model_options["transformer_options"]["other"] = held(tokens)
        return model, conditioning

    draw(hold, tokens, "after")
    assert len(seen) == 1  # the prompt alone


def test_features_that_patches_keep_are_not_text(monkeypatch, draw, seen):
    """As many as the latent has places, and as wide as tokens by chance."""
    kept = {}

    def hold(model, conditioning, _):
        def patch(q, k, v, extra_options):
            kept.setdefault("features", q[:, :16, :16].clone())  # 4 x 4 places, of an 8 x 8 latent
            return q, k, v

        model = model.clone()
        model.set_model_attn2_patch(patch)
        return model, conditioning

    draw(hold, held_tokens(), "after")
    assert kept["features"].shape[1:] == (16, 16) and (kept["features"] < 0).any()
    assert [t.shape[1] for t in seen] == [7]  # the prompt alone


def test_readings_know_of_it(monkeypatch, draw):
    Known(monkeypatch, ROWS).start()
    out = draw(HOLDERS["a bound method"], held_tokens(), "after")
    (prompt_roles,) = {tuple(p.role for p in image.prompts) for image in traces.trace_of({"samples": out}).images}
    assert prompt_roles == ("positive", "prompt in patches.attn2_patch.conds")


def test_without_others_nothing_is_searched_again(tiny_model, tiny_cond, monkeypatch):
    looked, real = [], Search.look
    monkeypatch.setattr(Search, "look", lambda self, *args, **kwargs: (looked.append(1), real(self, *args, **kwargs))[1])
    counts = []
    for steps in (1, 6):
        looked.clear()
        sample(apply_hgr(tiny_model, make_hgr(NEVER, NEVER)), tiny_cond(1), tiny_cond(2), steps=steps)
        counts.append(len(looked))
    assert counts[0] == counts[1] < 200


def test_where_no_patch_holds_a_prompt_the_noise_level_is_not_read():
    """Reading it waits for the device, in every step."""
    found, read = PatchText(), []
    run = SimpleNamespace(window=SimpleNamespace(contains=read.append))
    found._patches = identities_of({})
    found.find_new(run, None, {}, torch.zeros(1, 4, 8, 8), torch.ones(1))
    assert not read
    found._patches = ()  # patches came, or changed
    found.find_new(run, None, {}, torch.zeros(1, 4, 8, 8), torch.ones(1))
    assert len(read) == 1
