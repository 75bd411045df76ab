"""Encoded prompts as shards: the pairs that text space learns from, clean prompts, and those that thresholds come from."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from comfy.sd import CLIP

from ...hgr_models.errors import HGRError
from ...hgr_models.pair_shards import write_pairs
from ...hgr_models.pairs import PromptPair, PromptSet
from ...hgr_models.shards import CALIBRATION, CALIBRATION_TEXTS, CLEAN, HELD_OUT_PAIRS, PAIRS, TEXTS, token_columns, write_texts
from ...hgr_models.textspace import PairTexts
from ..host.encoding import FILLERS, LONG, encode_batch, reads_clip_alone, some_layer, text_of, vary
from .recorder import CleanPrompt, clean_pairs, labels

TEXT_BATCH = 32
LARGEST = 4 * 2**30  # bytes of all encoded prompts on disk
SAMPLE = 4  # pairs whose size is measured


def write_prompts(clip: CLIP, prompts: PromptSet, seed: int, folder: Path, facts: dict, notes: list[str]) -> Iterator[float]:
    """Writes every encoded prompt as shards; yields the share that is done. Those to learn from are worded as users do.

    Where they would take more than LARGEST, every kind is cut to the same share, said in `notes`. Raises HGRError where some are
    gone at the end: an HGR would learn from the rest alone.
    """
    batches, share = plan_batches(prompts, bytes_of_prompt(clip, prompts), not reads_clip_alone(clip))
    if share < 1:
        notes.append(f"learnt from {100 * share:.0f} % of the prompts: all of them would take more than {LARGEST // 2**30} GiB")
    paths = [folder / f"{name}.safetensors" for _, name, _ in batches]
    for done, ((kind, name, pairs), path) in enumerate(zip(batches, paths, strict=True)):
        if not path.exists():
            _write(clip, prompts, path, kind, pairs, facts, random.Random(f"{seed} {name}"))
        yield (done + 1) / len(batches)
    if gone := sum(not path.exists() for path in paths):
        raise HGRError(
            f"{gone} of {len(paths)} files with encoded prompts were removed from {folder} while the others were written. Start again: "
            "they are encoded anew."
        )


def plan_batches(prompts: PromptSet, each: float, by_length: bool = False) -> tuple[list[tuple[str, str, tuple]], float]:
    """Kind, name and pairs of every shard, and the share of the prompts that fits LARGEST at `each` bytes per prompt.

    `by_length`: prompts of like length share a shard, for encoders that give every prompt tokens of its own count.
    """
    groups = {
        PAIRS: prompts.pairs, HELD_OUT_PAIRS: prompts.held_out_pairs, CLEAN: clean_pairs(prompts.clean),
        CALIBRATION: clean_pairs(prompts.held_out_clean),
    }  # fmt: skip
    total = sum(len(some) * (2 if kind in (PAIRS, HELD_OUT_PAIRS) else 1) for kind, some in groups.items())
    share = min(1.0, LARGEST / max(1, total * each))
    kept = {kind: _spread(some, share) for kind, some in groups.items()}
    if by_length:
        kept = {kind: tuple(sorted(some, key=_length)) for kind, some in kept.items()}
    batches = [
        (kind, f"texts-{kind.replace(' ', '-')}-{i:05d}", some[start : start + TEXT_BATCH])
        for kind, some in kept.items()
        for i, start in enumerate(range(0, len(some), TEXT_BATCH))
    ]
    return batches, share


def bytes_of_prompt(clip: CLIP, prompts: PromptSet) -> float:
    """Of one encoded prompt on disk, about: by a few pairs, as they are and as long as `encoding.vary` makes a part of them."""
    texts = [pair.harmful for pair in _spread(prompts.pairs, min(1.0, SAMPLE / len(prompts.pairs)))]
    around = ", ".join(prompts.clean[:FILLERS])
    plain, long = (_stored_bytes(clip, some) for some in (texts, [f"{text}, {around}" for text in texts]))
    return (1 - LONG) * plain + LONG * long


def _stored_bytes(clip: CLIP, texts: list[str]) -> float:
    columns = token_columns("prompts", encode_batch(clip, texts)[0][0].float())
    return sum(t.numel() * t.element_size() for t in columns.values()) / len(texts)


def _length(pair: PromptPair | CleanPrompt) -> int:
    """Letters of a pair's longer side; close enough to tokens."""
    return max(len(pair.harmful), len(pair.safe))


def _spread(pairs: tuple, share: float) -> tuple:
    """An even share of some pairs, at least one."""
    count = max(1, int(share * len(pairs))) if pairs else 0
    return pairs if count == len(pairs) else tuple(pairs[i * len(pairs) // count] for i in range(count))


def _write(clip: CLIP, prompts: PromptSet, path: Path, kind: str, pairs: tuple, facts: dict, rng: random.Random) -> None:
    texts = [[pair.harmful for pair in pairs], [pair.safe for pair in pairs]]
    harms = torch.stack([labels(prompts.categories, pair.harms) for pair in pairs])
    if kind in (PAIRS, CLEAN):
        texts, clip = vary(texts, prompts.clean, rng), some_layer(clip, rng)
    if kind in (PAIRS, HELD_OUT_PAIRS):
        removed = torch.stack([labels(prompts.categories, pair.removed) for pair in pairs])
        both = text_of(encode_batch(clip, texts[0] + texts[1]), torch.cat([harms, harms]))
        prompt, partner = both[: len(pairs)], both[len(pairs) :]
        columns = (t for side in (prompt, partner) for t in (side.tokens, side.pooled, side.mask))
        write_pairs(path, PairTexts(*columns, harms, removed), facts, kind)
    else:
        rows = text_of(encode_batch(clip, texts[0]), harms)
        write_texts(path, rows, facts, CALIBRATION_TEXTS if kind == CALIBRATION else TEXTS)
