"""Weights that do not fit beside what a backward pass keeps: blocks come to the device for their turn, and go again."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .recompute import blocks_of


class Streaming:
    """Brings a network's blocks to a device one by one; counts the bytes of weights that are there at once."""

    def __init__(self, device: torch.device):
        self.device, self.resident, self.peak = device, 0, 0

    @contextmanager
    def place(self, block: nn.Module) -> Iterator[None]:
        """A block's weights on the device, for a while; what autograd keeps of them stays until it is done with them."""
        with self._copied(block.modules()):
            yield

    @contextmanager
    def around(self, model: nn.Module, network: nn.Module) -> Iterator[None]:
        """Everything of a model but its network's blocks on the device, for a while."""
        blocks = {id(part) for block in blocks_of(network) for part in block.modules()}
        with self._copied(part for part in model.modules() if id(part) not in blocks):
            yield

    @contextmanager
    def _copied(self, parts: Iterable[nn.Module]) -> Iterator[None]:
        changed, size = [], 0
        for part in parts:
            stores: tuple[dict, dict] = (part._parameters, part._buffers)
            for store in stores:
                for name, value in store.items():
                    if value is not None:
                        there = value.detach().to(self.device, copy=True)
                        changed.append((store, name, value))
                        store[name] = nn.Parameter(there, requires_grad=False) if store is part._parameters else there
                        held = getattr(
                            value, "_qdata", value
                        )  # of core's quantised weights, which say the size of what they stand for
                        size += held.numel() * held.element_size()
        self.resident += size
        self.peak = max(self.peak, self.resident)
        try:
            yield
        finally:
            self.resident -= size
            for store, name, value in changed:
                store[name] = value
