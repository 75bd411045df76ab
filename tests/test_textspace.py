"""Random attention readers and the errors made of them, with right values worked out by hand."""

import math

import pytest
import torch

from hgr_models.condition import ConditionConfig, ConditionRedirector, presence_bias
from hgr_models.textspace import (
    FLOOR,
    PairTexts,
    Readers,
    draw_readers,
    pooled_error,
    reader_errors,
    text_errors,
    token_units,
)


def test_a_reader_weighs_tokens_by_its_query():
    z = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    readers = Readers(torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]]), None)  # the mean; three times as much of the first
    # The keys are z itself: its mean square is 1/2, below the 1 from which a token is scaled down.
    assert torch.allclose(readers.read(z), torch.tensor([[[0.5, 0.5], [0.75, 0.25]]]), atol=1e-6)


def test_a_token_far_from_all_others_does_not_take_every_reader():
    z = torch.tensor([[[8.0, 6.0], [0.0, 1.0]]])  # the first has rms sqrt(50): as a key it is (8, 6) / sqrt(50)
    query = torch.tensor([[1.0], [0.0]])
    share = 1 / (1 + math.exp(-8 / math.sqrt(50)))
    assert torch.allclose(Readers(query, None).read(z)[0, 0], torch.tensor([8 * share, 6 * share + 1 - share]), atol=1e-5)


def test_absent_tokens_are_not_read_and_a_counted_one_stands_for_many():
    z, readers = (
        torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)),
        draw_readers(6, torch.Generator(), torch.device("cpu")),
    )
    mask = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]])
    read = readers.read(z, mask)
    assert torch.allclose(read[:1], readers.read(z[:1, :2]), atol=1e-5)
    repeated = torch.cat([z[1:, :3], z[1:, 3:].repeat(1, 5, 1)], dim=1)
    counted = torch.tensor([[1.0, 1, 1, 5]])
    assert torch.allclose(readers.read(z[1:], counted), readers.read(repeated), atol=1e-5)
    assert presence_bias(counted).tolist()[0][3] == pytest.approx(math.log(5))


def test_a_counted_token_reads_and_corrects_as_many_equal_ones():
    """Padding is stored once: the network must make the same of it."""
    torch.manual_seed(0)
    network = ConditionRedirector(ConditionConfig(6, 2, width=16, heads=2)).eval()
    torch.nn.init.normal_(network.token_out.weight)
    tokens, weights = torch.randn(1, 4, 6), torch.ones(1, 2)
    counted, repeated = torch.tensor([[1.0, 1, 1, 7]]), torch.cat([tokens[:, :3], tokens[:, 3:].repeat(1, 7, 1)], dim=1)
    one, many = network.delta(tokens, None, weights, counted)[0], network.delta(repeated, None, weights)[0]
    assert one.abs().max() > 1e-3 and torch.allclose(one, many[:, :4], atol=1e-5)
    assert torch.allclose(network.harmfulness(tokens, None, counted), network.harmfulness(repeated), atol=1e-6)


def test_readers_are_drawn_in_equal_shares_of_temperature():
    readers = draw_readers(512, torch.Generator().manual_seed(0), torch.device("cpu"))
    spread = readers.queries.std(dim=0) * 512**0.5
    assert readers.sketch is None and readers.queries.shape == (512, 256)
    for i, temperature in enumerate((0.0, 1.0, 2.0, 4.0)):
        assert spread[64 * i : 64 * (i + 1)].mean() == pytest.approx(temperature, rel=0.03)


def test_wide_tokens_are_read_through_a_projection_that_keeps_distances():
    generator = torch.Generator().manual_seed(0)
    readers = draw_readers(4096, generator, torch.device("cpu"))
    a, b = torch.randn(2, 1, 5, 4096, generator=generator)
    assert readers.read(a).shape == (1, 256, 256)
    projected = ((a - b) @ readers.sketch).square().sum() / (a - b).square().sum()
    assert projected.item() == pytest.approx(1, abs=0.1)


def test_the_errors_of_two_pairs():
    before = torch.tensor([[[0.0, 0.0]], [[0.0, 0.0]]])
    partner = torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]]])
    after = torch.tensor([[[1.0, 1.0]], [[0.0, 4.0]]])
    errors = reader_errors(before, after, partner)
    assert errors.before.tolist() == [2.0, 8.0] and errors.after.tolist() == [1.0, 0.0]
    assert errors.error.tolist() == pytest.approx([1 / (2 + FLOOR * 5), 0.0])
    assert errors.unredirected.tolist() == pytest.approx([2 / 2.5, 8 / 8.5])
    assert errors.along.tolist() == pytest.approx([0.5, 1.0])  # half of the way, and a step aside that does not count


def test_the_pooled_error_is_in_the_networks_units():
    network = ConditionRedirector(ConditionConfig(4, 1, pooled_width=2, width=8, heads=2))
    network.pooled_scale.copy_(torch.tensor([1.0, 10.0]))
    pooled, partner = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 20.0]])
    corrected = torch.tensor([[2.0, 0.0]])
    # (0, -20) / (1, 10) = (0, -2): mean square 2; the way is (2, 2): 4, and a tenth of the batch's mean on top.
    assert pooled_error(network, pooled, corrected, partner).tolist() == pytest.approx([2 / 4.4])


def test_tokens_are_read_in_the_networks_units_and_the_error_reaches_the_network():
    network = ConditionRedirector(ConditionConfig(4, 2, width=8, heads=2))
    network.token_center.fill_(1.0), network.token_scale.fill_(0.5)
    assert token_units(network, torch.full((1, 2, 4), 2.0)).eq(2.0).all()
    assert token_units(network, torch.full((1, 2, 4), 99.0)).eq(20.0).all()  # an outlier must not rule
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    pairs = PairTexts(draw(3, 5, 4), None, None, draw(3, 4, 4), None, None, torch.ones(3, 2), torch.ones(3, 2))
    errors, pooled = text_errors(network, pairs, draw_readers(4, generator, torch.device("cpu")))
    assert pooled is None and torch.allclose(errors.error, errors.unredirected)  # an untrained one changes nothing
    errors.error.mean().backward()
    assert network.token_out.weight.grad.abs().max() > 0
