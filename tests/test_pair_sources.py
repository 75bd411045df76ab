"""Prompt pairs of several sources: the held-out split, the user's own lines and files, and what becomes of them together."""

import json
from dataclasses import replace

import pytest

from hgr_models import HGRError
from hgr_models.pairs import (
    CATEGORIES,
    Clean,
    Material,
    PromptPair,
    Sourced,
    build,
    clean_words_to_avoid,
    keep_categories,
    parse_own,
    read_file,
    seven_categories,
)
from hgr_models.pairs.build import words_of


def pairs_of(*rows, category="brand"):
    """Pairs of (harmful, safe, subject)."""
    one = frozenset((category,))
    return [Sourced(PromptPair(h, s, one, one, subject), "here") for h, s, subject in rows]


def test_a_category_of_one_pair_is_trained_and_not_held_out():
    built = build(Material(pairs_of(("a red can", "a can", "can"))), ("brand",), {}, 0.5, 0)
    assert len(built.prompts.pairs) == 1 and not built.prompts.held_out_pairs
    assert "brand: all its pairs are of one subject" in built.warnings[0] and built.warnings[0] in built.summary
    assert built.prompts.concept_prompts == {"brand": "brand"}
    assert not build(Material(pairs_of(("a red can", "a can", "can"))), ("brand",), {}, 0.0, 0).warnings


def test_two_subjects_go_apart_and_a_common_prompt_keeps_pairs_together():
    rows = [("a", "x", "1"), ("b", "y", "1"), ("c", "z", "2"), ("d", "Z ", "3"), ("e", "w", "4")]
    for seed in range(10):
        prompts = build(Material(pairs_of(*rows)), ("brand",), {}, 0.4, seed).prompts
        train, out = ({p.subject for p in some} for some in (prompts.pairs, prompts.held_out_pairs))
        assert train and out and not train & out and len({"2", "3"} & out) != 1


# Own pairs


def test_own_pairs_are_lines():
    text = "# mine\n\n a cat on a mat =>  a dog on a mat \nTwo cats => two dogs\n" + "x" * 10_000 + " => " + "y" * 10_000
    pairs = [item.pair for item in parse_own(text, "cats").pairs]
    assert [(p.harmful, p.safe) for p in pairs[:2]] == [("a cat on a mat", "a dog on a mat"), ("Two cats", "two dogs")]
    assert len(pairs[2].harmful) == len(pairs[2].safe) == 10_000
    assert all(p.harms == p.removed == {"cats"} for p in pairs)


def test_lines_may_name_their_own_categories():
    text = (
        "weapons: a knife on a table => a spoon on a table\n"
        "my brand|weapons: a Zorb knife => a spoon\n"
        "a sign reading: stop => a sign reading: go\n"
        "(blood:1.3) on a wall => paint on a wall\n"
        "The end: a skull => The end: a flower"
    )
    pairs = [item.pair for item in parse_own(text, "own").pairs]
    assert [sorted(p.harms) for p in pairs] == [["weapons"], ["my brand", "weapons"], ["own"], ["own"], ["own"]]
    assert (pairs[0].harmful, pairs[0].safe) == ("a knife on a table", "a spoon on a table")
    assert pairs[2].harmful == "a sign reading: stop" and pairs[3].harmful == "(blood:1.3) on a wall"


def test_every_bad_line_is_named():
    with pytest.raises(HGRError) as error:
        parse_own("a => b\nno arrow\na => b => c\n=> safe\nharmful =>\nSame  text => same text\n" + "long " * 50, "own")
    text = str(error.value)
    assert "line 1:" not in text
    assert "line 2: expected one `=>`, as in `harmful => safe`, but got 'no arrow'" in text
    assert "line 3: expected one `=>`" in text
    assert "line 4: expected a harmful and a safe prompt, but got '' and 'safe'" in text
    assert "line 5: expected a harmful and a safe prompt, but got 'harmful' and ''" in text
    assert "line 6: Expected a safe prompt that differs" in text
    assert "line 7:" in text and "long lo..." in text and len(text) < 900
    with pytest.raises(HGRError, match="and 80 more"):
        parse_own("bad\n" * 100, "own")


@pytest.mark.parametrize("name", ["", " ", "a,b", "a|b", "a=1", "a;b", "x" * 61])
def test_category_names_must_fit_into_lists(name):
    with pytest.raises(HGRError, match="expected a category name of 1 to 60 characters"):
        parse_own("a => b", name)
    assert parse_own("a => b", " Self-Harm ").pairs[0].pair.harms == {"self-harm"}


