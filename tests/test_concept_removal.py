"""CRG beside its equations written out once more, and beside DDPM's transitions, which they follow from."""

import math

import pytest
import torch
from torch.testing import assert_close

from hgr_models import HGRError
from hgr_models.concept_removal import ConceptRemoval, CRGSettings, evidence_weight, noise_ratio

SIGMAS = [12.0, 5.0, 2.0, 0.7, 0.0]


def predictions(steps=len(SIGMAS) - 1, batch=2, seed=0):
    """x0 predictions (cond, uncond, concept), (steps, batch, 4, 3, 3) each; the concept near the prompt in row 0."""
    cond, uncond, other = torch.randn(3, steps, batch, 4, 3, 3, generator=torch.Generator().manual_seed(seed)).unbind()
    near = torch.tensor([0.9, -0.5]).view(1, 2, 1, 1, 1)
    return cond, uncond, near * cond + (1 - near) * other


def published(cond, uncond, concept, sigmas, tau, scale):
    """The restated algorithm of one picture in DDPM's own variables: noise predictions, alpha_bar, T steps and kappa."""
    steps, total, out = len(sigmas) - 1, 0.0, []
    for k in range(steps):
        sigma, alpha_bar = sigmas[k], 1 / (1 + sigmas[k] ** 2)
        alpha = alpha_bar * (1 + sigmas[k + 1] ** 2)
        kappa = (1 - alpha) * steps / (2 * alpha * (1 - alpha_bar))
        d_c, d_u, d_n = (-t[k].double() / sigma for t in (cond, uncond, concept))  # x / sigma cancels in every difference
        bracket = float((d_c - d_u).square().sum() - (d_c - d_n).square().sum())
        presence = bracket / 2 + total / steps
        delta = d_n - d_u
        omega = (presence - tau) / float(delta.square().sum()) if presence > tau else 0.0
        out.append(-(d_c - scale * omega * delta) * sigma)
        total += kappa * bracket
    return out


def run(settings, sigmas=SIGMAS, **more):
    cond, uncond, concept = predictions(len(sigmas) - 1, **more)
    guard = ConceptRemoval(settings, noise_ratio(torch.tensor(sigmas), "EPS"))
    sigma = [torch.full((cond.shape[1],), s) for s in sigmas]
    return [guard.steer(c, u, n, noise_ratio(s, "EPS")) for c, u, n, s in zip(cond, uncond, concept, sigma, strict=False)]


@pytest.mark.parametrize("tau, scale", [(0.0, 1.0), (3.0, 1.0), (-0.5, 2.0)])
def test_a_run_is_the_restated_algorithm(tau, scale):
    cond, uncond, concept = predictions()
    ours, changed = run(CRGSettings(tau, scale)), []
    for row in range(2):
        wanted = published(cond[:, row], uncond[:, row], concept[:, row], SIGMAS, tau, scale)
        for k, target in enumerate(wanted):
            assert_close(ours[k][row].double(), target, rtol=1e-4, atol=1e-4)
            changed.append(not torch.equal(ours[k][row], cond[k, row]))
    assert any(changed) and not all(changed)


def test_the_weight_is_the_likelihood_of_ddpm_s_step():
    """log N(mean_c; mean_n, beta) - log N(mean_c; mean_u, beta), with DDPM's mean of a noise prediction."""
    d_c, d_u, d_n = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    for sigma, after in ((12.0, 5.0), (0.7, 0.0), (2.0, 1.9)):
        alpha_bar = 1 / (1 + sigma**2)
        alpha = alpha_bar * (1 + after**2)
        beta = 1 - alpha
        mean = lambda d: -beta / math.sqrt(1 - alpha_bar) * d / math.sqrt(alpha)  # noqa: E731, B023
        ratio = ((mean(d_c) - mean(d_u)).square().sum() - (mean(d_c) - mean(d_n)).square().sum()) / (2 * beta)
        bracket = (d_c - d_u).square().sum() - (d_c - d_n).square().sum()
        weight = evidence_weight(torch.tensor(sigma, dtype=torch.float64), torch.tensor(after, dtype=torch.float64))
        assert_close(weight * bracket, ratio, rtol=1e-6, atol=1e-9)


