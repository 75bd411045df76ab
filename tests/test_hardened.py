"""The adversary that the demo's guidance redirector is hardened against: it gains ground, stays in its ball, and tells no lies."""

import random
from dataclasses import replace

import pytest
import torch

from demo.pipeline import DemoModel
from demo.training import hardened
from hgr_models.calibration import guidance_readings
from hgr_models.losses import mean_square
from hgr_models.recording import Points
from hgr_models.shards import CLEAN, Recording


@pytest.fixture
def adversary(monkeypatch):
    monkeypatch.setattr(hardened, "POOL", 4)
    monkeypatch.setattr(hardened, "RUN_STEPS", 3)
    monkeypatch.setattr(hardened, "ATTACKED_BATCH", 4)
    monkeypatch.setattr(hardened, "FORGET", 0.0)
    hgr = hardened.load_hgr(hardened.OUT)
    low = ((0.02,) * len(hgr.info.categories),) * len(hgr.info.guidance_thresholds)  # gates that are hard to pass under
    hgr.calibrate(replace(hgr.info, guidance_thresholds=low))
    return hardened.Adversary(DemoModel.load("cpu"), hgr, random.Random(0), torch.Generator().manual_seed(0))


def losses_of(adversary):
    """The attack's loss at every point that is always there."""
    here = adversary.plain
    with torch.no_grad():
        tokens = adversary.tokens[here.row] + adversary.delta[here.row] * adversary.radius
        return adversary._loss(here, adversary.predict(here.x, here.sigma, tokens).float())


def test_the_attack_gains_ground_inside_its_ball(adversary):
    before = losses_of(adversary)
    for _ in range(20):
        points, harms = adversary.bend()
    after, evading = losses_of(adversary), adversary.evading[adversary.plain.row]
    assert after[evading].mean() < 0.7 * before[evading].mean() and after.mean() < 0.8 * before.mean()
    assert adversary.delta.any() and adversary.delta.abs().max() <= 1
    assert points.cond_denoised.shape == points.x.shape and not points.cond_denoised.requires_grad
    assert all(parameter.requires_grad for parameter in adversary.hgr.guidance.parameters())  # they learn next
    adversary.refresh()
    assert len(adversary.moments.x) == 2 * len(adversary.plain.x)
    assert torch.equal(adversary.moments[torch.arange(len(before))].x, adversary.plain.x)


def test_what_no_longer_looks_harmful_teaches_nothing(adversary):
    adversary.tokens = adversary.partners
    points, harms = adversary.bend()
    assert len(points) == len(harms) == 0
    here = adversary.plain
    assert (mean_square(here.harmful_denoised - here.partner_denoised) > 0).all()


def test_some_changes_start_again(adversary, monkeypatch):
    monkeypatch.setattr(hardened, "FORGET", 1.0)
    adversary.bend()
    assert not adversary.delta.any() and not adversary.age.any()


def test_a_short_hardening_changes_the_guidance_redirector_alone(monkeypatch, tmp_path):
    for name in ("POOL", "HARMFUL_RUNS", "CLEAN_RUNS", "WORD_RUNS", "HELD_OUT_RUNS"):
        monkeypatch.setattr(hardened, name, 4)
    for name, value in {"RUN_STEPS": 3, "REFRESH": 1}.items():
        monkeypatch.setattr(hardened, name, value)
    model, hgr, stored = DemoModel.load("cpu"), *(hardened.load_hgr(hardened.OUT) for _ in range(2))
    hardened.train_in(tmp_path, model, hgr, 2, 0)
    same = [torch.equal(a, b) for a, b in zip(hgr.guidance.parameters(), stored.guidance.parameters(), strict=True)]
    assert not any(same)
    assert all(torch.equal(a, b) for a, b in zip(hgr.condition.parameters(), stored.condition.parameters(), strict=True))
    assert len(Recording.open(tmp_path).of_kind(CLEAN)) == 2  # what sets the thresholds is apart
    assert hgr.info.guidance_thresholds != stored.info.guidance_thresholds


def test_the_clean_points_that_look_most_harmful_are_found():
    hgr = hardened.load_hgr(hardened.OUT)
    x = torch.randn(60, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(60)
    clean = Points(x, ones, ones, 0 * x, x.flip(0), x.flip(0), torch.zeros(60, 3), torch.arange(60))
    found = hardened.most_alarming(hgr, clean)
    b = guidance_readings(hgr, clean, torch.device("cpu")).amax(dim=1)
    assert set(found.prompt.tolist()) == set(b.argsort(descending=True)[:3].tolist())
