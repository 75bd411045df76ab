"""The built-in set of seven categories: hand-written and composed pairs, and clean prompts, hard ones among them."""

import random
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, combinations, repeat

from .build import Clean, Material, Sourced, build, words_of
from .clean import CleanCore, styled_clean
from .scenes import Phrase, Scenery, Words, deck, load_data, story
from .styles import Styles
from .terms import Terms
from .types import PromptPair, PromptSet, normalised

CATEGORIES = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal")
# The split of Safe Latent Diffusion's concepts over the categories by category-wise guidance (CASG), adults only.
CONCEPTS = {name: load_data(name)["concept"] for name in CATEGORIES}
NEUTRAL = {name: load_data(f"words/{name}")["neutral"] for name in CATEGORIES}  # what can stand for any of its words
PAIRS_PER_CATEGORY, CLEAN_PROMPTS, CALIBRATION_PROMPTS = 1000, 6000, 2000  # by default; of the clean ones so many are held out
ORIGIN = "the built-in set"
HAND_WRITTEN = 0.1  # at most this share of the pairs asked for
STYLED = 0.75  # of the pairs asked for: terms of the category in users' styles
TWO_HARMS = 0.3  # of the composed scenes; each gives three pairs
DETAIL = 0.3  # of the scenes with one harm: the harm stands around, and the subject does something harmless
LEFT_OUT = 0.3  # of those: the partner has nothing in its place
HARD, PLAIN = 0.1, 0.03  # at most, of the clean prompts: those that only sound harmful, and hand-written ordinary ones
STYLED_CLEAN = 0.85  # of the composed clean prompts are in users' styles
HELD_OUT_HARD = 0.2  # of the subjects of clean prompts that only sound harmful
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
        found += _styled(category, int(pairs * STYLED), seen, rng)
        found += _composed(category, [c for c in categories if c != category], pairs - len(found), seen, rng)
        material.pairs += [Sourced(pair, ORIGIN) for pair in found]
    material.clean += _clean(clean, avoid, random.Random(f"{seed} clean"))
    if len(material.clean) < clean:
        material.notes.append(f"the built-in set has no more than {len(material.clean)} such clean prompts")
    return material


def default_prompts(seed: int = 0, held_out: float = 0.1) -> PromptSet:
    """What SafeCFG Prompt Pairs gives where nobody chose anything."""
    material = seven_categories(CATEGORIES, PAIRS_PER_CATEGORY, CLEAN_PROMPTS, seed)
    return build(material, CATEGORIES, CONCEPTS, held_out, seed, CALIBRATION_PROMPTS).prompts


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


def _styled(category: str, count: int, seen: set, rng: random.Random) -> list[PromptPair]:
    """`count` pairs of the category's terms in users' styles that are not in `seen`, which grows."""
    terms, styles, one, found = Terms(category, rng), Styles(rng), frozenset((category,)), list[PromptPair]()
    while len(found) < count:
        core, style = terms.draw(), styles.draw()
        pair = PromptPair(style.write(core.harmful), style.write(core.safe), one, one, core.subject)
        if _key(pair) not in seen:
            seen.add(_key(pair))
            found.append(pair)
    return found


def _composed(category: str, others: Sequence[str], count: int, seen: set, rng: random.Random) -> list[PromptPair]:
    """`count` pairs that are not in `seen`, which grows. There are millions: running out of them is a fault of the data."""
    scenery, found, failed = Scenery(rng), list[PromptPair](), 0
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
    """`count` clean prompts; fewer only when there are no more.

    Thresholds are calibrated on what users ask for, and prompts that only sound harmful are rare among that: of those, a share
    HELD_OUT_HARD may be held out, the others are trained on.
    """
    data, failed = load_data("clean"), 0
    found: dict = {}
    hand_written = []
    for kind, share in (("hard", HARD), ("plain", PLAIN)):
        usable = [prompt for prompt in data[kind] if not words_of(prompt) & set(avoid)]
        hand_written += [CleanCore(p, p, kind == "hard") for p in rng.sample(usable, min(len(usable), int(share * count)))]
    plain, styled = _composed_clean(data, rng), styled_clean(rng, CATEGORIES)
    for core in chain(hand_written, (next(styled if rng.random() < STYLED_CLEAN else plain) for _ in repeat(None))):
        if len(found) >= count or failed >= TRIES:
            break
        if normalised(core.text) in found or words_of(core.text) & set(avoid):
            failed += 1
        else:
            # The held-out split keeps what is of one subject together; clean prompts must not pull pairs with them.
            subject, out = f"clean: {core.subject}", None
            if core.hard and random.Random(subject).random() >= HELD_OUT_HARD:
                subject, out = f"hard: {core.subject}", False
            found[normalised(core.text)], failed = Clean(core.text, subject, out), 0
    return list(found.values())


def _composed_clean(data: dict, rng: random.Random) -> Iterator[CleanCore]:
    """Prompts in the composed pairs' styles: people, also as the partners of harmful prompts show them, animals, things, landscapes."""
    scenery = Scenery(rng)
    safe = [phrase for name in CATEGORIES for phrase in _phrases(name, "actions")]
    people = deck([*safe, *(scenery.neutral() for _ in range(80))], rng)
    follow = {"animals": "doing", "things": "places", "landscapes": "weather"}
    decks = {kind: deck(data[kind], rng) for kind in (*follow, *follow.values())}
    while True:
        kind, style = rng.choice(("people", "people", *follow)), scenery.style()
        if kind == "people":
            phrase, (subject, who) = next(people), scenery.subject()
            yield CleanCore(style.write(Words(who, phrase.safe, "", scenery.place(phrase.where))), subject, False)
        elif style.form is not story:  # "is in thick fog": only people have stories
            subject, place = next(decks[kind]), next(decks["weather"]) if kind == "animals" else ""
            yield CleanCore(style.write(Words(subject, next(decks[follow[kind]]), "", place)), subject, False)
