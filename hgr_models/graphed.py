"""The guidance redirector as one CUDA graph: its kernels are so small that launching each of them takes longer than running it.

Speed only: wherever a graph cannot be had, the redirector is called as it is, with the same result.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from .host_layers import brings_weights
from .redirection import CategorySettings, GuidanceResult, redirect_guidance, strengths_on

MOST = 4  # kinds of calls (shapes, settings) that keep a graph, each with the activations of one call

logger = logging.getLogger(__name__)


@dataclass
class Kind:
    """Calls that one graph can answer, while the weights lie at `addresses`; `graph` is None until the second one."""

    addresses: tuple[int, ...]
    graph: "Graph | None" = None


class GraphedGuidance:
    """Calls the guidance redirector, from the second call of a kind on as a graph. Holds GPU memory until `clear`."""

    failed = False  # in this process: whatever refused one capture will refuse the next

    def __init__(self):
        self.kinds: dict[tuple, Kind] = {}

    def __call__(
        self,
        redirect: Callable[..., GuidanceResult],
        hgr: nn.Module,
        tensors: Sequence[Tensor],
        settings: CategorySettings,
        flagged: Tensor | None = None,
    ) -> GuidanceResult:
        """`redirect(hgr, *tensors, settings, flagged)`; `tensors` are cond_denoised, uncond_denoised, x_in and sigma.

        `redirect` is `redirect_guidance`, or what somebody put in its place, which is called as it is. No later call changes
        the tensors of a result.
        """
        inputs = [*tensors] if flagged is None else [*tensors, flagged]
        if self.failed or redirect is not redirect_guidance or not fit_for_graphs(inputs):
            return redirect(hgr, *tensors, settings, flagged)
        if (addresses := resident_addresses(hgr, inputs[0].device)) is None:
            return redirect(hgr, *tensors, settings, flagged)
        key = (hgr, settings, *((t.shape, t.dtype) for t in inputs))
        kind = self.kinds.get(key)
        if kind is None or kind.addresses != addresses:  # a graph would read where the weights were
            self.kinds[key] = Kind(addresses)
            if len(self.kinds) > MOST:
                del self.kinds[next(iter(self.kinds))]
            return redirect(hgr, *tensors, settings, flagged)
        if kind.graph is None:
            try:
                kind.graph = Graph(hgr, settings, inputs)
            except RuntimeError as error:
                GraphedGuidance.failed = True
                self.clear()
                logger.warning("SafeCFG: redirecting guidance without a CUDA graph, which takes a little longer: %s", error)
                return redirect(hgr, *tensors, settings, flagged)
        return kind.graph.replay(inputs)

    def clear(self) -> None:
        """Lets go of all graphs and their memory."""
        self.kinds.clear()


class Graph:
    """`redirect_guidance` with inputs like `inputs` (cond_denoised, uncond_denoised, x_in, sigma and, maybe, flagged).

    Raises RuntimeError when it cannot be captured.
    """

    def __init__(self, hgr: nn.Module, settings: CategorySettings, inputs: Sequence[Tensor]):
        device = inputs[0].device
        self.strengths = strengths_on(settings, device)  # the graph reads this tensor, and the cache may forget it
        current, side = torch.cuda.current_stream(device), _side_stream(device)
        # ComfyUI's inference mode would make tensors that nobody can write to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [torch.empty(t.shape, dtype=t.dtype, device=device).copy_(t) for t in inputs]
            call = lambda: redirect_guidance(hgr, *self.inputs[:4], settings, *self.inputs[4:])  # noqa: E731
            side.wait_stream(current)
            with torch.cuda.stream(side):
                call()  # libraries choose and allocate on this stream what they keep
                self.graph, self.result = _captured(call, device)
            current.wait_stream(side)

    def replay(self, inputs: Sequence[Tensor]) -> GuidanceResult:
        """What the call gives for these inputs."""
        torch._foreach_copy_(self.inputs, list(inputs))  # launched together
        self.graph.replay()
        result = self.result
        return GuidanceResult(result.cond_denoised.clone(), result.harmfulness.clone(), result.weights.clone())


def _captured(call: Callable[[], GuidanceResult], device: torch.device) -> tuple[torch.cuda.CUDAGraph, GuidanceResult]:
    """The graph of what a call does on the current stream, and its result, whose tensors every replay fills.

    Not `torch.cuda.graph`: it empties the cache of freed memory, which the denoiser would have to fill again.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        try:
            result = call()
        finally:
            graph.capture_end()
    except RuntimeError:
        # torch's allocator does not hear of the end of a capture that CUDA refuses: it would free nothing any more.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
            torch._C._cuda_releasePool(device.index, pool)
        raise
    return graph, result


def fit_for_graphs(inputs: Sequence[Tensor]) -> bool:
    """Whether a call on these tensors could be a graph: all on one NVIDIA GPU, nothing learns, and no graph is being made."""
    device = inputs[0].device
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and all(t.device == device for t in inputs)
        and not torch.is_grad_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def resident_addresses(hgr: nn.Module, device: torch.device) -> tuple[int, ...] | None:
    """Where everything lies that a call reads; None unless all of it is on the device and stays there from call to call."""
    addresses = []
    for layer in (hgr, *hgr.guidance.modules()):
        if brings_weights(layer):
            return None
        own = vars(layer)  # `parameters()` would take three times as long, in every step
        for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
            if tensor is None:
                continue
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.device != device:
                return None
            addresses.append(tensor.data_ptr())
    return tuple(addresses)


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream to capture on; always the same, because libraries keep memory for every stream that they were used on."""
    return torch.cuda.Stream(device)
