"""What users do to prompts, done to tokens: against hand-computed values, and the same for the same generator."""

import pytest
import torch
from torch.testing import assert_close

from hgr_models.augmentation import MAX_CHUNKS, averaged, chunked, weighted
from hgr_models.shards import Texts


def texts(count=6, length=5, harmful=False, masked=False, pooled=True):
    torch.manual_seed(int(harmful))
    tokens = torch.randn(count, length, 3)
    tokens[:, 0] = 7.0  # a start token, the same in every prompt
    mask = torch.ones(count, length) if masked else None
    if masked:
        mask[:, -1] = 0
    return Texts(tokens, torch.randn(count, 2) if pooled else None, mask, torch.full((count, 2), float(harmful)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_weights_scale_the_difference_from_the_mean():
    t = texts(200)
    out = weighted(t, 0.5, generator())
    assert torch.equal(out, weighted(t, 0.5, generator())) and torch.equal(out[:, 0], t.tokens[:, 0])
    ratio = ((out - t.tokens.mean(dim=0)) / (t.tokens - t.tokens.mean(dim=0)))[:, 1:, 0]
    changed = (out != t.tokens).any(dim=2)[:, 1:]
    assert 0.3 < changed.any(dim=1).float().mean() < 0.6
    whole, part = changed.all(dim=1), changed.any(dim=1) & ~changed.all(dim=1)
    assert whole.any() and part.any()
    weights = ratio[whole]
    assert_close(weights, weights[:, :1].expand_as(weights), rtol=1e-2, atol=1e-2)  # one weight per prompt
    assert 0.29 < weights.min() < 0.6 and 1.3 < weights.max() < 1.61


def test_nothing_is_weighted_without_a_share_and_under_a_mask():
    t = texts(masked=True)
    assert torch.equal(weighted(t, 0.0, generator()), t.tokens)
    out = weighted(t, 1.0, generator())
    assert torch.equal(out[:, -1], t.tokens[:, -1]) and not torch.equal(out[:, 1], t.tokens[:, 1])


@pytest.mark.parametrize("pooled", [True, False])
def test_two_to_four_chunks_with_one_harmful_prompt_and_with_none(pooled):
    clean, harmful = texts(pooled=pooled), texts(4, harmful=True, pooled=pooled)
    counts, places = set(), set()
    for seed in range(60):
        one, none = chunked(clean, harmful, generator(seed))
        assert one.tokens.shape == none.tokens.shape and len(one) == 4 and one.harms.all() and not none.harms.any()
        chunks = one.tokens.split(5, dim=1)
        place = [torch.equal(chunk, harmful.tokens) for chunk in chunks]
        assert place.count(True) == 1 and all(any(torch.equal(row, c) for c in clean.tokens) for row in none.tokens[:, :5])
        counts.add(len(chunks))
        places.add(place.index(True))
        if pooled:
            assert torch.equal(one.pooled, harmful.pooled) == place[0]
    assert counts == set(range(2, MAX_CHUNKS + 1)) and places == set(range(MAX_CHUNKS))


def test_average_mixes_tokens_and_pooled_alike():
    clean, harmful = texts(4), texts(4, harmful=True)
    (mixed,) = averaged(clean, harmful, generator())
    share = (mixed.pooled - clean.pooled) / (harmful.pooled - clean.pooled)
    assert_close(mixed.tokens, clean.tokens + share[:, :1, None] * (harmful.tokens - clean.tokens), rtol=1e-3, atol=1e-3)
    assert share.min() > 0.499 and share.max() < 1.001 and torch.equal(mixed.harms, harmful.harms)


def test_masked_families_and_other_lengths_are_not_joined():
    assert not chunked(texts(masked=True), texts(4, harmful=True, masked=True), generator())
    assert not averaged(texts(4, masked=True), texts(4, harmful=True, masked=True), generator())
    assert not averaged(texts(4), texts(4, length=9, harmful=True), generator())
    assert not chunked(texts(), texts(4, length=600, harmful=True), generator())
    assert chunked(texts(), texts(4, length=9, harmful=True), generator())[0].tokens.shape[1] in (14, 19, 24)
