"""Detecting harm in pictures: views, looks and their averages on known readings; curves and thresholds by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from helpers import info, small_hgr
from hgr_models import HGR, HGRError, load_hgr, save_hgr
from hgr_models.calibration import calibrated_on_pictures, picture_readings, upper_bound
from hgr_models.condition import ConditionConfig
from hgr_models.detection import (
    CERTAIN,
    LEVELS,
    Detection,
    Looks,
    Seen,
    auroc,
    detect,
    picture_thresholds,
    prompt_scores,
    roc,
    run_excess,
    threshold_at,
)
from hgr_models.recording import Points
from hgr_models.redirection import log_snr_of
from hgr_models.shards import Texts

SHAPE = (2, 4, 8, 8)


class Network:
    """Gives known logits: `direction` and `beside` where there is a direction, `alone` where there is none; per noise level."""

    def __init__(self, alone, direction=(0.0, 0.0), beside=(-9.0, -9.0), by_level=None):
        self.alone, self.direction, self.beside, self.by_level, self.seen = alone, direction, beside, by_level or {}, []

    def read(self, direction, x_in, uncond_denoised, log_snr, log_norm):
        self.seen.append(direction)
        alone = torch.tensor([self.by_level.get(round(float(snr), 3), self.alone) for snr in log_snr])
        moving = direction.flatten(1).any(dim=1, keepdim=True)
        picture = torch.where(moving, torch.tensor(self.beside), alone)
        b = torch.tensor(self.direction).expand(len(x_in), 2)
        places = lambda logits: logits[:, :, None, None, None].expand(-1, -1, 1, 4, 4)  # noqa: E731
        return SimpleNamespace(direction_logits=b, picture_logits=picture, places=places(b), picture_places=places(picture))


def see(level, noise, sigma_of=lambda level: 1 + level, cond=None):
    sigma = torch.full((len(noise),), sigma_of(level))
    uncond = torch.zeros_like(noise)
    return Seen(noise * 0.5, sigma, uncond, None if cond is None else uncond + cond)


def prompted(level, noise):
    return see(level, noise, cond=0.1)


def test_a_picture_alone_is_read_without_direction():
    network = Network(alone=(1.0, -2.0))
    found = detect(network, see, SHAPE)
    assert_close(found.scores, torch.tensor([[1.0, -2.0]] * 2).sigmoid())
    assert found.places.shape == (2, 2, 4, 4) and len(network.seen) == len(LEVELS)
    assert not any(direction.any() for direction in network.seen)


def test_looks_are_averaged_in_log_odds_and_capped():
    levels = {round(float(log_snr_of(torch.tensor([1 + level]))), 3): (value, 0.0) for level, value in ((0.2, 4.0), (0.6, -1.0))}
    found = detect(Network((0.0, 0.0), by_level=levels), see, SHAPE, Looks(levels=(0.2, 0.6)))
    assert_close(found.scores[0, 0], torch.tensor(1.5).sigmoid())
    found = detect(
        Network((0.0, 0.0), by_level={k: (v * 100, 0.0) for k, (v, _) in levels.items()}), see, SHAPE, Looks((0.2, 0.6))
    )
    assert_close(found.scores[0, 0], torch.tensor(0.0).sigmoid())  # +12 and -12: no look outvotes all others


@pytest.mark.parametrize(
    ("views", "worst"),
    [
        ({"alone": (2.0, -5.0), "direction": (-5.0, -5.0)}, (2.0, -5.0)),  # a caption that hides the harm
        ({"alone": (-5.0, -5.0), "direction": (3.0, -5.0)}, (3.0, -5.0)),  # a prompt that gives it away
        ({"alone": (-5.0, -5.0), "direction": (-5.0, -5.0), "beside": (-5.0, 1.0)}, (-5.0, 1.0)),
    ],
)
def test_the_most_alarming_view_counts(views, worst):
    assert_close(detect(Network(**views), prompted, SHAPE).scores, torch.tensor([worst] * 2).sigmoid())


def test_a_caption_never_lessens_the_alarm():
    network, latents = small_hgr().guidance, torch.randn(SHAPE)
    both = lambda level, noise: see(level, latents + noise, cond=torch.randn(SHAPE))  # noqa: E731
    alone = lambda level, noise: see(level, latents + noise)  # noqa: E731
    assert (detect(network, both, SHAPE).scores >= detect(network, alone, SHAPE).scores).all()


def test_the_prompt_itself_counts_for_the_picture_and_for_no_place():
    network, prompts = Network(alone=(1.0, -2.0), direction=(-5.0, -5.0)), torch.tensor([[0.1, 0.9], [1.0, 0.0]])
    found = detect(network, prompted, SHAPE, prompts=prompts)
    expected = torch.tensor([[1.0, torch.logit(prompts[0, 1])], [CERTAIN, -2.0]])
    assert_close(found.scores, expected.sigmoid())
    assert torch.equal(found.places, detect(network, prompted, SHAPE).places)


def test_a_prompt_equal_to_the_negative_is_no_direction():
    network = Network(alone=(1.0, -2.0), direction=(9.0, 9.0))
    found = detect(network, lambda level, noise: see(level, noise, cond=0.0), SHAPE)
    assert_close(found.scores, torch.tensor([[1.0, -2.0]] * 2).sigmoid())


def test_a_prompt_that_acts_at_some_levels_counts_there():
    network = Network(alone=(-5.0, -5.0), direction=(3.0, -5.0))
    found = detect(network, lambda level, noise: see(level, noise, cond=0.1 if level > 0.6 else None), SHAPE)
    assert_close(found.scores[:, 0], torch.full((2,), 3.0).sigmoid())


def test_the_noise_is_the_seeds_and_the_same_for_every_picture():
    def noises(seed, shape=SHAPE, draws=2):
        found = []
        detect(
            Network((0.0, 0.0)), lambda level, n: found.append((level, n)) or see(level, n), shape, Looks(draws=draws, seed=seed)
        )
        return found

    first = noises(3)
    assert [level for level, _ in first] == [level for level in LEVELS for _ in range(2)]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, noises(3), strict=True))
    assert not any(torch.equal(a[1], b[1]) for a, b in zip(first, noises(4), strict=True))
    assert torch.equal(first[0][1][0], first[0][1][1]) and not torch.equal(first[0][1], first[1][1])
    assert torch.equal(first[0][1][:1], noises(3, (1, *SHAPE[1:]))[0][1])  # alone as in a batch


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error(bad):
    def broken(level, noise):
        seen = see(level, noise)
        seen.uncond_denoised = seen.uncond_denoised.clone()
        seen.uncond_denoised[1, 0, 3, 4] = bad  # one value is enough
        return seen

    with pytest.raises(HGRError, match="not finite .* picture 2,"):
        detect(small_hgr().guidance, broken, SHAPE)


@pytest.mark.parametrize("shape", [(1, 4, 5, 7), (3, 4, 16, 8)])
def test_real_networks_of_any_size(shape):
    found = detect(small_hgr().guidance, prompted, shape)
    assert found.scores.shape == (shape[0], 2) and found.places.shape == (shape[0], 2, -(-shape[2] // 2), -(-shape[3] // 2))
    assert found.places.min() >= 0 and found.places.max() <= 1


def test_video_takes_its_worst_frame():
    found = detect(small_hgr(dimensions=3).guidance, prompted, (1, 4, 3, 6, 6))
    assert found.scores.shape == (1, 2) and found.places.shape == (1, 2, 3, 3)


def test_heat_is_that_of_counted_categories_which_are_there():
    places = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    found = Detection(torch.tensor([[0.8, 0.1]]), places)
    assert_close(found.heat(torch.tensor([True, True])), torch.tensor([[[0.8, 0.1]]]))
    assert_close(found.heat(torch.tensor([False, True])), torch.tensor([[[0.0, 0.1]]]))


def test_prompt_scores_are_the_condition_redirectors():
    hgr, tokens = small_hgr(), torch.randn(3, 5, 16)
    assert_close(prompt_scores(hgr, tokens), hgr.condition.harmfulness(tokens))
    assert not prompt_scores(hgr, torch.zeros(1, 5, 16)).any()


def test_a_run_exceeds_where_a_threshold_is_passed():
    facts = info(condition_thresholds=(0.5, 0.5), guidance_levels=(0.0,), guidance_thresholds=((0.2, 0.2), (0.9, 0.9)))
    hgr = HGR(facts, ConditionConfig(16, 2, width=32, depth=1, delta_depth=1), None)
    sigmas = torch.tensor([3.0, 0.5])  # one per level
    quiet, loud = torch.tensor([[0.1, 0.1]]), torch.tensor([[0.1, 0.3]])
    assert (run_excess(quiet, torch.stack([quiet, quiet]), sigmas, hgr) < 0).all()
    assert (run_excess(quiet, torch.stack([quiet, loud]), sigmas, hgr) < 0).all()  # 0.3 is below 0.9
    assert (run_excess(quiet, torch.stack([loud, quiet]), sigmas, hgr) > 0).tolist() == [[False, True]]
    assert (run_excess(1 - quiet, torch.stack([quiet, quiet]), sigmas, hgr) > 0).all()


def test_curve_by_hand():
    curve = roc(torch.tensor([0.9, 0.6, 0.4]), torch.tensor([0.1, 0.4, 0.5, 0.2]))
    assert curve.auroc == pytest.approx((4 + 4 + 2.5) / 12)  # 0.4 ties with a clean one
    at = dict(zip(curve.thresholds, zip(curve.false_positives, curve.true_positives, strict=True), strict=True))
    by = {round(threshold, 3): rates for threshold, rates in at.items()}
    assert by[0.9] == (0, 0) and by[0.5] == pytest.approx((0, 2 / 3)) and by[0.4] == pytest.approx((0.25, 2 / 3))
    assert by[-1.0] == (1, 1) and list(curve.false_positives) == sorted(curve.false_positives)


def test_area_is_the_rank_statistic():
    generator = torch.Generator().manual_seed(0)
    harmful, clean = torch.rand(50, generator=generator) ** 0.5, torch.rand(80, generator=generator)
    pairs = (harmful[:, None] > clean).double().mean()
    assert auroc(harmful, clean) == pytest.approx(float(pairs)) and auroc(clean, harmful) == pytest.approx(1 - float(pairs))
    curve = roc(harmful, clean)
    x, y = torch.tensor(curve.false_positives), torch.tensor(curve.true_positives)
    assert float(torch.trapezoid(y, x)) == pytest.approx(curve.auroc, abs=1e-6)
    with pytest.raises(HGRError, match="0 harmful and 80 clean"):
        roc(harmful[:0], clean)


@pytest.mark.parametrize(("rate", "threshold"), [(0.0, 0.5), (0.01, 0.5), (0.25, 0.4), (0.3, 0.4), (0.5, 0.2), (1.0, 0.1)])
def test_threshold_for_a_rate(rate, threshold):
    clean = torch.tensor([0.1, 0.4, 0.5, 0.2])
    found = threshold_at(clean, rate)
    assert found == pytest.approx(threshold) and (clean.double() > found).double().mean() <= rate


@pytest.mark.parametrize("by_condition", [True, False])
def test_recorded_pictures_are_read_as_they_are_seen(by_condition):
    """A recording of looks gives what `detect` gives where it can look itself."""
    torch.manual_seed(0)
    hgr, prompts, recorded = small_hgr(), Texts(torch.randn(2, 5, 16), None, None, torch.zeros(2, 2)), []
    hgr.condition = hgr.condition if by_condition else None

    def look(level, noise):
        x, uncond, cond = torch.randn(3, *SHAPE)
        c_in = torch.full((2,), 0.5)
        recorded.append(Points(x, torch.full((2,), 1 + level), c_in, uncond, cond, cond, torch.zeros(2, 2), torch.arange(2)))
        return Seen(x * 0.5, recorded[-1].sigma, uncond, cond)

    p = prompt_scores(hgr, prompts.tokens) if by_condition else None
    expected = detect(hgr.guidance, look, SHAPE, prompts=p).scores
    assert_close(picture_readings(hgr, Points.cat(recorded), prompts, torch.device("cpu")), expected)


def test_picture_thresholds_are_calibrated_stored_and_missed(tmp_path):
    hgr = small_hgr()
    with pytest.raises(HGRError, match="mine.safetensors has no thresholds for pictures.*threshold of your own"):
        picture_thresholds(hgr.info, "mine.safetensors")
    clean = torch.linspace(0.01, 0.3, 500)[:, None].repeat(1, 2)
    new = calibrated_on_pictures(hgr.info, clean, rate=0.02)
    assert all(0.28 < t < 0.3 for t in new.picture_thresholds)
    assert new.training["calibration"]["upper_bound_pictures"] == pytest.approx(upper_bound(10, 500))
    hgr.calibrate(new)
    save_hgr(tmp_path / "hgr.safetensors", hgr)
    assert picture_thresholds(load_hgr(tmp_path / "hgr.safetensors").info) == new.picture_thresholds
    for wrong in ((0.5,), (0.5, 1.5)):
        with pytest.raises(HGRError, match="2 picture thresholds|from 0 to 1"):
            info(picture_thresholds=wrong).validate()
