"""The condition redirector: rewrites a harmful prompt's tokens so that the model itself draws the safe picture.

    p           = harmfulness(tokens, pooled)            (B, K)
    w           = strength * (p > threshold)             (B, K), a hard gate
    D, P        = delta(tokens, pooled, w)               (B, T, D), (B, P)
    tokens_safe = where(any_k w_k > 0, tokens + D, tokens)

This project's reading of arXiv 2412.16039; see `redirection.py` for the gate.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import start_at_zero


@dataclass(frozen=True)
class ConditionConfig:
    """Sizes of a condition redirector. `pooled_width` 0 means the family has no pooled vector."""

    token_width: int
    categories: int
    pooled_width: int = 0
    width: int = 128
    depth: int = 2  # layers that read the prompt
    delta_depth: int = 2  # layers that write the delta, conditioned on the category weights
    heads: int = 4
    short_width: int = 0  # channels that the tokens of a narrower encoder fill (`narrower_width`); 0: there is none


CHANNELS = 512  # that units are measured of at once: a median copies what it looks at
CLAMP = 20.0  # of tokens in units: an outlier must not rule what the network reads


def presence_bias(mask: Tensor) -> Tensor:
    """What attention adds to its logits for a mask (B, T): 0 where it is 1, -1e9 where it is 0, log m where it is m.

    A mask of m lets one token stand for m equal ones, such as padding: a softmax cannot tell the difference.
    """
    return torch.where(mask > 0, mask.float().clamp(min=1e-9).log(), -1e9)


class Layer(nn.Module):
    """Pre-norm transformer layer over (B, N, width); `absent` (B, 1, 1, N) is added to the attention's logits."""

    def __init__(self, width: int, heads: int, ops: Any):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = ops.LayerNorm(width), ops.Linear(width, 3 * width), ops.Linear(width, width)
        self.norm2, self.up, self.down = ops.LayerNorm(width), ops.Linear(width, 2 * width), ops.Linear(2 * width, width)

    def forward(self, x: Tensor, absent: Tensor | None) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=absent).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _center_and_spread(values: Tensor) -> tuple[Tensor, Tensor]:
    center = values.median(dim=0).values
    spread = 1.4826 * (values - center).abs().median(dim=0).values
    return center, torch.where(spread > 0, spread, values.std(dim=0, correction=0))  # mostly one value


@torch.no_grad()
def robust_units(values: Tensor) -> tuple[Tensor, Tensor]:
    """Center and scale (D,) of the channels of values (N, D): median and 1.48 median absolute deviations."""
    parts = [_center_and_spread(some.float()) for some in values.split(CHANNELS, dim=1)]
    center, spread = (torch.cat(column) for column in zip(*parts, strict=True))
    return center, spread.clamp(min=max(1e-4, 0.05 * spread.median().item()))


def narrower_width(tokens: Tensor) -> int:
    """Channels that the tokens of a narrower encoder fill, among tokens (N, T, D); 0 when all come from one encoder.

    Core joins encoders along T where it pads the narrower one's channels with zeros: SD3 has CLIP (2048) beside T5 (4096).
    """
    filled = tokens.reshape(-1, tokens.shape[-1]) != 0
    filled = filled[filled.any(dim=1)]  # tokens that are all 0 say nothing
    ends = filled.shape[1] - filled.flip(1).float().argmax(dim=1)
    short = ends[ends <= 0.9 * filled.shape[1]]  # a single value may be 0 by chance
    return int(short.max()) if 0 < len(short) < len(ends) else 0


def in_units(values: Tensor, scale: Tensor) -> Tensor:
    """Values per unit; 0 where a unit is 0, as beyond a narrower encoder's channels, where nothing differs from its center."""
    return values / torch.where(scale > 0, scale, 1.0)


