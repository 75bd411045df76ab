"""The guidance redirector as a CUDA graph: when it is one (anywhere), and that it says what the plain call says (on a GPU)."""

import gc
import logging

import pytest
import torch

from helpers import small_hgr
from hgr_models import CategorySettings, GraphedGuidance, GuidanceResult, graphed, redirect_guidance
from hgr_models.combined import CombinedHGR

ALL = CategorySettings((1.0, 1.0), threshold_offset=-1.0)
SOME = CategorySettings((1.0, 0.5))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_failed(monkeypatch):
    monkeypatch.setattr(GraphedGuidance, "failed", False)


class FakeGraph:
    """Replays by calling; `made` counts captures."""

    made = 0

    def __init__(self, hgr, settings, inputs):
        type(self).made += 1
        self.hgr, self.settings = hgr, settings

    def replay(self, inputs):
        result = redirect_guidance(self.hgr, *inputs[:4], self.settings, *inputs[4:])
        return GuidanceResult(result.cond_denoised, result.harmfulness, "replayed")


@pytest.fixture
def fake(monkeypatch):
    """Graphs on a CPU."""
    monkeypatch.setattr(FakeGraph, "made", 0)
    monkeypatch.setattr(graphed, "Graph", FakeGraph)
    monkeypatch.setattr(graphed, "fit_for_graphs", lambda inputs: True)
    return FakeGraph


def latents(batch=1, size=8, device=CPU, seed=0):
    """cond_denoised, uncond_denoised, x_in and sigma."""
    generator = torch.Generator().manual_seed(seed)
    tensors = torch.randn(3, batch, 4, size, size, generator=generator)
    return [t.to(device) for t in (*tensors, 3 * torch.rand(batch, generator=generator))]


def replayed(call, hgr, inputs, settings=ALL, flagged=None, redirect=redirect_guidance) -> bool:
    return isinstance(call(redirect, hgr, inputs, settings, flagged).weights, str)


def test_a_graph_from_the_second_call_of_a_kind_on(fake):
    call, hgr = GraphedGuidance(), small_hgr()
    assert [replayed(call, hgr, latents(seed=i)) for i in range(3)] == [False, True, True] and fake.made == 1
    flagged, half = torch.ones(1, 2), [t.half() for t in latents()]
    for inputs, settings, held in (
        (latents(2), ALL, None),
        (latents(), SOME, None),
        (latents(), ALL, flagged),
        (half, ALL, None),
    ):
        assert [replayed(call, hgr, inputs, settings, held) for _ in range(2)] == [False, True]
    assert fake.made == 5


def test_few_graphs_at_a_time(fake):
    call, hgr = GraphedGuidance(), small_hgr()
    for size in range(4, 12):
        replayed(call, hgr, latents(size=size))
        assert replayed(call, hgr, latents(size=size))
    assert len(call.kinds) == graphed.MOST
    assert replayed(call, hgr, latents(size=11)) and not replayed(call, hgr, latents(size=4))


def test_weights_that_moved_are_captured_again(fake):
    call, hgr = GraphedGuidance(), small_hgr()
    assert [replayed(call, hgr, latents()) for _ in range(2)] == [False, True]
    hgr.guidance.stem.weight = torch.nn.Parameter(hgr.guidance.stem.weight.clone(), requires_grad=False)
    assert [replayed(call, hgr, latents()) for _ in range(2)] == [False, True]
    hgr.guidance_thresholds = hgr.guidance_thresholds.clone()
    assert [replayed(call, hgr, latents()) for _ in range(2)] == [False, True]
    assert fake.made == 3 and len(call.kinds) == 1


def test_cleared(fake):
    call, hgr = GraphedGuidance(), small_hgr()
    assert [replayed(call, hgr, latents()) for _ in range(2)] == [False, True]
    call.clear()
    assert not call.kinds and not replayed(call, hgr, latents())


def test_another_function_in_its_place_is_called(fake):
    call, calls = GraphedGuidance(), []
    other = lambda *args: calls.append(args) or "its result"  # noqa: E731
    inputs = latents()
    assert [call(other, None, inputs, ALL, None) for _ in range(3)] == ["its result"] * 3
    assert calls[2] == (None, *inputs, ALL, None)


