"""SAFREE beside its equations written out once more, with projection matrices and loops."""

import math

import pytest
import torch
from torch.testing import assert_close

from hgr_models.safree import filter_tokens, filtered_steps, project, subspace, triggers

WIDTH = 12


def projection(vectors):
    """E (E^T E)^+ E^T, the vectors being the columns of E."""
    e = vectors.double().T
    return e @ torch.linalg.pinv(e.T @ e, rtol=1e-9) @ e.T


def published(tokens, words, masked, concepts, present, alpha):
    """Tokens and distance of one prompt, as in the paper's section on filtering."""
    p_c, p_i, one = projection(concepts), projection(masked), torch.eye(WIDTH, dtype=torch.float64)
    distances = [float(((one - p_c) @ p).norm()) for p in masked.double()]
    out = tokens.clone()
    for i, place in enumerate(words.tolist()):
        others = [d for j, d in enumerate(distances) if j != i]
        if distances[i] >= (1 + alpha) * sum(others) / len(others):
            out[place] = ((one - p_c) @ p_i @ tokens[place].double()).to(tokens.dtype)
    moved = [(one - p_c) @ p_i @ e for e in tokens.double()]
    alike = [float(m @ e / (m.norm() * e.norm())) for m, e in zip(moved, tokens.double(), strict=True)][:present]
    return out, 1 - sum(alike) / len(alike)


def prompt(seed, n=5):
    generator = torch.Generator().manual_seed(seed)
    tokens, concepts = torch.randn(9, WIDTH, generator=generator), torch.randn(3, WIDTH, generator=generator)
    masked = torch.randn(1, WIDTH, generator=generator) + 0.4 * torch.randn(n, WIDTH, generator=generator)
    return tokens, torch.arange(1, n + 1), masked, concepts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_filtering_is_the_published_one(seed, alpha):
    tokens, words, masked, concepts = prompt(seed)
    found = filter_tokens(tokens, words, masked, concepts, 7, alpha)
    wanted, distance = published(tokens, words, masked, concepts, 7, alpha)
    assert_close(found.tokens, wanted, rtol=1e-4, atol=1e-4)
    assert found.distance == pytest.approx(distance, abs=1e-6)
    changed = (found.tokens != tokens).any(dim=1)
    assert changed.nonzero().flatten().tolist() == words[found.triggers].tolist()


def test_the_word_without_which_a_prompt_is_farther_away_triggers():
    harm, rest = torch.eye(WIDTH)[0], torch.eye(WIDTH)[1:4]
    masked = torch.stack([rest[0] + rest[1] + rest[2], harm + rest[1] + rest[2], harm + rest[0] + rest[2]])
    basis = subspace(harm[None])
    assert triggers(masked, basis).tolist() == [True, False, False]  # by hand: distances sqrt 3, sqrt 2, sqrt 2
    found = filter_tokens(torch.stack([harm] * 5), torch.tensor([1, 2, 3]), masked, harm[None], 5)
    assert abs(float(found.tokens[1] @ harm)) < 1e-6 and found.tokens[1].abs().max() > 0.1
    assert torch.equal(found.tokens[2], harm)


def test_where_nothing_triggers_the_tokens_are_the_same_bits():
    tokens, words, masked, concepts = prompt(0)
    found = filter_tokens(tokens, words, masked, concepts, 7, alpha=10.0)
    assert torch.equal(found.tokens, tokens) and not found.triggers.any()
    same = filter_tokens(tokens, words, masked[:1].expand(5, -1), concepts, 7)  # no word makes a difference
    assert torch.equal(same.tokens, tokens)


def test_a_word_alone_triggers():
    tokens, words, masked, concepts = prompt(1, n=1)
    assert filter_tokens(tokens, words, masked, concepts, 3).triggers.tolist() == [True]


def test_vectors_that_repeat_span_no_more():
    basis = subspace(torch.stack([torch.eye(WIDTH)[0], torch.eye(WIDTH)[0] * (1 + 1e-7), torch.eye(WIDTH)[2]]))
    assert basis.shape == (WIDTH, 2)
    assert_close(project(torch.ones(WIDTH), basis), torch.eye(WIDTH, dtype=torch.float64)[[0, 2]].sum(dim=0))
    assert subspace(torch.zeros(2, WIDTH)).shape == (WIDTH, 0)


@pytest.mark.parametrize("distance", [0.0, 0.3, 0.5, 0.5333, 0.6, 0.9])
def test_of_50_steps_as_published(distance):
    last = round(10 * (1 / (1 + math.exp(-2 * 2.5 * (10 * distance - 5.333)))))
    assert filtered_steps(distance, 50) == last + 1  # the steps 0 to t'
    assert filtered_steps(distance, 25) == math.ceil((last + 1) / 2) and filtered_steps(distance, 1) == 1


def test_more_distance_never_means_fewer_steps():
    counts = [filtered_steps(d / 100, 30) for d in range(101)]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 7
