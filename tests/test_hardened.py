"""The adversary that the demo's guidance redirector is hardened against: it gains ground, stays in its ball, and tells no lies."""

import random
from dataclasses import replace

import pytest
import torch

from demo.pipeline import DemoModel
from demo.training import hardened
from helpers import small_hgr
from hgr_models import HGRError, losses
from hgr_models.calibration import guidance_readings
from hgr_models.losses import mean_square
from hgr_models.recording import Points
from hgr_models.shards import CLEAN, HARMFUL


@pytest.fixture
def adversary(monkeypatch):
    monkeypatch.setattr(hardened, "POOL", 12)
    monkeypatch.setattr(hardened, "RUN_STEPS", 3)
    monkeypatch.setattr(hardened, "FORGET", 0.0)
    hgr = hardened.load_hgr(hardened.OUT)
    low = ((0.02,) * len(hgr.info.categories),) * len(hgr.info.guidance_thresholds)  # gates that are hard to pass under
    hgr.calibrate(replace(hgr.info, guidance_thresholds=low))
    return hardened.Adversary(DemoModel.load("cpu"), hgr, random.Random(0), torch.Generator().manual_seed(0))


def losses_of(adversary):
    """The attack's loss at every point that is always there."""
    here = adversary.moments[torch.arange(adversary.plain)]
    with torch.no_grad():
        tokens = adversary.tokens[here.row] + adversary.delta[here.row] * adversary.radius
        return adversary._loss(here, adversary.predict(here.x, here.sigma, tokens).float())


def bend(adversary):
    """A step of the attack at random moments; nothing is forgotten."""
    return adversary.bend(torch.randint(adversary.count, (12,), generator=adversary.generator), torch.ones(12))


def test_the_attack_gains_ground_inside_its_ball(adversary):
    before = losses_of(adversary)
    for _ in range(40):
        points, harms, counts = bend(adversary)
    plain = adversary.moments[torch.arange(adversary.plain)]
    after, evading = losses_of(adversary), adversary.evading[plain.row]
    assert after[evading].mean() < 0.75 * before[evading].mean()  # 0.42 to 0.57 of it, by seed and number of threads
    assert adversary.delta.any() and adversary.delta.abs().max() <= 1
    assert points.cond_denoised.shape == points.x.shape and not points.cond_denoised.requires_grad
    assert all(parameter.requires_grad for parameter in adversary.hgr.guidance.parameters())  # they learn next
    assert counts.any() and len(harms) == len(points)
    place = adversary.moments.x.data_ptr()
    adversary.refresh()
    own = adversary.moments[torch.arange(adversary.plain, adversary.count)]
    assert len(own.x) == len(plain.x) and (own.x[:12] == plain.x[:12]).all() and (own.x[-12:] != plain.x[-12:]).any()
    assert torch.equal(adversary.moments[torch.arange(adversary.plain)].x, plain.x)
    assert adversary.moments.x.data_ptr() == place  # where a graph reads


def test_what_no_longer_looks_harmful_teaches_nothing(adversary):
    adversary.tokens = adversary.partners
    assert not bend(adversary)[2].any()
    here = adversary.moments[torch.arange(adversary.plain)]
    assert (mean_square(here.harmful_denoised - here.partner_denoised) > 0).all()


def test_some_changes_start_again(adversary, monkeypatch):
    monkeypatch.setattr(hardened, "FORGET", 0.5)
    adversary.bend(torch.arange(4), torch.tensor([0.4, 0.6, 0.6, 0.4]))  # the first moments are of one row each
    assert adversary.delta.flatten(1).any(dim=1).tolist() == (adversary.age > 0).tolist() == [False, True, True, *[False] * 9]


def test_a_short_hardening_changes_the_guidance_redirector_alone(monkeypatch):
    for name in ("POOL", "HARMFUL_RUNS", "CLEAN_RUNS", "WORD_RUNS", "HELD_OUT_RUNS"):
        monkeypatch.setattr(hardened, name, 4)
    for name, value in {"RUN_STEPS": 3, "REFRESH": 1}.items():
        monkeypatch.setattr(hardened, name, value)
    model, hgr, stored = DemoModel.load("cpu"), *(hardened.load_hgr(hardened.OUT) for _ in range(2))
    hardened.train_in(model, hgr, 2, 0)
    same = [torch.equal(a, b) for a, b in zip(hgr.guidance.parameters(), stored.guidance.parameters(), strict=True)]
    assert not any(same)
    assert all(torch.equal(a, b) for a, b in zip(hgr.condition.parameters(), stored.condition.parameters(), strict=True))
    assert hgr.info.guidance_thresholds != stored.info.guidance_thresholds


