"""What a shard's file must hold, so that nothing fails in the middle of a training."""

from pathlib import Path

import torch
from torch import Tensor

from .errors import HGRError

HARMFUL, CLEAN, CALIBRATION = "harmful", "clean", "calibration"  # kinds of shards of runs
PICTURES = "pictures"  # the finished calibration runs, looked at as a detector does: noised to `detection.LEVELS` in turn
TEXTS, CALIBRATION_TEXTS = "texts", "calibration texts"  # kinds of shards of prompts
PAIRS, HELD_OUT_PAIRS = "pairs", "held out pairs"  # of harmful prompts with their partners
OF_TEXT = (TEXTS, CALIBRATION_TEXTS, PAIRS, HELD_OUT_PAIRS)
KINDS = (HARMFUL, CLEAN, CALIBRATION, PICTURES, *OF_TEXT)
LATENTS = ("x", "uncond_denoised", "guidance", "partner_guidance")
DTYPES = (torch.float16, torch.float32, torch.uint8, torch.int64)


def problem_of(kind: str, tensors: dict[str, Tensor]) -> str | None:
    """What is wrong with a shard's columns; values of large ones are looked at when they are drawn."""
    texts = kind in OF_TEXT
    prompts = {"prompts.tokens": 3, "prompts.harms": 2}
    if kind in (PAIRS, HELD_OUT_PAIRS):
        prompts |= {"partners.tokens": 3, "prompts.removed": 2}
    prompts |= {name: 2 for side in ("prompts", "partners") for name in (f"{side}.pooled", f"{side}.mask") if name in tensors}
    prompts |= {name: 1 for name in ("prompts.lengths",) if name in tensors}
    points: dict[str, int] = {}
    if not texts:
        prompts["prompts.removed"] = 2
        points = {"sigma": 1, "c_in": 1, "shown": 0, "prompt": 1, "x": 0, "uncond_denoised": 0, "guidance": 0}
        points |= {"partner_guidance": 0} if kind == HARMFUL else {}
        points |= {"rest": 2} if "rest" in tensors else {}
    for columns in (prompts, points):
        for name, ndim in columns.items():
            if name not in tensors:
                return f"it has no column {name}"
            tensor = tensors[name]
            if tensor.ndim == 0 or (ndim and tensor.ndim != ndim) or tensor.dtype not in DTYPES:
                return f"its column {name} has the shape {tuple(tensor.shape)} and the type {tensor.dtype}"
            if len(tensor) != len(tensors[next(iter(columns))]) or len(tensor) == 0:
                return f"its column {name} has {len(tensor)} rows"
    harms = tensors["prompts.harms"]
    for side in ("prompts", "partners"):
        if f"{side}.padding" in tensors and not _continues(tensors[f"{side}.tokens"], tensors[f"{side}.padding"]):
            return "its padding does not fit its tokens"
        if f"{side}.mask" in tensors and tensors[f"{side}.mask"].shape != (len(harms), _length(tensors, side)):
            return "its masks do not fit its tokens"
    lengths = tensors.get("prompts.lengths")
    if lengths is not None and not 1 <= int(lengths.min()) <= int(lengths.max()) <= _length(tensors, "prompts"):
        return "the lengths of its prompts do not fit its tokens"
    if "prompts.removed" in tensors and tensors["prompts.removed"].shape != harms.shape:
        return "its harms and removed harms differ in shape"
    return None if texts else _points_problem(tensors, harms)


def _continues(tokens: Tensor, padding: Tensor) -> bool:
    return padding.ndim == 2 and padding.shape[1] == tokens.shape[2] and padding.dtype in DTYPES


def _length(tensors: dict[str, Tensor], side: str) -> int:
    """Tokens of a prompt, those that all of a shard's share included."""
    return tensors[f"{side}.tokens"].shape[1] + len(tensors.get(f"{side}.padding", ()))


def _points_problem(tensors: dict[str, Tensor], harms: Tensor) -> str | None:
    latents = [tensors[name].shape for name in LATENTS if name in tensors]
    if len(latents[0]) not in (4, 5) or len(set(latents)) > 1:
        return f"its latents have the shapes {[tuple(shape) for shape in latents]}"
    prompt = tensors["prompt"]
    if prompt.dtype.is_floating_point or not 0 <= int(prompt.min()) <= int(prompt.max()) < len(harms):
        return "its points belong to prompts that it does not have"
    return None


def finite(path: Path, tensor: Tensor) -> Tensor:
    """The values that were read from a shard; raises HGRError when some are not finite."""
    if not torch.isfinite(tensor).all():
        raise HGRError(f"{path} holds values that are not finite (NaN or infinity). Delete it and record again.")
    return tensor
