"""Runs that drew nothing but their positive prompts' text: what they return is held back only where the judge is sure.

Such a run began with an empty latent (or with what such a run returned), its noise level fell, no other node had a hook, no LoRA
changed the model, and its conditions hold text, places and sizes alone. Where both redirectors found nothing in it either, the
picture is the last thing left to look at, and one that is unfinished (two or three steps) must not look like harm.
"""

from collections import OrderedDict
from collections.abc import Iterable

import comfy.model_management
from comfy.samplers import CFGGuider
from torch import Tensor

from ..reporting import traces
from .negative_side import RunState

TEXT_ALONE = frozenset(
    """
    aesthetic_score area attention_mask clip_end_percent clip_start_percent crop_h crop_w cross_attn default end_percent guidance height
    mask mask_strength model_conds pooled_output prompt_type set_area_to_bounds start_percent strength target_height target_width
    timestep_end timestep_start uuid width
    """.split()
)
REMEMBERED = 8192  # latents

_returned: OrderedDict[str, None] = OrderedDict()


def begins_plain(guider: CFGGuider, latent_image: Tensor) -> bool:
    """Whether a run of a guider on raw latents (B, C, *spatial) begins as a plain one."""
    entries = [entry for conds in getattr(guider, "conds", {}).values() for entry in conds or ()]
    if guider.model_patcher.patches or not all(entry.keys() <= TEXT_ALONE for entry in entries):
        return False
    if getattr(latent_image, "is_nested", False):
        return not any(part.any() for part in latent_image.unbind())
    return not latent_image.any() or all(digest in _returned for digest in traces.digests(latent_image))


def remember(state: RunState, output: Tensor) -> None:
    """Keeps what a run returned, (B, C, *spatial), when it was plain to its end."""
    if not state.plain or state.rising or not state.evaluations:
        return
    dtype = getattr(comfy.model_management, "intermediate_dtype", lambda: output.dtype)()
    for latent in (output, *([output.to(dtype)] if dtype != output.dtype else [])):
        _returned.update(dict.fromkeys(traces.digests(latent)))
    while len(_returned) > REMEMBERED:
        _returned.popitem(last=False)


def were_plain(digests: Iterable[str]) -> list[bool]:
    """Per latent: did a plain run return it in which nothing was flagged?"""
    found = [(digest in _returned, traces.STORE.get(digest)) for digest in digests]
    return [plain and trace is not None and not bool(trace.flagged.any()) for plain, trace in found]
