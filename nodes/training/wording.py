"""How users write prompts, for a share of those that an HGR learns from: weighted, long, read by another layer of the CLIP."""

import random

WEIGHTED, LONG, SKIPPED = 0.15, 0.15, 0.2  # shares of the batches; half of the last get the layer that is not the CLIP's own
LAYERS = (-1, -2)  # CLIP skip: what users choose, and what SD1.5 and SDXL have by themselves
CLIPS = frozenset(("l", "g", "h"))  # core's names of CLIP's encoders; of a language model, another layer may have another width


def vary(columns: list[list[str]], fillers: tuple[str, ...], rng: random.Random) -> list[list[str]]:
    """Prompts with weights, or of several chunks, in a part of the batches; the same change in every column.

    Columns are prompts and their partners, row by row; fillers are clean prompts. Chunks are padded to a batch's longest.
    """
    way = rng.random()
    frames = [("", "") for _ in columns[0]]
    if way < WEIGHTED:
        frames = [("(", f":{rng.uniform(0.3, 1.6):.2f})") for _ in frames]
    elif way < WEIGHTED + LONG:
        around = [rng.sample(fillers, min(len(fillers), rng.randint(1, 8))) for _ in frames]
        places = [rng.randint(0, len(some)) for some in around]
        frames = [
            ("".join(f"{t}, " for t in some[:place]), "".join(f", {t}" for t in some[place:]))
            for some, place in zip(around, places, strict=True)
        ]
    return [[before + text + after for text, (before, after) in zip(column, frames, strict=True)] for column in columns]


def some_layer(clip, rng: random.Random):
    """The CLIP, in a part of the batches as core's CLIP Set Last Layer gives it; as it is where an encoder is none of CLIP's."""
    if rng.random() >= SKIPPED:
        return clip
    tokens = clip.tokenize("")
    if not isinstance(tokens, dict) or not tokens.keys() <= CLIPS:
        return clip
    clip = clip.clone()
    clip.clip_layer(rng.choice(LAYERS))
    return clip
