"""Concept guidance: SLD and CASG against the published loop, written out here from the paper, and the gates by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from hgr_models import (
    DEFAULT_CONCEPTS,
    SLD_PRESETS,
    ConceptGuard,
    HGRError,
    SLDSettings,
    output_units,
    parse_concepts,
    select_concept,
    sld_term,
    warm_up_steps,
)

# The published parameters: warm-up steps of 50, s_S, lambda, s_m, beta_m.
PUBLISHED = {
    "Weak": (15, 20, 0.0, 0.0, 0.0),
    "Medium": (10, 1000, 0.01, 0.3, 0.4),
    "Strong": (7, 2000, 0.025, 0.5, 0.7),
    "Max": (0, 5000, 1.0, 0.5, 0.7),
}
STEPS, GUIDANCE_SCALE, SAMPLES = 50, 7.5, 2


def published_loop(predictions, parameters, choose):
    """The noise that every step of the published pipeline hands to its scheduler, from (uncond, text, concepts) predictions."""
    warmup_steps, safety_scale, threshold, momentum_scale, momentum_beta = parameters
    momentum, noises = None, []
    for i, (uncond, text, concepts) in enumerate(predictions):
        guidance = text - uncond
        if momentum is None:
            momentum = torch.zeros_like(guidance)
        concept = choose(uncond, text, concepts)
        phi = torch.minimum(torch.ones_like(text), torch.abs(text - concept) * safety_scale)
        phi[text - concept >= threshold] = 0
        gamma = phi * (concept - uncond) + momentum_scale * momentum
        momentum = momentum_beta * momentum + (1 - momentum_beta) * gamma
        if i >= warmup_steps:
            guidance = guidance - gamma
        noises.append(uncond + GUIDANCE_SCALE * guidance)
    return noises


def strongest(uncond, text, concepts):
    """CASG's choice, one picture at a time."""
    chosen = []
    for b in range(len(text)):
        prompt = (text[b] - uncond[b]).flatten()
        scores = []
        for concept in concepts:
            direction = (concept[b] - uncond[b]).flatten()
            scores.append(float(torch.dot(direction, prompt) / math.sqrt(float(torch.dot(direction, direction)))))
        chosen.append(concepts[scores.index(max(scores))][b])
    return torch.stack(chosen)


