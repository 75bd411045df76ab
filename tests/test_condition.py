"""The condition redirector: any token count, masks, units, the weights' influence."""

import torch
from torch.testing import assert_close

from helpers import small_hgr
from hgr_models import CategorySettings, losses, redirect_condition
from hgr_models.condition import ConditionConfig, ConditionRedirector, narrower_width

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


def test_the_pooled_delta_is_its_own_feature_in_pooled_units():
    """Without layers, the pooled vector's delta hangs on nothing but itself; a head of constants shows its unit."""
    network = ConditionRedirector(ConditionConfig(16, 2, 4, width=8, depth=0, delta_depth=0, heads=1))
    tokens, pooled = torch.randn(2, 1, 5, 16), torch.randn(1, 4)
    torch.nn.init.normal_(network.pooled_out.weight)
    one, other = (network.delta(some, pooled, W)[1] for some in tokens)
    assert one.abs().max() > 0.01 and torch.equal(one, other)
    assert not torch.allclose(network.delta(tokens[0], -pooled, W)[1], one)
    torch.nn.init.zeros_(network.pooled_out.weight)
    torch.nn.init.constant_(network.pooled_out.bias, 3.0)
    network.pooled_scale.copy_(torch.tensor([1.0, 2.0, 0.5, 10.0]))
    assert network.delta(tokens[0], pooled, W)[1].tolist() == [[3.0, 6.0, 1.5, 30.0]]
    # A false alarm costs |D|^2 in those units: 3^2 for every channel, and nothing for tokens that stay.
    assert_close(losses.quiet_loss(network, tokens[0], W, pooled), torch.tensor(9.0))


def test_units_make_outlier_channels_ordinary():
    network = small_hgr().condition
    tokens = torch.randn(50, 8, 16)
    tokens[..., 3] = 400 + 90 * tokens[..., 3]
    network.measure(tokens)
    assert 300 < network.token_center[3] < 500 and 60 < network.token_scale[3] < 120
    assert 0.8 < network.token_scale[0] < 1.2


# Two encoders along T, the narrower one's channels padded with zeros


def two_encoders(count=60):
    """Tokens (count, 6, 16): two of an encoder of 10 channels in large numbers, four of one of 16 in small ones."""
    narrow = torch.nn.functional.pad(40 + 20 * torch.randn(count, 2, 10), (0, 6))
    return torch.cat([narrow, 0.1 * torch.randn(count, 4, 16)], dim=1)


def segmented():
    torch.manual_seed(0)
    network = ConditionRedirector(ConditionConfig(16, 2, width=32, depth=1, delta_depth=1, heads=2, short_width=10))
    for head in (network.token_out, network.erase):
        torch.nn.init.normal_(head.weight, std=0.3)
    return network.eval().requires_grad_(False)


def test_a_narrower_encoder_is_seen_by_its_zeros():
    tokens = two_encoders()
    assert narrower_width(tokens) == 10
    assert narrower_width(tokens[:, 2:]) == narrower_width(tokens[:, :2]) == narrower_width(torch.zeros(1, 2, 16)) == 0
    masked = tokens[:, 2:].clone()
    masked[0, 3] = 0.0  # a token of padding
    masked[1, 1, -1] = 0.0  # by chance
    assert narrower_width(masked) == 0


def test_each_encoder_has_units_of_its_own():
    network, tokens = segmented(), two_encoders()
    network.measure(tokens)
    center, scale = network.units(tokens)
    assert_close(center[0, 0, :10], torch.full((10,), 40.0), rtol=0.2, atol=0)
    assert_close(scale[0, 1, :10], torch.full((10,), 20.0), rtol=0.4, atol=0)
    assert_close(scale[0, 2], torch.full((16,), 0.1), rtol=0.4, atol=0)
    assert not scale[:, :2, 10:].any() and not center[:, :2, 10:].any()
    z = network._read(tokens, None, None)[1]
    assert z[:, :2, :10].std() < 1.3 and z[:, 2:].std() < 1.3 and not z[:, :2, 10:].any()


def test_the_delta_is_in_each_encoders_units_and_zero_beyond_its_channels():
    network, tokens = segmented(), two_encoders()
    network.measure(tokens)
    delta, _ = network.delta(tokens, None, W)
    assert torch.isfinite(delta).all() and not delta[:, :2, 10:].any()
    assert delta[:, :2, :10].std() > 20 * delta[:, 2:].std() > 0
    quiet = losses.quiet_loss(network, tokens, W.expand(60, -1))
    assert torch.isfinite(quiet) and quiet > 0