def test_a_capture_that_fails_is_said_once(fake, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphed, "Graph", broken)
    call, hgr = GraphedGuidance(), small_hgr()
    wanted = redirect_guidance(hgr, *latents(), ALL).cond_denoised
    with caplog.at_level(logging.INFO):
        for _ in range(4):
            assert torch.equal(call(redirect_guidance, hgr, latents(), ALL).cond_denoised, wanted)
    assert not any(replayed(GraphedGuidance(), hgr, latents()) for _ in range(3))  # nor in later runs
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "not permitted" in caplog.text
    assert not call.kinds


def test_an_interrupted_capture_is_no_failure(fake, monkeypatch):
    """ComfyUI's layers raise in the middle when the user stops the run: in 0.3.64 an Exception, in 0.29 a BaseException."""
    for kind in (Exception, BaseException):

        class Interrupted(kind):
            pass

        def stop(*args, error=Interrupted):
            raise error

        monkeypatch.setattr(graphed, "Graph", stop)
        call, hgr = GraphedGuidance(), small_hgr()
        replayed(call, hgr, latents())
        with pytest.raises(Interrupted):
            replayed(call, hgr, latents())
        assert not call.failed


def test_not_on_a_cpu():
    call, hgr = GraphedGuidance(), small_hgr()
    with torch.no_grad():
        assert not graphed.fit_for_graphs(latents())
        for _ in range(3):
            call(redirect_guidance, hgr, latents(), ALL)
    assert not call.kinds


@pytest.mark.parametrize("combined", [False, True])
def test_weights_that_a_host_brings_at_every_call_have_no_address(combined):
    """ComfyUI's layers; its own are in tests/host/test_memory.py."""
    hgr = CombinedHGR([small_hgr(), small_hgr(1)], ["a", "b"]) if combined else small_hgr()
    part = hgr.guidance.networks[1] if combined else hgr.guidance
    addresses = graphed.resident_addresses(hgr, CPU)
    assert part.stem.weight.data_ptr() in addresses and hgr.guidance_thresholds.data_ptr() in addresses
    assert hgr.condition is not None and len(addresses) == len(list(hgr.guidance.parameters())) + 3
    assert graphed.resident_addresses(hgr, torch.device("meta")) is None
    for name, value, at_rest in (("_v", (1, 2, 3), None), ("weight_function", [abs], []), ("bias_function", [abs], [])):
        setattr(part.stem, name, value)
        assert graphed.resident_addresses(hgr, CPU) is None
        delattr(part.stem, name) if at_rest is None else setattr(part.stem, name, at_rest)
        assert graphed.resident_addresses(hgr, CPU) == addresses
    hgr.guidance_levels = hgr.guidance_levels.to("meta")  # low VRAM: buffers stay behind
    assert graphed.resident_addresses(hgr, CPU) is None


def test_tensors_of_another_kind_have_no_address():
    class Quantized(torch.Tensor):
        pass

    hgr = small_hgr()
    hgr.guidance_thresholds = hgr.guidance_thresholds.as_subclass(Quantized)
    assert graphed.resident_addresses(hgr, CPU) is None


def same(one, other) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("cond_denoised", "harmfulness", "weights"))


@pytest.fixture
def gpu():
    """A CUDA device; like ComfyUI, without gradients."""
    with torch.no_grad():
        yield torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [ALL, SOME])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_graph_says_what_the_plain_call_says(gpu, settings, held, dtype):
    call, hgr, results = GraphedGuidance(), small_hgr().to(gpu), []
    for seed in range(6):
        inputs = [t.to(dtype) for t in latents(2, 16, gpu, seed)]
        flagged = torch.tensor([[0.0, seed % 2], [0.0, 0.0]], device=gpu) if held else None
        results.append((call(redirect_guidance, hgr, inputs, settings, flagged), inputs, flagged))
    assert len(call.kinds) == 1 and next(iter(call.kinds.values())).graph is not None
    for result, inputs, flagged in results:  # now: no later call has written into them
        assert same(result, redirect_guidance(hgr, *inputs, settings, flagged))
        unflagged = ~(result.weights > 0).any(dim=1)
        assert torch.equal(result.cond_denoised[unflagged], inputs[0][unflagged])


@pytest.mark.gpu
def test_a_graph_of_combined_hgrs_and_of_video(gpu):
    hgrs = [small_hgr(seed, dimensions=3).to(gpu) for seed in range(2)]
    for hgr, settings in ((hgrs[0], ALL), (CombinedHGR(hgrs, ["a", "b"]).to(gpu), CategorySettings((1.0,) * 4, -1.0))):
        call = GraphedGuidance()
        for seed in range(3):
            *three, sigma = latents(2, 8, gpu, seed)
            inputs = [*(t[:, :, None].repeat(1, 1, 3, 1, 1) for t in three), sigma]
            assert same(call(redirect_guidance, hgr, inputs, settings), redirect_guidance(hgr, *inputs, settings))
        assert next(iter(call.kinds.values())).graph is not None


