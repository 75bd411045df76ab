"""LoRA: small trainable additions to the linear and convolutional layers of any network, whose own weights stay untouched.

    layer'(x) = layer(x) + alpha / rank * up(down(x))       up is zero at first: then nothing changes, to the last bit

arXiv 2106.09685. Stored in the key format that ComfyUI's own loaders read: `diffusion_model.<layer>.lora_up.weight`,
`.lora_down.weight` and `.alpha`.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import HGRError
from .files import write_whole
from .metadata import is_file, json_object

KEY = "safecfg_lora"  # of the metadata entry
PREFIX = "diffusion_model."
UP, DOWN, ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"
AUTO, CROSS_ATTENTION, LINEAR, ALL = LAYERS = ("auto", "cross-attention", "linear", "linear and conv")
READS_THE_PROMPT = ".attn2."  # in the names of the layers in which a UNet of ComfyUI reads the prompt


@dataclass(frozen=True)
class LoraSettings:
    """Rank and strength (alpha / rank) of every adapter, and the layers that get one, of `LAYERS`.

    "auto" is "cross-attention" where a network has such layers, and else "linear".
    """

    rank: int = 64
    alpha: float = 64.0
    layers: str = AUTO


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer maps `in_features` to `out_features`: torch's, and those that hosts derive or rebuild (quantised ones)."""
    return isinstance(getattr(layer, "in_features", None), int) and isinstance(getattr(layer, "out_features", None), int)


def is_conv(layer: nn.Module) -> bool:
    """Whether a layer is a 2-D convolution whose LoRA can be merged into its weight: not grouped, padded with zeros."""
    return isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"


class Adapter(nn.Module):
    """What is added to one layer: `scale * up(down(x))`; x (..., in) or (B, in, H, W) in the layer's dtype, which is kept."""

    def __init__(self, down: Tensor, up: Tensor, scale: float):
        super().__init__()
        self.down, self.up, self.scale = nn.Parameter(down), nn.Parameter(up), scale

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if down.ndim == 2:
            return self.scale * F.linear(F.linear(x, down), up)
        # A host may have changed the layer's padding since (seamless textures), so it is read now.
        return self.scale * F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation), up)


def _adapter(layer: nn.Module, settings: LoraSettings, generator: torch.Generator) -> Adapter:
    """A new adapter: `down` uniform as torch's own layers are, `up` zero. Its rank is at most the layer's own."""
    size: Any = layer  # nn.Module gives every attribute two types
    ends: tuple[int, ...]
    if is_conv(layer):
        inner, ends, outer = (size.in_channels, *size.kernel_size), (1, 1), size.out_channels
    else:
        inner, ends, outer = (size.in_features,), (), size.out_features
    fan_in = torch.Size(inner).numel()
    rank = min(settings.rank, fan_in, outer)
    down = torch.empty(rank, *inner).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
    return Adapter(down, torch.zeros(outer, rank, *ends), settings.alpha / settings.rank)