def test_keep_categories():
    assert keep_categories("", CATEGORIES) == CATEGORIES
    assert keep_categories(" Violence;\nhate, ", CATEGORIES) == ("hate", "violence")
    with pytest.raises(HGRError, match="Unknown category .swords. in .*: these prompts have hate, harassment"):
        keep_categories("hate, swords", CATEGORIES)


CSV = """harmful,safe,category,removed,note
"a knife, red",a spoon,violence,,x
a naked knife,a naked spoon,violence|sexual,violence,
,a meadow,,,clean

"two
lines",one line,,,
"""


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv(tmp_path, separator):
    file = tmp_path / "mine.csv"
    text = CSV if separator == "," else CSV.replace("knife, red", "knife red").replace(",", separator)
    file.write_text(text, encoding="utf-8-sig")
    material = read_file(file, "own")
    first, second, third = (item.pair for item in material.pairs)
    assert (
        first.harms == {"violence"}
        and first.safe == "a spoon"
        and first.harmful == ("a knife, red" if separator == "," else "a knife red")
    )
    assert second.harms == {"violence", "sexual"} and second.removed == {"violence"}
    assert third.harms == {"own"} and third.harmful == "two\nlines"
    assert [item.prompt for item in material.clean] == ["a meadow"]
    assert material.notes == ["mine.csv has note, which nothing uses"]


