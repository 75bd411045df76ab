"""The guidance redirector's Triton kernels say what torch's layers say: on a GPU, or elsewhere in Triton's interpreter."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from torch.testing import assert_close

from helpers import info
from hgr_models import HGR, CategorySettings, fused, redirect_guidance, release_packed
from hgr_models.combined import CombinedHGR
from hgr_models.guidance import GuidanceConfig
from hgr_models.layers import pool

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
ALL = CategorySettings((1.0, 1.0), -1.0)
pytestmark = pytest.mark.skipif(not fused.has_triton(), reason="needs Triton 3.2, which there is for Linux")


def make_hgr(seed=0, dimensions=2, width=32, heads=2, channels=4) -> HGR:
    """Random weights everywhere, so that nothing is left out unnoticed."""
    torch.manual_seed(seed)
    config = GuidanceConfig(channels, 2, dimensions, width=width, read_depth=2, correct_depth=2, heads=heads)
    hgr = HGR(info(latent_dimensions=dimensions, latent_channels=channels), None, config)
    with torch.no_grad():
        for parameter in hgr.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return hgr.eval().requires_grad_(False).to(DEVICE)


@pytest.fixture(autouse=True)
def on(monkeypatch):
    """The kernels on this machine, taken to work: tests of their own try that."""
    monkeypatch.setattr(fused, "DEVICES", (DEVICE.type,))
    monkeypatch.setattr(fused, "_works", {DEVICE: True})
    with torch.no_grad():
        yield


def redirect(hgr, *shape, settings=ALL):
    """(result, cond_denoised) of a call whose inputs depend on the shape alone."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator).to(DEVICE) for _ in range(3)]
    sigma = torch.rand(shape[0], generator=generator).to(DEVICE)
    return redirect_guidance(hgr, *tensors, sigma, settings), tensors[0]


def packed(hgr) -> list:
    return [vars(module)["fused"] for module in hgr.modules() if "fused" in vars(module)]


def assert_same(hgr, *shape, settings=ALL):
    found, before = redirect(hgr, *shape, settings=settings)
    assert packed(hgr)
    with fused.without_fusing():
        plain, _ = redirect(hgr, *shape, settings=settings)
    change, wanted = found.cond_denoised - before, plain.cond_denoised - before
    assert (found.harmfulness - plain.harmfulness).abs().max() < 0.01
    assert (change - wanted).abs().max() < 0.01 * wanted.abs().max() and wanted.abs().max() > 0.1
    assert not torch.equal(change, wanted)  # it was another computation


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (2, 4, 9, 15), (1, 4, 2, 3), (1, 4, 40, 8)])
def test_pictures(shape):
    assert_same(make_hgr(), *shape)


@pytest.mark.parametrize("shape", [(1, 16, 1, 8, 8), (2, 16, 5, 9, 6)])
def test_video(shape):
    assert_same(make_hgr(dimensions=3, channels=16), *shape)


def test_the_shipped_width():
    assert_same(make_hgr(width=128, heads=4), 1, 4, 20, 20)


def test_large_tiles():
    assert_same(make_hgr(), 1, 4, 92, 94)


def test_combined_hgrs():
    assert_same(CombinedHGR([make_hgr(0), make_hgr(1)], ["a", "b"]), 1, 4, 10, 10, settings=CategorySettings((1.0,) * 4, -1.0))


def test_the_same_bits_every_time():
    hgr = make_hgr()
    results = [redirect(hgr, 2, 4, 20, 20)[0] for _ in range(3)]
    assert all(torch.equal(results[0].cond_denoised, result.cond_denoised) for result in results)


def test_unflagged_rows_stay_to_the_last_bit():
    result, before = redirect(make_hgr(), 2, 4, 16, 16, settings=CategorySettings((1.0, 1.0), 1.0))
    assert torch.equal(result.cond_denoised, before)


@pytest.mark.parametrize("count", [(1, 1), (1, 3), (9, 15)])
def test_the_strongest_places(count):
    from hgr_models import fused_kernels

    places = torch.randn(2, 3, 1, *count, device=DEVICE).round()  # with equal ones
    flat = places.flatten(2).transpose(1, 2).contiguous()
    assert_close(fused_kernels.strongest(flat, 4), pool(places))
    flat[0, 0, 1] = float("nan")
    assert fused_kernels.strongest(flat, 4).isnan().tolist() == [[False, True, False], [False] * 3]


def test_nan_counts_as_harmful():
    hgr = make_hgr()
    x = torch.full((1, 4, 16, 16), float("nan"), device=DEVICE)
    result = redirect_guidance(hgr, x, x, x, torch.ones(1, device=DEVICE), CategorySettings((1.0, 1.0)))
    assert packed(hgr) and (result.weights == 1).all()


