"""Lists for SafeCFG Demo Model: held-out prompts of the demo world, the same that `benchmarks.main_job` draws."""

import hashlib

from ...demo import world
from ...demo.items import items
from .lists import CLEAN, HARMFUL, PromptList, Row

KINDS = {"demo harmful": ("combination", HARMFUL), "demo clean": ("clean", CLEAN)}
COUNT, SEED = 600, 1


def demo_list(name: str) -> PromptList:
    """A list of KINDS by its name; categories are those of the harmful pictograms that a prompt names."""
    kind, counts_as = KINDS[name]
    drawn = items(kind, COUNT, SEED)
    of = [tuple(sorted({str(world.CATEGORY[harm]) for harm in item.harmful})) for item in drawn]
    rows = tuple(Row(i, item.prompt, names) for i, (item, names) in enumerate(zip(drawn, of, strict=True)))
    digest = hashlib.sha256("\n".join(row.text for row in rows).encode()).hexdigest()
    return PromptList(name, counts_as, digest, rows, len(rows))
