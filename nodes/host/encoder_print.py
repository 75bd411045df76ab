"""Which text encoder a CLIP is: its parts and the fingerprint of what it says (`hgr_models.encoders`)."""

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.sd import CLIP

from ... import hgr_models
from ...hgr_models.condition import narrower_width
from ...hgr_models.encoders import SAME, EncoderPrint, distance_between, print_of
from ...hgr_models.shards import Shard, read_shard
from .encoding import QUOTED, encode_batch, text_of

_known: WeakKeyDictionary = WeakKeyDictionary()  # of a CLIP's module: (patches, print); four prompts cost a T5 seconds


def encoder_of(clip: CLIP) -> EncoderPrint:
    """The print of a CLIP as its loader made it: core's CLIP Set Last Layer does not count, LoRAs of the encoder do.

    Raises HGRError for a family whose conditions hold text that an HGR cannot rewrite.
    """
    module, patches = clip.cond_stage_model, str(clip.patcher.patches_uuid)
    if module in _known and _known[module][0] == patches:
        return _known[module][1]
    plain = clip.clone()
    plain.clip_layer(None)
    tokens = plain.tokenize("")
    parts = tuple(sorted(tokens)) if isinstance(tokens, dict) else ()
    short = narrower_width(_encoded(plain, QUOTED)[0])
    found = print_of(parts, lambda text: _encoded(plain, text), short)
    _known[module] = patches, found
    return found


def _encoded(clip: CLIP, text: str) -> Any:
    rows = text_of(encode_batch(clip, [text]), torch.zeros(1, 1))
    return rows.tokens, rows.pooled, rows.mask


def first_shard(folder: Path) -> Shard | None:
    """A folder's first shard: of runs, where there are any; None without one. Raises HGRError when it is damaged."""
    first = min(folder.glob("*.safetensors"), default=None)
    return None if first is None else read_shard(first)


def recorded_print(folder: Path, found: EncoderPrint, anew: bool = False) -> EncoderPrint:
    """The print that a folder's recording was made with, where it is the same encoder's: all shards of one must say the same.

    Rounding differs between devices. Raises HGRError when the recording is of another encoder, unless it is made `anew`.
    """
    first = first_shard(folder)
    about = {} if first is None else first.about.get("encoder", {})
    if not about:
        return found
    recorded = EncoderPrint.from_dict(about)
    if distance_between(found, recorded) > SAME:
        if anew:
            return found
        raise hgr_models.HGRError(
            f"{folder} was recorded with another text encoder ({recorded.in_words()}) than this CLIP ({found.in_words()}). "
            "Switch `resume` off to begin again there, or choose another name."
        )
    return recorded
