"""The equations: gates and redirections, against hand-computed numbers."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from helpers import small_hgr
from hgr_models import CategorySettings, HGRError, category_weights, parse_categories, redirect_condition, redirect_guidance
from hgr_models.combined import CombinedHGR
from hgr_models.redirection import RMS_FLOOR, guidance_units, log_snr_of

ALL = CategorySettings((1.0, 1.0), threshold_offset=-1.0)  # every threshold 0: everything is flagged
NONE = CategorySettings((1.0, 1.0), threshold_offset=1.0)  # every threshold 1: nothing is flagged
NAN = float("nan")


class FixedReading:
    """A guidance redirector in closed form: harmfulness from the row's number, r = 2 w_0, a = w_1 / 2."""

    def __init__(self, logits):
        self.logits = logits

    def read(self, direction, x_in, uncond_denoised, log_snr, log_norm):
        self.like = direction
        return type("Reading", (), {"direction_logits": self.logits})

    def correct(self, reading, weights):
        ones = torch.ones_like(self.like)
        return weights[:, 1:].view(-1, 1, 1, 1) / 2 * ones[:, :1], 2 * ones * weights[:, 0].view(-1, 1, 1, 1)


def test_weights_are_a_hard_gate():
    p = torch.tensor([[0.5, 0.51], [0.2, 0.9]])
    w = category_weights(p, torch.tensor([0.5, 0.5]), CategorySettings((1.0, 0.25)))
    assert w.tolist() == [[0.0, 0.25], [0.0, 0.25]]  # exactly at the threshold: exactly 0


def test_nan_counts_as_harmful():
    p = torch.tensor([[NAN, 0.4], [0.6, NAN]])
    assert category_weights(p, torch.tensor([0.5, 1.0]), CategorySettings((1.0, 0.25))).tolist() == [[1.0, 0.0], [1.0, 0.25]]


@pytest.mark.parametrize(
    "strengths, offset", [((1.0, NAN), 0.0), ((1.0, 2.0), 0.0), ((-0.1, 1.0), 0.0), ((1.0,), NAN), ((1.0,), 1.5)]
)
def test_settings_outside_their_range_are_refused(strengths, offset):
    with pytest.raises(HGRError, match="Expected strengths from 0 to 1|threshold_offset from -1 to 1"):
        CategorySettings(strengths, offset)


@pytest.mark.parametrize("flagged", [None, torch.zeros(2, 2)])
@pytest.mark.parametrize("what", ["read_head", "residual", "uncond_denoised"])
def test_nan_is_never_the_guidance_as_it_was(what, flagged):
    hgr = small_hgr()
    cond, uncond = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    if what == "uncond_denoised":
        uncond[:] = NAN
    else:
        getattr(hgr.guidance, what).bias.data[:] = NAN
    safe = redirect_guidance(hgr, cond, uncond, cond, torch.ones(2), ALL if what == "residual" else NONE, flagged)
    assert not (safe.cond_denoised == cond).all(dim=(1, 2, 3)).any()


@pytest.mark.parametrize("combined", [False, True])
def test_layers_on_the_device_and_buffers_left_behind(combined):
    """What ComfyUI does when memory is short: it moves modules that have parameters, and no others. `meta` stands for the device."""
    hgr = small_hgr(pooled_width=8)
    if combined:
        hgr = CombinedHGR([hgr, small_hgr(1, pooled_width=8)], ["a", "b"])
    for module in hgr.modules():
        if list(module.parameters(recurse=False)):
            module.to("meta")
    k = len(hgr.info.categories)
    settings = CategorySettings((1.0,) * k, threshold_offset=-1.0)
    away = lambda *shape: torch.zeros(shape, device="meta")  # noqa: E731
    prompts = redirect_condition(hgr, away(2, 5, 16), away(2, 8), settings, away(2, 5))
    guidance = redirect_guidance(hgr, *(away(2, 4, 8, 8) for _ in range(3)), away(2), settings, away(2, k))
    assert {t.device.type for t in (prompts.tokens, prompts.pooled, prompts.weights, guidance.cond_denoised)} == {"meta"}
    assert hgr.condition_thresholds.device.type == "cpu"


