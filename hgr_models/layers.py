"""Layers that both redirectors and their fused kernels share."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID = 8  # the context is at most GRID x GRID places (and FRAMES frames), whatever the latent's size
FRAMES = 4
ONE_BLOCK = ("cuda",)  # devices whose group norm reads each group with one block, which is slow for large pictures
LARGE = 2**18  # numbers per picture from which normalising by chunks is faster on a GPU: 128 channels of 46x46 places
CHUNKS = 32  # of each group
STRONGEST = 4  # places whose mean is the whole picture's logit


def brings_weights(layer: nn.Module) -> bool:
    """Whether a ComfyUI layer brings its weights with every call, so that only the call has them: `_v` stands for dynamic VRAM,
    the functions for patches on weights when VRAM is short."""
    own = vars(layer)
    return "_v" in own or bool(own.get("weight_function") or own.get("bias_function"))


class ResBlock(nn.Module):
    """x + two normalised 3x3 convolutions, scaled and shifted by an embedding (B, embedding)."""

    def __init__(self, width: int, embedding: int, ops: Any):
        super().__init__()
        self.norm1, self.conv1 = ops.GroupNorm(8, width), ops.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = ops.GroupNorm(8, width), ops.Conv2d(width, width, 3, padding=1)
        self.film = ops.Linear(embedding, 2 * width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(normed(self.norm1, x)))
        h = self.conv2(F.silu(torch.addcmul(shift, normed(self.norm2, h), 1 + scale)))  # one kernel instead of two
        return x + h


class Context(nn.Module):
    """Every place attends to a fixed number of pooled places, over all frames: linear in the number of places."""

    def __init__(self, width: int, heads: int, ops: Any):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_pooled = ops.LayerNorm(width), ops.LayerNorm(width)
        self.q, self.kv, self.out = ops.Linear(width, width), ops.Linear(width, 2 * width), ops.Linear(width, width)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        video = x.unflatten(0, (-1, frames)).transpose(1, 2)  # (B, C, frames, h, w)
        size = [min(n, m) for n, m in zip(video.shape[2:], (FRAMES, GRID, GRID), strict=True)]
        pooled = self.norm_pooled(averaged(video, size).flatten(2).transpose(1, 2))  # (B, M, C)
        places = video.flatten(2).transpose(1, 2)  # (B, N, C)
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        k, v = self.kv(pooled).chunk(2, dim=-1)
        h = F.scaled_dot_product_attention(split(self.q(self.norm(places))), split(k), split(v))
        places = places + self.out(h.transpose(1, 2).flatten(2))
        return places.transpose(1, 2).unflatten(2, video.shape[2:]).transpose(1, 2).flatten(0, 1)


def per_frame(rows: Tensor, frames: int) -> Tensor:
    """(B, ...) as (B * frames, ...)."""
    return rows if frames == 1 else rows.repeat_interleave(frames, dim=0)


def normed(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """`norm(x)` of x (B, C, h, w), by chunks where that is faster and the weights are at hand."""
    size, weight = x[0].numel(), norm.weight
    if x.device.type not in ONE_BLOCK or torch.is_grad_enabled() or size < LARGE or size % (CHUNKS * norm.num_groups):
        return norm(x)
    if brings_weights(norm) or (weight.device, weight.dtype) != (x.device, x.dtype):
        return norm(x)
    return chunked_group_norm(x, norm.num_groups, weight, norm.bias, norm.eps)


def chunked_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`F.group_norm` of x (B, C, h, w) by the moments of chunks; each group's size must be a multiple of CHUNKS."""
    within, means = torch.var_mean(x.reshape(len(x), groups, CHUNKS, -1), dim=3, correction=0)
    between, mean = torch.var_mean(means, dim=2, correction=0)
    scale = weight.view(groups, -1) * (within.mean(dim=2) + between + eps).rsqrt()[..., None]  # (B, groups, C / groups)
    shift = torch.addcmul(bias.view(groups, -1), scale, mean[..., None], value=-1)
    return torch.addcmul(shift.flatten(1)[..., None, None], x, scale.flatten(1)[..., None, None])


def averaged(video: Tensor, size: list[int]) -> Tensor:
    """(B, C, frames, h, w) averaged to `size` places per axis; where a device has no kernel for that (Apple's), axis by axis."""
    if video.device.type in ("cpu", "cuda"):
        return F.adaptive_avg_pool3d(video, size)
    return averaged_by_axis(video, size)


def averaged_by_axis(video: Tensor, size: Sequence[int]) -> Tensor:
    """`adaptive_avg_pool3d` as matrix products, which every device has."""
    for axis, places in enumerate(size, start=2):
        length = video.shape[axis]
        weights = torch.zeros(length, places)
        for i in range(places):
            start, end = i * length // places, -(-(i + 1) * length // places)
            weights[start:end, i] = 1 / (end - start)
        video = (video.transpose(axis, -1) @ weights.to(video)).transpose(axis, -1)
    return video


def pool(places: Tensor) -> Tensor:
    """The mean of the four strongest places: small harm in a large picture must not drown. (B, K, frames, h, w) -> (B, K)."""
    flat = places.flatten(2)
    return flat.topk(min(STRONGEST, flat.shape[2]), dim=2, sorted=False).values.mean(dim=2)


def start_at_zero(head: nn.Module) -> None:
    """Zeroes a layer's weights, if it has any yet: on Windows a host's layers get theirs when they are loaded."""
    for parameter in (head.weight, head.bias):
        if parameter is not None:
            nn.init.zeros_(parameter)
