"""The guidance redirector's trunk in a few large Triton kernels on NVIDIA GPUs: most of its time there went into small ones.

Speed only: wherever this cannot be had, torch's layers do the same. Products are of fp16 with fp32 sums, which keeps as many digits
as TF32, PyTorch's default for convolutions.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .layers import brings_weights

DEVICES = ("cuda",)
OLDEST_TRITON = (3, 2)
TF32 = (8, 0)  # compute capability from which PyTorch's convolutions take TF32
TOLERANCE = 0.02  # of the largest value, between these kernels and torch's layers
CHECKED = (34, 18), (96, 100)  # latents that both are tried on: of small tiles, and of large ones

logger = logging.getLogger(__name__)
_works: dict[torch.device, bool] = {}  # by device, once it was tried
_wanted = [True]


@contextmanager
def without_fusing() -> Iterator[None]:
    """Torch's own layers everywhere, to compare with or to count operations of."""
    before, _wanted[0] = _wanted[0], False
    try:
        yield
    finally:
        _wanted[0] = before


def fused_trunk(network: nn.Module, x: Tensor) -> "FusedTrunk | None":
    """The trunk of a guidance redirector for inputs like x; None where torch's layers must do.

    Its packed weights (half the size of the network's) stay with the network until `release_packed`, or until the weights change.
    """
    if not _wanted[0] or x.device.type not in DEVICES or torch.is_grad_enabled() or not _fits(network.config):
        return None
    trunk = network.__dict__.get("fused")
    if not _supported(x.device) or (key := _key(_layers(network) if trunk is None else trunk.layers, x.device)) is None:
        return None
    if trunk is None or trunk.key != key:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # a graph's weights may change with every replay
        if (trunk := _packed_trunk(network, key, x.device)) is not None:
            network.__dict__["fused"] = trunk
    return trunk


def release_packed(networks: nn.Module) -> None:
    """Lets go of the packed weights of all guidance redirectors in a module."""
    for module in networks.modules():
        module.__dict__.pop("fused", None)


def _fits(c: Any) -> bool:
    """Whether the kernels know these sizes: powers of two, and at least 16 channels per head."""
    return c.width in (32, 64, 128, 256) and c.heads in (1, 2, 4, 8) and c.width // c.heads >= 16


def _layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if getattr(module, "weight", None) is not None]


def _key(layers: list[nn.Module], device: torch.device) -> tuple | None:
    """What changes with the weights of layers; None unless all are at hand: on the device, in fp32, not brought with every call."""
    key = []
    for layer in layers:
        if brings_weights(layer):
            return None
        for w in (layer.weight, layer.bias):
            if w.device != device or w.dtype != torch.float32:
                return None
            key.append((w.data_ptr(), 0 if w.is_inference() else w._version))
    return tuple(key)


def _supported(device: torch.device) -> bool:
    if device not in _works and not _possible(device):
        _works[device] = False
    if _works.get(device) is False:
        return False
    if device.type != "cuda":
        return True  # a test, in Triton's interpreter
    return device.index == torch.cuda.current_device() and torch.backends.cudnn.allow_tf32  # Triton launches on the current one


@lru_cache
def has_triton() -> bool:
    """Whether there is a Triton that these kernels were tried with; that of torch 2.4 and 2.5 is older."""
    if find_spec("triton") is None:
        return False
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= OLDEST_TRITON


def _possible(device: torch.device) -> bool:
    if not has_triton() or torch.version.hip is not None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= TF32


def _packed_trunk(network: nn.Module, key: tuple, device: torch.device) -> "FusedTrunk | None":
    """The trunk with packed weights; before the first one on a device in this process, the kernels are tried beside torch's layers."""
    if device in _works:
        return FusedTrunk(network, key) if _works[device] else None
    logger.info("SafeCFG: preparing the redirector's Triton kernels; the first time takes up to half a minute.")
    generator = torch.Generator().manual_seed(0)
    for size in CHECKED:
        x = torch.randn(1, 3 * network.config.latent_channels, *size, generator=generator).to(device)
        embedding = torch.randn(1, 2 * network.config.width, generator=generator).to(device)
        h, *wanted = network.read_trunk(x, embedding, 1)
        wanted += network.correct_trunk(h, embedding, 1)
        if not all(t.isfinite().all() for t in wanted):
            return None  # weights that tell nothing of the kernels
        try:
            trunk = FusedTrunk(network, key)
            features, *found = trunk.read_trunk(x, embedding, 1)
            found += trunk.correct_trunk(features, embedding, 1)
            off = [(a - b).abs().max() / b.abs().max().clamp(min=1e-6) for a, b in zip(found, wanted, strict=True)]
            far = float(torch.stack(off).max())  # torch's maximum, for Python's may lose a NaN
            why = None if far <= TOLERANCE else f"its results are {far:.1%} off"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton's, its compiler's, the driver's: speed is all there is to lose
            why = f"{type(error).__name__}: {error}"
        if why:
            logger.warning("SafeCFG: Triton does not work here (%s); the redirector is a little slower without it.", why)
            _works[device] = False
            return None
    _works[device] = True
    return trunk


