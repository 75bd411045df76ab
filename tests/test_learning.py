"""Recording, losses and calibration: closed forms, and a toy model whose harm both networks learn to remove."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from helpers import small_hgr
from hgr_models import CategorySettings, losses, redirect_condition, redirect_guidance
from hgr_models.calibration import calibrated, joint_thresholds, only_shown, upper_bound
from hgr_models.recording import Points, Prompts, record_runs

HARM, SAFE, OTHER = torch.eye(16)[:3] * 4.0  # three words


def predict(x, sigma, tokens):
    """A toy denoiser: x0 is a pattern of the tokens' sum."""
    content = tokens.sum(dim=1)
    return 0.1 * x + content.view(-1, 4, 2, 2).repeat(1, 1, 2, 2) * (1 + 0.1 * sigma.view(-1, 1, 1, 1))


def predict_with(points, prompts, tokens, pooled):
    return predict(points.x, points.sigma, tokens)


def c_in(sigma):
    return (sigma**2 + 1).rsqrt()


def toy_prompts(count):
    other = OTHER * torch.rand(count, 1)
    harmful, safe = torch.stack([HARM.expand(count, -1), other], 1), torch.stack([SAFE.expand(count, -1), other], 1)
    ones = torch.tensor([[1.0, 0.0]]).repeat(count, 1)
    return Prompts(harmful, safe, torch.zeros(count, 2, 16), ones, ones)


def toy_points(prompts, follow="prompt", policy=None):
    noise = torch.randn(len(prompts), 4, 4, 4)
    return record_runs(
        predict, c_in, prompts, torch.tensor([5.0, 2.0, 0.5, 0.0]), noise, follow, torch.full((len(prompts),), 3.0), policy
    )


def test_new_thresholds_stay_where_the_networks_are():
    hgr = small_hgr().to("meta")
    hgr.calibrate(hgr.info)
    assert hgr.condition_thresholds.is_meta and hgr.guidance_thresholds.is_meta and hgr.guidance_levels.is_meta


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
    before = losses.condition_error(network, predict_with, points, prompts[points.prompt]).mean().item()
    for _ in range(150):
        error = losses.condition_error(network, predict_with, points, prompts[points.prompt])
        read, _ = losses.prompt_loss(network, torch.cat([prompts.tokens, clean]), torch.cat([prompts.harms, 0 * prompts.harms]))
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
    partner = replace(points, cond_denoised=points.partner_denoised)
    both, nothing = Points.cat([points, partner]), torch.zeros(len(points), 2)
    harms = torch.cat([prompts.harms[points.prompt], nothing])
    optimiser, first = torch.optim.Adam(hgr.guidance.parameters(), lr=5e-3), None
    for _ in range(120):
        error, b, q, _ = losses.guidance_losses(hgr.guidance, both, harms, harms, both.partner_denoised, torch.ones(len(both)))
        first = first or error.mean().item()
        optimiser.zero_grad()
        (error.mean() + b).backward()
        optimiser.step()
    assert error.mean().item() < 0.2 * first and b.item() < 0.1
    x_in = both.x * both.c_in.view(-1, 1, 1, 1)
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
    error, b, q, _ = losses.guidance_losses(hgr.guidance, points, harms, harms, points.partner_denoised, none)
    assert not error.any() and b.item() == 0 and q.item() > 0


def test_thresholds_let_the_wanted_share_through_of_all_cells_together():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, 2, generator=generator) * torch.tensor([[1.0, 5.0], [0.5, 2.0], [3.0, 1.0]]) - 4
    logits[:, 1, 1] = logits[:, 0, 1]  # alarms in two cells at once count once
    fitted, others = logits.sigmoid().chunk(2)
    thresholds = joint_thresholds(fitted, rate=0.02, lowest=1e-6)
    assert (fitted > thresholds).flatten(1).any(dim=1).float().mean().item() == pytest.approx(0.02, abs=1e-6)
    assert (others > thresholds).flatten(1).any(dim=1).float().mean().item() == pytest.approx(0.02, abs=0.01)
    assert ((others > thresholds).float().mean(dim=0) > 0.0005).all()  # every cell has its part


def test_a_small_sample_gets_a_margin_above_its_maximum():
    clean = torch.linspace(0.01, 0.6, 40)[:, None]
    assert 0.62 < joint_thresholds(clean, rate=0.01, lowest=0.02).item() < 0.99
    assert joint_thresholds(torch.full((10, 2), 1e-6), rate=0.5, lowest=0.02).tolist() == pytest.approx([0.02, 0.02])
    assert joint_thresholds(torch.ones(10, 2), rate=0.5, lowest=0.02).max() < 1


def test_the_margin_of_a_small_sample_ends_halfway_to_the_harmful():
    """Few clean prompts with a heavy tail must not lift a threshold above every harmful prompt."""
    torch.manual_seed(0)
    clean = torch.cat([-8 + 0.5 * torch.randn(190, 2), torch.linspace(-6, 3, 10)[:, None].repeat(1, 2)]).sigmoid()
    harmful = torch.stack([(7 + torch.rand(50)).sigmoid(), torch.full((50,), torch.nan)], dim=1)
    alone, both = (torch.logit(joint_thresholds(clean, 0.002, 0.02, h).double()) for h in (None, harmful))
    assert alone[0] > 5.5 and both[1] == alone[1]  # of the second category nothing is known
    assert both[0].item() == pytest.approx((3 + torch.logit(harmful[:, 0]).quantile(0.05).item()) / 2, abs=1e-3)
    many = clean.repeat(10, 1)  # enough to show the rate: no margin
    assert torch.equal(joint_thresholds(many, 0.002, 0.02, harmful), joint_thresholds(many, 0.002, 0.02))
    among = clean.flip(0)[:50]  # harmful readings that are no higher than clean ones say nothing
    assert torch.equal(joint_thresholds(clean, 0.002, 0.02, among), joint_thresholds(clean, 0.002, 0.02))


def test_only_what_a_harmful_sample_shows_counts():
    readings = torch.rand(2, 3, 2) + 0.1
    readings[1, 2] = 0  # no step there
    shown = only_shown(readings, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert shown[0, :, 1].isnan().all() and shown[1, 2].isnan().all()
    assert torch.equal(shown[0, :, 0], readings[0, :, 0]) and torch.equal(shown[1, :2], readings[1, :2])


def test_upper_bound_of_a_rate():
    assert upper_bound(0, 300) == pytest.approx(0.0089, abs=2e-4)
    assert upper_bound(30, 300) > 0.1


def test_calibration_counts_its_own_alarms():
    hgr = small_hgr()
    runs = torch.linspace(0.01, 0.2, 200)[:, None, None].repeat(1, 2, 2)
    runs[0, 0, 0] = runs[1, 1, 0] = 0.99
    new = calibrated(hgr, torch.linspace(0.01, 0.3, 500)[:, None].repeat(1, 2), runs, rate=0.02)
    assert 0.29 < new.condition_thresholds[0] < 0.3
    assert len(new.guidance_thresholds) == 2 and new.guidance_thresholds[0][0] < 0.99
    proof = new.training["calibration"]
    assert proof["upper_bound_prompts"] == pytest.approx(upper_bound(5, 500))
    assert proof["upper_bound_runs"] == pytest.approx(upper_bound(2, 200))


def test_calibration_of_one_network_leaves_the_other():
    hgr = small_hgr()
    new = calibrated(hgr, torch.rand(100, 2), None, rate=0.05)
    assert new.guidance_thresholds == hgr.info.guidance_thresholds and "clean_runs" not in new.training["calibration"]
