"""Chooses the settings of SafeCFG's peers for `benchmarks.safety`, on prompts and seeds that its test never uses.

The pairs of pictograms are those that HGR training may see, the test's are held out. A peer's choice is the setting with
the least harm among those that keep what is not harmful: rest kept and clean accuracy at most a point below plain CFG's, or
within its 95 % interval. The hardest setting is the one with the least harm whatever else it does.
"""

import random
from collections.abc import Mapping

from demo import evaluate as e
from demo import prompts as p

from .safety_peers import CANDIDATES
from .safety_tables import QUALITY, cell, keeps, markdown

KINDS = ("combination", "clean")
SEED = 1_000_000  # added to the seed: the test's noise is of seeds below
COLUMNS = {"harm_present": "harm present", "rest_kept": "rest kept", "neither": "neither", "clean_accuracy": "clean accuracy"}


def validation_items(kind: str, count: int, seed: int) -> list[e.Item]:
    """`count` prompts of two pictograms that HGR training may see, of a kind in KINDS."""
    rng, first = random.Random(f"validation {kind} {seed}"), p.SEEN_HARMFUL if kind == "combination" else p.SEEN_CLEAN
    found = []
    while len(found) < count:
        names = (rng.choice(first), rng.choice(p.SEEN_CLEAN))
        if names[0] != names[1] and not p.held_out(names):
            found.append(e.item_of(names, rng))
    return found


def validation_figures(which: Mapping[str, list[e.Item]], drawn: Mapping[str, e.Drawn]) -> dict[str, e.Rate]:
    mixed, clean = KINDS
    return {
        "harm_present": e.harm_present(which[mixed], drawn[mixed]),
        "rest_kept": e.rest_kept(which[mixed], drawn[mixed]),
        "neither": e.neither(which[mixed], drawn[mixed]),
        "clean_accuracy": e.accuracy(which[clean], drawn[clean]),
    }


def choose(results: Mapping, candidates: list[str]) -> tuple[str, str]:
    """The best and the hardest of these settings; of equals the one that keeps more. Where none keeps enough, the hardest twice."""
    order = lambda setting: (results[setting]["harm_present"], -sum(results[setting][key] for key in QUALITY))  # noqa: E731
    hardest = min(candidates, key=order)
    keeping = [setting for setting in candidates if keeps(results[setting], results["plain"], True)]
    return min(keeping, key=order, default=hardest), hardest


def report(results: Mapping) -> str:
    """Every setting's figures, and the choices as `safety_peers` holds them."""
    plain, settings = results["plain"], sorted({setting for some in CANDIDATES.values() for setting in some})
    kept = {setting: keeps(results[setting], plain, True) for setting in ["plain", *settings]}
    rows = [(s, *(cell(results[s], key) for key in COLUMNS), "yes" if keeping else "no") for s, keeping in kept.items()]
    chosen = {name: choose(results, some) for name, some in CANDIDATES.items()}
    best = [f'    "{name}": "{s}",' + ("" if kept[s] else "  # none keeps enough") for name, (s, _) in chosen.items()]
    hardest = [f'    "{name}": "{s}",' for name, (_, s) in chosen.items()]
    head = ("setting", *COLUMNS.values(), "keeps the rest and clean prompts")
    return "\n".join([markdown(head, rows), "", "CHOSEN = {", *best, "}", "HARDEST = {", *hardest, "}"])
