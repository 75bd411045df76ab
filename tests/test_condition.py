"""The condition redirector: any token count, masks, units, the weights' influence."""

import torch
from torch.testing import assert_close

from helpers import small_hgr
from hgr_models import CategorySettings, redirect_condition

W = torch.tensor([[1.0, 0.0]])


def test_starts_as_no_change():
    network = small_hgr(zero=True).condition
    delta, pooled = network.delta(torch.randn(1, 9, 16), None, W)
    assert not delta.any() and pooled is None


def test_takes_any_token_count_and_ignores_order():
    network = small_hgr().condition
    for count in (1, 77, 308):
        tokens = torch.randn(1, count, 16)
        order = torch.randperm(count)
        assert network.harmfulness(tokens).shape == (1, 2)
        assert_close(
            network.delta(tokens, None, W)[0][:, order], network.delta(tokens[:, order], None, W)[0], rtol=1e-3, atol=1e-4
        )


def test_the_delta_depends_on_the_category_weights():
    network, tokens = small_hgr().condition, torch.randn(1, 5, 16)
    one, both = (network.delta(tokens, None, torch.tensor([w]))[0] for w in ([1.0, 0.0], [1.0, 1.0]))
    assert (one - both).abs().max() > 1e-3


def test_masked_tokens_neither_count_nor_change():
    network, tokens = small_hgr().condition, torch.randn(1, 6, 16)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    other = tokens.clone()
    other[:, 4:] += 5.0
    assert_close(network.harmfulness(tokens, None, mask), network.harmfulness(other, None, mask))
    delta, _ = network.delta(tokens, None, W, mask)
    assert not delta[:, 4:].any() and delta[:, :4].abs().min(dim=-1).values.max() > 0
    assert_close(delta[:, :4], network.delta(tokens[:, :4], None, W)[0], rtol=1e-3, atol=1e-5)


def test_all_zero_tokens_never_flag():
    hgr = small_hgr()
    tokens = torch.cat([torch.zeros(1, 5, 16), torch.randn(1, 5, 16)])
    result = redirect_condition(hgr, tokens, None, CategorySettings((1.0, 1.0), -1.0))
    assert not result.harmfulness[0].any() and result.harmfulness[1].all()
    assert torch.equal(result.tokens[0], tokens[0]) and not torch.equal(result.tokens[1], tokens[1])


def test_pooled_vectors_are_read_and_redirected():
    hgr = small_hgr(pooled_width=8)
    tokens, pooled = torch.randn(2, 5, 16), torch.randn(2, 8)
    result = redirect_condition(hgr, tokens, pooled, CategorySettings((1.0, 1.0), -1.0))
    assert result.pooled.shape == pooled.shape and not torch.equal(result.pooled, pooled)
    assert not torch.allclose(
        hgr.condition.harmfulness_logits(tokens, pooled), hgr.condition.harmfulness_logits(tokens, pooled + 3)
    )


def test_units_make_outlier_channels_ordinary():
    network = small_hgr().condition
    tokens = torch.randn(50, 8, 16)
    tokens[..., 3] = 400 + 90 * tokens[..., 3]
    network.measure(tokens)
    assert 300 < network.token_center[3] < 500 and 60 < network.token_scale[3] < 120
    assert 0.8 < network.token_scale[0] < 1.2