def test_changed_weights_are_packed_anew():
    hgr = make_hgr()
    before, _ = redirect(hgr, 1, 4, 16, 16)
    first = packed(hgr)
    assert torch.equal(redirect(hgr, 1, 4, 16, 16)[0].cond_denoised, before.cond_denoised) and packed(hgr) == first
    hgr.guidance.residual.weight.mul_(-1)
    assert_same(hgr, 1, 4, 16, 16)
    assert packed(hgr) != first
    held = weakref.ref(packed(hgr)[0])
    gc.disable()
    try:
        release_packed(hgr)
        assert not packed(hgr) and held() is None  # at once: nobody collects cycles for the GPU's sake
    finally:
        gc.enable()


def test_a_copy_reads_its_own_weights():
    hgr = make_hgr()
    redirect(hgr, 1, 4, 16, 16)
    other = copy.deepcopy(hgr)
    other.guidance.residual.weight.mul_(-1)
    assert_same(other, 1, 4, 16, 16)


@pytest.mark.parametrize("why", ["gradients", "half", "brought", "patched", "elsewhere", "size", "no device"])
def test_torch_s_layers_where_the_kernels_cannot_be(why, monkeypatch):
    hgr, x = make_hgr(width=48 if why == "size" else 32), torch.zeros(1, 12, 8, 8, device=DEVICE)
    network = hgr.guidance
    if why == "half":
        network.half()
    elif why == "brought":
        network.stem._v = (1, 2, 3)
    elif why == "patched":
        network.stem.weight_function = [abs]
    elif why == "elsewhere":
        network.stem.to("meta")
    elif why == "no device":
        monkeypatch.setattr(fused, "DEVICES", ())
    with torch.set_grad_enabled(why == "gradients"):
        assert fused.fused_trunk(network, x) is None and not packed(hgr)


def test_tried_beside_torch_s_layers_once(monkeypatch, caplog):
    tried = []
    monkeypatch.setattr(fused, "_works", {})
    monkeypatch.setattr(fused, "CHECKED", ((10, 14),))
    read = fused.FusedTrunk.read_trunk
    monkeypatch.setattr(fused.FusedTrunk, "read_trunk", lambda self, x, *rest: tried.append(x.shape) or read(self, x, *rest))
    networks = [make_hgr(seed).guidance for seed in range(2)]
    state = torch.random.get_rng_state()
    assert all(fused.fused_trunk(network, torch.zeros(1, 12, 8, 8, device=DEVICE)) for network in networks)
    assert tried == [(1, 12, 10, 14)] and not caplog.records
    assert torch.equal(torch.random.get_rng_state(), state)  # a picture's noise does not depend on it


def test_weights_that_are_not_finite_say_nothing_of_the_kernels(monkeypatch, caplog):
    monkeypatch.setattr(fused, "_works", {})
    monkeypatch.setattr(fused, "CHECKED", ((10, 14),))
    spoilt, x = make_hgr().guidance, torch.zeros(1, 12, 8, 8, device=DEVICE)
    spoilt.stem.bias[0] = float("nan")
    assert fused.fused_trunk(spoilt, x) is None and not caplog.records
    assert fused.fused_trunk(make_hgr().guidance, x) is not None


@pytest.mark.parametrize("wrong", ["error", "numbers", "a NaN in the last one"])
def test_kernels_that_do_not_work_are_not_used(wrong, monkeypatch, caplog):
    """A compiler that is missing, or results that are off: said once, and torch's layers do the work."""
    monkeypatch.setattr(fused, "_works", {})
    monkeypatch.setattr(fused, "CHECKED", ((10, 14),))
    read, correct = fused.FusedTrunk.read_trunk, fused.FusedTrunk.correct_trunk

    def broken(self, *args):
        if wrong == "error":
            raise RuntimeError("Failed to find C compiler")
        features, places = read(self, *args)
        return features, (1.1 if wrong == "numbers" else 1.0) * places

    def nan(self, *args):
        *others, last = correct(self, *args)
        return [*others, last * float("nan")]

    monkeypatch.setattr(fused.FusedTrunk, "read_trunk", broken)
    if wrong == "a NaN in the last one":
        monkeypatch.setattr(fused.FusedTrunk, "correct_trunk", nan)
    hgr = make_hgr()
    with caplog.at_level(logging.WARNING):
        found = [redirect(hgr, 1, 4, 16, 16)[0] for _ in range(2)]
    with fused.without_fusing():
        assert torch.equal(found[0].cond_denoised, redirect(hgr, 1, 4, 16, 16)[0].cond_denoised)
    assert len(caplog.records) == 1 and ("C compiler" if wrong == "error" else "% off") in caplog.text
    assert not packed(hgr)
