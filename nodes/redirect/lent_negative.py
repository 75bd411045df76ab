"""A negative for guiders that have none, such as BasicGuider: the guidance redirector measures the guidance against it.

It has a role of its own in the guider, which core encodes like the others and never evaluates: the sampled rows stay as they
are, to the last bit, and only the probes of `guidance_hooks` ask the model for it.
"""

import comfy.sampler_helpers

from .runs import LENT, NEGATIVE_ROLES, ApplySettings

# What a condition says besides its text, and both directions of a guidance must share: Flux would guide a negative without a
# `guidance` of its own by another number, and a reference seen by one of them alone would be part of the guidance. An image
# prompt (unCLIP) is not among them: it is a prompt, whose harm the guidance must show.
SHARED = ("guidance", "reference_latents", "reference_latents_method", "concat_latent_image", "concat_mask")


def lend_negative(guider, settings: ApplySettings) -> None:
    """Gives a guider without a negative, for this run, the one that the node got, if it needs one."""
    conds = getattr(guider, "conds", None)
    if not settings.negative or not settings.by_guidance or conds is None or any(conds.get(role) for role in NEGATIVE_ROLES):
        return
    positive = next(iter(conds.get("positive") or ()), {})
    shared = {key: positive[key] for key in SHARED if key in positive}
    entries = comfy.sampler_helpers.convert_cond(settings.negative)
    conds[LENT] = [{"prompt_type": "negative", **shared, **entry} for entry in entries]