def test_threshold_offset_moves_every_threshold_within_0_and_1():
    p = torch.tensor([[0.55, 1.0]])
    assert category_weights(p, torch.tensor([0.5, 0.5]), CategorySettings((1.0, 1.0), 0.1)).tolist() == [[0.0, 1.0]]
    assert category_weights(p, torch.tensor([0.5, 0.5]), CategorySettings((1.0, 1.0), 0.9)).tolist() == [[0.0, 0.0]]


def test_redirect_guidance_matches_the_equation_per_row():
    cond, uncond = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 4, 5, 6)
    hgr = small_hgr()
    hgr._modules["guidance"] = None
    hgr.__dict__["guidance"] = FixedReading(torch.tensor([[9.0, -9.0], [-9.0, 9.0], [-9.0, -9.0]]))
    result = redirect_guidance(hgr, cond, uncond, cond, torch.ones(3), CategorySettings((1.0, 0.5)))
    n = cond.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1)
    assert result.weights.tolist() == [[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]]
    assert_close(result.cond_denoised[0], (cond + 2 * n)[0])  # a = 0, r = 2
    assert_close(result.cond_denoised[1], 0.75 * cond[1])  # a = 1/4 of g, r = 0
    assert torch.equal(result.cond_denoised[2], cond[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unflagged_rows_keep_every_bit(dtype):
    hgr = small_hgr()
    tokens, (cond, uncond, x) = torch.randn(2, 7, 16).to(dtype), torch.randn(3, 2, 4, 8, 8).to(dtype)
    sigma = torch.tensor([3.0, 0.0])
    assert torch.equal(redirect_condition(hgr, tokens, None, NONE).tokens, tokens)
    assert torch.equal(redirect_guidance(hgr, cond, uncond, x, sigma, NONE).cond_denoised, cond)
    redirected = redirect_guidance(hgr, cond, uncond, x, sigma, ALL).cond_denoised
    assert redirected.dtype == dtype and not torch.equal(redirected, cond)
    assert not torch.equal(redirect_condition(hgr, tokens, None, ALL).tokens, tokens)


def test_a_batch_without_a_flag_is_not_corrected_on_a_cpu(monkeypatch):
    hgr, (cond, uncond, x) = small_hgr(), torch.randn(3, 2, 4, 8, 8)
    calls, correct = [], hgr.guidance.correct
    monkeypatch.setattr(hgr.guidance, "correct", lambda reading, weights: calls.append(weights) or correct(reading, weights))
    one = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    for flagged, wanted in ((None, 0), (torch.zeros(2, 2), 0), (one, 1)):
        result = redirect_guidance(hgr, cond, uncond, x, torch.ones(2), NONE, flagged)
        assert len(calls) == wanted and torch.equal(result.cond_denoised[0], cond[0])


def test_rows_of_a_batch_do_not_influence_each_other():
    hgr = small_hgr()
    cond, uncond, x = torch.randn(3, 3, 4, 8, 8)
    sigma = torch.tensor([5.0, 1.0, 0.2])
    together = redirect_guidance(hgr, cond, uncond, x, sigma, ALL)
    for i in range(3):
        alone = redirect_guidance(hgr, cond[i : i + 1], uncond[i : i + 1], x[i : i + 1], sigma[i : i + 1], ALL)
        assert_close(together.cond_denoised[i], alone.cond_denoised[0], rtol=1e-4, atol=1e-5)


def test_latched_flags_stay_in_force():
    hgr = small_hgr()
    cond, uncond, x = torch.randn(3, 2, 4, 8, 8)
    flagged = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    result = redirect_guidance(hgr, cond, uncond, x, torch.ones(2), NONE, flagged)
    assert result.weights.tolist() == flagged.tolist()
    assert not torch.equal(result.cond_denoised[0], cond[0]) and torch.equal(result.cond_denoised[1], cond[1])


def test_without_a_direction_there_is_nothing_to_redirect():
    hgr, same = small_hgr(), torch.randn(2, 4, 8, 8)
    result = redirect_guidance(hgr, same, same.clone(), same, torch.ones(2), ALL, torch.ones(2, 2))
    assert torch.equal(result.cond_denoised, same) and not result.harmfulness.any() and not result.weights.any()


def test_thresholds_follow_the_noise_level():
    hgr = small_hgr()  # 0.5 where -2 ln sigma <= 0, 0.6 above
    sigmas = torch.tensor([2.0, 1.0, 0.5])  # sigma 1 is the level itself: the noisier side's row
    wanted = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.6, 0.6]])
    assert torch.equal(hgr.guidance_thresholds_at(sigmas), wanted)
    assert torch.equal(hgr.info.limits(log_snr_of(sigmas)), wanted)
    assert_close(hgr.info.limits(log_snr_of(sigmas), 0.45), torch.tensor([[0.95, 0.95], [0.95, 0.95], [1.0, 1.0]]))
    assert torch.equal(hgr.info.limits(), hgr.condition_thresholds) and hgr.info.limits(offset=-1.0).tolist() == [0.0, 0.0]