class LoRA(nn.Module):
    """Adapters by the names of the layers they belong to. It holds no layer: attach it to any network with those names."""

    def __init__(self, adapters: Mapping[str, Adapter]):
        super().__init__()
        self.names, self.adapters, self.on = tuple(adapters), nn.ModuleList(adapters.values()), True

    @contextmanager
    def attached(self, network: nn.Module) -> Iterator["LoRA"]:
        """Adds to the network's layers, for a while. Raises HGRError when it lacks one of them."""
        handles = []
        try:
            for name, adapter in zip(self.names, self.adapters, strict=True):
                handles.append(_layer(network, name).register_forward_hook(self._hook(adapter)))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, adapter: Adapter) -> Callable[[nn.Module, tuple, Tensor], Tensor | None]:
        def add(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
            return output + adapter(inputs[0], layer).to(output.dtype) if self.on else None

        return add

    @contextmanager
    def off(self) -> Iterator[None]:
        """The network alone, to the last bit, although this is attached."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def tensors(self, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """Copies on the CPU in ComfyUI's key format."""
        found: dict[str, Tensor] = {}
        for name, adapter in zip(self.names, self.adapters, strict=True):
            up, down = (t.detach().to("cpu", dtype, copy=True) for t in (adapter.up, adapter.down))
            alpha = torch.tensor(adapter.scale * len(down), dtype=torch.float32)
            found |= {f"{PREFIX}{name}{UP}": up, f"{PREFIX}{name}{DOWN}": down, f"{PREFIX}{name}{ALPHA}": alpha}
        return found


def _layer(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        raise HGRError(
            f"This LoRA has an adapter for the layer {name!r}, which this network lacks. Use it with the model that it was trained for."
        ) from error


def new_lora(network: nn.Module, settings: LoraSettings, seed: int) -> LoRA:
    """A LoRA in float32 on the CPU that changes nothing yet; the same seed gives the same adapters."""
    if settings.layers not in LAYERS:
        raise HGRError(f"Expected the layers of a LoRA to be one of {', '.join(LAYERS)}, but got {settings.layers!r}.")
    generator = torch.Generator().manual_seed(seed)
    found = _chosen_layers(network, settings.layers)
    if not found:
        raise HGRError(
            f"This network ({type(network).__name__}) has no layers of the kind {settings.layers!r} that a LoRA could be added to. "
            f"Choose other `layers`, of {', '.join(LAYERS)}."
        )
    return LoRA({name: _adapter(layer, settings, generator) for name, layer in found.items()})


def _chosen_layers(network: nn.Module, layers: str) -> dict[str, nn.Module]:
    linear = {name: layer for name, layer in network.named_modules() if is_linear(layer)}
    reading = {name: layer for name, layer in linear.items() if READS_THE_PROMPT in name}
    if layers == ALL:
        return {name: layer for name, layer in network.named_modules() if name in linear or is_conv(layer)}
    return {AUTO: reading or linear, CROSS_ATTENTION: reading, LINEAR: linear}[layers]


def lora_from(tensors: Mapping[str, Tensor]) -> LoRA:
    """The LoRA of tensors in ComfyUI's key format, in float32. Raises HGRError when a tensor is missing or strange."""
    names = [key.removesuffix(UP) for key in tensors if key.endswith(UP)]
    strange = sorted(tensors.keys() - {name + end for name in names for end in (UP, DOWN, ALPHA)})
    if not names or strange or not all(name.startswith(PREFIX) for name in names):
        raise HGRError(
            f"Expected a LoRA with keys such as {PREFIX}<layer>{UP}, but got {strange[:1] or names[:1] or 'nothing'}. "
            "Use a file made by SafeCFG Fine-tune Safe LoRA."
        )
    adapters = {}
    for name in names:
        try:
            up, down, alpha = (tensors[name + end] for end in (UP, DOWN, ALPHA))
        except KeyError as error:
            raise HGRError(f"This LoRA lacks {error}. The file is damaged: copy it again.") from error
        if problem := _adapter_problem(up, down, alpha):
            raise HGRError(f"This LoRA has an impossible adapter for {name[:80]}: {problem}. The file is damaged: copy it again.")
        adapters[name.removeprefix(PREFIX)] = Adapter(down.float(), up.float(), float(alpha) / len(down))
    return LoRA(adapters)


def _adapter_problem(up: Tensor, down: Tensor, alpha: Tensor) -> str:
    """What is wrong with an adapter's tensors; "" when nothing is."""
    if not all(t.is_floating_point() and torch.isfinite(t.float()).all() for t in (up, down, alpha)):
        return "expected finite floating-point values"
    if alpha.numel() != 1:
        return f"expected one number as alpha, but got {alpha.numel()}"
    if down.ndim not in (2, 4) or up.ndim != down.ndim or 0 in (*up.shape, *down.shape):
        return f"expected two matrices or two convolutions, but got {tuple(up.shape)} and {tuple(down.shape)}"
    if up.shape[1] != len(down) or tuple(up.shape[2:]) != (1,) * (up.ndim - 2):
        return f"{tuple(up.shape)} does not follow {tuple(down.shape)}"
    return ""


def save_lora(path: str | os.PathLike, tensors: Mapping[str, Tensor], about: dict) -> None:
    """Writes a LoRA with `about` (JSON) in its metadata; the file appears whole or not at all."""
    write_whole(path, tensors, {"format": "pt", KEY: json.dumps(about)})


def load_lora(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a LoRA file and its `about`, {} when another program wrote it. Raises HGRError for a damaged file."""
    if not is_file(path):
        raise HGRError(f"There is no LoRA file {str(path)[:500]}.")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY, "{}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise HGRError(f"{path} is not a complete LoRA file ({error}). Copy it again, or train it again.") from error
    return tensors, json_object(text, path, "a LoRA")
