"""The attack's equations: its loss by hand, the ball, padding, its verdict, and that it finds a way where there is one."""

import pytest
import torch
from torch.testing import assert_close

from helpers import small_hgr
from hgr_models.attack import RADIUS, WAYS, Way, harm_is_back, objective, search, soft_gate
from hgr_models.recording import Points, Prompts

STEPS, RUNS = 3, 2


def tokens_of(seed, shape=(RUNS, 5, 16)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predict(points, prompts, tokens, pooled):
    return points.x * 0.1 + tokens[:, 0, :4, None, None] * torch.ones(4, 8, 8)


def scene(mask=None, distance=1.0):
    """Points of `RUNS` runs, their prompts, and the safe partners' tokens."""
    harmful = tokens_of(0)
    safe = harmful.clone()
    safe[:, 0] -= distance
    prompts = Prompts(harmful, safe, harmful, torch.ones(RUNS, 2), torch.ones(RUNS, 2), None, mask)
    x = torch.randn(STEPS * RUNS, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([5.0, 2.0, 1.0]).repeat_interleave(RUNS)
    rows = torch.arange(RUNS).repeat(STEPS)
    points = Points(x, sigma, 1 / (1 + sigma**2).sqrt(), x * 0.1, x, x, torch.ones(len(x), 2), rows)
    points.cond_denoised = predict(points, None, harmful[rows], None)
    points.partner_denoised = predict(points, None, safe[rows], None)
    return points, prompts, safe


def test_the_loss_by_hand():
    points, prompts, safe = scene()
    at = points[torch.arange(RUNS)]
    loss = objective(None, predict, at, prompts, safe, Way(0.0, False))
    off = (predict(at, prompts, safe, None) - at.cond_denoised).square().flatten(1).mean(dim=1)
    assert_close(loss, off / (at.cond_denoised - at.uncond_denoised).square().flatten(1).mean(dim=1))
    assert_close(objective(None, predict, at, prompts, prompts.tokens, Way(0.0, False)), torch.zeros(RUNS))


def test_a_soft_gate_is_half_open_at_its_threshold_and_quiet_below_it():
    weights, quiet = soft_gate(torch.tensor([[0.0, -3.0], [2.0, -3.0]]), torch.tensor([0.5, 0.5]))
    assert_close(weights[0, 0], torch.tensor(0.5))
    assert_close(quiet, torch.tensor([0.5, 2.5]))  # half a logit of margin
    assert weights[1, 0] > weights[0, 0]


def test_an_undefended_model_is_led_from_the_safe_prompt_to_the_harmful_one():
    points, prompts, safe = scene()
    spread = torch.ones(16)
    assert not harm_is_back(None, predict, points, prompts, safe).any()
    assert harm_is_back(None, predict, points, prompts, prompts.tokens).all()
    found = search(None, predict, points, prompts, safe, spread, 30, WAYS[0], 0)
    assert harm_is_back(None, predict, points, prompts, found).all()
    assert_close(found[:, 0, :4], prompts.tokens[:, 0, :4], atol=0.2, rtol=0)


def test_what_is_garbled_is_not_harm():
    """Far from both predictions, though nearer to the harmful one."""
    points, prompts, safe = scene()
    garbled = prompts.tokens.clone()
    garbled[:, 0] += 0.9 * (prompts.tokens - safe)[:, 0]
    assert not harm_is_back(None, predict, points, prompts, garbled).any()
    most = safe + 0.6 * (prompts.tokens - safe)
    assert harm_is_back(None, predict, points, prompts, most).all()
    assert not harm_is_back(None, predict, points, prompts, safe + 0.4 * (prompts.tokens - safe)).any()


def test_the_ball_holds_and_padding_stays():
    mask = torch.ones(RUNS, 5)
    mask[1, 3:] = 0
    points, prompts, safe = scene(mask, distance=50.0)  # out of reach
    spread = torch.linspace(0.1, 1.0, 16)
    found = search(None, predict, points, prompts, safe, spread, 20, WAYS[1], 0)
    assert ((found - safe).abs() <= RADIUS * spread + 1e-4).all() and torch.equal(found[1, 3:], safe[1, 3:])
    assert not harm_is_back(None, predict, points, prompts, found).any()


@pytest.mark.parametrize("way", WAYS)
def test_a_defended_model_is_attacked_through_its_gates(way):
    hgr = small_hgr()
    points, prompts, _ = scene()
    before = objective(hgr, predict, points[torch.arange(RUNS)], prompts, prompts.tokens, way)
    found = search(hgr, predict, points, prompts, prompts.tokens, torch.ones(16), 25, way, 0)
    after = objective(hgr, predict, points[torch.arange(RUNS)], prompts, found, way)
    assert (after < before).all() and not torch.equal(found, prompts.tokens)
    assert not any(p.requires_grad for p in hgr.parameters()) and all(p.grad is None for p in hgr.parameters())


def test_the_same_seed_finds_the_same_tokens_and_overflow_is_survived():
    points, prompts, safe = scene()
    args = points, prompts, safe, torch.ones(16), 5, WAYS[1], 3
    assert torch.equal(search(None, predict, *args), search(None, predict, *args))
    assert search(None, predict, *args, scale=1e38).isfinite().all()
