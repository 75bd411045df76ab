"""Prompts to conditioning: several at once, and as the tensors that training needs."""

import torch

from ... import hgr_models
from ...hgr_models.shards import Texts
from ..families import MASK, OTHER_TEXT, POOLED


def encode_batch(clip, prompts: list[str]) -> list:
    """A CONDITIONING of one entry whose tensors have a row per prompt: tokens (B, T, D), pooled (B, P).

    Shorter prompts get chunks of the empty prompt, as core gives the shorter of two encoders' prompts. Raises ValueError
    where an encoder makes prompts of different lengths that nothing marks as padding.
    """
    pieces = _equal_chunks(clip, prompts)
    tokens, extras = _encode(clip, pieces)
    if len({(t.shape[1], MASK in extra) for t, extra in zip(tokens, extras, strict=True)}) > 1:
        if _gives_masks(clip):  # core drops a mask that masks nothing
            extras = [{MASK: torch.ones(t.shape[:2], device=t.device), **e} for t, e in zip(tokens, extras, strict=True)]
        elif _lacks_masks(extras):
            tokens, extras = _encode(clip, _padded(pieces, clip.tokenize("")))
    longest = max(t.shape[1] for t in tokens)
    if any(t.shape[1] != longest for t in tokens):
        if _lacks_masks(extras):
            lengths = [t.shape[1] for t in tokens]
            raise ValueError(
                f"This CLIP encodes the prompts to different lengths ({lengths} tokens), and they cannot share a batch."
            )
        extras = [{**extra, MASK: _pad(extra[MASK], 1, longest)} for extra in extras]
        tokens = [_pad(t, 1, longest) for t in tokens]
    return [[torch.cat(tokens), {key: _join([extra.get(key) for extra in extras]) for key in extras[0]}]]


def _equal_chunks(clip, prompts: list[str]) -> list[dict]:
    """The tokens of every prompt, with chunks of the empty prompt where others have more; other layouts stay as they are."""
    all_tokens = [clip.tokenize(prompt) for prompt in prompts]
    empty = clip.tokenize("")
    if not all(isinstance(tokens, dict) and all(isinstance(v, list) for v in tokens.values()) for tokens in (*all_tokens, empty)):
        return all_tokens
    counts = {key: max(len(tokens[key]) for tokens in all_tokens) for key in empty}
    return [
        {key: [*tokens[key], *empty[key] * (count - len(tokens[key]))] for key, count in counts.items()} for tokens in all_tokens
    ]


def _lacks_masks(extras: list[dict]) -> bool:
    return any(MASK not in extra for extra in extras)


def _gives_masks(clip) -> bool:
    """Whether one of a CLIP's encoders marks padding for the model that reads it, as language models do."""
    model = getattr(clip, "cond_stage_model", None)
    return model is not None and any(getattr(part, "return_attention_masks", False) for part in model.modules())


def _padded(pieces: list[dict], empty: dict) -> list[dict]:
    """Chunks as long as the longest, with the token that an encoder such as T5 pads the empty prompt with; others stay as they are."""
    for key, chunks in empty.items() if isinstance(empty, dict) else ():
        pad = chunks[-1][-1:]
        if chunks[-1][-2:] == 2 * pad:  # the empty prompt ends in padding
            longest = max(len(chunk) for tokens in pieces for chunk in tokens[key])
            pieces = [{**tokens, key: [[*c, *pad * (longest - len(c))] for c in tokens[key]]} for tokens in pieces]
    return pieces


def _encode(clip, pieces: list) -> tuple[list[torch.Tensor], list[dict]]:
    """Tokens (1, T, D) and extras per prompt."""
    entries = [_only(clip.encode_from_tokens_scheduled(tokens)) for tokens in pieces]
    return [entry[0] for entry in entries], [entry[1] for entry in entries]


def _only(entries: list) -> list:
    if len(entries) != 1:
        raise ValueError("This CLIP has scheduled hooks, which give one prompt several encodings. Connect a CLIP without.")
    return entries[0]


def _pad(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    return torch.cat([x, x.new_zeros([*x.shape[:dim], size - x.shape[dim], *x.shape[dim + 1 :]])], dim=dim)


def _join(values: list):
    """Tensors of one row each as one batch; anything else must be the same for every prompt."""
    if all(isinstance(value, torch.Tensor) for value in values):
        if len({value.shape for value in values}) > 1 or values[0].shape[:1] != (1,):
            raise ValueError(
                f"This CLIP gives prompts extra tensors of shapes {[tuple(v.shape) for v in values]}, which cannot share a batch."
            )
        return torch.cat(values)
    if any(value is not values[0] and value != values[0] for value in values):
        raise ValueError("This CLIP gives each prompt extra values of its own, which cannot share a batch.")
    return values[0]


def text_of(conditioning: list, harms: torch.Tensor) -> Texts:
    """The tokens, pooled vectors and masks of a batched CONDITIONING with the harms (B, K) of its rows, on the CPU.

    Raises HGRError for a family whose conditions hold text that an HGR cannot rewrite.
    """
    (tokens, extras), count = conditioning[0], len(harms)
    if others := sorted(extras.keys() & OTHER_TEXT.keys()):
        raise hgr_models.HGRError(
            f"SafeCFG cannot learn from this model: its prompts also carry {', '.join(OTHER_TEXT[k] for k in others)}, which the "
            "condition redirector does not rewrite. SafeCFG Concept Guidance needs no HGR."
        )
    mask = extras.get(MASK)
    mask = None if mask is None else mask.reshape(count, -1).float().cpu()
    pooled = extras.get(POOLED)
    return Texts(tokens.float().cpu(), None if pooled is None else pooled.float().cpu(), mask, harms)
