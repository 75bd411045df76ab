"""What a call costs: FLOPs, operations, bytes alive at once, GPU kernels, and seconds beside another call."""

import statistics
import time
import weakref
from collections.abc import Callable, Mapping

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

Run = Callable[[], object]
NO_KERNEL = ("aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided")


def _attention_flops(query, key, value, *args, out_val=None, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


# PyTorch's counter takes a CPU's attention for nothing; with `get_raw` it hands over tensors.
_attention_flops._get_raw = True
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class _Tally(TorchDispatchMode):
    """Counts operations that compute, and the bytes of the tensors that they make and that are alive at once."""

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = [value.alias_info for value in func._schema.returns]
        if func._schema.name not in NO_KERNEL and any(alias is None or alias.is_write for alias in aliases):
            self.operations += 1
        if all(alias is None for alias in aliases):
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self._made(tensor.untyped_storage())
        return out

    def _made(self, storage) -> None:
        if storage not in self.seen:
            self.seen[storage] = size = storage.nbytes()
            weakref.finalize(storage, self._freed, size)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def _freed(self, size: int) -> None:
        self.bytes -= size


def count(run: Run) -> dict[str, int]:
    """FLOPs (a multiplication and an addition are two), operations that are no views, and the peak of bytes made, of one call."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops, _Tally() as tally:
        run()
    return {"flops": flops.get_total_flops(), "operations": tally.operations, "peak_bytes": tally.peak}


def kernels(run: Run) -> int:
    """GPU kernels and copies of one call."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())


def gpu_peak_bytes(run: Run) -> int:
    """Bytes that one call holds at most on the GPU, beyond those that were held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def graphed(run: Run) -> Run:
    """The call as a CUDA graph. Raises RuntimeError for one that cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds(run: Run, times: int, gpu: bool) -> float:
    """Wall-clock seconds per call of `times` calls; on a GPU, until the last one has ended."""
    wait = torch.cuda.synchronize if gpu else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - start) / times


def beside(
    step: Run, extras: Mapping[str, Run], repeats: int, gpu: bool, block: int = 20
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a step and of what comes after it in a run, side by side, `repeats` times for each extra, after a warm-up.

    On a CPU every call is timed, the first extra with the caches as the step leaves them. A GPU works while Python goes on,
    so there `block` steps are timed without and with the extra, and the difference is what it costs.
    """
    found = {name: [] for name in extras}
    for run in (step, *extras.values()):
        run()
    for _ in range(repeats):
        alone = seconds(step, block if gpu else 1, gpu)
        for name, extra in extras.items():
            if gpu:
                cost = seconds(lambda extra=extra: (step(), extra()), block, gpu) - alone
            else:
                cost = seconds(extra, 1, gpu)
            found[name].append((alone, cost))
    return found


def describe(found: list[tuple[float, float]]) -> dict:
    """Medians of pairs (seconds of a step, of an extra), and the median and the range of their ratios."""
    ratios = [extra / step for step, extra in found]
    return {
        "seconds": statistics.median(extra for _, extra in found),
        "time_ratio": statistics.median(ratios),
        "time_ratio_range": [min(ratios), max(ratios)],
    }
