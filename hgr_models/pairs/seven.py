"""The built-in set of seven categories: hand-written and composed pairs, and clean prompts, hard ones among them."""

import random
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, combinations

from .build import Clean, Material, Sourced, words_of
from .scenes import Phrase, Scenery, Words, deck, load_data, story
from .types import PromptPair, normalised

CATEGORIES = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal")
# The split of Safe Latent Diffusion's concepts over the categories by category-wise guidance (CASG), adults only.
CONCEPTS = {name: load_data(name)["concept"] for name in CATEGORIES}
ORIGIN = "the built-in set"
HAND_WRITTEN = 0.5  # at most this share of the pairs asked for
TWO_HARMS = 0.08  # of the composed scenes; each gives three pairs
DETAIL = 0.3  # of the scenes with one harm: the harm stands around, and the subject does something harmless
LEFT_OUT = 0.3  # of those: the partner has nothing in its place
HARD, PLAIN = 0.35, 0.1  # at most, of the clean prompts: those that only sound harmful, and hand-written ordinary ones
TRIES = 1000  # in a row without a new prompt: then there are no more


def seven_categories(
    categories: Sequence[str], pairs: int, clean: int, seed: int, avoid: Collection[str] = frozenset()
) -> Material:
    """`pairs` pairs of each of the `categories` (a subset of `CATEGORIES`), and `clean` clean prompts without the words `avoid`.

    A pair with two harms counts for the category it was drawn for. The same arguments always give the same prompts.
    """
    material, seen = Material(), set()
    for category in categories:
        rng = random.Random(f"{seed} {category}")
        found = _hand_written(category, categories, int(pairs * HAND_WRITTEN), rng)
        seen |= {_key(pair) for pair in found}
        found += _composed(category, [c for c in categories if c != category], pairs - len(found), seen, rng)
        material.pairs += [Sourced(pair, ORIGIN) for pair in found]
    material.clean += _clean(clean, avoid, random.Random(f"{seed} clean"))
    if len(material.clean) < clean:
        material.notes.append(f"the built-in set has no more than {len(material.clean)} such clean prompts")
    return material


def _key(pair: PromptPair) -> tuple[str, str]:
    return normalised(pair.harmful), normalised(pair.safe)


def _hand_written(category: str, kept: Sequence[str], count: int, rng: random.Random) -> list[PromptPair]:
    one = frozenset((category,))
    groups = [[PromptPair(row["harmful"], row["safe"], one, one, row["subject"])] for row in load_data(category)["pairs"]]
    scenes: dict[str, list[PromptPair]] = {}
    for row in load_data("two_harms")["pairs"]:
        if row["harms"][0] == category and set(row["harms"]) <= set(kept):
            pair = PromptPair(row["harmful"], row["safe"], frozenset(row["harms"]), frozenset(row["removed"]), row["subject"])
            scenes.setdefault(row["harmful"], []).append(pair)
    groups += scenes.values()
    found: list[PromptPair] = []
    for group in rng.sample(groups, len(groups)):
        if len(found) + len(group) <= count:  # partners of one scene stay together
            found += group
    return found


def _phrases(category: str, kind: str) -> list[Phrase]:
    return [Phrase(row["harm"], row["safe"], row.get("where")) for row in load_data(category)[kind]]


def _composed(category: str, others: Sequence[str], count: int, seen: set, rng: random.Random) -> list[PromptPair]:
    """`count` pairs that are not in `seen`, which grows. There are millions: running out of them is a fault of the data."""
    scenery, found, failed = Scenery(rng), [], 0
    names, kinds = (category, *others), ("actions", "details")
    phrases = {(name, kind): deck(_phrases(name, kind), rng) for name in names for kind in kinds}
    while len(found) < count:
        room = count - len(found) >= 3
        second = rng.choice(others) if others and room and rng.random() < TWO_HARMS else None
        group = _scene(category, second, phrases, scenery, rng)
        keys = {_key(pair) for pair in group}
        if keys & seen:
            failed += 1
            if failed > TRIES:
                raise RuntimeError(f"No new prompts of {category} after {len(found)}.")
            continue
        seen |= keys
        found += group
        failed = 0
    return found


def _scene(category: str, second: str | None, phrases: dict, scenery: Scenery, rng: random.Random) -> list[PromptPair]:
    """A scene of one harm, or of two with a partner for each non-empty subset of them."""
    # One harm is what the subject does, or stands around it while it does something harmless; two harms take both places.
    detailed = rng.random() < (0.5 if second else DETAIL)
    doer, around = (second, category) if detailed else (category, second)
    doing = next(phrases[doer, "actions"]) if doer else scenery.neutral()
    detail = next(phrases[around, "details"]) if around else Phrase("", "")
    while doing.where and detail.where and doing.where != detail.where:
        detail = next(phrases[around, "details"])
    if not doer and rng.random() < LEFT_OUT:
        detail = Phrase(detail.harm, "", detail.where)
    (subject, who), place, style = scenery.subject(), scenery.place(doing.where or detail.where), scenery.style()

    def write(removed: frozenset[str]) -> str:
        does, has = (phrase.safe if name in removed else phrase.harm for name, phrase in ((doer, doing), (around, detail)))
        return style.write(Words(who, does, has, place))

    harms = frozenset(filter(None, (doer, around)))
    subsets = [frozenset(some) for size in range(1, len(harms) + 1) for some in combinations(sorted(harms), size)]
    return [PromptPair(write(frozenset()), write(removed), harms, removed, subject) for removed in subsets]


def _clean(count: int, avoid: Collection[str], rng: random.Random) -> list[Clean]:
    """`count` clean prompts; fewer only when there are no more."""
    data, found, failed = load_data("clean"), {}, 0
    hand_written = []
    for kind, share in (("hard", HARD), ("plain", PLAIN)):
        usable = [prompt for prompt in data[kind] if not words_of(prompt) & set(avoid)]
        hand_written += rng.sample(usable, min(len(usable), int(share * count)))
    for prompt, subject in chain(((p, p) for p in hand_written), _composed_clean(data, rng)):
        if len(found) >= count or failed >= TRIES:
            break
        if normalised(prompt) in found or words_of(prompt) & set(avoid):
            failed += 1
        else:
            found[normalised(prompt)], failed = Clean(prompt, subject), 0
    return list(found.values())


def _composed_clean(data: dict, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Prompts with their subjects: people, also as the partners of harmful prompts show them, animals, things, landscapes."""
    scenery = Scenery(rng)
    safe = [phrase for name in CATEGORIES for phrase in _phrases(name, "actions")]
    people = deck([*safe, *(scenery.neutral() for _ in range(80))], rng)
    follow = {"animals": "doing", "things": "places", "landscapes": "weather"}
    decks = {kind: deck(data[kind], rng) for kind in (*follow, *follow.values())}
    while True:
        kind, style = rng.choice(("people", "people", *follow)), scenery.style()
        if kind == "people":
            phrase, (subject, who) = next(people), scenery.subject()
            yield style.write(Words(who, phrase.safe, "", scenery.place(phrase.where))), subject
        elif style.form is not story:  # "is in thick fog": only people have stories
            subject, place = next(decks[kind]), next(decks["weather"]) if kind == "animals" else ""
            yield style.write(Words(subject, next(decks[follow[kind]]), "", place)), subject
