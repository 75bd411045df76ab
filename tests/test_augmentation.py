"""What users do to prompts, done to tokens: against hand-computed values, and the same for the same generator."""

import pytest
import torch
from torch.testing import assert_close

from hgr_models.augmentation import MAX_CHUNKS, averaged, chunked, strayed, weighted
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


def test_prompts_stray_along_the_differences_of_clean_ones():
    clean, harmful = texts(2), texts(300, harmful=True)
    out = strayed(harmful, clean, 0.5, generator())
    assert torch.equal(out.tokens, strayed(harmful, clean, 0.5, generator()).tokens) and torch.equal(out.harms, harmful.harms)
    assert_close(out.tokens[:, 0], harmful.tokens[:, 0])  # what all prompts have in common
    way = clean.tokens[0] - clean.tokens[1]
    size = (out.tokens - harmful.tokens)[:, 1] @ way[1] / way[1].square().sum()
    assert_close(out.tokens - harmful.tokens, size[:, None, None] * way)  # as a whole, by one size a row
    assert_close(out.pooled - harmful.pooled, size[:, None] * (clean.pooled[0] - clean.pooled[1]), atol=1e-5, rtol=1e-4)
    assert size.abs().max() <= 0.5 and size.min() < -0.4 and size.max() > 0.4
    assert 0.35 < (size == 0).float().mean() < 0.65  # of two clean prompts the same one was drawn twice


@pytest.mark.parametrize("length", [3, 9])
def test_padding_and_masked_tokens_do_not_stray(length):
    clean, harmful = texts(masked=True, length=length), texts(40, harmful=True, masked=True)
    harmful.tokens[:, 2] = 0.0
    out = strayed(harmful, clean, 1.0, generator()).tokens
    beyond = [4, *range(length - 1, 5)]  # masked in the harmful prompts, or in the clean ones
    assert torch.equal(out[:, beyond], harmful.tokens[:, beyond]) and torch.equal(out[:, 2], harmful.tokens[:, 2])
    assert (out[:, 1] != harmful.tokens[:, 1]).any()


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
