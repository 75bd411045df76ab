"""Concept guidance for flagged samples: who is steered, by which concept, how far, and whose momentum builds up."""

import pytest
import torch
from torch.testing import assert_close

from hgr_models import ConceptGuard, FlaggedConceptGuard, SLDSettings, select_concept, select_flagged

SLD = SLDSettings(0.0, 2.0, 0.05, 0.5, 0.7)
SHAPES = [(3, 4, 8, 8), (3, 16, 2, 4, 4), (3, 1, 40)]
UNITS = torch.tensor([-0.5, -1.0, -2.0])


def predictions(shape=SHAPES[0], concepts=2, seed=0, dtype=torch.float32):
    """cond_denoised, uncond_denoised and a prediction per concept, all random."""
    generator = torch.Generator().manual_seed(seed)
    cond, uncond, *others = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2 + concepts))
    return cond, uncond, others


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_flagged_samples_get_slds_step_and_others_stay(shape, dtype):
    cond, uncond, concepts = predictions(shape, dtype=dtype)
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    safe = FlaggedConceptGuard(SLD).steer(cond, uncond, concepts, weights, UNITS)
    wanted = [ConceptGuard(SLD).steer(cond, uncond, [concept], UNITS) for concept in concepts]
    assert safe.dtype == dtype
    assert torch.equal(safe[0], wanted[0][0]) and torch.equal(safe[1], cond[1]) and torch.equal(safe[2], wanted[1][2])
    assert not torch.equal(safe[0], cond[0]) and not torch.equal(safe[2], cond[2])


def test_the_choice_is_among_flagged_concepts_only():
    cond, uncond, (concept, _) = predictions()
    best = cond  # follows the guidance exactly
    guidance, directions = cond - uncond, torch.stack([best, concept, uncond]) - uncond
    every = torch.ones(3, 3)
    assert select_flagged(guidance, directions, every).tolist() == select_concept(guidance, directions).tolist() == [0, 0, 0]
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.9, 0.0], [0.0, 0.0, 0.3]])
    assert select_flagged(guidance, directions, weights).tolist() == [1, 0, 2]


def test_the_chosen_concepts_weight_scales_the_subtraction():
    cond, uncond, concepts = predictions()
    full = FlaggedConceptGuard(SLD).steer(cond, uncond, concepts[:1], torch.ones(3, 1), UNITS)
    part = FlaggedConceptGuard(SLD).steer(cond, uncond, concepts[:1], torch.full((3, 1), 0.25), UNITS)
    assert_close(part - cond, 0.25 * (full - cond), atol=1e-6, rtol=0)


def test_momentum_belongs_to_the_flagged_sample():
    guard, alone = FlaggedConceptGuard(SLD), ConceptGuard(SLD)
    first, second = predictions(concepts=1, seed=1), predictions(concepts=1, seed=2)
    guard.steer(*first, torch.tensor([[1.0], [0.0], [1.0]]), UNITS)
    assert not guard.momentum[1].any() and guard.momentum[0].any()
    before = guard.momentum.clone()
    alone.steer(*first, UNITS)
    safe, wanted = guard.steer(*second, torch.tensor([[1.0], [1.0], [0.0]]), UNITS), alone.steer(*second, UNITS)
    assert torch.equal(safe[0], wanted[0])  # carried on
    assert torch.equal(safe[1], ConceptGuard(SLD).steer(*second, UNITS)[1])  # began here
    assert torch.equal(guard.momentum[2], before[2])


def test_the_warm_up_only_builds_momentum():
    cond, uncond, concepts = predictions(concepts=1)
    guard = FlaggedConceptGuard(SLD)
    safe = guard.steer(cond, uncond, concepts, torch.full((3, 1), 0.7), UNITS, torch.tensor([False, True, False]))
    assert [torch.equal(a, b) for a, b in zip(safe, cond, strict=True)] == [True, False, True]
    assert guard.momentum.flatten(1).any(dim=1).all()


def test_another_size_begins_again():
    guard = FlaggedConceptGuard(SLD)
    guard.steer(*predictions(concepts=1), torch.ones(3, 1), UNITS)
    small = predictions((3, 4, 4, 4), concepts=1)
    assert torch.equal(guard.steer(*small, torch.ones(3, 1), UNITS), ConceptGuard(SLD).steer(*small, UNITS))
