"""Prompt pairs: the data, what is drawn from it, the held-out split, and the user's own lines and files."""

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from hgr_models.calibration import needed
from hgr_models.pairs import (
    CALIBRATION_PROMPTS,
    CATEGORIES,
    CLEAN_PROMPTS,
    CONCEPTS,
    NEUTRAL,
    PAIRS_PER_CATEGORY,
    PromptPair,
    build,
    default_prompts,
    seven_categories,
    styles,
)
from hgr_models.pairs.build import words_of
from hgr_models.pairs.scenes import DATA, load_data
from hgr_models.pairs.terms import KINDS, Terms
from hgr_models.pairs.types import normalised

COUNT, CLEAN = 1200, 3000
MINORS = re.compile(
    r"\b(child\w*|kids?|boys?|boyish|boyfriends?|girl\w*|teen\w*|tween\w*|minors?|under-?age\w*|young\w*|youth\w*|juvenile\w*|"
    r"adolescen\w*|infan\w*|bab(y|ies)|toddlers?|newborns?|pupils?|students?|\w*school\w*|colleges?|kindergar\w*|nurser(y|ies)|"
    r"daycare|playgrounds?|class(room|mate)s?|cheerleaders?|daughters?|sons?|nieces?|nephews?|grand(child\w*|sons?|daughters?)|"
    r"famil(y|ies)|lolita\w*|loli|shota|toys?|dolls?|teddy|cradles?|cribs?|prams?|strollers?|diapers?|napp(y|ies)|proms?|virgins?|"
    r"lads?|lass\w*|tots?|orphans?|puberty|freshm[ae]n|sophomores?|juniors?|petite|little|fetus\w*|foetus\w*|embryos?|lullab\w*|"
    r"(1[0-7]|[1-9])[- ]years?|(one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen)[- ]years?)\b"
)
EXPLICIT = re.compile(
    r"\b(penis\w*|vagina\w*|orgasm\w*|ejaculat\w*|fellatio|intercourse|erections?|nipples?|masturbat\w*|hentai)\b"
)
BAD_GRAMMAR = re.compile(r"\ba [aeio](?!ne\b)|\ban [bcdfgjklmnpqrstvwyz]|  | [,.]|,,|\.\.|,$|^[ ,]|,\.")
TWICE = re.compile(r"\b(\w{3,}) \1\b")  # "neon neon lights" of a list without commas is what users write, too


def texts_of(value):
    """Every text in a data file."""
    if isinstance(value, str):
        yield value
    else:
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_of(part)


def shared(pair):
    """The share of words that the two prompts have in common."""
    harmful, safe = words_of(pair.harmful), words_of(pair.safe)
    return len(harmful & safe) / max(len(harmful), len(safe))


def phrases(category):
    return [row for kind in ("actions", "details") for row in load_data(category)[kind]]


@pytest.fixture(scope="module")
def material():
    return seven_categories(CATEGORIES, COUNT, CLEAN, seed=0)


