"""A training or attack step as one CUDA graph: launching the small kernels of the demo's networks one by one takes several times as long."""

from collections.abc import Callable

import torch
from torch import Tensor


class Replayed:
    """A function of tensors, whose shapes never change, that is replayed as a CUDA graph from its second call on.

    All that it changes it must change in place, and all else that it reads must stay where it is. On a CPU it is called as it is.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device):
        self.function, self.device = function, device
        self.inputs: list[Tensor] = []
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *given: Tensor) -> Tensor:
        """What the function returns; on a GPU the next call overwrites it."""
        if self.device.type != "cuda":
            return self.function(*given)
        if self.graph is None:
            return self._capture([each.to(self.device) for each in given])
        for own, each in zip(self.inputs, given, strict=True):
            own.copy_(each)
        self.graph.replay()
        return self.found

    def _capture(self, inputs: list[Tensor]) -> Tensor:
        """Makes this call on a stream of its own, as CUDA graphs ask for, and then records one."""
        self.inputs, side = inputs, torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            first = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = self.function(*inputs)
        return first
