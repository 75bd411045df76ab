"""Prompts as users write them: the same change for prompt and partner, CLIP skip in a share of the batches."""

import random

import pytest
import torch
from safecfg import hgr_models
from safecfg.hgr_models.condition import narrower_width
from safecfg.nodes.host.encoder_print import encoder_of
from safecfg.nodes.host.encoding import some_layer, vary
from safecfg.nodes.training import recorder
from safecfg.nodes.training.plan import recording_facts
from safecfg.nodes.training.recorder import RunSettings, plan_jobs, record_job

from test_training import demo, folders, prompt_set, train  # noqa: F401 (two are fixtures)
from test_training_families import FAMILIES, TinyClip, make_model

FILLERS = tuple(f"scene {i}" for i in range(12))


def test_prompt_and_partner_change_alike():
    seen = set()
    for seed in range(200):
        harmful, safe = vary([["a gun", "a knife"], ["a cup", "a spoon"]], FILLERS, random.Random(seed))
        for pair, words in ((("gun", "cup"), (harmful[0], safe[0])), (("knife", "spoon"), (harmful[1], safe[1]))):
            assert words[0].replace(pair[0], pair[1]) == words[1]
        kind = "weight" if harmful[0].startswith("(") else "long" if "scene" in harmful[0] else "plain"
        seen.add(kind)
        if kind == "weight":
            assert 0.3 <= float(harmful[0].removeprefix("(a gun:").removesuffix(")")) <= 1.6
    assert seen == {"weight", "long", "plain"}


class Layers:
    """A CLIP that tells its layer."""

    def __init__(self, key="l"):
        self.key, self.layer = key, None

    def clone(self):
        return Layers(self.key)

    def clip_layer(self, layer):
        self.layer = layer

    def tokenize(self, text):
        return {self.key: [[(0, 1.0)] * 77]}


def test_clip_skip_in_a_share_of_the_batches():
    clip = Layers()
    layers = [some_layer(clip, random.Random(seed)).layer for seed in range(400)]
    assert 0.05 < layers.count(-2) / 400 < 0.15 and layers.count(-1) and layers.count(None) > 280 and clip.layer is None
    assert {some_layer(Layers("t5xxl"), random.Random(seed)).layer for seed in range(100)} == {None}
    assert some_layer(tiny := TinyClip(), random.Random(0)) is tiny


@pytest.mark.parametrize("looks, varied", [(2, True), (0, False)])
def test_runs_to_learn_from_are_worded_as_users_do(demo, monkeypatch, looks, varied):  # noqa: F811
    """Prompt, partner and negative are read by the same layer; runs to measure with stay plain."""
    encoded = []
    encode = recorder.encode_groups
    monkeypatch.setattr(
        recorder, "encode_groups", lambda clip, texts, *how: encoded.append((clip, texts)) or encode(clip, texts, *how)
    )
    settings = RunSettings(2, 1, ((64, 64),), ("euler",), "normal", (3.0, 3.0), ("",), 0)
    prompts = prompt_set()
    jobs = plan_jobs(settings, "harmful", prompts.pairs, 24, ("prompt",), looks=looks)
    with torch.inference_mode():
        for job in jobs:
            record_job(*demo, prompts, job, settings, None, None)
    prompts_of, partners = encoded[::3], encoded[2::3]
    plain = {pair.harmful for pair in prompts.pairs}
    assert varied == any(texts[0] not in plain for _, texts in prompts_of)
    assert varied == any(clip is not demo[1] for clip, _ in encoded)
    assert all(a[0] is b[0] for a, b in zip(prompts_of, partners, strict=True))


class TwoEncoders(TinyClip):
    """Two tokens of half the width beside those of another encoder, as SD3's CLIP beside T5."""

    def encode_from_tokens_scheduled(self, tokens):
        ((wide, extra),) = super().encode_from_tokens_scheduled(tokens)
        narrow = 50 * wide[:, :2].clone()
        narrow[..., 12:] = 0
        return [[torch.cat([narrow, wide], dim=1), extra]]


def test_a_narrower_encoder_is_found_and_has_units_of_its_own():
    model_type, latent_format, *_ = FAMILIES["flow"]
    model, clip = make_model(model_type, latent_format()), TwoEncoders()
    hgr = train((model, clip), train="condition", sizes="64x64", cfg_min=1.0, cfg_max=1.0)[0]
    network = hgr_models.load_hgr(hgr.path).condition
    assert network.config.short_width == 12 and network.short_scale[:12].median() > 9 * network.token_scale.median()
    assert not network.short_scale[12:].any()
    tokens = clip.encode_from_tokens_scheduled(clip.tokenize("a knife"))[0][0]
    assert narrower_width(tokens) == 12
    sample, found = hgr_models.shards.Texts(tokens, None, None, torch.zeros(1, 2)), encoder_of(clip)
    assert recording_facts(model, prompt_set(), sample, found)["short_width"] == 12
    one = hgr_models.shards.Texts(tokens[:, 2:], None, None, torch.zeros(1, 2))
    assert "short_width" not in recording_facts(model, prompt_set(), one, found)