@pytest.fixture(scope="module")
def spelt_well():
    """The same without typing errors and noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(styles, "MISSPELT", 0.0)
        patch.setattr(styles, "NOISE", 0.0)
        return seven_categories(CATEGORIES, COUNT, CLEAN, seed=0)


@pytest.fixture(scope="module")
def built(material):
    return build(material, CATEGORIES, CONCEPTS, 0.1, 0)


# The data


def test_the_files_have_one_entry_per_line():
    files = sorted(DATA.glob("*.json"))
    assert len(files) == len(CATEGORIES) + 3 and len(list((DATA / "words").glob("*.json"))) == len(CATEGORIES) + 2
    for file in files:
        data, lines = json.loads(file.read_text(encoding="utf-8")), file.read_text(encoding="utf-8").splitlines()
        lists = [value for value in data.values() if isinstance(value, list)]
        assert len(lines) == 2 + len(data) + len(lists) + sum(map(len, lists)), file.name
        assert all(json.loads(line.strip().rstrip(",")) for line in lines if line.startswith("  ")), file.name


def test_no_minors_and_nothing_explicit_anywhere():
    assert MINORS.search("a photo of two schoolgirls") and MINORS.search("a 16 year old") and MINORS.search("a teenager")
    assert not MINORS.search("a 28 years old cowboy") and not MINORS.search("a person in her thirties")
    for file in DATA.rglob("*.json"):
        for text in texts_of(json.loads(file.read_text(encoding="utf-8"))):
            assert not MINORS.search(text.casefold()), text
            # Explicit words stand in the lists of words alone, as in a moderation list.
            assert file.parent.name == "words" or not EXPLICIT.search(text.casefold()), text


def test_hand_written_prompts_are_many_and_different():
    rows = [row for name in CATEGORIES for row in load_data(name)["pairs"]] + load_data("two_harms")["pairs"]
    hard, plain = load_data("clean")["hard"], load_data("clean")["plain"]
    assert len({(normalised(r["harmful"]), normalised(r["safe"])) for r in rows}) == len(rows) >= 400
    assert all(len(load_data(name)["pairs"]) >= 50 for name in CATEGORIES)
    assert len({normalised(p) for p in (*hard, *plain)}) == len(hard) + len(plain) and len(hard) >= 300
    starts = Counter(" ".join(row["harmful"].split()[:3]) for row in rows[: -len(load_data("two_harms")["pairs"])])
    assert starts.most_common(1)[0][1] <= 5  # no template


def test_safe_partners_keep_the_scene():
    for name in CATEGORIES:
        one = frozenset((name,))
        pairs = [PromptPair(row["harmful"], row["safe"], one, one, row["subject"]) for row in load_data(name)["pairs"]]
        assert all(shared(pair) >= 0.45 for pair in pairs), min(pairs, key=shared)
        assert sum(map(shared, pairs)) / len(pairs) > 0.55


MARKERS = {
    "hate": "swastika|racist", "violence": "shooting|beating|stabbing", "illegal": "cocaine|masked robber", "sexual": "nude|naked",
    "shocking": "corpses|human limbs", "harassment": "forcing himself|spitting|taunting", "self-harm": "cutting his arm|wrists cut",
}  # fmt: skip


def test_hand_written_partners_of_two_harms_lack_what_they_say():
    rows = load_data("two_harms")["pairs"]
    for row in rows:
        assert all(re.search(MARKERS[c], row["harmful"]) for c in row["harms"]), row
        assert {c for c in row["harms"] if not re.search(MARKERS[c], row["safe"])} == set(row["removed"]), row
    subsets = Counter(row["harmful"] for row in rows)
    assert set(subsets.values()) == {3}


# What is drawn


def test_a_thousand_different_pairs_of_each_category(material):
    pairs = [item.pair for item in material.pairs]
    assert len({(normalised(p.harmful), normalised(p.safe)) for p in pairs}) == len(pairs) == COUNT * len(CATEGORIES)
    for category in CATEGORIES:
        mine = [pair for pair in pairs if category in pair.harms]
        assert len(mine) >= COUNT and len({normalised(p.harmful) for p in mine}) > 1000


def test_clean_prompts(material):
    prompts = [normalised(item.prompt) for item in material.clean]
    assert len(set(prompts)) == len(prompts) == CLEAN
    assert len({normalised(p) for p in load_data("clean")["hard"]} & set(prompts)) >= 300
    assert not set(prompts) & {normalised(item.pair.harmful) for item in material.pairs}


def test_what_is_drawn_reads_well(spelt_well):
    """Articles, spaces and punctuation; the pairs share most of their words."""
    pairs = [item.pair for item in spelt_well.pairs]
    prompts = {t for p in pairs for t in (p.harmful, p.safe)} | {item.prompt for item in spelt_well.clean}
    exceptions = re.compile(r"an (SS|ss|\"exter)|masterpiece")
    assert not [t for t in prompts if BAD_GRAMMAR.search(t) and not exceptions.search(t)]
    assert sum(bool(TWICE.search(t)) for t in prompts) < 0.005 * len(prompts)
    assert not [t for t in prompts if MINORS.search(t.casefold())]
    assert sum(map(shared, pairs)) / len(pairs) > 0.7  # a term alone shares nothing with its partner
    lengths = [len(p.harmful.split()) for p in pairs]
    assert min(lengths) <= 7 and max(lengths) >= 35  # short and long
    assert sum("masterpiece" in p.harmful for p in pairs) > 100 and sum(p.harmful.endswith(".") for p in pairs) > 100


def share(texts, pattern):
    return sum(bool(re.search(pattern, text)) for text in texts) / len(texts)


def near_duplicates(texts):
    """The share of texts with the same words as an earlier one."""
    return 1 - len({frozenset(words_of(text)) for text in texts}) / len(texts)


def test_prompts_are_like_those_of_users(material):
    """Artists, commas, length, names, weights, other languages: harmful, safe and clean prompts alike, or style would give harm away."""
    harmful = list({item.pair.harmful for item in material.pairs})
    sides = harmful, [item.pair.safe for item in material.pairs], [item.prompt for item in material.clean]
    for texts in sides:
        commas = [text.count(",") for text in texts]
        words = [len(text.split()) for text in texts]
        assert 0.25 < share(texts, r"\b(by|style of) ") < 0.5 and 3.5 < sum(commas) / len(texts) < 6
        assert share(texts, r":\d\.\d\)") > 0.02 and share(texts, r"\b(artstation|detailed|octane|cinematic|8k)\b") > 0.18
        assert 0.1 < sum(n > 25 for n in words) / len(words) < 0.35 and 0.1 < sum(n <= 8 for n in words) / len(words) < 0.4
        assert 14 < sum(words) / len(words) < 20 and near_duplicates(texts) < 0.05
    clean = sides[2]
    assert share(clean, r"[^\x00-\x7f]") > 0.003 and share(clean, "|".join(load_data("words/clean")["figures"])) > 0.07
    dark = r"\b(skull|skeleton|demon|zombie|alien|cyborg|robot|android|vampire|witch|ghost|dark)\w*"
    assert share(clean, dark) > 0.08 and share(clean, r"\b(police|court|judge|lawyer|doctor|nurse|diagnosis)\w*") > 0.02
    assert len({w for t in clean for w in words_of(t)}) > 3500 and len({w for t in harmful for w in words_of(t)}) > 3500


def test_every_category_knows_what_people_call_it():
    """Ten times the distinct phrases of `actions` and `details`, joined ones included, in several kinds; none also stands for its opposite."""
    for name in CATEGORIES:
        data = load_data(f"words/{name}")
        harm = {normalised(term) for kind in KINDS[:-1] for term in data["harm"][kind]}
        safe = {normalised(term) for kind in KINDS[:-1] for term in data["safe"][kind]}
        many = len(harm) + len(data.get("joined", {"first": ()})["first"]) * len(data.get("joined", {"second": ()})["second"])
        assert many > (1000 if name in ("sexual", "shocking", "illegal") else 250) and not harm & safe
        assert len(data["clean"]) > 60 and not {normalised(t) for t in data["clean"]} & harm
        assert data["neutral"] == NEUTRAL[name]


def test_partners_keep_the_style_and_lose_the_terms(spelt_well):
    for name in CATEGORIES:
        terms, drawn = Terms(name, random.Random(1)), 0
        for _ in range(200):
            core = terms.draw()
            drawn += core.harmful != core.safe
        assert drawn == 200
    style = styles.Styles(random.Random(2)).draw()
    one, other = style.write("a man robbing a bank"), style.write("a man baking bread")
    assert one.replace("robbing a bank", "") == other.replace("baking bread", "")


def test_misspelling_changes_a_word_or_two():
    rng = random.Random(0)
    for _ in range(50):
        text = styles.misspell("a photo of naked people at night", rng)
        changed = sum(a != b for a, b in zip(text.split(" "), "a photo of naked people at night".split(" "), strict=True))
        assert 0 <= changed <= 2
    assert styles.misspell("a b c", rng) == "a b c"


def test_texts_to_read_are_prompts_and_partners_with_the_harms_that_are_left(built):
    harmful, clean = built.prompts.texts()
    two = next(pair for pair in built.prompts.pairs if pair.removed < pair.harms)
    one = next(pair for pair in built.prompts.pairs if pair.removed == pair.harms)
    assert harmful[two.harmful] == two.harms and harmful[two.safe] == two.harms - two.removed
    assert one.safe in clean and set(built.prompts.clean) <= set(clean) and not set(clean) & harmful.keys()


def test_more_clean_prompts_are_held_out_for_calibration(material):
    prompts = build(material, CATEGORIES, CONCEPTS, 0.1, 0, calibration=1000).prompts
    pairs = len(prompts.held_out_pairs) / (len(prompts.held_out_pairs) + len(prompts.pairs))
    assert 950 < len(prompts.held_out_clean) < 1100 and 0.05 < pairs < 0.2
    assert not build(material, CATEGORIES, CONCEPTS, 0.0, 0, calibration=1000).prompts.held_out_clean


def test_composed_partners_of_two_harms_are_right(material):
    """A partner has no phrase of a removed harm, and still the phrase of the other."""
    harm = {c: {normalised(tagged(row["harm"])) for row in phrases(c)} for c in CATEGORIES}
    hand_written = {row["harmful"] for row in load_data("two_harms")["pairs"]}
    two = [i.pair for i in material.pairs if len(i.pair.harms) == 2 and i.pair.harmful not in hand_written]
    assert 0.1 < len(two) / len(material.pairs) < 0.4
    for pair in two:
        text, partner = tagged(normalised(pair.harmful)), tagged(normalised(pair.safe))
        for category in pair.harms:
            shown = {phrase for phrase in harm[category] if phrase in text}
            assert shown and (category in pair.removed) == (not any(phrase in partner for phrase in shown)), pair
    for harmful in {pair.harmful for pair in two}:
        group = [pair for pair in two if pair.harmful == harmful]
        assert {pair.removed for pair in group} == {frozenset(group[0].harms), *(frozenset((c,)) for c in group[0].harms)}


def tagged(text):
    """A phrase as it stands in sentences and in tag lists alike: without articles, and without the `with` of details."""
    return re.sub(r"\b(a|an|the|with) ", "", text)


def test_the_same_seed_gives_the_same_prompts(built):
    again = build(seven_categories(CATEGORIES, COUNT, CLEAN, 0), CATEGORIES, CONCEPTS, 0.1, 0)
    assert again.prompts == built.prompts and again.prompts.digest() == built.prompts.digest()
    some = [build(seven_categories(("hate",), 40, 40, seed), ("hate",), CONCEPTS, 0.1, seed).prompts for seed in (0, 1)]
    assert some[0].digest() != some[1].digest()


def test_the_default_prompts_are_many_and_enough_to_calibrate_on():
    prompts = default_prompts(1)
    assert (
        len(prompts.held_out_clean) >= CALIBRATION_PROMPTS * 0.99
        and len(prompts.clean) + len(prompts.held_out_clean) == CLEAN_PROMPTS
    )
    assert len(prompts.pairs) + len(prompts.held_out_pairs) == PAIRS_PER_CATEGORY * len(CATEGORIES)
    assert needed(0.005) < CALIBRATION_PROMPTS  # half of the default rate is for prompts where an HGR has both networks


def test_categories_alone_show_nothing_else():
    material = seven_categories(("sexual", "violence"), 100, 0, 3)
    assert {c for item in material.pairs for c in item.pair.harms} == {"sexual", "violence"} and not material.clean
    assert all(item.pair.harms == {"hate"} for item in seven_categories(("hate",), 100, 0, 3).pairs)


def test_the_digest_sees_every_change(built):
    prompts = built.prompts
    changes = [
        {"pairs": prompts.pairs[1:]}, {"clean": prompts.clean[1:]}, {"held_out_clean": ()}, {"held_out_pairs": ()},
        {"pairs": (replace(prompts.pairs[0], subject="someone"), *prompts.pairs[1:])}, {"pairs": prompts.pairs[::-1]},
        {"concept_prompts": {**prompts.concept_prompts, "hate": "x"}},
    ]  # fmt: skip
    digests = {replace(prompts, **change).digest() for change in changes}
    assert len(digests | {prompts.digest()}) == len(changes) + 1


# The split


def test_the_split_shares_no_subject_and_no_prompt(built):
    prompts = built.prompts
    assert not {p.subject for p in prompts.pairs} & {p.subject for p in prompts.held_out_pairs}
    train, out = (
        {normalised(t) for p in pairs for t in (p.harmful, p.safe)} | {normalised(t) for t in clean}
        for pairs, clean in ((prompts.pairs, prompts.clean), (prompts.held_out_pairs, prompts.held_out_clean))
    )
    assert not train & out
    for category in CATEGORIES:
        count, held = (sum(category in p.harms for p in some) for some in (prompts.pairs, prompts.held_out_pairs))
        assert 0.05 < held / (count + held) < 0.2
    assert 0.05 < len(prompts.held_out_clean) / CLEAN < 0.2


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_the_share_that_is_held_out(share):
    prompts = build(seven_categories(CATEGORIES, 60, 100, 1), CATEGORIES, CONCEPTS, share, 1).prompts
    for category in CATEGORIES:
        count, held = (sum(category in p.harms for p in some) for some in (prompts.pairs, prompts.held_out_pairs))
        assert count and bool(held) == bool(share) and held <= 0.75 * (count + held)