class FusedTrunk:
    """`GuidanceRedirector.read_trunk` and `correct_trunk` with packed weights."""

    def __init__(self, network: nn.Module, key: tuple):
        from . import fused_kernels  # here: Triton is not everywhere

        self.kernels, self.key, self.layers = fused_kernels, key, _layers(network)
        self.stem = _packed(network.stem)
        self.readers = Stack(network.readers, network.read_context, after=0)
        self.correctors = Stack(network.correctors, network.correct_context, after=1)
        self.read_norm, self.correct_norm = network.read_norm, network.correct_norm
        self.head, self.residual = _packed(network.read_head), _packed(network.residual)

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a network packs its own weights."""

    def read_trunk(self, inputs: Tensor, embedding: Tensor, frames: int) -> tuple["Features", Tensor]:
        """Of inputs (N, 3 C, H, W) with even sides: features, and logits per place (N, 2 K, H / 2, W / 2)."""
        n, channels, height, width = inputs.shape
        size = (height // 2, width // 2)
        x = torch.empty(n, *size, channels, 2, 2, device=inputs.device, dtype=torch.float16)
        x.copy_(inputs.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5))  # pixel_unshuffle
        convolved = self.kernels.convolve(x.view(n, size[0] * size[1], 4 * channels), size, *self.stem, side=3, groups=8)
        h = self.readers(self, Features(self, size, *convolved), embedding, frames)
        places = self.kernels.convolve(self.silu_normed(self.read_norm, h), size, *self.head, side=1)[0]
        return h, places.transpose(1, 2).unflatten(2, size)

    def strongest(self, places: Tensor) -> Tensor:
        """`GuidanceRedirector.strongest`."""
        from .layers import STRONGEST, pool

        flat = places.flatten(2).transpose(1, 2)
        if flat.shape[1] > self.kernels.MOST:
            return pool(places)
        return self.kernels.strongest(flat.contiguous(), STRONGEST)

    def correct_trunk(self, features: "Features", embedding: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """The residual (N, C, H, W) and pooled features (N / frames, width)."""
        h = self.correctors(self, features, embedding, frames)
        normed = self.silu_normed(self.correct_norm, h)
        r = self.kernels.convolve(normed, h.size, *self.residual, side=3)[0]
        r = r.unflatten(1, h.size).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # pixel_shuffle
        return r, normed.view(-1, frames * normed.shape[1], normed.shape[2]).mean(dim=1, dtype=torch.float32)

    def silu_normed(self, norm: nn.GroupNorm, h: "Features", film: Tensor | None = None, frames: int = 1) -> Tensor:
        """SiLU of normalised features, scaled and shifted by `film` where it is given."""
        return self.kernels.normalise(h.x, h.moments, norm.weight, norm.bias, norm.eps, film, frames)


class Features:
    """x (N, places, C) float32, the moments of its group norm, its size in places, and the trunk that can read it."""

    def __init__(self, trunk: FusedTrunk, size: tuple[int, int], x: Tensor, moments: Tensor):
        self.trunk, self.size, self.x, self.moments = trunk, size, x, moments


class Stack:
    """Residual blocks with a context after one of them; it does not hold its trunk, which must be freed as soon as it is let go."""

    def __init__(self, blocks: nn.ModuleList, context: nn.Module, after: int):
        self.after, self.context = after, context
        self.norms = [(block.norm1, block.norm2) for block in blocks]
        self.convolutions = [(_packed(block.conv1), _packed(block.conv2)) for block in blocks]
        films: list[Any] = [block.film for block in blocks]
        self.film = torch.cat([film.weight for film in films]), torch.cat([film.bias for film in films])
        self.q, self.kv, self.out = (_packed(layer) for layer in (context.q, context.kv, context.out))

    def __call__(self, trunk: FusedTrunk, h: Features, embedding: Tensor, frames: int) -> Features:
        kernels, normed = trunk.kernels, trunk.silu_normed
        films = nn.functional.linear(embedding, *self.film).chunk(len(self.norms), dim=1)
        for i, (film, norms, (first, second)) in enumerate(zip(films, self.norms, self.convolutions, strict=True)):
            y = Features(trunk, h.size, *kernels.convolve(normed(norms[0], h), h.size, *first, side=3, groups=8))
            normal = normed(norms[1], y, film, frames)
            h = Features(trunk, h.size, *kernels.convolve(normal, h.size, *second, side=3, groups=8, residual=h.x))
            if i == self.after:
                h = self._attended(trunk, h, frames)
        return h

    def _attended(self, trunk: FusedTrunk, h: Features, frames: int) -> Features:
        from .layers import FRAMES, GRID

        c, kernels = self.context, trunk.kernels
        to = (min(frames, FRAMES), min(h.size[0], GRID), min(h.size[1], GRID))
        kv = kernels.pool(h.x, frames, h.size, to, c.norm_pooled, *self.kv)
        return Features(trunk, h.size, *kernels.attend(h.x, frames, c.heads, 8, c.norm, self.q, kv, self.out))


def _packed(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (inputs, outputs) fp16 of a linear layer or convolution, taps before channels, and bias float32."""
    weight = layer.weight.detach()
    weight = weight.permute(2, 3, 1, 0).flatten(0, 2) if weight.ndim == 4 else weight.t()
    return weight.to(torch.float16).contiguous(), layer.bias.detach()