class ConditionRedirector(nn.Module):
    """Reads a prompt's tokens of any count; tells its harmfulness per category and the delta that makes it safe.

    Without absolute positions: chunks, concatenations and averages of prompts are read alike. Inputs and deltas are in
    robust units per channel and encoder (`measure`), because outlier channels would otherwise drown the rest.
    """

    token_center: Tensor  # buffers: (D,), (D,), (P,), (P,), (D,), (D,)
    token_scale: Tensor
    pooled_center: Tensor
    pooled_scale: Tensor
    short_center: Tensor
    short_scale: Tensor

    def __init__(self, config: ConditionConfig, ops: Any = nn):
        super().__init__()
        self.config = c = config
        sizes = {"token": c.token_width, "pooled": c.pooled_width, **({"short": c.token_width} if c.short_width else {})}
        for name, size in sizes.items():
            self.register_buffer(f"{name}_center", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        if c.short_width:
            self.short_scale[c.short_width :] = 0.0
        self.token_in = ops.Linear(c.token_width, c.width)
        self.pooled_in = ops.Linear(c.pooled_width, c.width) if c.pooled_width else None
        self.readers = nn.ModuleList(Layer(c.width, c.heads, ops) for _ in range(c.depth))
        self.read_norm, self.read_head = ops.LayerNorm(c.width), ops.Linear(c.width, c.categories)
        self.weights_in = ops.Linear(c.categories, 2 * c.width)
        self.writers = nn.ModuleList(Layer(c.width, c.heads, ops) for _ in range(c.delta_depth))
        self.write_norm = ops.LayerNorm(c.width)
        self.token_out, self.erase = ops.Linear(c.width, c.token_width), ops.Linear(c.width, 1)
        self.pooled_out = ops.Linear(c.width, c.pooled_width) if c.pooled_width else None
        for head in (self.token_out, self.erase, self.pooled_out):
            if head is not None:
                start_at_zero(head)

    def measure(self, tokens: Tensor, pooled: Tensor | None = None) -> None:
        """Sets the units from a sample of tokens (N, T, D) and pooled (N, P)."""
        tokens = tokens.reshape(-1, tokens.shape[-1])
        samples = {"token": tokens, "pooled": pooled}
        if width := self.config.short_width:
            short = self._short(tokens)
            samples |= {"token": tokens[~short], "short": tokens[short, :width]}
        for name, values in samples.items():
            if values is not None and len(values):
                for kind, unit in zip(("center", "scale"), robust_units(values), strict=True):
                    buffer = self.get_buffer(f"{name}_{kind}")
                    buffer.zero_()[: len(unit)].copy_(unit)

    def _short(self, tokens: Tensor) -> Tensor:
        """Which tokens (..., D) are a narrower encoder's: (...)."""
        return (tokens[..., self.config.short_width :] == 0).all(dim=-1)

    def units(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Center and scale of tokens (B, T, D): (D,), or (B, T, D) where there are two encoders; 0 beyond the narrower one's channels."""
        # When ComfyUI, short of memory, loads only some of the layers, buffers stay where they were: hence `to(device)`.
        center, scale = self.token_center.to(tokens.device), self.token_scale.to(tokens.device)
        if not self.config.short_width:
            return center, scale
        short = self._short(tokens)[..., None]
        short_center, short_scale = self.short_center.to(tokens.device), self.short_scale.to(tokens.device)
        return torch.where(short, short_center, center), torch.where(short, short_scale, scale)

    def _read(self, tokens: Tensor, pooled: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Features (B, N, width) of the present tokens and the pooled vector (last, if any), units z, attention bias."""
        center, scale = self.units(tokens)
        z = in_units(tokens.float() - center, scale).clamp(-CLAMP, CLAMP)  # fp32: deltas are small against outlier channels
        h = self.token_in(z)
        present = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
        if self.pooled_in is not None and pooled is not None:
            center, scale = self.pooled_center.to(pooled.device), self.pooled_scale.to(pooled.device)
            y = ((pooled.float() - center) / scale).clamp(-CLAMP, CLAMP)
            h = torch.cat([h, self.pooled_in(y)[:, None]], dim=1)
            present = F.pad(present, (0, 1), value=True)
        absent = None
        if mask is not None:
            bias = presence_bias(mask)
            absent = F.pad(bias, (0, present.shape[1] - bias.shape[1]))[:, None, None].to(h.dtype)
        for layer in self.readers:
            h = layer(h, absent)
        return h, z, present, absent

    def harmfulness_logits(self, tokens: Tensor, pooled: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits (B, K) float32 of `harmfulness`, for training."""
        return self._logits(*self._read(tokens, pooled, mask)[::2])

    def _logits(self, h: Tensor, present: Tensor) -> Tensor:
        logits = self.read_head(self.read_norm(h)).float()  # (B, N, K)
        # The strongest token decides: one harmful word must not drown in a long prompt.
        return logits.masked_fill(~present[..., None], -30.0).amax(dim=1)

    def harmfulness(self, tokens: Tensor, pooled: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Harmfulness (B, K) float32 in [0, 1] of tokens (B, T, D), pooled (B, P), attention mask (B, T); all-zero tokens give 0."""
        p = self.harmfulness_logits(tokens, pooled, mask).sigmoid()
        return p * (tokens != 0).flatten(1).any(dim=1, keepdim=True)

    def delta(
        self, tokens: Tensor, pooled: Tensor | None, weights: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The delta (B, T, D) of the tokens and (B, P) of the pooled vector, float32, for category weights (B, K) in [0, 1].

        0 where the attention mask is 0. One delta for all flagged categories together: adding one per category would leave
        each harm half in place.
        """
        h, z, present, absent = self._read(tokens, pooled, mask)
        scale, shift = self.weights_in(weights.to(h.dtype))[:, None].chunk(2, dim=-1)
        h = h * (1 + scale) + shift
        for layer in self.writers:
            h = layer(h, absent)
        h, count = self.write_norm(h), tokens.shape[1]
        # `erase` takes a token's own content out, which also works for words that training never saw.
        change = self.token_out(h[:, :count]) - self.erase(h[:, :count]) * z
        delta = (change * self.units(tokens)[1] * present[:, :count, None]).float()
        if self.pooled_out is None or pooled is None:
            return delta, None
        return delta, (self.pooled_out(h[:, -1]) * self.pooled_scale.to(h.device)).float()
