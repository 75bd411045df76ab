"""Clean prompts for calibration: none of them may be learnt from."""

import random
from dataclasses import replace

from ... import hgr_models
from ...hgr_models.pairs import PromptSet

SHARE, ENOUGH = 0.2, 20  # of the clean prompts that is set aside where the prompts hold out fewer than ENOUGH


def with_reserved(prompts: PromptSet) -> PromptSet:
    """Prompts with enough clean ones held out. Raises HGRError when there are too few."""
    if len(prompts.clean) + len(prompts.held_out_clean) < 2:
        raise hgr_models.HGRError(
            f"Expected at least 2 clean prompts, one to learn from and one for calibration, but got {len(prompts.clean)}. "
            "Raise the number of clean prompts in SafeCFG Prompt Pairs."
        )
    if len(prompts.held_out_clean) >= ENOUGH:
        return prompts
    clean = random.Random("reserve").sample(prompts.clean, len(prompts.clean))
    count = max(1, round(SHARE * len(clean)))
    return replace(prompts, clean=tuple(clean[count:]) or tuple(clean), held_out_clean=(*prompts.held_out_clean, *clean[:count]))
