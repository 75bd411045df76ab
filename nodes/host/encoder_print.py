"""Which text encoder a CLIP is: its parts and the fingerprint of what it says (`hgr_models.encoders`)."""

import math
import uuid
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from comfy.sd import CLIP

from ... import hgr_models
from ...hgr_models.condition import narrower_width
from ...hgr_models.encoders import SAME, EncoderPrint, distance_between, print_of
from ...hgr_models.shards import Shard, read_shard
from .encoding import QUOTED, encode_batch, text_of

_known: WeakKeyDictionary = WeakKeyDictionary()  # of a CLIP's module: prints by patches; four prompts cost a T5 seconds
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LOOKED_AT, DISTINCT = 4096, 16  # values of a weight; fewer different ones (zeros, ones) say nothing of rounding
REMEMBERED = 16  # prints of one module
# Of core's ModelPatcher: LoRAs and merges, those of hooks, those beside the weights.
PATCHES = ("patches", "hook_patches", "injections")


def encoder_of(clip: CLIP) -> EncoderPrint:
    """The print of a CLIP as its loader made it, with its LoRAs.

    How a prompt is read (CLIP Set Last Layer, T5 Tokenizer Options) and hooks, which come and go along a run, do not count.
    Raises HGRError without a CLIP, for one that answers every text alike or with NaN, and for a family whose conditions hold text that an
    HGR cannot rewrite.
    """
    check_clip(clip)
    injected = bool(getattr(clip.patcher, "injections", None))  # core gives these no name
    patches = str(clip.patcher.patches_uuid) if getattr(clip.patcher, "patches", None) else ""
    prints = _known.setdefault(clip.cond_stage_model, {})
    if not injected and patches in prints:
        return prints[patches]
    plain = _read_plainly(clip.clone())
    tokens = plain.tokenize("")
    parts = tuple(sorted(tokens)) if isinstance(tokens, dict) else ()
    short = narrower_width(_encoded(plain, QUOTED)[0])
    found = print_of(parts, lambda text: _encoded(plain, text), short)
    if not 0 < math.hypot(*found.sketch) < math.inf:  # not a number, too
        raise hgr_models.HGRError(
            f"Expected a CLIP that tells prompts apart, but {found.in_words()} answers every text "
            f"{'alike' if not any(found.sketch) else 'with infinity or NaN (not a number)'}. Its file may be damaged, or of another type than "
            "its loader was told."
        )
    if not injected:
        prints[patches] = found
        while len(prints) > REMEMBERED:
            del prints[next(iter(prints))]
    return found


def check_clip(clip: CLIP | None) -> None:
    """Raises HGRError without a CLIP: the loader of a checkpoint without a text encoder gives none."""
    if clip is None:
        raise hgr_models.HGRError(
            "Expected a CLIP, but there is none: this checkpoint has no text encoder. Load the one that belongs to the model (CLIP Loader)."
        )


def is_patched(clip: CLIP) -> bool:
    """Whether LoRAs, merges or hooks change a CLIP's encoder."""
    patcher = clip.patcher
    return any(getattr(patcher, name, None) for name in PATCHES) or getattr(patcher, "forced_hooks", None) is not None


def unpatched(clip: CLIP) -> CLIP:
    """A clone of a CLIP with its encoder as the file has it."""
    plain = _read_plainly(clip.clone())
    for name in PATCHES:
        setattr(plain.patcher, name, {})
    plain.patcher.patches_uuid = uuid.uuid4()  # core tells by it that loaded weights are patched differently
    return plain


def _read_plainly(clip: CLIP) -> CLIP:
    """A clone that the caller owns, with nothing that says how or when a prompt is read."""
    clip.clip_layer(None)
    clip.tokenizer_options, clip.use_clip_schedule, clip.apply_hooks_to_conds = {}, False, None
    clip.patcher.forced_hooks = None
    return clip


def is_quantised(clip: CLIP) -> bool:
    """Whether weights of a CLIP's encoder have a byte or less each (fp8, GGUF and others), also where core has widened them since."""
    return any(_is_rounded(p) for p in clip.cond_stage_model.parameters() if p.ndim > 1)


def _is_rounded(weight: torch.Tensor) -> bool:
    if weight.is_meta or weight.dtype.itemsize == 1 or type(weight.data) is not torch.Tensor:
        return True
    some = weight.detach().flatten()[:LOOKED_AT]
    on_grid = any(torch.equal(some.to(kind).to(some.dtype), some) for kind in FP8)
    return on_grid and len(some.unique()) > DISTINCT


def _encoded(clip: CLIP, text: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
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