def test_every_bad_csv_line_is_named(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(
        'harmful,safe,category,removed\na,b,x,\na, with comma,b,x\n"c\nc",,x,\n,only safe,x,\nd,e,x,y\nf,g,a=b,\n',
        encoding="utf-8",
    )
    with pytest.raises(HGRError) as error:
        read_file(file, "own")
    text = str(error.value)
    assert text.startswith("Entries of mine.csv cannot be used:") and "line 2:" not in text
    assert "line 3: expected 4 cells, but got 5" not in text  # four cells, wrongly
    assert "line 4: expected a harmful and a safe prompt, but got 'c\\nc' and ''" in text
    assert "line 6: expected harmful and safe, or a clean prompt as safe and no category, but got" in text
    assert "line 7: Expected the removed categories to be some of x, but got y" in text
    assert "line 8: expected a category name" in text and "'a=b'" in text
    file.write_text("harmful,safe\na, with comma,b\n", encoding="utf-8")
    with pytest.raises(HGRError, match="line 2: expected 2 cells, but got 3: 'a' and so on; put a prompt with commas"):
        read_file(file, "own")


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.csv",
            b"prompt,category\nx,y\n",
            r"Expected the columns harmful and safe.* in the first line of a.csv, but got 'prompt,cat",
        ),
        ("a.csv", b"", "Expected the columns"),
        ("a.csv", b"harmful,safe,safe\n", "each once"),
        ("a.csv", b"harmful,safe\n", "Expected prompts in a.csv, but it has none"),
        ("a.csv", b'harmful,safe\n"open,quote\n', "a.csv is not CSV near line 2"),
        ("a.csv", b"harmful,safe\n\xff\xfe,b\n", "a.csv is not UTF-8 text"),
        ("a.json", b'[{"harmful": "a",}]', "a.json is not JSON: .*line 1 column"),
        ("a.json", b"3", "Expected a list of pairs in a.json"),
        ("a.json", b'{"pairs": {}}', "Expected a list of pairs in a.json"),
        ("a.json", b"{}", "Expected prompts in a.json"),
        ("a.json", b"[3]", "entry 1: expected an object with harmful and safe, but got '3'"),
        ("a.json", b'[{"harmful": "a", "safe": "b"}, {"harmful": 1}]', "entry 2: expected a text as harmful, but got '1'"),
        ("a.json", b'[{"harmful": "a", "safe": "b", "category": [1]}]', "entry 1: expected a text as category"),
        ("a.json", b'{"clean": [""]}', "entry 1 of clean: expected harmful and safe, or a clean prompt"),
        ("none.csv", None, "none.csv cannot be read: No such file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(HGRError, match=message):
        read_file(tmp_path / name, "own")


def test_json(tmp_path):
    file = tmp_path / "mine.JSON"
    rows = [{"harmful": "a", "safe": "b", "category": ["x", "y"], "removed": "x", "subject": "s"}, {"safe": "clean too", "id": 7}]
    file.write_text(json.dumps({"pairs": rows, "clean": ["a meadow"]}), encoding="utf-8")
    material = read_file(file, "own")
    (item,) = material.pairs
    assert item.pair == PromptPair("a", "b", frozenset("xy"), frozenset("x"), "s") and item.origin == "mine.JSON, entry 1"
    assert [c.prompt for c in material.clean] == ["clean too", "a meadow"] and material.notes == [
        "mine.JSON has id, which nothing uses"
    ]
    file.write_text(json.dumps(rows[:1]), encoding="utf-8")
    assert read_file(file, "own").pairs == material.pairs


# Sources together


def test_duplicates_are_dropped_and_counted():
    own = parse_own("a cat => a dog\nA  cat => a dog\na cat=>a dog\na red cat => a red dog", "cats")
    own.clean += [Clean("a meadow", "m"), Clean("A meadow ", "m"), Clean("a CAT", "c")]
    built = build(own, ("cats",), {}, 0.0, 0)
    assert len(built.prompts.pairs) == 2 and built.prompts.clean == ("a meadow",)
    for line in ("2 duplicate pairs", "1 duplicate clean prompts", "1 clean prompts that a pair calls harmful"):
        assert f"dropped: {line}" in built.summary


def test_prompts_that_contradict_each_other():
    with pytest.raises(
        HGRError, match="line 2 of the own pairs calls 'a dog' safe|line 1 of the own pairs calls 'a dog' safe, but line 2"
    ):
        build(parse_own("a cat => a dog\na dog => a cow", "cats"), ("cats",), {}, 0.0, 0)
    both = parse_own("a cat => a dog", "cats") + parse_own("a cat => a cow", "pets")
    with pytest.raises(HGRError, match="calls 'a cat' pets, but line 1 of the own pairs calls it cats"):
        build(both, ("cats", "pets"), {}, 0.0, 0)


def test_partners_for_subsets_do_not_contradict_each_other():
    two = frozenset(("cats", "hats"))
    rows = [
        ("a cat in a hat", "a dog in a hat", {"cats"}),
        ("a cat in a hat", "a cat in a coat", {"hats"}),
        ("a cat in a hat", "a dog", two),
    ]
    own = Material([Sourced(PromptPair(h, s, two, frozenset(r), "x"), "here") for h, s, r in rows])
    own += parse_own("a cat in a coat => a dog in a coat", "cats")
    assert len(build(own, ("cats", "hats"), {}, 0.0, 0).prompts.pairs) == 4
    wrong = Material([*own.pairs, Sourced(PromptPair("a cat in a hat", "a dog", two, frozenset(("cats",)), "x"), "there")])
    with pytest.raises(HGRError, match="there says that 'a dog' lacks cats, but here says cats, hats"):
        build(wrong, ("cats", "hats"), {}, 0.0, 0)


def test_a_category_without_pairs_is_an_error():
    two = frozenset(("cats", "hats"))
    own = Material([Sourced(PromptPair("a cat in a hat", "a dog", two, two, "x"), "here")])
    with pytest.raises(
        HGRError, match="Expected pairs of cats, but there is none: all of its 1 also show hats, which is not kept"
    ):
        build(own, ("cats",), {}, 0.0, 0)
    with pytest.raises(HGRError, match="Expected pairs of dogs, but there is none. Add some"):
        build(own, ("cats", "hats", "dogs"), {}, 0.0, 0)
    with pytest.raises(HGRError, match="at least one pair in each category"):
        build(Material(), (), {}, 0.0, 0)


def test_clean_prompts_leave_out_what_own_pairs_are_about():
    own = parse_own(
        "a red Zorblat can on a table => a red can on a table\na man with a zorblat => a man with a cup\nx => y", "brand"
    )
    assert clean_words_to_avoid(own.pairs, CATEGORIES) == {"zorblat"}
    violent = parse_own("a man with a knife => a man with a spoon", "violence")
    assert not clean_words_to_avoid(violent.pairs, CATEGORIES)
    cats = clean_words_to_avoid(parse_own("a cat => a dog", "cats").pairs, CATEGORIES)
    clean = seven_categories((), 0, 2000, 0, cats).clean
    assert len(clean) == 2000 and not any("cat" in words_of(item.prompt) for item in clean)


def test_a_pair_and_a_set_check_themselves():
    one, two = frozenset("x"), frozenset("xy")
    for broken in ({"removed": frozenset()}, {"removed": two}, {"safe": " "}, {"safe": "A "}):
        with pytest.raises(HGRError):
            PromptPair(**{"harmful": "a", "safe": "b", "harms": one, "removed": one, "subject": "s", **broken})
    prompts = build(Material(pairs_of(("a", "b", "s"), category="x")), ("x",), {}, 0.0, 0).prompts
    for broken in ({"categories": ("x", "y")}, {"categories": ()}, {"concept_prompts": {}}, {"pairs": ()}):
        with pytest.raises(HGRError):
            replace(prompts, **broken)
