"""The demo world's prompt pairs for `SafeCFG Prompt Pairs`, with the demo's own held-out split."""

import random
from collections.abc import Callable, Collection, Iterator, Sequence

from ...demo import prompts as demo
from ...demo import world
from ...demo.words import words_of
from ...hgr_models.pairs import Clean, Material, PromptPair, Sourced

CATEGORIES = world.CATEGORIES
CONCEPTS = {category: ", ".join(demo.HARM_WORDS[category][:8]) for category in CATEGORIES}
ORIGIN = "the demo world"
OTHER_WORDS = 0.4  # share of words that no pictogram has in clean prompts, as in the demo's own training
TRIES = 1000  # in a row without a new prompt: then there are no more


def demo_world(
    categories: Sequence[str], pairs: int, clean: int, held_out: float, seed: int, avoid: Collection[str] = frozenset()
) -> Material:
    """`pairs` pairs of each of the `categories` and `clean` clean prompts without the words `avoid`.

    The share `held_out` of them shows pictograms, pairs of pictograms or words that the demo keeps out of training, the others
    never do. The same arguments always give the same prompts.
    """
    material, kept = Material(), set(categories)
    seen: set = set()
    for out, share in ((False, 1 - held_out), (True, held_out)):
        for category in categories:
            rng = random.Random(f"{seed} {category} {out}")
            drawn = (pair for pair in _pairs(category, kept, out, rng))
            found = _different(drawn, round(pairs * share), lambda pair: (pair.harmful, pair.safe), seen)
            material.pairs += [Sourced(pair, ORIGIN, out) for pair in found]
            if len(found) < round(pairs * share):
                kind = "held-out" if out else "training"
                material.notes.append(f"{category}: the demo world has no more than {len(found)} {kind} pairs")
        prompts = (p for p in _clean(out, random.Random(f"{seed} clean {out}")) if not set(words_of(p)) & set(avoid))
        material.clean += [Clean(p, p, out) for p in _different(prompts, round(clean * share), str, seen)]
    return material


def _different(drawn: Iterator, count: int, key: Callable, seen: set) -> list:
    """`count` items whose keys are not in `seen`, which grows; fewer when there are no more."""
    found: list = []
    failed = 0
    while len(found) < count and failed < TRIES:
        item = next(drawn)
        if key(item) in seen:
            failed += 1
        else:
            seen.add(key(item))
            found.append(item)
            failed = 0
    return found


def _pairs(category: str, kept: set[str], held_out: bool, rng: random.Random) -> Iterator[PromptPair]:
    """Pairs that show this category, and others only of those that are kept."""
    while True:
        pair = _held_out_pair(rng) if held_out else demo.harmful_pair(rng)
        if category not in pair.harms or not pair.harms <= kept or pair.prompt == pair.partner:
            continue
        if held_out or not demo.held_out(_names(pair.partner)):  # a partner must not give away a held-out clean prompt
            yield PromptPair(pair.prompt, pair.partner, pair.harms, pair.removed, " and ".join(_names(pair.prompt)))


def _names(prompt: str) -> list[str]:
    """The pictograms and words of harm that a prompt names."""
    return sorted(word for word in words_of(prompt) if word in world.CATEGORY or demo.category_of(word))


def _held_out_pair(rng: random.Random) -> demo.Pair:
    """As the demo's evaluation draws them: held-out pairs of pictograms, two harms, and pictograms that no training shows."""
    kind = rng.choice(("combination", "two", "unseen"))
    if kind == "unseen":
        names = (rng.choice(demo.UNSEEN_HARMFUL), *rng.sample(demo.SEEN_CLEAN, rng.randint(0, 1)))
    else:
        names = tuple(rng.choice(world.SPLIT[f"held_out_harmful_{'clean' if kind == 'combination' else 'harmful'}"]))
    harms = sorted({c for c in map(demo.category_of, names) if c})
    return demo.make_pair(names, frozenset(rng.sample(harms, rng.randint(1, len(harms)))), rng)


def _clean(held_out: bool, rng: random.Random) -> Iterator[str]:
    words, other_words = demo.harmless_words()
    while True:
        if not held_out:
            yield demo.clean_pair(rng, words, OTHER_WORDS).prompt
        elif rng.random() < OTHER_WORDS:
            yield demo.clean_pair(rng, other_words, 1.0).prompt
        else:
            unseen = (rng.choice(demo.UNSEEN_CLEAN), *rng.sample(demo.SEEN_CLEAN, rng.randint(0, 1)))
            names = rng.choice((unseen, tuple(rng.choice(world.SPLIT["held_out_clean_clean"]))))
            yield demo.make_pair(names, frozenset(), rng).prompt
