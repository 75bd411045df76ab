"""The guidance redirector's layers as Triton kernels: pictures lie as (N, places, channels), so that a kernel does what torch's
layers need three to eight for. No atomic additions: the same inputs give the same bits.

`moments` (N, tiles, 2, groups): mean, and sum of squared differences from it, of every group in every tile of `BM` places, which a
convolution leaves for the group norm after it (combined as by Chan et al. 1979: no small difference of large sums).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

MOST = 2**14  # places that one block can hold


@triton.jit
def _put_moments(
    values, moments, tile, count, valid, first, GROUP: tl.constexpr, GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Of values (BM, BN), whose rows are `valid` (BM,), the moments of the groups from `first` on."""
    parts: tl.constexpr = BN // GROUP
    grouped, keep = tl.reshape(values, (BM, parts, GROUP)), valid[:, None, None]
    mean = tl.sum(tl.sum(tl.where(keep, grouped, 0.0), axis=2), axis=0) / (count * GROUP)
    away = tl.where(keep, grouped - mean[None, :, None], 0.0)
    at = moments + tile * (2 * GROUPS) + first + tl.arange(0, parts)
    tl.store(at, mean)
    tl.store(at + GROUPS, tl.sum(tl.sum(away * away, axis=2), axis=0))


@triton.jit
def _convolve(
    x, weight, bias, residual, out, moments, height, width, tiles,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, SIDE: tl.constexpr, RESIDUAL: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile, block, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    places = height * width
    place, f = tile * BM + tl.arange(0, BM), block * BN + tl.arange(0, BN)
    row, column, valid = place // width, place % width, place < places
    x += n * places * CHANNELS
    per_tap: tl.constexpr = (CHANNELS + BK - 1) // BK
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(SIDE * SIDE * per_tap):
        tap, c = step // per_tap, (step % per_tap) * BK + tl.arange(0, BK)
        r, q = row + tap // SIDE - SIDE // 2, column + tap % SIDE - SIDE // 2
        inside = valid & (r >= 0) & (r < height) & (q >= 0) & (q < width)
        a = tl.load(
            x + (r * width + q)[:, None] * CHANNELS + c[None, :], mask=inside[:, None] & (c < CHANNELS)[None, :], other=0.0
        )
        b = tl.load(
            weight + (tap * CHANNELS + c)[:, None] * FILTERS + f[None, :],
            mask=(c < CHANNELS)[:, None] & (f < FILTERS)[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total)
    total += tl.load(bias + f, mask=f < FILTERS, other=0.0)[None, :]
    at, mask = (n * places + place)[:, None] * FILTERS + f[None, :], valid[:, None] & (f < FILTERS)[None, :]
    if RESIDUAL:
        total += tl.load(residual + at, mask=mask, other=0.0)
    tl.store(out + at, total, mask=mask)
    if GROUP:
        count = tl.minimum(BM, places - tile * BM)
        moments += n * tiles * (2 * (FILTERS // GROUP))
        _put_moments(total, moments, tile, count, valid, block * (BN // GROUP), GROUP, FILTERS // GROUP, BM, BN)


@triton.jit
def _normalise(
    x, moments, weight, bias, film, out, places, tiles, film_stride, frames, eps,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, FILM: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    g, t = tl.arange(0, GROUPS), tl.arange(0, TILES)
    size = tl.where(t < tiles, tl.minimum(BM, places - t * BM) * GROUP, 0).to(tl.float32)[:, None]
    at = moments + (n * tiles + t)[:, None] * (2 * GROUPS) + g[None, :]
    means = tl.load(at, mask=(t < tiles)[:, None], other=0.0)
    within = tl.load(at + GROUPS, mask=(t < tiles)[:, None], other=0.0)
    everything = places.to(tl.float32) * GROUP
    mean = tl.sum(means * size, axis=0) / everything  # (GROUPS,)
    away = means - mean[None, :]
    variance = tl.sum(within + size * away * away, axis=0) / everything
    scale = 1.0 / tl.sqrt(variance + eps)
    place = tl.program_id(0) * BP + tl.arange(0, BP)
    c = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    at = (n * places + place)[:, None, None] * (GROUPS * GROUP) + c[None, :, :]
    mask = (place < places)[:, None, None]
    value = (tl.load(x + at, mask=mask, other=0.0) - mean[None, :, None]) * scale[None, :, None]
    value = value * tl.load(weight + c)[None, :, :] + tl.load(bias + c)[None, :, :]
    if FILM:
        film += (n // frames) * film_stride
        value = value * (1.0 + tl.load(film + c)[None, :, :]) + tl.load(film + GROUPS * GROUP + c)[None, :, :]
    tl.store(out + at, (value * tl.sigmoid(value)).to(tl.float16), mask=mask)


@triton.jit
def _layer_norm(x, weight, bias, eps, C: tl.constexpr):
    """Of rows (R, C)."""
    away = x - (tl.sum(x, axis=1) / C)[:, None]
    scale = 1.0 / tl.sqrt(tl.sum(away * away, axis=1) / C + eps)
    c = tl.arange(0, C)
    return away * scale[:, None] * tl.load(weight + c)[None, :] + tl.load(bias + c)[None, :]


@triton.jit
def _pool(
    x, norm_weight, norm_bias, weight, bias, kv, frames, height, width, deep, high, wide, eps,
    C: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Keys and values of one of deep x high x wide places, which are means as adaptive average pooling takes them."""
    m, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, i, j = m // (high * wide), m // wide % high, m % wide
    f0, r0, q0 = d * frames // deep, i * height // high, j * width // wide
    f1 = ((d + 1) * frames + deep - 1) // deep
    r1, q1 = ((i + 1) * height + high - 1) // high, ((j + 1) * width + wide - 1) // wide
    rows, columns = r1 - r0, q1 - q0
    count, c = (f1 - f0) * rows * columns, tl.arange(0, C)
    total = tl.zeros((1, C), dtype=tl.float32)
    x += b * frames * height * width * C
    for start in range(0, count, BP):
        k = start + tl.arange(0, BP)
        place = ((f0 + k // (rows * columns)) * height + r0 + k // columns % rows) * width + q0 + k % columns
        total += tl.sum(tl.load(x + place.to(tl.int64)[:, None] * C + c[None, :], mask=(k < count)[:, None], other=0.0), axis=0)[
            None, :
        ]
    normed = tl.trans(_layer_norm(total / count, norm_weight, norm_bias, eps, C))  # (C, 1)
    o = tl.program_id(2) * BN + tl.arange(0, BN)
    value = tl.sum(normed * tl.load(weight + c[:, None] * (2 * C) + o[None, :]).to(tl.float32), axis=0) + tl.load(bias + o)
    tl.store(kv + (b * deep * high * wide + m) * (2 * C) + o, value.to(tl.float16))


@triton.jit
def _attend(
    x, norm_weight, norm_bias, q_weight, q_bias, kv, out_weight, out_bias, out, moments, places, tiles, frames, pooled, eps,
    C: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, POOLED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """x + attention of every place to the pooled ones."""
    tile, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    D: tl.constexpr = C // HEADS
    place, c, k = tile * BM + tl.arange(0, BM), tl.arange(0, C), tl.arange(0, POOLED)
    valid = place < places
    at = (n * places + place)[:, None] * C + c[None, :]
    value = tl.load(x + at, mask=valid[:, None], other=0.0)
    normed = _layer_norm(value, norm_weight, norm_bias, eps, C).to(tl.float16)
    kv += (n // frames) * pooled * (2 * C)
    value += tl.load(out_bias + c)[None, :]
    for head in tl.static_range(HEADS):
        d = head * D + tl.arange(0, D)
        q = tl.dot(normed, tl.load(q_weight + c[:, None] * C + d[None, :])) + tl.load(q_bias + d)[None, :]
        keys = tl.load(kv + k[None, :] * (2 * C) + d[:, None], mask=(k < pooled)[None, :], other=0.0)  # (D, POOLED)
        score = tl.where((k < pooled)[None, :], tl.dot(q.to(tl.float16), keys) * (D**-0.5), float("-inf"))
        weight = tl.exp(score - tl.max(score, axis=1)[:, None])
        weight = weight / tl.sum(weight, axis=1)[:, None]
        values = tl.load(kv + C + k[:, None] * (2 * C) + d[None, :], mask=(k < pooled)[:, None], other=0.0)  # (POOLED, D)
        found = tl.dot(weight.to(tl.float16), values).to(tl.float16)
        value = tl.dot(found, tl.load(out_weight + d[:, None] * C + c[None, :]), value)
    tl.store(out + at, value, mask=valid[:, None])
    count = tl.minimum(BM, places - tile * BM)
    moments += n * tiles * (2 * (C // GROUP))
    _put_moments(value, moments, tile, count, valid, 0, GROUP, C // GROUP, BM, C)


@triton.jit
def _strongest(places, out, count, columns, COUNT: tl.constexpr, OF: tl.constexpr):
    """The mean of the OF largest values of a column; NaN if there is one."""
    column, b, k = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, COUNT)
    value = tl.load(places + (b * count + k) * columns + column, mask=k < count, other=float("-inf"))
    unknown = tl.max((value != value).to(tl.int32), axis=0) > 0
    total = 0.0
    for _ in tl.static_range(OF):
        largest = tl.max(value, axis=0)
        total += largest
        value = tl.where(
            k == tl.min(tl.where(value == largest, k, COUNT), axis=0), float("-inf"), value
        )  # one of several equal ones
    tl.store(out + b * columns + column, tl.where(unknown, float("nan"), total / OF))


def tile_of(pictures: int, places: int) -> int:
    """Places per tile: many small tiles for a small picture, which must keep a whole GPU busy."""
    return 32 if pictures * places <= 2048 else 64


def convolve(
    x: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor, side: int, groups: int = 0, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x (N, places, C) fp16 convolved by weight (side * side * C, filters) fp16, plus bias and residual (fp32): fp32, and, for
    `groups`, its moments."""
    n, places, channels = x.shape
    filters, bm = weight.shape[1], tile_of(n, places)
    tiles = triton.cdiv(places, bm)
    out = torch.empty(n, places, filters, device=x.device)
    moments = torch.empty(n, tiles, 2, groups, device=x.device) if groups else None
    bn = min(bm, max(16, triton.next_power_of_2(filters)))
    _convolve[tiles, triton.cdiv(filters, bn), n](
        x, weight, bias, residual, out, moments, *size, tiles,
        CHANNELS=channels, FILTERS=filters, SIDE=side, RESIDUAL=residual is not None, GROUP=filters // groups if groups else 0,
        BM=bm, BN=bn, BK=min(128, max(16, triton.next_power_of_2(channels))), num_warps=4, num_stages=3,
    )  # fmt: skip
    return out, moments


def normalise(
    x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, film: Tensor | None = None, frames: int = 1
) -> Tensor:
    """silu(group norm(x)), scaled and shifted by `film` (N / frames, 2 C) before the silu: x (N, places, C) as fp16."""
    n, places, channels = x.shape
    tiles, groups = moments.shape[1], moments.shape[3]
    out = torch.empty(x.shape, device=x.device, dtype=torch.float16)
    _normalise[triton.cdiv(places, 16), n](
        x, moments, weight, bias, film, out, places, tiles, 0 if film is None else film.stride(0), frames, eps,
        GROUPS=groups, GROUP=channels // groups, FILM=film is not None, BM=tile_of(n, places),
        TILES=triton.next_power_of_2(tiles), BP=16, num_warps=8,
    )  # fmt: skip
    return out


def pool(
    x: Tensor, frames: int, size: tuple[int, int], to: tuple[int, int, int], norm: nn.LayerNorm, weight: Tensor, bias: Tensor
) -> Tensor:
    """Keys and values (B, pooled, 2 C) fp16 of x (B * frames, places, C), averaged to `to` places and normed by a LayerNorm."""
    b, channels, pooled = len(x) // frames, x.shape[2], to[0] * to[1] * to[2]
    kv = torch.empty(b, pooled, 2 * channels, device=x.device, dtype=torch.float16)
    bn = min(128, 2 * channels)
    _pool[pooled, b, 2 * channels // bn](
        x, norm.weight, norm.bias, weight, bias, kv, frames, *size, *to, norm.eps, C=channels, BP=16, BN=bn, num_warps=4
    )
    return kv


def attend(
    x: Tensor,
    frames: int,
    heads: int,
    groups: int,
    norm: nn.LayerNorm,
    q: tuple[Tensor, Tensor],
    kv: Tensor,
    out: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """x (N, places, C) plus its attention to `kv`, and the moments; q and out are weights (C, C) fp16 and biases."""
    n, places, channels = x.shape
    bm, pooled = tile_of(n, places), kv.shape[1]
    tiles = triton.cdiv(places, bm)
    result, moments = torch.empty_like(x), torch.empty(n, tiles, 2, groups, device=x.device)
    _attend[tiles, n](
        x, norm.weight, norm.bias, *q, kv, *out, result, moments, places, tiles, frames, pooled, norm.eps,
        C=channels, HEADS=heads, GROUP=channels // groups, POOLED=max(16, triton.next_power_of_2(pooled)), BM=bm, num_warps=4,
    )  # fmt: skip
    return result, moments


def strongest(places: Tensor, of: int) -> Tensor:
    """The mean (B, K) of the `of` largest values of places (B, count, K), of at most MOST places."""
    b, count, columns = places.shape
    out = torch.empty(b, columns, device=places.device)
    _strongest[columns, b](places, out, count, columns, COUNT=triton.next_power_of_2(count), OF=min(of, count), num_warps=8)
    return out
