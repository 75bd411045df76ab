"""Every class of `comfy.supported_models` as core's real network, shrunk: what SafeCFG does with it."""

import re
from contextlib import nullcontext
from dataclasses import replace

import comfy.model_management
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from safecfg import hgr_models
from safecfg.hgr_models import HGRError
from safecfg.hgr_models.pairs import PromptPair, PromptSet
from safecfg.hgr_models.recording import Prompts
from safecfg.nodes.demo_world.prompt_batch import batch
from safecfg.nodes.host.architecture import architecture_of
from safecfg.nodes.host.embedded import clip_for, embeds_ids
from safecfg.nodes.host.encoding import encode_batch, encode_groups, text_of
from safecfg.nodes.host.more_tokens import gather, keys_of, scatter
from safecfg.nodes.training.forward_check import check_reads
from safecfg.nodes.training.frozen_model import FrozenModel
from safecfg.nodes.training.gradient import probe_gradient
from safecfg.nodes.training.recorder import Job, RecordingGuider, RunSettings

from fakes import ALWAYS, NEVER, KnownRedirection, apply_hgr, make_hgr
from zoo_models import ALL, KIN, NEWEST, Encoder, Variant, build, encode, flat, guide, info_of, latents, note
from zoo_pictures import PICTURES
from zoo_videos import NOT_DIFFUSION, REFUSED, VIDEOS

EVERY = [variant for variant in (*PICTURES, *VIDEOS) if variant.core_class is not None]
VARIANTS = [variant for variant in EVERY if ALL or NEWEST or variant.name not in KIN]
SHORT, LONG = "a dog", "a red knife and a blue cup on a table"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-12))


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def animal(request):
    """(variant, MODEL); one at a time is in memory."""
    yield request.param, build(request.param)
    comfy.model_management.unload_all_models()


def test_every_class_of_this_host_is_known():
    known = {variant.of or variant.name for variant in EVERY} | REFUSED.keys() | NOT_DIFFUSION
    assert {core.__name__ for core in comfy.supported_models.models} <= known


class Evaluation(comfy.samplers.Sampler):
    """Evaluates a guider once at its first noise level, and each of its conditions alone."""

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        model, options = model_wrap.inner_model, {"transformer_options": {"sample_sigmas": sigmas}}
        x, sigma = (
            model.model_sampling.noise_scaling(sigmas[0], noise, latent_image, True),
            sigmas[0] * noise.new_ones(len(noise)),
        )
        self.out = model_wrap(x, sigma, **extra_args)
        calc = comfy.samplers.calc_cond_batch
        self.alone = {role: calc(model, [conds], x, sigma, options)[0] for role, conds in model_wrap.conds.items()}
        return self.out


@torch.inference_mode()
def test_clean_runs_are_bit_identical_and_harmful_ones_redirected(animal):
    variant, model = animal
    positive, info = encode(variant, LONG), info_of(model, variant)
    plain = flat(guide(model, variant, positive))
    assert plain.isfinite().all()
    never = flat(guide(apply_hgr(model, make_hgr(NEVER, NEVER, info)), variant, positive))
    assert torch.equal(never, plain)
    hgr, redirected = make_hgr(ALWAYS, ALWAYS, info), {}
    for way in ("condition", "guidance", "both"):
        redirected[way] = not torch.equal(flat(guide(apply_hgr(model, hgr, redirect=way), variant, positive)), plain)
    note(variant, model=architecture_of(model), **redirected)
    assert redirected == {"condition": variant.by_prompt, "guidance": True, "both": True}


@torch.inference_mode()
def test_guidance_is_turned_exactly_once(animal, monkeypatch):
    variant, model = animal
    known, seen = KnownRedirection(monkeypatch), Evaluation()
    hgr = make_hgr(NEVER, ALWAYS, info_of(model, variant))
    guide(apply_hgr(model, hgr, redirect="guidance"), variant, encode(variant, LONG), seen)
    assert known.count == 1
    if not variant.packed:  # of packed latents an HGR sees a part; the count says enough
        uncond, cond = seen.alone["negative"], seen.alone["positive"]
        turned = 4.0 * 0.5 * (cond - uncond).flip(-1)
        assert relative(seen.out - uncond, turned) < 0.05


@torch.inference_mode()
def test_tokens_are_redirected_exactly_once(animal):
    variant, model = animal
    if not variant.by_prompt:
        pytest.skip("its prompts have no tokens to redirect")
    hgr, positive = make_hgr(ALWAYS, NEVER, info_of(model, variant)), encode(variant, LONG)
    seen = flat(guide(apply_hgr(model, hgr, redirect="condition"), variant, positive))
    (tokens, extras), on = positive[0], hgr_models.CategorySettings((1.0, 1.0))
    pooled, condition = extras["pooled_output"] if variant.pooled else None, {**extras, "cross_attn": tokens}
    if embeds_ids(model):  # what stands in for its ids
        positive = clip_for(model, Encoder(variant)).encode_from_tokens_scheduled(Encoder(variant).tokenize(LONG))
        (tokens, extras), condition = positive[0], {**positive[0][1], "cross_attn": positive[0][0]}
    together, mask = gather(condition)
    result = hgr_models.redirect_condition(hgr.patcher.model, together, pooled, on, mask)
    parts = scatter(condition, result.tokens)
    assert len(parts) == 1 + len(keys_of(extras)) and not any(torch.equal(parts[key], condition[key]) for key in parts)
    by_hand = [[parts.pop("cross_attn"), {**extras, **parts, **({"pooled_output": result.pooled} if variant.pooled else {})}]]
    assert relative(seen, flat(guide(model, variant, by_hand))) < 1e-4


