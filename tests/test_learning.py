"""Recording, losses and calibration: closed forms, and a toy model whose harm both networks learn to remove."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from helpers import small_hgr
from hgr_models import CategorySettings, losses, redirect_condition, redirect_guidance
from hgr_models.calibration import (
    calibrated,
    guidance_readings,
    joint_thresholds,
    needed,
    only_shown,
    proof_in_words,
    run_maxima,
    upper_bound,
)
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


def test_the_error_is_in_units_of_both_directions():
    """By hand: directions 2 and 4 long, sigma 0: the size is (4 + 16) / 2 = 10; a prediction 5 beside the partner's is 25 / 10 off."""
    hgr, prompts = small_hgr(zero=True), toy_prompts(1)
    points, flat = toy_points(prompts)[:1], torch.ones(1, 4, 4, 4)
    points = replace(points, uncond_denoised=0 * flat, cond_denoised=2 * flat, partner_denoised=4 * flat, sigma=torch.zeros(1))
    error = losses.condition_error(hgr.condition, lambda *args: 9 * flat, points, prompts)
    assert_close(error, torch.tensor([2.5]))
    assert_close(losses.unredirected_error(points), torch.tensor([0.4]))  # 2^2 / 10


def test_a_reading_is_asked_for_each_category_and_for_harm_at_all():
    """By hand, logits 0, so that harm at all has odds of 2: a harmful prompt's other category counts a fifth."""
    logits, two, three = torch.zeros(1, 2), torch.tensor(2.0).log(), torch.tensor(3.0).log()
    clean, first = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    assert_close(losses.reading_loss(logits, clean), (2 * two + three) / 3)
    assert_close(losses.reading_loss(logits, first), (1.2 * two + three - two) / 3)
    alone, harms = torch.tensor([[1.5], [-2.0]]), torch.tensor([[0.0], [1.0]])
    assert_close(losses.reading_loss(alone, harms), torch.nn.functional.binary_cross_entropy_with_logits(alone, harms))


def test_the_model_is_asked_about_the_redirected_prompt():
    hgr, prompts, asked = small_hgr(pooled_width=8), toy_prompts(2), []
    prompts.pooled = torch.randn(2, 8)
    points = toy_points(prompts)[:2]
    losses.condition_error(hgr.condition, lambda *args: asked.append(args[2:]) or points.x, points, prompts)
    d_tokens, d_pooled = hgr.condition.delta(prompts.tokens, prompts.pooled, prompts.removed)
    assert d_tokens.abs().max() > 0.01 and d_pooled.abs().max() > 0.01
    assert_close(asked[0][0], prompts.tokens + d_tokens)
    assert_close(asked[0][1], prompts.pooled + d_pooled)


def test_where_there_is_nothing_to_redirect_by_hand():
    """Directions 2 and 4 long: (2 - 4)^2 / 2^2. And directions of 0 and 0.01 at sigma 1: 1e-4 / (1e-4 / 2 + 1e-4 / 2)."""
    flat = torch.ones(1, 4, 4, 4)
    points = replace(toy_points(toy_prompts(1))[:1], uncond_denoised=0 * flat, cond_denoised=2 * flat, partner_denoised=4 * flat)
    assert_close(losses.unredirected_guidance_error(points), torch.tensor([1.0]))
    points = replace(points, cond_denoised=0 * flat, partner_denoised=0.01 * flat, sigma=torch.ones(1))
    assert_close(losses.unredirected_error(points), torch.tensor([1.0]))


def test_mean_square_by_hand():
    assert losses.mean_square(torch.tensor([[[1.0, 3.0]], [[0.0, 2.0]]])).tolist() == [5.0, 2.0]


def test_a_point_at_a_level_belongs_to_the_noisier_side():
    """`small_hgr` has one level, -2 ln sigma = 0: sigma 1 counts with sigma 2."""
    hgr, prompts = small_hgr(), toy_prompts(1)
    points = toy_points(prompts)[:3]
    points = replace(points, sigma=torch.tensor([2.0, 1.0, 0.5]), prompt=torch.zeros(3, dtype=torch.long))
    read = guidance_readings(hgr, points, torch.device("cpu"))
    found = run_maxima(hgr, points, torch.device("cpu"))
    assert_close(found, torch.stack([read[:2].amax(dim=0), read[2]])[None])


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


@pytest.mark.parametrize("count", [40, 100, 250, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_a_stricter_rate_never_gives_a_lower_threshold(count, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.3, 1.0, 3.0])
    clean = (torch.randn(count, 3, generator=generator).abs() * spread - 4).sigmoid()
    harmful = (torch.randn(200, 3, generator=generator) + torch.tensor([-3.0, 2.0, 6.0])).sigmoid()
    for known in (None, harmful):
        thresholds = torch.stack([joint_thresholds(clean, rate, 1e-6, known) for rate in (0.2, 0.05, 0.02, 0.01, 0.004, 1e-4)])
        assert (thresholds.diff(dim=0) >= 0).all()
        assert not (clean > thresholds[-1]).any()


def test_a_category_with_a_long_tail_spends_its_own_part_of_the_false_alarms():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(4000, 4, generator=generator) - 4
    clean[:, 0] = clean[:, 0].exp() - 4  # a few readings are very high
    flagged = (clean.sigmoid() > joint_thresholds(clean.sigmoid(), 0.01, 1e-6)).float().sum(dim=0)
    assert flagged.sum() == pytest.approx(40, abs=2) and flagged[0] <= 20 and flagged[1:].min() >= 5


def test_what_a_calibration_proves_in_words():
    assert needed(0.01) == 268 and upper_bound(0, 268) <= 0.01 < upper_bound(0, 266)
    few = {"rate": 0.01, "clean_prompts": 100, "upper_bound_prompts": upper_bound(0, 100)}
    assert proof_in_words(few) == [
        "100 clean prompts: with 95 % confidence at most 2.6 % are flagged; too few to prove 1 %, which takes 268"
    ]
    many = {"rate": 0.01, "clean_prompts": 2000, "upper_bound_prompts": upper_bound(20, 2000)}
    assert proof_in_words(many) == ["2000 clean prompts: with 95 % confidence at most 1.4 % are flagged"]


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
