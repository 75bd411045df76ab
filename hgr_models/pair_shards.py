"""Shards of encoded prompt pairs: the prompts with their safe partners, which training in text space learns from."""

import os
from collections.abc import Callable

import torch

from .shards import PAIRS, Recording, Shard, Texts, draw_rows, prompt_columns, write_shard
from .textspace import PairTexts

PARTNER = "partners."  # of the columns that hold the partners' tokens, pooled vectors and masks


def write_pairs(path: str | os.PathLike, pairs: PairTexts, about: dict, kind: str = PAIRS) -> None:
    """Writes encoded pairs, to learn from or (HELD_OUT_PAIRS) to measure with; the file appears whole or not at all."""
    columns = prompt_columns(Texts(pairs.tokens, pairs.pooled, pairs.mask, pairs.harms))
    partners = prompt_columns(Texts(pairs.partner_tokens, pairs.partner_pooled, pairs.partner_mask, pairs.harms))
    columns |= {name.replace("prompts.", PARTNER): t for name, t in partners.items() if name != "prompts.harms"}
    columns["prompts.removed"] = pairs.removed.to(torch.uint8)
    write_shard(path, kind, columns, about)


def pairs_of(shard: Shard, rows: torch.Tensor) -> PairTexts:
    """Encoded pairs at these rows (B,) of a shard, float32."""
    prompts: Texts = shard.texts(rows)
    tokens, pooled, mask = (shard.column(f"{PARTNER}{name}", rows) for name in ("tokens", "pooled", "mask"))
    removed = shard.column("prompts.removed", rows)
    return PairTexts(prompts.tokens, prompts.pooled, prompts.mask, tokens, pooled, mask, prompts.harms, removed)


def draw_pairs(
    recording: Recording,
    count: int,
    generator: torch.Generator,
    kind: str = PAIRS,
    most: Callable[[int, int], int] | None = None,
) -> PairTexts:
    """Random pairs of a recording, all of one bucket. Raises HGRError when it has none.

    `most(length, width)` says how many pairs of so many tokens on both sides, so wide, there may be at once: others are not read.
    """
    drawn = draw_rows(recording.buckets(kind), count, generator)
    order = torch.randperm(count, generator=generator)
    if most is not None:
        sides = drawn[0][0].bucket[:2]
        order = order[: most(sum(side[0] for side in sides), sides[0][1])]
    read = torch.zeros(count, dtype=torch.bool)
    read[order] = True
    shares = [(shard, rows[kept]) for (shard, rows), kept in zip(drawn, read.split([len(r) for _, r in drawn]), strict=True)]
    parts = [pairs_of(shard, rows) for shard, rows in shares if len(rows)]
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    pairs = PairTexts(*(None if column[0] is None else torch.cat(column) for column in columns))
    return pairs[(read.cumsum(0) - 1)[order]]
