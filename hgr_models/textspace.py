"""The condition redirector's objective in text space: no denoiser, no latents, only what the text encoder says.

    z        = (tokens - center) / scale                            the redirector's own units
    A        = softmax over tokens of z W,  W ~ N(0, t^2 / D)       random attention readers, new ones in every step
    R(z)     = A^T z                                                (B, R, D): what each reader takes from the prompt
    error    = mean |R(z_corrected) - R(z_partner)|^2 / (mean |R(z) - R(z_partner)|^2 + floor)

A denoiser meets its prompt through attention alone, as a set of tokens. What reads like the safe partner to every random
reader reads like it to the denoiser, too; the temperature 0 among the readers is the mean over all tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .condition import CLAMP, ConditionRedirector, in_units, presence_bias

READERS = 256  # per step
TEMPERATURES = (0.0, 1.0, 2.0, 4.0)  # of the readers' attention, in equal shares
SKETCH = 256  # dims that wider tokens are read in: a random projection keeps distances on average
TINY = 1e-12  # of a mean square
FLOOR = 0.1  # of the batch's mean size, added to a pair's own: pairs that hardly differ must not rule


@dataclass
class PairTexts:
    """Encoded prompts with their safe partners, row by row; masks are as in `ConditionRedirector`.

    tokens (B, T, D), pooled (B, P) or None, mask (B, T) or None, the same of the partners (B, S, D); harms and `removed`,
    the subset of them that the partner lacks: (B, K).
    """

    tokens: Tensor
    pooled: Tensor | None
    mask: Tensor | None
    partner_tokens: Tensor
    partner_pooled: Tensor | None
    partner_mask: Tensor | None
    harms: Tensor
    removed: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> "PairTexts":
        return PairTexts(*(None if value is None else value[index] for value in vars(self).values()))


@dataclass(frozen=True)
class Readers:
    """Random attention readers: queries (S, R), and the projection (D, S) that wide tokens go through, or None."""

    queries: Tensor
    sketch: Tensor | None

    def read(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each reader takes from tokens z (B, T, D) in units: (B, R, S). Absent tokens (mask 0) are not read."""
        z = z if self.sketch is None else z @ self.sketch
        # A token that is the same in every prompt can be far from all others (CLIP's first): no reader may see it alone.
        keys = z / z.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1.0)
        logits = keys @ self.queries  # (B, T, R)
        if mask is not None:
            logits = logits + presence_bias(mask)[..., None].to(logits.dtype)
        return logits.softmax(dim=1).transpose(1, 2) @ z


def draw_readers(width: int, generator: torch.Generator, device: torch.device, count: int = READERS) -> Readers:
    """New readers of tokens of a width: `count` of them, the temperatures in equal shares."""
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    sketch = normal(width, SKETCH) / SKETCH**0.5 if width > 2 * SKETCH else None
    inner = SKETCH if sketch is not None else width
    temperature = torch.tensor(TEMPERATURES, device=device).repeat_interleave(-(-count // len(TEMPERATURES)))[:count]
    return Readers(normal(inner, count) / inner**0.5 * temperature, sketch)


def token_units(network: ConditionRedirector, tokens: Tensor) -> Tensor:
    """Tokens (B, T, D) in the network's units, clamped as it reads them; float32."""
    center, scale = network.units(tokens)
    return in_units(tokens.float() - center, scale).clamp(-CLAMP, CLAMP)


@dataclass(frozen=True)
class TextErrors:
    """Distances to the partner (B,): `error` is relative to no redirection, 0 is the partner itself and 1 as far as before.

    `before` and `after` are mean squares over all readers, before the division; `along` is how much of the way from the prompt
    to its partner the mean reading moved: 1 all of it.
    """

    error: Tensor
    before: Tensor
    after: Tensor
    along: Tensor

    @property
    def unredirected(self) -> Tensor:
        """`error` of a redirector that does nothing, (B,)."""
        return self.before / (self.before + FLOOR * self.before.mean() + TINY)


def reader_errors(before: Tensor, after: Tensor, partner: Tensor) -> TextErrors:
    """The errors of readings (B, R, S) of the prompt, the corrected prompt and the partner; differentiable in `after`."""
    way, left = partner - before, partner - after
    sizes, lefts = (t.square().flatten(1).mean(dim=1) for t in (way, left))
    floor = FLOOR * sizes.mean()
    moved = ((after - before) * way).flatten(1).mean(dim=1) / (sizes + TINY)
    return TextErrors(lefts / (sizes + floor + TINY), sizes, lefts, moved.detach())


def pooled_error(network: ConditionRedirector, pooled: Tensor, corrected: Tensor, partner: Tensor) -> Tensor:
    """|P + dP - P_partner|^2 / (|P - P_partner|^2 + floor) in the network's units, (B,); all pooled vectors are (B, P)."""
    scale = network.pooled_scale.to(pooled.device)
    size = ((pooled - partner) / scale).square().mean(dim=1)
    return ((corrected - partner) / scale).square().mean(dim=1) / (size + FLOOR * size.mean() + TINY)


def text_errors(network: ConditionRedirector, pairs: PairTexts, readers: Readers) -> tuple[TextErrors, Tensor | None]:
    """The readers' errors after the redirector's own correction, and the pooled vectors' (B,), None without them.

    Differentiable in the network.
    """
    d_tokens, d_pooled = network.delta(pairs.tokens, pairs.pooled, pairs.removed, pairs.mask)
    before = readers.read(token_units(network, pairs.tokens), pairs.mask)
    after = readers.read(token_units(network, pairs.tokens + d_tokens), pairs.mask)
    partner = readers.read(token_units(network, pairs.partner_tokens), pairs.partner_mask)
    pooled = None
    if d_pooled is not None and pairs.partner_pooled is not None:
        pooled = pooled_error(network, pairs.pooled, pairs.pooled + d_pooled, pairs.partner_pooled)
    return reader_errors(before, after, partner), pooled
