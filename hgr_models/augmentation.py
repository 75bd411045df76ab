"""What users do to prompts, done to their tokens: weights, several chunks, Concat and Average (core's nodes)."""

from dataclasses import replace

import torch
from torch import Tensor

from .shards import Texts

WEIGHTS = (0.3, 1.6)  # of words, as users write them
MAX_CHUNKS, LONGEST = 4, 512  # of prompts that are joined: how many, and tokens of each


def weighted(texts: Texts, share: float, generator: torch.Generator) -> Tensor:
    """Tokens (B, T, D) of which `share` of the prompts are weighted as `(words:1.3)` does: (z - e) * weight + e.

    Half of those as a whole, the others in a span. Core's e is the empty prompt's token at that place; here it is the batch's
    mean, which has all in common with it that no text changes: CLIP's start token stays what it is. Masked tokens stay, too.
    """
    tokens, (count, length) = texts.tokens, texts.tokens.shape[:2]
    draw = lambda *shape: torch.rand(*shape, generator=generator).to(tokens.device)  # noqa: E731
    present = torch.ones(count, length, dtype=torch.bool, device=tokens.device) if texts.mask is None else texts.mask.bool()
    kept = present[..., None].to(tokens.dtype)
    mean = (tokens * kept).sum(dim=0) / kept.sum(dim=0).clamp(min=1)  # (T, D)
    weight = WEIGHTS[0] + (WEIGHTS[1] - WEIGHTS[0]) * draw(count, 1, 1)
    span = (length * draw(count, 2)).sort(dim=1).values
    place = torch.arange(length, device=tokens.device)
    hit = ((place >= span[:, :1].floor()) & (place <= span[:, 1:])) | (draw(count, 1) < 0.5)
    hit = hit & present & (draw(count, 1) < share)
    return torch.where(hit[..., None], mean + (tokens - mean) * weight.to(tokens.dtype), tokens)


def strayed(texts: Texts, clean: Texts, most: float, generator: torch.Generator) -> Texts:
    """Prompts moved by up to `most` of the difference between two clean ones at the same place, others for each row.

    Words that no pair has differ from known ones as clean prompts differ from each other, and that says nothing about harm.
    Padding and masked tokens stay; pooled vectors move as their tokens do.
    """
    tokens, count = texts.tokens, len(texts)
    length = min(tokens.shape[1], clean.tokens.shape[1])
    one, other = (clean[torch.randint(len(clean), (count,), generator=generator).to(tokens.device)] for _ in range(2))
    size = most * torch.rand(count, 1, generator=generator).to(tokens)
    start = tokens[:, :length]
    present = (start != 0) & (one.tokens[:, :length] != 0) & (other.tokens[:, :length] != 0)
    for some in (texts, one, other):
        if some.mask is not None:
            present &= some.mask[:, :length, None] > 0
    moved = start + size[..., None] * (one.tokens - other.tokens)[:, :length]
    tokens = torch.cat([torch.where(present, moved, start), tokens[:, length:]], dim=1)
    pooled = texts.pooled
    if pooled is not None and one.pooled is not None and other.pooled is not None:
        pooled = pooled + size.to(pooled) * (one.pooled - other.pooled)
    return replace(texts, tokens=tokens, pooled=pooled)


def chunked(clean: Texts, harmful: Texts, generator: torch.Generator) -> list[Texts]:
    """Rows of two to four prompts one after another, as chunks and Concat give them: one of them harmful, and none.

    As many rows as the shorter of both. The pooled vector is the first prompt's. Long prompts are not made longer, and families
    with an attention mask get none: core's nodes do not join those in a way that keeps the mask.
    """
    count = min(len(clean), len(harmful))
    if clean.mask is not None or max(clean.tokens.shape[1], harmful.tokens.shape[1]) > LONGEST:
        return []
    pick = lambda: clean[torch.randperm(len(clean), generator=generator)[:count].to(clean.tokens.device)]  # noqa: E731
    parts = [pick() for _ in range(int(torch.randint(2, MAX_CHUNKS + 1, (), generator=generator)))]
    place = int(torch.randint(len(parts), (), generator=generator))
    return [_concat([*parts[:place], harmful[:count], *parts[place + 1 :]]), _concat(parts)]


def averaged(clean: Texts, harmful: Texts, generator: torch.Generator) -> list[Texts]:
    """Rows mixed as Average does, at least half of each from the harmful prompt; none where the prompts differ in length."""
    if clean.mask is not None or clean.tokens.shape != harmful.tokens.shape:
        return []
    share = (0.5 + 0.5 * torch.rand(len(harmful), 1, generator=generator)).to(harmful.tokens.device)
    tokens = harmful.tokens * share[..., None] + clean.tokens * (1 - share[..., None])
    pooled = None if harmful.pooled is None else harmful.pooled * share + clean.pooled * (1 - share)
    return [Texts(tokens, pooled, None, harmful.harms)]


def _concat(parts: list[Texts]) -> Texts:
    harms = torch.stack([part.harms for part in parts]).amax(dim=0)
    return Texts(torch.cat([part.tokens for part in parts], dim=1), parts[0].pooled, None, harms)
