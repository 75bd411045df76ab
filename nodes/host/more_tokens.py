"""Text that some networks read beside their tokens, as one sequence with them: a redirector sees and changes all of it.

HiDream's Llama states (B, L, T, D), HunyuanDiT's mT5 and Hunyuan's ByT5 embeddings (B, T, D) follow the tokens; the narrower ones
are padded with zeros, as core joins the two encoders of SD3.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, MASK = "cross_attn", "attention_mask"
LLAMA, MT5, BYT5 = "conditioning_llama3", "conditioning_mt5xl", "conditioning_byt5small"
MORE = {LLAMA: "", MT5: "attention_mask_mt5xl", BYT5: ""}  # keys of a condition, and of their masks
FIXED = (LLAMA, MT5)  # as long for every prompt; ByT5 reads what a prompt puts in quotes
BYT5_WIDTH = 1472


def keys_of(condition: dict) -> list[str]:
    """The keys with more tokens that a condition has, in the order of the sequence."""
    return [key for key in MORE if isinstance(condition.get(key), Tensor) and condition[key].ndim >= 3]


def gather(condition: dict) -> tuple[Tensor, Tensor | None]:
    """All tokens of a condition (B, N, D), D that of the widest, and their mask (B, N); None: nothing is masked."""
    tokens, mask = condition[TOKENS], condition.get(MASK)
    keys = keys_of(condition)
    if not keys:
        return tokens, mask
    count = len(tokens)
    parts = [tokens, *(condition[key].flatten(1, -2).expand(count, -1, -1) for key in keys)]
    width = max(part.shape[-1] for part in parts)
    masks = [mask, *(condition.get(MORE[key]) for key in keys)]
    joined = torch.cat([F.pad(part.to(tokens), (0, width - part.shape[-1])) for part in parts], dim=1)
    if all(mask is None for mask in masks):
        return joined, None
    return joined, torch.cat([_mask(part, mask) for part, mask in zip(parts, masks, strict=True)], dim=1)


def _mask(part: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones(part.shape[:2], device=part.device)
    return mask.reshape(-1, part.shape[1]).expand(len(part), -1).to(part.device, torch.float32)


def scatter(condition: dict, tokens: Tensor) -> dict[str, Tensor]:
    """The keys of a condition with tokens (B, N, D) in their places, in the shapes that the condition has."""
    shapes = {TOKENS: condition[TOKENS].shape, **{key: condition[key].shape for key in keys_of(condition)}}
    return split(tokens, shapes)


def split(tokens: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tokens (B, N, D) of `gather` by key; `shapes` of a condition's own tensors, whatever their rows."""
    parts = tokens.split([math.prod(shape[1:-1]) for shape in shapes.values()], dim=1)
    return {
        key: part[..., : shape[-1]].unflatten(1, shape[1:-1]) if len(shape) > 3 else part[..., : shape[-1]]
        for (key, shape), part in zip(shapes.items(), parts, strict=True)
    }


def shapes_in(tokens: Tensor, template: dict, width: int, quotes: bool) -> dict[str, tuple[int, ...]]:
    """Shapes by key of what is in tokens (B, N, D): `width` is that of the first, `template` a condition of the same encoder.

    `quotes`: the network reads ByT5's tokens, if there are any. They are the last ones, narrower than the others.
    """
    more = {key: tuple(template[key].shape) for key in keys_of(template) if key in FIXED}
    if quotes and tokens.shape[-1] > BYT5_WIDTH:
        narrow = (tokens.detach()[..., BYT5_WIDTH:] == 0).all(dim=-1).all(dim=0)
        count = int(narrow.flip(0).long().cumprod(0).sum())
        more |= {BYT5: (1, count, BYT5_WIDTH)} if 0 < count < tokens.shape[1] else {}
    rest = tokens.shape[1] - sum(math.prod(shape[1:-1]) for shape in more.values())
    return {TOKENS: (1, rest, width), **more}
