"""The HGR checkpoint: one safetensors file, fp16 or fp32 tensors, everything else as JSON in its metadata."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .condition import ConditionConfig
from .errors import HGRError
from .files import write_whole
from .guidance import GuidanceConfig
from .hgr import HGR, HGRInfo
from .metadata import is_file, json_object

FORMAT_VERSION = 1
KEY = "safecfg_hgr"  # of the metadata entry
SAMPLED_TENSORS, SAMPLED_VALUES = 16, 256  # of a fingerprint
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_DEPTH, LARGEST_WIDTH = 256, 65536  # of a network that a file may describe


def save_hgr(path: str | os.PathLike, hgr: HGR, dtype: torch.dtype = torch.float16) -> None:
    """Writes an HGR; the file appears whole or not at all. Raises HGRError when it cannot be written."""
    about = {
        "format_version": FORMAT_VERSION,
        "info": asdict(hgr.info),
        "condition": asdict(hgr.condition.config) if hgr.condition else None,
        "guidance": asdict(hgr.guidance.config) if hgr.guidance else None,
    }
    # Units per channel stay fp32: they may exceed fp16's range.
    keep = ("_center", "_scale")
    tensors = {k: v if k.endswith(keep) else v.to(dtype) for k, v in hgr.state_dict().items()}
    write_whole(path, tensors, {KEY: json.dumps(about)})


def load_hgr(path: str | os.PathLike, ops: Any = nn) -> HGR:
    """Reads and validates an HGR, frozen, on the CPU; `ops` gives the layer classes (torch.nn, or ComfyUI's casting ones).

    Raises HGRError, naming the file, when it does not exist, is not safetensors, is truncated, is no HGR of a format this
    version knows, or holds wrong shapes, missing tensors or values that are not finite.
    """
    path = Path(path)
    about, tensors = _read(path)
    _check_version(path, about)
    try:
        info = _info(about["info"])
        condition = ConditionConfig(**about["condition"]) if about["condition"] is not None else None
        guidance = GuidanceConfig(**about["guidance"]) if about["guidance"] is not None else None
    except (KeyError, TypeError, AttributeError) as error:
        raise HGRError(
            f"The metadata of {path} is not that of an HGR ({error}). Use a file made by SafeCFG Train HGR."
        ) from error
    info.validate(str(path))
    _check_sizes(path, info, condition, guidance)
    with torch.device("meta"):  # takes no memory, whatever the metadata asks for
        expected = HGR(info, condition, guidance).state_dict()
    _check_tensors(path, tensors, expected)
    hgr = HGR(info, condition, guidance, ops)
    # fp32 while it is small: harmfulness near a threshold must not depend on the rounding of weights in use.
    hgr.load_state_dict({k: v.float() for k, v in tensors.items()})
    return hgr.train(False).requires_grad_(False)


def read_info(path: str | os.PathLike) -> tuple[HGRInfo, tuple[str, ...]]:
    """What an HGR's file says of itself, and which of "condition" and "guidance" it holds, without reading its weights.

    Raises HGRError as `load_hgr` does for a file that is none.
    """
    path = Path(path)
    about, _ = _read(path, weights=False)
    _check_version(path, about)
    try:
        info = _info(about["info"])
        networks = tuple(name for name in ("condition", "guidance") if about[name] is not None)
    except (KeyError, TypeError, AttributeError) as error:
        raise HGRError(
            f"The metadata of {path} is not that of an HGR ({error}). Use a file made by SafeCFG Train HGR."
        ) from error
    info.validate(str(path))
    return info, networks


@cache
def _hash(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file as hexadecimal digits; remembered while its size and time stay the same."""
    stat = os.stat(path)
    return _hash(os.fspath(path), stat.st_size, stat.st_mtime_ns)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over a sample of a network's weights by name: tells one base of a family from another, in fp32, fp16 or bf16."""
    names, digest = sorted(weights), hashlib.sha256()
    for name in names[:: max(1, len(names) // SAMPLED_TENSORS)]:
        values = weights[name].flatten()[:SAMPLED_VALUES].to(torch.bfloat16).float().cpu()
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _check_version(path: Path, about: dict) -> None:
    version = about.get("format_version")
    if version != FORMAT_VERSION:
        raise HGRError(
            f"Expected HGR format version {FORMAT_VERSION} in {path}, but got {version!r}. Update SafeCFG, or train the HGR again."
        )


def _read(path: Path, weights: bool = True) -> tuple[dict, dict[str, Tensor]]:
    """The metadata of a file, and its tensors."""
    if not is_file(path):
        raise HGRError(f"There is no HGR file {path}. Put the .safetensors file into models/hgr.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()} if weights and KEY in metadata else {}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise HGRError(f"{path} is not a complete safetensors file ({error}). Download or copy it again.") from error
    if KEY not in metadata:
        raise HGRError(
            f"Expected an HGR in {path}, but its metadata has no {KEY!r}: it is some other model. Use a file made by SafeCFG Train HGR."
        )
    return json_object(metadata[KEY], path, "an HGR"), tensors


def _info(values: dict) -> HGRInfo:
    known = {f.name for f in fields(HGRInfo)}
    lists = ("categories", "condition_thresholds", "guidance_levels", "picture_thresholds")
    tuples = {k: tuple(v) for k, v in values.items() if k in lists}
    rows = tuple(tuple(row) for row in values["guidance_thresholds"])
    return HGRInfo(**{**{k: v for k, v in values.items() if k in known}, **tuples, "guidance_thresholds": rows})


def _check_sizes(path: Path, info: HGRInfo, condition: ConditionConfig | None, guidance: GuidanceConfig | None) -> None:
    """The networks must have sizes that exist, and those that the metadata promises."""
    if condition is None and guidance is None:
        raise HGRError(f"Expected a condition redirector, a guidance redirector or both in {path}, but it has neither.")
    for config in filter(None, (condition, guidance)):
        _check_config(path, config)
    pairs = [("categories", len(info.categories), c.categories) for c in (condition, guidance) if c]
    if condition:
        pairs += [
            ("token width", info.token_width, condition.token_width),
            ("pooled width", info.pooled_width, condition.pooled_width),
        ]
    if guidance:
        pairs += [
            ("latent channels", info.latent_channels, guidance.latent_channels),
            ("latent dimensions", info.latent_dimensions, guidance.dimensions),
        ]
    for name, expected, came in pairs:
        if expected != came:
            raise HGRError(
                f"Expected {name} {expected} in {path}, but its network has {came}. The file is damaged: download it again."
            )


def _check_config(path: Path, config: ConditionConfig | GuidanceConfig) -> None:
    for name, size in asdict(config).items():
        lowest = 0 if name in ("pooled_width", "short_width") else 1
        largest = LARGEST_DEPTH if name.endswith("depth") else LARGEST_WIDTH
        if type(size) is not int or not lowest <= size <= largest:
            raise HGRError(
                f"Expected {name} from {lowest} to {largest} in {path}, but got {size!r}. The file is damaged: download it again."
            )
    if isinstance(config, ConditionConfig) and config.short_width >= config.token_width:
        raise HGRError(
            f"Expected short_width below {config.token_width} in {path}, but got {config.short_width}. Train it again."
        )
    groups = math.lcm(config.heads, 8 if isinstance(config, GuidanceConfig) else 1)  # its GroupNorms have 8
    if config.width % groups:
        raise HGRError(
            f"Expected a width that {groups} divides in {path}, but got {config.width}. The file is damaged: download it again."
        )


def _check_tensors(path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if missing := sorted(expected.keys() - tensors.keys()):
        raise HGRError(f"{path} lacks {len(missing)} tensors, the first is {missing[0]!r}. Download or copy it again.")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise HGRError(
            f"{path} has {len(extra)} tensors that no HGR has, the first is {extra[0]!r}. Use a file made by SafeCFG Train HGR."
        )
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise HGRError(f"Expected {key!r} of shape {tuple(expected[key].shape)} in {path}, but got {tuple(tensor.shape)}.")
        if tensor.dtype not in DTYPES:
            raise HGRError(
                f"Expected {key!r} in fp16, bf16 or fp32 in {path}, but got {tensor.dtype}. Train or download the HGR again."
            )
        if not torch.isfinite(tensor).all():
            raise HGRError(
                f"{key!r} in {path} holds values that are not finite (NaN or infinity). Train or download the HGR again."
            )