def random_predictions(concepts: int, shape=(4, 6, 5)):
    """A run of noise predictions that differ as a model's do: by a few hundredths. float64: the gate is a step function."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda scale: scale * torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64)  # noqa: E731
    run = []
    for _ in range(STEPS):
        uncond = draw(1.0)
        run.append((uncond, uncond + draw(0.03), [uncond + draw(0.03) for _ in range(concepts)]))
    return run


def guarded_loop(predictions, settings):
    """The same through ConceptGuard, as ComfyUI's samplers see it: x0 predictions at falling noise levels, then core's CFG."""
    guard, noises = ConceptGuard(settings), []
    first = warm_up_steps(settings.warm_up, len(predictions))
    x = 3.0 * torch.randn(predictions[0][0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for i, (uncond, text, concepts) in enumerate(predictions):
        sigma = torch.full((SAMPLES,), 14.0 * 0.9**i, dtype=torch.float64)
        level = float(sigma[0])
        uncond_denoised = x - level * uncond
        concepts_denoised = [x - level * concept for concept in concepts]
        active = torch.full((SAMPLES,), i >= first)
        safe = guard.steer(x - level * text, uncond_denoised, concepts_denoised, output_units(sigma, "EPS"), active)
        noises.append((x - (uncond_denoised + GUIDANCE_SCALE * (safe - uncond_denoised))) / level)
    return noises


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 2, 6, 5)], ids=["picture", "video"])
@pytest.mark.parametrize("preset", PUBLISHED)
def test_sld_is_the_published_loop(preset, shape):
    predictions = random_predictions(1, shape)
    wanted = published_loop(predictions, PUBLISHED[preset], lambda uncond, text, concepts: concepts[0])
    for ours, published in zip(guarded_loop(predictions, SLD_PRESETS[preset]), wanted, strict=True):
        assert_close(ours, published, rtol=0, atol=1e-9)
    unguarded = predictions[-1][0] + GUIDANCE_SCALE * (predictions[-1][1] - predictions[-1][0])
    assert (wanted[-1] - unguarded).abs().max() > 0.01  # the comparison has something to see


@pytest.mark.parametrize("preset", PUBLISHED)
def test_casg_is_the_published_loop(preset):
    predictions = random_predictions(4)
    wanted = published_loop(predictions, PUBLISHED[preset], strongest)
    for ours, published in zip(guarded_loop(predictions, SLD_PRESETS[preset]), wanted, strict=True):
        assert_close(ours, published, rtol=0, atol=1e-9)


def test_each_sample_chooses_its_own_concept():
    guidance = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[-1.0, 0.0]]])  # (3, 1, 2)
    up, right, down = ([[[a, b]]] * 3 for a, b in ((0.0, 5.0), (0.1, 0.0), (0.0, -1.0)))
    directions = torch.tensor([up, right, down]).view(3, 3, 1, 2)
    assert select_concept(guidance, directions).tolist() == [1, 0, 0]  # length does not count; of equals the first
    assert select_concept(guidance, torch.zeros_like(directions)).tolist() == [0, 0, 0]


def test_the_gate_by_hand():
    """lambda = 0.1, s_S = 2: saturates where |difference| >= 1/2, and is 0 from lambda upwards."""
    guidance = torch.tensor([[0.0, 0.3, 1.0, 0.2]])
    concept = torch.tensor([[1.0, 0.5, 0.5, 0.1]])  # differences -1, -0.2, 0.5, 0.1
    term, momentum = sld_term(guidance, concept, SLDSettings(0.0, 2.0, 0.1, 0.5, 0.75))
    assert_close(term, torch.tensor([[1.0, 0.4 * 0.5, 0.0, 0.0]]))
    assert_close(momentum, 0.25 * term)
    again, _ = sld_term(guidance, concept, SLDSettings(0.0, 2.0, 0.1, 0.5, 0.75), momentum)
    assert_close(again, term + 0.5 * momentum)


@pytest.mark.parametrize("fraction, steps, first", [
    (0.3, 50, 15), (0.2, 50, 10), (0.14, 50, 7), (0.0, 50, 0), (0.3, 8, 2), (0.2, 8, 1), (0.14, 8, 1), (0.3, 4, 1), (0.3, 1, 0),
    (0.95, 1, 0), (0.95, 2, 1), (0.3, 0, 0),
])  # fmt: skip
def test_warm_up_is_a_fraction_of_the_run(fraction, steps, first):
    assert warm_up_steps(fraction, steps) == first


def test_warm_up_returns_every_bit_and_builds_momentum():
    cond, uncond, concept = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    units, rows = output_units(torch.tensor([2.0, 2.0]), "EPS"), torch.tensor([False, True])
    waiting, acting = ConceptGuard(SLD_PRESETS["Max"]), ConceptGuard(SLD_PRESETS["Max"])
    safe = waiting.steer(cond, uncond, [concept], units, rows)
    assert torch.equal(safe[0], cond[0]) and not torch.equal(safe[1], cond[1])
    acting.steer(cond, uncond, [concept], units)
    assert torch.equal(waiting.momentum, acting.momentum) and waiting.momentum[0].any()
    other = torch.randn(1, 4, 5, 5)  # a run whose latent changes its size
    fresh = ConceptGuard(SLD_PRESETS["Max"]).steer(other, other * 0.9, [other * 0.8], units[:1])
    assert torch.equal(acting.steer(other, other * 0.9, [other * 0.8], units[:1]), fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept_and_sigma_0_divides_nothing(dtype):
    cond, uncond, concept = torch.randn(3, 2, 4, 3, 3).to(dtype).unbind()
    for prediction in ("EPS", "V", "FLOW", "COSMOS_FLOW", "X0"):
        units = output_units(torch.tensor([0.0, 1.0], dtype=dtype), prediction)
        safe = ConceptGuard(SLD_PRESETS["Strong"]).steer(cond, uncond, [concept], units)
        assert safe.dtype == dtype and safe.isfinite().all() and units.isfinite().all() and (units < 0).all()


def test_v_is_noise_in_other_units():
    """v = alpha noise - sigma' x0 of a variance-preserving model: its differences are sqrt(sigma^2 + 1) times the noise's."""
    sigma = torch.tensor([0.3, 2.0, 14.0], dtype=torch.float64)
    x, x0, other = torch.randn(3, 3, 7, dtype=torch.float64).unbind()
    s, alpha = sigma[:, None], 1 / (sigma[:, None] ** 2 + 1).sqrt()
    noise = [(x - denoised) / s for denoised in (x0, other)]
    v = [alpha * n - s * alpha * denoised for n, denoised in zip(noise, (x0, other), strict=True)]
    assert_close(output_units(sigma, "V")[:, None] * (x0 - other), v[0] - v[1])
    assert_close(output_units(sigma, "EPS")[:, None] * (x0 - other), noise[0] - noise[1])
    assert_close(output_units(sigma, "V", 0.5), -((sigma**2 + 0.25).sqrt()) / (sigma * 0.5))


def test_concepts_are_parsed():
    assert parse_concepts("violence: blood, gore\n\n self-harm : suicide ") == {"violence": "blood, gore", "self-harm": "suicide"}
    assert parse_concepts("blood (gore:1.3),\nknives") == {"concept": "blood (gore:1.3), knives"}
    assert parse_concepts("violence: (blood:1.3), gore") == {"violence": "(blood:1.3), gore"}
    seven = parse_concepts(DEFAULT_CONCEPTS)
    assert len(seven) == 7 and seven["sexual"] == "sexual, nudity, bodily fluids, obscene gestures"


@pytest.mark.parametrize(
    "text, said",
    [
        (" \n ", "text is empty"),
        ("violence: blood\nhate", "line 2 .*'hate'"),
        ("violence: blood\n\nhate:", "line 3"),
        (" : blood", "line 1"),
        ("hate: a\nhate: b", "'hate' comes again in line 2"),
    ],
)
def test_wrong_concepts_are_named(text, said):
    with pytest.raises(HGRError, match=said):
        parse_concepts(text)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"warm_up": 1.0}, "warm-up fraction from 0 to below 1"),
        ({"scale": -1.0}, "safety scale of 0 or more"),
        ({"momentum_scale": -0.1}, "momentum scale"),
        ({"momentum_beta": 1.0}, "momentum beta"),
        ({"scale": float("nan")}, "safety scale"),
    ],
)
def test_parameters_have_ranges(change, said):
    with pytest.raises(HGRError, match=said):
        SLDSettings(**{"warm_up": 0.1, "scale": 1.0, "threshold": 0.0, **change})