@pytest.mark.gpu
def test_a_graph_in_inference_mode_and_out_of_it(gpu):
    call = GraphedGuidance()
    with torch.inference_mode():
        hgr = small_hgr().to(gpu)
    for seed, inference in enumerate((True, True, False, True, False)):
        with torch.inference_mode(inference):
            inputs = latents(1, 8, gpu, seed)
            assert same(call(redirect_guidance, hgr, inputs, ALL), redirect_guidance(hgr, *inputs, ALL))


@pytest.mark.gpu
def test_nan_counts_as_harmful_in_a_graph(gpu):
    call, hgr = GraphedGuidance(), small_hgr().to(gpu)
    for seed in range(3):
        inputs = latents(2, 8, gpu, seed)
        inputs[1][0] = float("nan")
        result = call(redirect_guidance, hgr, inputs, SOME)
        assert (result.weights[0] > 0).all() and not torch.equal(result.cond_denoised[0], inputs[0][0])


@pytest.mark.gpu
def test_a_graph_follows_its_weights(gpu):
    """Written to in place, and moved."""
    call, hgr, inputs = GraphedGuidance(), small_hgr().to(gpu), latents(1, 8, gpu)
    call(redirect_guidance, hgr, inputs, ALL)
    before = call(redirect_guidance, hgr, inputs, ALL)
    hgr.guidance.residual.weight.mul_(2)
    assert not same(call(redirect_guidance, hgr, inputs, ALL), before)
    hgr.cpu()
    hgr.guidance.residual.weight.mul_(2)
    torch.cuda.empty_cache()
    taken = torch.zeros(2**20, device=gpu)  # where the weights may have been
    hgr.to(gpu)
    wanted = redirect_guidance(hgr, *inputs, ALL)
    assert all(same(call(redirect_guidance, hgr, inputs, ALL), wanted) for _ in range(3)) and not taken.any()


@pytest.mark.gpu
def test_a_cleared_graph_gives_its_memory_back(gpu):
    call, hgr, inputs = GraphedGuidance(), small_hgr().to(gpu), latents(1, 64, gpu)
    for _ in range(3):
        call(redirect_guidance, hgr, inputs, ALL)
    call.clear()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(gpu)
    for _ in range(2):
        for _ in range(3):
            call(redirect_guidance, hgr, inputs, ALL)
        assert torch.cuda.memory_allocated(gpu) > before
        call.clear()
        gc.collect()
        assert torch.cuda.memory_allocated(gpu) == before


@pytest.mark.gpu
def test_a_call_that_waits_for_the_host_is_made_plainly(gpu, monkeypatch, caplog):
    """A capture that CUDA itself refuses; the device stays usable."""
    call, hgr, inputs = GraphedGuidance(), small_hgr().to(gpu), latents(1, 8, gpu)
    wanted, read = redirect_guidance(hgr, *inputs, ALL), hgr.guidance.read

    def looks(direction, *rest):
        direction.sum().item()
        return read(direction, *rest)

    monkeypatch.setattr(hgr.guidance, "read", looks)
    assert all(same(call(redirect_guidance, hgr, inputs, ALL), wanted) for _ in range(4))
    assert call.failed and len(caplog.records) == 1
    before = torch.cuda.memory_allocated(gpu)
    for _ in range(3):  # memory used on two streams is freed when both are done
        used = torch.zeros(2**20, device=gpu)
        used.record_stream(torch.cuda.Stream(gpu))
        del used
        torch.cuda.synchronize()
        torch.zeros(1, device=gpu)
        assert torch.cuda.memory_allocated(gpu) <= before + 2**20


@pytest.mark.gpu
def test_no_graph_within_a_graph_or_with_gradients(gpu):
    call, hgr, inputs = GraphedGuidance(), small_hgr().to(gpu), latents(1, 8, gpu)
    with torch.enable_grad():
        for _ in range(3):
            call(redirect_guidance, hgr, inputs, ALL)
    assert not call.kinds
    outer = torch.cuda.CUDAGraph()
    with torch.cuda.graph(outer):
        result = call(redirect_guidance, hgr, inputs, ALL)
    assert not call.kinds
    outer.replay()
    assert same(result, redirect_guidance(hgr, *inputs, ALL))
