"""Prompts to conditioning, each as if it were alone: batches hold only prompts that are alike, and padding never reaches a model."""

import random
from typing import Any

import torch
from comfy.sd import CLIP

from ...hgr_models.shards import Texts
from .families import POOLED
from .more_tokens import MASK, TOKENS, gather, keys_of

# How users write prompts, for a share of those that an HGR learns from: weighted, long, read by another layer of the CLIP.
WEIGHTED, LONG, SKIPPED = 0.15, 0.15, 0.2  # shares of the batches; half of the last get the layer that is not the CLIP's own
FILLERS = 8  # the most clean prompts that stand around a long one
LAYERS = (-1, -2)  # CLIP skip: what users choose, and what SD1.5 and SDXL have by themselves
CLIPS = frozenset(("l", "g", "h"))  # core's names of CLIP's encoders; of a language model, another layer may have another width

WIDTH = "safecfg_width"  # of a prompt's own tokens, where more text was joined to them; in its extras
QUOTED = 'a sign that says "yes"'  # a prompt of which every encoder of a family has something to read
LENGTHS = "safecfg_lengths"  # of the prompts of a padded batch, in its extras
ROUNDED = 32  # padded lengths are multiples of it, so that different batches stack


def encode_text(clip: CLIP, text: str) -> list:
    """The CONDITIONING that core's CLIP Text Encode gives."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def encode_each(clip: CLIP, prompts: list[str]) -> list:
    """An entry [tokens (1, T, D), extras] of a CONDITIONING per prompt, as CLIP Text Encode makes it."""
    return [_only(clip.encode_from_tokens_scheduled(clip.tokenize(prompt))) for prompt in prompts]


def encode_groups(clip: CLIP, prompts: list[str], one_by_one: bool = False) -> list[tuple[list[int], list]]:
    """(rows, CONDITIONING of one entry with those rows) per group of prompts that core can evaluate as one batch.

    Prompts of different lengths never share a group: many models do not fully honour an attention mask, so that padding would
    change what they draw. `one_by_one`: every prompt is a group.
    """
    groups: list[tuple[list[int], list]] = []
    for row, entry in enumerate(encode_each(clip, prompts)):
        for rows, entries in groups:
            if not one_by_one and _alike(entries[0], entry):
                rows.append(row)
                entries.append(entry)
                break
        else:
            groups.append(([row], [entry]))
    return [(rows, [_joined(entries)]) for rows, entries in groups]


def encode_batch(clip: CLIP, prompts: list[str]) -> list:
    """A CONDITIONING of one entry with a row per prompt: tokens (B, T, D), pooled (B, P). To read, not to sample with.

    Shorter prompts are padded with zeros and masked; their own lengths (B,) are then in the extras, under LENGTHS.
    """
    return padded(encode_each(clip, prompts))


def _only(entries: list) -> list:
    if len(entries) != 1:
        raise ValueError("This CLIP has scheduled hooks, which give one prompt several encodings. Connect a CLIP without.")
    return entries[0]


def _alike(one: list, other: list) -> bool:
    """Whether two entries differ in nothing but the values of tensors with a row per prompt."""
    (tokens, extras), (tokens_too, extras_too) = one, other
    return (
        tokens.shape == tokens_too.shape
        and not takes_no_rows(extras)
        and extras.keys() == extras_too.keys()
        and all(_rows_of_a_batch(extras[key], extras_too[key]) or _same(extras[key], extras_too[key]) for key in extras)
    )


def takes_no_rows(extras: dict) -> bool:
    """Whether an entry holds a vector without rows, as Anima's token ids are: core evaluates such prompts one at a time."""
    return any(isinstance(value, torch.Tensor) and value.ndim == 1 for value in extras.values())


def _rows_of_a_batch(one: Any, other: Any) -> bool:
    both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return both and one.shape == other.shape and one.ndim > 1 and one.shape[0] == 1


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return type(one) is type(other) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or type(one) is type(other) and bool(one == other)


def _joined(entries: list) -> list:
    """One entry with the rows of entries that are alike."""
    first = entries[0][1]
    join = lambda key: torch.cat([extras[key] for _, extras in entries])  # noqa: E731
    extras = {key: join(key) if _rows_of_a_batch(value, value) else value for key, value in first.items()}
    return [torch.cat([tokens for tokens, _ in entries]), extras]


def in_rows(groups: list[tuple[list[int], list]]) -> list:
    """The entries of groups of `encode_groups`, one per prompt, in their order."""
    entries = {row: _row(cond[0], i) for rows, cond in groups for i, row in enumerate(rows)}
    return [entries[row] for row in sorted(entries)]


