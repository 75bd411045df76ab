"""The guidance redirector: any size, 2-D and 3-D latents, local pooling, linear cost."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from helpers import small_hgr
from hgr_models import CategorySettings, layers, redirect_guidance
from hgr_models.layers import averaged_by_axis, chunked_group_norm, pool
from hgr_models.losses import guidance_losses
from hgr_models.recording import Points
from hgr_models.redirection import read_guidance

ALL = CategorySettings((1.0, 1.0), -1.0)


def redirect(hgr, *shape):
    cond, uncond, x = torch.randn(3, *shape)
    return cond, redirect_guidance(hgr, cond, uncond, x, torch.ones(shape[0]), ALL)


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (2, 4, 9, 15), (1, 4, 2, 3), (1, 4, 40, 8)])
def test_takes_any_picture_size(shape):
    cond, result = redirect(small_hgr(), *shape)
    assert result.cond_denoised.shape == shape and not torch.equal(result.cond_denoised, cond)


@pytest.mark.parametrize("shape", [(1, 16, 1, 8, 8), (2, 16, 5, 9, 6)])
def test_takes_video(shape):
    cond, result = redirect(small_hgr(dimensions=3, channels=16), *shape)
    assert result.cond_denoised.shape == shape and not torch.equal(result.cond_denoised, cond)


def test_starts_as_no_change():
    cond, result = redirect(small_hgr(zero=True), 2, 4, 8, 8)
    assert_close(result.cond_denoised, cond)
    assert (result.weights > 0).all()  # flagged, and yet nothing to add


def test_small_harm_in_a_large_picture_counts_in_full():
    places = torch.full((1, 1, 1, 64, 64), -8.0)
    places[..., 10:12, 20:22] = 6.0
    assert pool(places).item() == pytest.approx(6.0)


def test_one_harmful_frame_of_a_video_counts_in_full():
    places = torch.full((1, 1, 3, 4, 4), -6.0)
    places[0, 0, 1, :2, :2] = 5.0
    assert pool(places).tolist() == [[5.0]]
    network = small_hgr(dimensions=3).guidance
    x = torch.randn(1, 4, 3, 8, 8)
    reading = network.read(x, x, x, torch.zeros(1), torch.zeros(1))
    assert_close(reading.picture_logits, reading.picture_places.flatten(2).topk(4).values.mean(dim=2))


def test_cost_is_linear_in_pixels():
    def flops(size):
        with FlopCounterMode(display=False) as counter:
            redirect(small_hgr(), 1, 4, size, size)
        return counter.get_total_flops()

    assert flops(128) / flops(64) == pytest.approx(4.0, rel=0.02)


def test_the_embedding_starts_from_sinusoids_of_both_scalars():
    network = small_hgr().guidance
    network.embed = torch.nn.Identity()
    log_snr, log_norm = torch.tensor([-5.0, 3.0]), torch.tensor([-1.5, 0.25])
    frequencies = 2.0 ** torch.linspace(-4, 2, 16)
    angles = torch.cat([log_snr[:, None] * frequencies, log_norm[:, None] * frequencies], dim=1) * (torch.pi / 2)
    wanted = torch.nn.functional.silu(torch.cat([angles.sin(), angles.cos()], dim=1))
    assert_close(network._embedding(log_snr, log_norm), wanted, atol=1e-5, rtol=0)


def test_a_closed_attenuation_still_learns():
    network = small_hgr().guidance
    reading = network.read(*torch.randn(3, 2, 4, 8, 8), torch.zeros(2), torch.zeros(2))
    network.attenuation.bias = torch.nn.Parameter(torch.tensor([50.0]))
    a = network.correct(reading, torch.ones(2, 2), elsewhere=1.0)[0]
    assert_close(a, torch.ones_like(a))
    a.sum().backward()
    assert network.attenuation.bias.grad.item() == pytest.approx(a.numel())


def test_the_correction_depends_on_the_category_weights():
    network = small_hgr().guidance
    inputs = torch.randn(3, 1, 4, 8, 8)
    reading = network.read(*inputs, torch.zeros(1), torch.zeros(1))
    one, both = (network.correct(reading, torch.tensor([w]))[1] for w in ([1.0, 0.0], [1.0, 1.0]))
    assert (one - both).abs().max() > 1e-4


@pytest.mark.parametrize("length", [(1, 4, 4), (1, 9, 17), (6, 32, 20)])
def test_averaging_axis_by_axis_is_torch_s(length):
    video = torch.randn(2, 3, *length)
    size = [min(n, m) for n, m in zip(length, (4, 8, 8), strict=True)]
    assert_close(averaged_by_axis(video, size), torch.nn.functional.adaptive_avg_pool3d(video, size))


def test_what_is_far_from_the_harm_changes_less():
    network = small_hgr().guidance
    reading = network.read(*torch.randn(3, 1, 4, 16, 16), torch.zeros(1), torch.zeros(1))
    reading.places = torch.full_like(reading.places, -9.0)
    reading.places[:, 0, :, 1, 1], reading.places[:, 1, :, 6, 6] = 9.0, 9.0
    whole, some = (network.correct(reading, torch.tensor([[1.0, 0.0]]), elsewhere)[1] for elsewhere in (1.0, 0.5))
    assert_close(some[..., :6, :6], whole[..., :6, :6], rtol=1e-3, atol=1e-4)  # the harm's place, and those beside it
    assert_close(some[..., 6:, 6:], whole[..., 6:, 6:] / 2, rtol=1e-2, atol=1e-3)  # harm of a category that is not flagged


def test_half_of_the_change_is_left_far_from_the_harm():
    """By hand: logits of -99 everywhere are far from any harm, and the default leaves 0.5 there."""
    network = small_hgr().guidance
    x, one = torch.randn(1, 4, 8, 8), torch.zeros(1)
    reading, weights = network.read(x, x, x, one, one), torch.ones(1, 2)
    reading.places = torch.full_like(reading.places, -99.0)
    (a, r), (whole_a, whole_r) = network.correct(reading, weights), network.correct(reading, weights, elsewhere=1.0)
    assert r.abs().max() > 0.01
    assert_close(r, 0.5 * whole_r)
    assert_close(a, 0.5 * whole_a)


def test_training_teaches_the_whole_change():
    """Far from every harm, too, where a sampler would apply half of it."""
    network = small_hgr().guidance
    torch.nn.init.constant_(network.read_head.bias, -99.0)
    cond, target = torch.randn(2, 1, 4, 8, 8)
    points = Points(cond, torch.ones(1), torch.ones(1), 0 * cond, cond, cond, torch.zeros(1, 2), torch.arange(1))
    error = guidance_losses(network, points, torch.zeros(1, 2), torch.ones(1, 2), target, torch.ones(1))[0]
    direction, n, reading = read_guidance(network, cond, 0 * cond, cond, torch.ones(1))
    whole, half = (network.correct(reading, torch.ones(1, 2), elsewhere) for elsewhere in (1.0, 0.5))
    by_hand = [((r - a * direction) - (target - cond) / n).square().mean() for a, r in (whole, half)]
    assert_close(error[0], by_hand[0])
    assert abs(by_hand[0] - by_hand[1]) > 1e-3


@pytest.mark.parametrize("shape", [(1, 16, 8, 8), (3, 16, 16, 24)])
def test_group_norm_by_chunks_is_torch_s(shape):
    x, weight, bias = torch.randn(shape) * 3 + 5, torch.randn(16), torch.randn(16)
    wanted = torch.nn.functional.group_norm(x, 8, weight, bias, 1e-5)
    assert_close(chunked_group_norm(x, 8, weight, bias, 1e-5), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_large_pictures_are_normalised_by_chunks_unless_the_layer_brings_its_weights(monkeypatch):
    monkeypatch.setattr(layers, "ONE_BLOCK", ("cpu",))
    monkeypatch.setattr(layers, "LARGE", 16 * 16 * 16)
    chunked = []
    monkeypatch.setattr(layers, "chunked_group_norm", lambda x, *rest: chunked.append(x.shape) or chunked_group_norm(x, *rest))
    norm, large, small = torch.nn.GroupNorm(8, 16), torch.randn(1, 16, 16, 16), torch.randn(1, 16, 8, 8)
    norm.weight_function = []  # as ComfyUI's layers have it
    for x in (large, small):
        assert_close(layers.normed(norm, x), norm(x), rtol=1e-5, atol=1e-5)
    assert chunked == [large.shape]
    with torch.enable_grad():
        layers.normed(norm, large)
    for name, value in (("_v", (1, 2, 3)), ("weight_function", [abs]), ("bias_function", [abs])):
        layer = torch.nn.GroupNorm(8, 16)
        setattr(layer, name, value)
        assert_close(layers.normed(layer, large), norm(large))
    assert len(chunked) == 1