@torch.inference_mode()
def test_a_prompt_of_a_batch_means_what_it_means_alone(animal):
    """In SafeCFG Prompt Batch and in a recording."""
    variant, model = animal
    prompts = [SHORT, LONG, SHORT]
    if _rows(variant) > 1:
        pytest.skip("frames are rows")
    alone = {text: _alone(model, variant, text, len(prompts)) for text in (SHORT, LONG)}
    assert not torch.equal(alone[SHORT], alone[LONG])
    found = [_recorded(model, variant, prompts).cond_denoised.flatten(1)]
    if not variant.packed and not variant.one_by_one:
        found.append(_prediction(model, variant, batch(Encoder(variant), prompts, model), len(prompts)))
    for rows in found:
        assert max(relative(rows[i], alone[text][i]) for i, text in enumerate(prompts)) < 1e-3


def _rows(variant: Variant) -> int:
    return variant.shape[0][0] if variant.packed else variant.shape[0]


def _prediction(model, variant, positive, count):
    seen = Evaluation()
    guide(model, variant, positive, seen, count, steps=1)
    return seen.alone["positive"].flatten(1)


def _alone(model, variant, text, count):
    """What a prompt draws in each of `count` pictures; one by one where core takes no batches."""
    if variant.one_by_one or variant.packed:
        return _recorded(model, variant, [text] * count).cond_denoised.flatten(1)
    return _prediction(model, variant, encode(variant, text), count)


def _recorded(model, variant, prompts):
    """The first point of a recorded run of prompts."""
    job = Job("j", "harmful", (), (64, 64), "euler", 1.0, "", "prompt", 0, 0)
    groups = lambda texts: encode_groups(Encoder(variant), texts, variant.one_by_one)  # noqa: E731
    negatives = [""] * (len(prompts) if variant.one_by_one else 1)
    guider = RecordingGuider(model).prepare(job, {"positive": groups(prompts), "negative": groups(negatives)}, None)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 1)
    noise, empty = latents(variant, len(prompts)), latents(variant, len(prompts), 0.0)
    guider.sample(noise, empty, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)
    return guider.points[0]


def test_the_frozen_model_never_sees_padding(animal):
    variant, model = animal
    if _rows(variant) > 1 or not variant.by_prompt:
        pytest.skip("frames are rows, or there are no tokens")
    clip = clip_for(model, Encoder(variant))
    text, template = text_of(encode_batch(clip, [SHORT, LONG]), torch.zeros(2, 2)), encode_batch(clip, [""])[0][1]
    frozen, point = FrozenModel(model, template, latents(variant)), _recorded(model, variant, [SHORT, LONG])
    prompts = Prompts(text.tokens, None, None, text.harms, text.harms, text.pooled, text.mask, text.lengths)
    with torch.no_grad(), frozen.loaded(tuple(point.x.shape), False):
        found = frozen.predict(point, prompts, text.tokens, text.pooled)
    assert relative(found, point.cond_denoised) < 1e-3


def settings_of(variant) -> RunSettings:
    return RunSettings(2, 2, ((64, 64),), ("euler",), "simple", (2.0, 4.0), ("",), 0, latents(variant, 1, 0.0))


def test_gradients_reach_the_prompt(animal):
    variant, model = animal
    if not variant.by_prompt:
        pytest.skip("its prompts have no tokens")
    check = probe_gradient(model, encode_batch(clip_for(model, Encoder(variant)), [LONG]), settings_of(variant), False)
    note(variant, gradient=check.error if check.passed else None, reason=check.reason)
    assert check.error <= 0.1, check.reason


def test_the_wrong_clip_is_told_before_anything_is_recorded(animal):
    """In our words, not in torch's: tokens of another width, and no pooled vector."""
    variant, model = animal
    if not variant.by_prompt:
        pytest.skip("it reads no tokens")
    pair = PromptPair(LONG, SHORT, frozenset({"red"}), frozenset({"red"}), "")
    prompts = PromptSet(("red",), (pair,), (SHORT,), concept_prompts={"red": "red"})
    check_reads(model, clip_for(model, Encoder(variant)), prompts, settings_of(variant))
    told = "cannot read this CLIP's prompts.*Connect the CLIP that belongs to the model"
    with (
        pytest.raises(HGRError, match=told) if variant.name != "Stable_Cascade_B" else nullcontext()
    ):  # that reads the pooled vector alone
        check_reads(model, Encoder(replace(variant, width=2 * variant.width)), prompts, settings_of(variant))
    try:  # Flux draws without a pooled vector
        check_reads(model, clip_for(model, Encoder(replace(variant, pooled=0))), prompts, settings_of(variant))
    except HGRError as error:
        assert re.search(told, str(error))