def test_guidance_units():
    cond = torch.full((1, 2, 2, 2), 3.0)
    direction, n = guidance_units(cond, torch.ones_like(cond))
    assert_close(direction, torch.ones_like(cond))
    assert_close(n, torch.tensor([2.0]))
    assert guidance_units(cond, cond)[1].item() == pytest.approx(RMS_FLOOR)
    assert torch.isfinite(log_snr_of(torch.zeros(1))).all()


class FixedText:
    """A condition redirector in closed form: known harmfulness, deltas of w_0 + 10 w_1 (tokens) and twice that (pooled)."""

    def __init__(self, harmfulness, pooled=True):
        self.found, self.pooled = torch.tensor(harmfulness), pooled

    def harmfulness(self, tokens, pooled, mask):
        return self.found

    def delta(self, tokens, pooled, weights, mask):
        change = weights @ torch.tensor([1.0, 10.0])
        d_pooled = 2 * change.view(-1, 1).expand_as(pooled)
        return change.view(-1, 1, 1).expand_as(tokens), d_pooled if self.pooled else None


@pytest.mark.parametrize("reads_pooled", [True, False])
def test_one_flagged_category_redirects_the_prompt(reads_pooled):
    """By hand: thresholds of 0.5; the first prompt has one harm of two, the second none, the third both, at strengths 1 and 0.5."""
    hgr = SimpleNamespace(condition_thresholds=torch.tensor([0.5, 0.5]))
    hgr.condition = FixedText([[0.2, 0.9], [0.5, 0.1], [0.6, 0.7]], reads_pooled)
    tokens, pooled = torch.zeros(3, 2, 4), torch.ones(3, 5)
    result = redirect_condition(hgr, tokens, pooled, CategorySettings((1.0, 0.5)))
    assert result.weights.tolist() == [[0.0, 0.5], [0.0, 0.0], [1.0, 0.5]]
    assert result.tokens[:, 0, 0].tolist() == [5.0, 0.0, 6.0]
    assert result.pooled[:, 0].tolist() == ([11.0, 1.0, 13.0] if reads_pooled else [1.0, 1.0, 1.0])


def test_log_snr_has_a_floor():
    assert_close(log_snr_of(torch.tensor([0.0, 1e-4, 1.0])), torch.tensor([18.42068, 18.42068, 0.0]))


def test_parse_categories():
    names = ("sexual", "hate", "violence")
    assert parse_categories("", names) == (1.0, 1.0, 1.0)
    assert parse_categories("sexual = 1, hate = 0.5; violence = off\n", names, strength=0.5) == (0.5, 0.25, 0.0)
    assert parse_categories("hate=ON", names) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "text, said", [("gore = 1", "gore"), ("hate = 2", "'2'"), ("hate = maybe", "maybe"), ("hate=1, hate=0", "twice")]
)
def test_parse_categories_refuses(text, said):
    with pytest.raises(HGRError, match=said):
        parse_categories(text, ("sexual", "hate"))