def _row(entry: list, i: int) -> list:
    tokens, extras = entry
    several = lambda value: isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == len(tokens)  # noqa: E731
    return [tokens[i : i + 1], {key: value[i : i + 1] if several(value) else value for key, value in extras.items()}]


def padded(entries: list) -> list:
    """Entries of one prompt each as a CONDITIONING of `encode_batch`; all text is in its tokens (`more_tokens`)."""
    entries = [_gathered(entry) for entry in entries]
    lengths = [tokens.shape[1] for tokens, _ in entries]
    varied = len(set(lengths)) > 1 or len({MASK in extras for _, extras in entries}) > 1
    if varied:
        longest = -(-max(lengths) // ROUNDED) * ROUNDED
        masks = [_mask_of(tokens, extras) for tokens, extras in entries]
        entries = [
            [_pad(tokens, longest), {**extras, MASK: _pad(mask, longest), LENGTHS: torch.tensor([[tokens.shape[1]]])}]
            for (tokens, extras), mask in zip(entries, masks, strict=True)
        ]
    keys = {key: None for _, extras in entries for key in extras}  # of all prompts: one may carry more than the first
    tokens = torch.cat([tokens for tokens, _ in entries])
    return [[tokens, {key: _column([extras.get(key) for _, extras in entries]) for key in keys}]]


def _gathered(entry: list) -> list:
    tokens, extras = entry
    if not keys_of(extras):
        return entry
    tokens, mask = gather({**extras, TOKENS: tokens})
    return [tokens, {**extras, **({} if mask is None else {MASK: mask}), WIDTH: entry[0].shape[-1]}]


def _mask_of(tokens: torch.Tensor, extras: dict) -> torch.Tensor:
    """A prompt's attention mask (1, T); core drops one that masks nothing."""
    mask = extras.get(MASK)
    return torch.ones(tokens.shape[:2], device=tokens.device) if mask is None else mask.reshape(1, -1)


def _pad(x: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([x, x.new_zeros([*x.shape[:1], length - x.shape[1], *x.shape[2:]])], dim=1)


def _column(values: list) -> Any:
    """Tensors of one row each as one batch where they stack; else the first prompt's value, or the list of all."""
    if all(_rows_of_a_batch(values[0], value) for value in values):
        return torch.cat(values)
    return values[0] if all(_same(values[0], value) for value in values) else values


def text_of(conditioning: list, harms: torch.Tensor) -> Texts:
    """The tokens, pooled vectors and masks of a CONDITIONING of `encode_batch` with the harms (B, K) of its rows, on the CPU."""
    (tokens, extras), count = conditioning[0], len(harms)
    mask = extras.get(MASK)
    mask = None if mask is None else mask.reshape(count, -1).float().cpu()
    pooled, lengths = extras.get(POOLED), extras.get(LENGTHS)
    return Texts(
        tokens.float().cpu(),
        None if pooled is None else pooled.float().cpu(),
        mask,
        harms,
        None if lengths is None else lengths[:, 0],
    )


def vary(columns: list[list[str]], fillers: tuple[str, ...], rng: random.Random) -> list[list[str]]:
    """Prompts with weights, or of several chunks, in a part of the batches; the same change in every column.

    Columns are prompts and their partners, row by row; fillers are clean prompts. Chunks are padded to a batch's longest.
    """
    way = rng.random()
    frames = [("", "") for _ in columns[0]]
    if way < WEIGHTED:
        frames = [("(", f":{rng.uniform(0.3, 1.6):.2f})") for _ in frames]
    elif way < WEIGHTED + LONG:
        around = [rng.sample(fillers, min(len(fillers), rng.randint(1, FILLERS))) for _ in frames]
        places = [rng.randint(0, len(some)) for some in around]
        frames = [
            ("".join(f"{t}, " for t in some[:place]), "".join(f", {t}" for t in some[place:]))
            for some, place in zip(around, places, strict=True)
        ]
    return [[before + text + after for text, (before, after) in zip(column, frames, strict=True)] for column in columns]


def some_layer(clip: CLIP, rng: random.Random) -> CLIP:
    """The CLIP, in a part of the batches as core's CLIP Set Last Layer gives it; as it is where an encoder is none of CLIP's."""
    if rng.random() >= SKIPPED:
        return clip
    if not reads_clip_alone(clip):
        return clip
    clip = clip.clone()
    clip.clip_layer(rng.choice(LAYERS))
    return clip


def reads_clip_alone(clip: CLIP) -> bool:
    """Whether all of a CLIP's encoders are CLIP's own, as those of Stable Diffusion and SDXL are."""
    tokens = clip.tokenize("")
    return isinstance(tokens, dict) and tokens.keys() <= CLIPS
