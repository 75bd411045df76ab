"""Blocks of a network that keep only their inputs for the backward pass, and are computed again there.

`torch.utils.checkpoint` does the same for functions that leave their inputs alone. Blocks of core's networks add in place
(`x += ...`), share a dictionary of options that later blocks change, and may lie on another device between their turns.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.overrides import TorchFunctionMode

Place = Callable[[nn.Module], AbstractContextManager]  # where a block's weights are while it computes
KERNELS = "comfy_kitchen::"  # core's kernels, of which some have no backward pass


def blocks_of(module: nn.Module, listed: bool = False) -> Iterator[nn.Module]:
    """The largest modules inside lists of modules: residual and transformer blocks, whatever the architecture."""
    for child in module.children():
        is_list = isinstance(child, (nn.ModuleList, nn.Sequential))
        if listed and not is_list and any(True for _ in child.parameters()) and "forward" not in vars(child):
            yield child
        else:
            yield from blocks_of(child, is_list)


@contextmanager
def recomputed(module: nn.Module, place: Place | None = None) -> Iterator[None]:
    """Keeps only the inputs of a network's blocks for the backward pass, and computes the rest again, for a while."""
    blocks = list(blocks_of(module))
    for block in blocks:
        block.forward = _Block(block, place).forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is visible again


class _Block:
    """A block's forward pass, and what is known of it."""

    def __init__(self, block: nn.Module, place: Place | None):
        self.block, self.compute = block, block.forward
        self.mutates: bool | None = None  # whether it changes in place what its backward pass needs; None: not known yet
        self.place = nullcontext if place is None else lambda: place(block)

    def forward(self, *args, **kwargs) -> Any:
        """As the block's own; the graph holds one node for all of it."""
        tensors, structure = _take_tensors((args, kwargs))

        def run(inputs: Sequence[Tensor]) -> Any:
            again, keywords = _put_back(structure, inputs)
            with self.place(), PlainKernels():
                return self.compute(*again, **keywords)

        if not torch.is_grad_enabled() or not (any(t.requires_grad for t in tensors) or self._learns()):
            return run(tensors)
        # A tensor that requires a gradient: else a block whose inputs need none would not teach a LoRA inside it.
        anchor = torch.zeros((), requires_grad=True)
        found: list = []
        results = _Recomputed.apply(self, run, found, anchor, *tensors)
        return _put_back(found[0], results)

    def _learns(self) -> bool:
        """Whether weights inside it learn: its own, or those of a LoRA in hooks."""
        hooked = any(module._forward_hooks for module in self.block.modules())
        return hooked or any(parameter.requires_grad for parameter in self.block.parameters())


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a structure holds a tensor."""

    index: int


def _take_tensors(value: object) -> tuple[list[Tensor], object]:
    """The tensors of nested tuples, lists, dictionaries and dataclasses, and the structure without them."""
    tensors: list[Tensor] = []

    def take(tensor: Tensor) -> _Place:
        tensors.append(tensor)
        return _Place(len(tensors) - 1)

    return tensors, _walked(value, Tensor, take)


def _put_back(structure: object, tensors: Sequence[Tensor]) -> Any:
    """A structure of `_take_tensors` with tensors in its places; containers are new ones."""
    return _walked(structure, _Place, lambda place: tensors[place.index])


def _walked(value: object, kind: type, visit: Callable) -> Any:
    if isinstance(value, kind):
        return visit(value)
    again = lambda part: _walked(part, kind, visit)  # noqa: E731
    if type(value) is dict:
        return {key: again(part) for key, part in value.items()}
    if isinstance(value, tuple):
        parts = map(again, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if type(value) is list:
        return list(map(again, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, _Place)):  # such as Chroma's modulations
        return dataclasses.replace(value, **{f.name: again(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init})
    return value


class _Recomputed(torch.autograd.Function):
    """One block in the graph; `ctx` is autograd's own, which takes any attribute."""

    @staticmethod
    def forward(ctx: Any, block: _Block, run: Callable, found: list, anchor: Tensor, *inputs: Tensor) -> Any:
        ctx.block, ctx.run = block, run
        ctx.save_for_backward(*inputs)
        outputs, structure = _take_tensors(run([t.clone() for t in inputs]))  # copies: a block may add to its inputs
        found.append(structure)
        outputs = [t.clone() if t._is_view() else t for t in outputs]  # autograd lets nobody add to parts of one tensor
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        block, inputs = ctx.block, [t.detach() for t in ctx.saved_tensors]
        needed = ctx.needs_input_grad[4:]
        inputs = [t.requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
        if block.mutates is None:
            block.mutates = _mutates(ctx.run, inputs, gradients)
        with torch.enable_grad(), allow_mutation_on_saved_tensors() if block.mutates else nullcontext():
            outputs, given = _differentiable(ctx.run, inputs, gradients)
            if outputs:
                torch.autograd.backward(outputs, given)
        return None, None, None, None, *(t.grad for t in inputs)


def _differentiable(
    run: Callable, inputs: list[Tensor], gradients: tuple[Tensor | None, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """A block's outputs, computed again, that have a gradient, and their gradients."""
    outputs, _ = _take_tensors(run([t.clone() for t in inputs]))
    both = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
    return [o for o, _ in both], [g for _, g in both]


def _mutates(run: Callable, inputs: list[Tensor], gradients: tuple[Tensor | None, ...]) -> bool:
    """Whether a block changes in place what its backward pass needs; autograd notices that, at the price of one pass."""
    needed = [t for t in inputs if t.requires_grad]
    try:
        with torch.enable_grad():
            outputs, given = _differentiable(run, inputs, gradients)
            if outputs and needed:
                torch.autograd.grad(outputs, needed, given, allow_unused=True)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        return True
    return False


class PlainKernels(TorchFunctionMode):
    """While it is on, core's kernels that have no backward pass are computed by plain torch, which has one."""

    def __torch_function__(self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "_qualified_op_name", "")
        if name.startswith(KERNELS) and torch.is_grad_enabled():
            func = _plain(name.removeprefix(KERNELS)) or func
        return func(*args, **kwargs)


def _plain(name: str) -> Callable | None:
    """comfy-kitchen's own implementation of a rotary kernel in plain torch; None where there is none."""
    from comfy_kitchen.backends.eager import rope

    return None if name.endswith("_") else getattr(rope, name, None)
