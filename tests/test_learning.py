"""Recording, losses and calibration: closed forms, and a toy model whose harm both networks learn to remove."""

import pytest
import torch
from torch.testing import assert_close

from helpers import small_hgr
from hgr_models import CategorySettings, losses, redirect_condition, redirect_guidance
from hgr_models.calibration import calibrated, quantile_thresholds, upper_bound
from hgr_models.recording import Points, Prompts, record_runs

HARM, SAFE, OTHER = torch.eye(16)[:3] * 4.0  # three words


def predict(x, sigma, tokens):
    """A toy denoiser: x0 is a pattern of the tokens' sum."""
    content = tokens.sum(dim=1)
    return 0.1 * x + content.view(-1, 4, 2, 2).repeat(1, 1, 2, 2) * (1 + 0.1 * sigma.view(-1, 1, 1, 1))


def scale_input(x, sigma):
    return x / (sigma.view(-1, 1, 1, 1) ** 2 + 1).sqrt()


def toy_prompts(count):
    other = OTHER * torch.rand(count, 1)
    harmful, safe = torch.stack([HARM.expand(count, -1), other], 1), torch.stack([SAFE.expand(count, -1), other], 1)
    ones = torch.tensor([[1.0, 0.0]]).repeat(count, 1)
    return Prompts(harmful, safe, torch.zeros(count, 2, 16), ones, ones)


def toy_points(prompts, follow="prompt", policy=None):
    noise = torch.randn(len(prompts), 4, 4, 4)
    return record_runs(
        predict, prompts, torch.tensor([5.0, 2.0, 0.5, 0.0]), noise, follow, torch.full((len(prompts),), 3.0), policy
    )


def test_a_run_is_recorded_step_by_step():
    prompts = toy_prompts(2)
    points = toy_points(prompts, "partner")
    assert len(points) == 6 and points.sigma.tolist() == [5.0, 5.0, 2.0, 2.0, 0.5, 0.5] and points.prompt.tolist() == [0, 1] * 3
    assert_close(points.cond_denoised, predict(points.x, points.sigma, prompts.tokens[points.prompt]))
    assert_close(points.partner_denoised, predict(points.x, points.sigma, prompts.partner_tokens[points.prompt]))
    assert not points.shown.any() and toy_points(prompts).shown[:, 0].all()
    guided = points.uncond_denoised + 3 * (points.partner_denoised - points.uncond_denoised)
    step = points.x[:2] + (points.x[:2] - guided[:2]) / 5 * (2 - 5)  # Euler
    assert_close(points.x[2:4], step)


def test_a_run_can_follow_the_hgr_in_training():
    seen = []

    def policy(x, sigma, uncond, cond):
        seen.append(float(sigma[0]))
        return uncond

    prompts = toy_prompts(2)
    points = toy_points(prompts, "policy", policy)
    assert seen == [5.0, 2.0, 0.5]
    assert_close(points.x[2:4], points.x[:2] + (points.x[:2] - points.uncond_denoised[:2]) / 5 * (2 - 5))


def test_condition_redirector_learns_the_partner():
    torch.manual_seed(0)
    hgr = small_hgr(zero=True).requires_grad_(True)
    network, prompts = hgr.condition, toy_prompts(32)
    points = toy_points(prompts)
    clean = prompts.partner_tokens
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    before = losses.condition_error(network, predict, points, prompts[points.prompt]).mean().item()
    for _ in range(150):
        error = losses.condition_error(network, predict, points, prompts[points.prompt])
        read = losses.prompt_loss(network, torch.cat([prompts.tokens, clean]), torch.cat([prompts.harms, 0 * prompts.harms]))
        loss = losses.capped(error, 5.0) + read + losses.quiet_loss(network, clean, prompts.removed)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert before > 0.5 and error.mean().item() < 0.1 * before
    settings = CategorySettings((1.0, 1.0))
    assert redirect_condition(hgr, prompts.tokens, None, settings).weights.tolist() == prompts.removed.tolist()
    assert torch.equal(redirect_condition(hgr, clean, None, settings).tokens, clean)


def test_guidance_redirector_learns_the_partner():
    torch.manual_seed(0)
    hgr = small_hgr(zero=True).requires_grad_(True)
    prompts = toy_prompts(16)
    points = toy_points(prompts)
    partner = Points(
        points.x,
        points.sigma,
        points.uncond_denoised,
        points.partner_denoised,
        points.partner_denoised,
        points.shown,
        points.prompt,
    )
    both, nothing = Points.cat([points, partner]), torch.zeros(len(points), 2)
    harms = torch.cat([prompts.harms[points.prompt], nothing])
    optimiser, first = torch.optim.Adam(hgr.guidance.parameters(), lr=5e-3), None
    for _ in range(120):
        error, b, q = losses.guidance_losses(
            hgr.guidance, both, scale_input, harms, harms, both.partner_denoised, torch.ones(len(both))
        )
        first = first or error.mean().item()
        optimiser.zero_grad()
        (error.mean() + b).backward()
        optimiser.step()
    assert error.mean().item() < 0.2 * first and b.item() < 0.1
    x_in = scale_input(both.x, both.sigma)
    result = redirect_guidance(hgr, both.cond_denoised, both.uncond_denoised, x_in, both.sigma, CategorySettings((1.0, 1.0)))
    assert (result.weights == harms).float().mean() > 0.95
    half = len(points)
    moved = (result.cond_denoised - both.partner_denoised)[:half].square().mean()
    assert moved < 0.3 * (points.cond_denoised - points.partner_denoised).square().mean()


def test_no_direction_teaches_only_the_picture():
    hgr, prompts = small_hgr().requires_grad_(True), toy_prompts(4)
    points = toy_points(prompts)
    none = torch.zeros(len(points))
    harms = prompts.harms[points.prompt]
    error, b, q = losses.guidance_losses(hgr.guidance, points, scale_input, harms, harms, points.partner_denoised, none)
    assert not error.any() and b.item() == 0 and q.item() > 0


def test_thresholds_let_the_wanted_share_through():
    clean = torch.stack([torch.linspace(0, 0.9, 1000), torch.linspace(0, 0.5, 1000)], dim=1)
    thresholds = quantile_thresholds(clean, rate=0.02, lowest=0.02)
    shares = (clean > thresholds).float().mean(dim=0)
    assert ((shares > 0.005) & (shares <= 0.0101)).all()


def test_a_small_sample_gets_a_margin_above_its_maximum():
    thresholds = quantile_thresholds(torch.tensor([[0.5, 0.001]] * 10), rate=0.01, lowest=0.02)
    assert thresholds[0].item() == pytest.approx(0.6225, abs=1e-3)  # logit 0 + 0.5
    assert thresholds[1].item() == pytest.approx(0.02)


def test_upper_bound_of_a_rate():
    assert upper_bound(0, 300) == pytest.approx(0.0089, abs=2e-4)
    assert upper_bound(30, 300) > 0.1


def test_calibration_counts_its_own_alarms():
    hgr = small_hgr()
    runs = torch.full((200, 2, 2), 0.1)
    runs[0, 0, 0] = 0.99
    new = calibrated(hgr, torch.full((500, 2), 0.3), runs, rate=0.05)
    assert new.condition_thresholds == pytest.approx((0.3, 0.3))
    assert len(new.guidance_thresholds) == 2
    assert new.training["calibration"]["upper_bound_runs"] > 0.0