def test_scale_1_brings_the_presence_down_to_the_threshold():
    cond, uncond, concept = predictions(1)
    tau = -0.25
    (safe,) = run(CRGSettings(tau), [2.0, 0.0])
    presence = ((safe - uncond[0]).square() - (safe - concept[0]).square()).flatten(1).sum(dim=1) / 2.0**2 / 2
    before = ((cond[0] - uncond[0]).square() - (cond[0] - concept[0]).square()).flatten(1).sum(dim=1) / 2.0**2 / 2
    assert_close(presence, torch.where(before > tau, tau, before), rtol=1e-4, atol=1e-4)
    assert (before > tau).any()


def test_what_has_no_evidence_is_the_same_to_the_last_bit():
    cond, uncond, concept = predictions()
    for guarded in (run(CRGSettings(1e9)), run(CRGSettings(0.0, 0.0))):
        assert all(torch.equal(a, b) for a, b in zip(guarded, cond, strict=True))
    guard = ConceptRemoval(CRGSettings(-5.0), torch.tensor([3.0, 0.0]))
    assert torch.equal(guard.steer(cond[0], uncond[0], uncond[0], torch.tensor([3.0, 3.0])), cond[0])  # a concept that is nothing


def test_a_step_that_is_evaluated_twice_counts_once():
    cond, uncond, concept = predictions(4)
    schedule = torch.tensor(SIGMAS)
    once, twice = (ConceptRemoval(CRGSettings(), schedule) for _ in range(2))
    for k, sigma in enumerate(SIGMAS[:-1]):
        ratio = torch.full((2,), sigma)
        for between in (ratio * 0.9, ratio * 0.99):  # second order: in the step, before its last evaluation
            twice.steer(cond[k] * 3, uncond[k], concept[k], between)
        a, b = (guard.steer(cond[k], uncond[k], concept[k], ratio) for guard in (once, twice))
        assert torch.equal(a, b)


def test_each_picture_has_its_own_evidence():
    together, alone = run(CRGSettings()), []
    cond, uncond, concept = predictions()
    for row in range(2):
        guard = ConceptRemoval(CRGSettings(), torch.tensor(SIGMAS))
        some = slice(row, row + 1)
        alone.append([
            guard.steer(cond[k, some], uncond[k, some], concept[k, some], torch.tensor([s])) for k, s in enumerate(SIGMAS[:-1])
        ])  # fmt: skip
    for k, both in enumerate(together):
        assert_close(both, torch.cat([alone[0][k], alone[1][k]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept_and_ends_of_the_schedule_divide_nothing(dtype):
    cond, uncond, concept = (t[0].to(dtype) for t in predictions(1))
    for prediction, sigma in (("EPS", 0.0), ("FLOW", 1.0), ("FLOW", 0.0), ("V", 80.0)):
        ratio = noise_ratio(torch.tensor([sigma, sigma]), prediction)
        guard = ConceptRemoval(CRGSettings(), noise_ratio(torch.tensor([1.0, 0.5, 0.0]), prediction))
        safe = guard.steer(cond, uncond, concept, ratio)
        assert safe.dtype == dtype and safe.isfinite().all() and ratio.isfinite().all()


def test_noise_to_signal_of_flow_models():
    assert_close(noise_ratio(torch.tensor([0.5, 0.8]), "FLOW"), torch.tensor([1.0, 4.0]))
    assert_close(noise_ratio(torch.tensor([0.5, 8.0]), "EPS"), torch.tensor([0.5, 8.0]))


@pytest.mark.parametrize("values", [(float("nan"), 1.0), (0.0, -1.0), (0.0, float("inf"))])
def test_parameters_have_ranges(values):
    with pytest.raises(HGRError, match="finite presence threshold"):
        CRGSettings(*values)