def test_the_clean_points_that_look_most_harmful_are_found():
    hgr = hardened.load_hgr(hardened.OUT)
    x = torch.randn(60, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(60)
    clean = Points(x, ones, ones, 0 * x, x.flip(0), x.flip(0), torch.zeros(60, 3), torch.arange(60))
    found = hardened.most_alarming(hgr, clean, 3)
    b = guidance_readings(hgr, clean, torch.device("cpu")).amax(dim=1)
    assert set(found.tolist()) == set(b.argsort(descending=True)[:3].tolist())


def test_twice_the_size_is_twice_of_everything(monkeypatch):
    for name in ("POOL", "HARMFUL_RUNS", "CLEAN_RUNS", "WORD_RUNS", "HELD_OUT_RUNS"):
        monkeypatch.setattr(hardened, name, 4)
    monkeypatch.setattr(hardened, "RUN_STEPS", 3)
    model, hgr = DemoModel.load("cpu"), hardened.load_hgr(hardened.OUT)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    learnt, held_out = hardened.recorded(model, hgr, rng, generator, 2)
    (harmful, prompts), (clean, quiet) = learnt.kinds[HARMFUL], learnt.kinds[CLEAN]
    assert len(prompts) == harmful.prompt.max() + 1 == held_out.prompt.max() + 1 == 8
    assert len(quiet) == clean.prompt.max() + 1 == 16 and not quiet.harms.any()  # clean runs and clean words
    points, of = learnt.at(CLEAN, torch.tensor([0, len(clean) - 1]))
    assert torch.equal(of.tokens, quiet.tokens[[0, -1]]) and torch.equal(points.x, clean.x[[0, -1]])
    adversary = hardened.Adversary(model, hgr, rng, generator, 2)
    assert len(adversary.delta) == 8
    training = hardened.Hardening(hgr, learnt, held_out, adversary, 2, 0, 2)
    assert [len(each) for each in training._draw()] == [64, 40, 48, 64, 128, 32, 32]


def test_a_loss_that_is_no_number_stops_the_training():
    assert hardened.finite(torch.tensor(0.5), 10) == 0.5
    with pytest.raises(HGRError, match="step 10 is nan"):
        hardened.finite(torch.tensor(float("nan")), 10)


def toy(monkeypatch):
    """A training of a small redirector on toy directions, and directions of another kind."""
    monkeypatch.setattr(hardened, "RATE", 5e-3)
    torch.manual_seed(0)
    x, guidance, ones = torch.randn(40, 4, 8, 8), torch.randn(40, 4, 8, 8), torch.ones(40)
    points = Points(x, ones, ones, 0 * x, guidance, 0 * x, torch.zeros(40, 2), torch.arange(40))
    hgr = small_hgr(zero=True).requires_grad_(True)
    return hgr, points, hardened.Hardening(hgr, hardened.Held({CLEAN: (points, None)}), points, None, 60, 0, 1)


def test_attacked_points_teach_what_they_hide_and_how_they_are_turned(monkeypatch):
    """Only those that count."""
    hgr, points, training = toy(monkeypatch)
    harms, counts = torch.tensor([[0.0, 1.0]]).repeat(40, 1), (torch.arange(40) < 20).float()
    points.partner_denoised[20:] = 2 * points.cond_denoised[20:]  # the other way: nothing that the first half could teach
    assert training._attacked_loss(points, harms, 0 * counts) == 0

    def measured():
        with torch.no_grad():
            parts = [
                losses.guidance_losses(hgr.guidance, points[half], harms[half], harms[half], points.partner_denoised[half], of)
                for half, of in ((slice(20), torch.ones(20)), (slice(20, 40), torch.ones(20)))
            ]
        return [(error.mean().item(), b.item()) for error, b, *_ in parts]

    before = measured()
    for _ in range(60):
        training.advance(training._attacked_loss(points, harms, counts))
    (error, b), (other_error, _) = measured()
    assert error < 0.7 * before[0][0] and b < 0.25 * before[0][1]
    assert other_error > 0.9 * before[1][0]


def test_alarming_clean_points_are_learnt(monkeypatch):
    hgr, points, training = toy(monkeypatch)
    before = guidance_readings(hgr, points, training.device)
    for _ in range(60):
        training.advance(training._alarm_loss(points))
    assert guidance_readings(hgr, points, training.device).max() < 0.4 * before.max()
