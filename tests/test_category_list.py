"""The grammar of category lists, which every node reads."""

import pytest

from hgr_models import HGRError, parse_categories
from hgr_models.category_list import chosen, parse_list, strengths
from hgr_models.pairs.build import keep_categories

SEVEN = ("hate", "self-harm", "sexual")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (1, 1, 1)),
        ("hate = off", (0, 1, 1)),
        ("hate off; SEXUAL = 0.5", (0, 1, 0.5)),
        ("Self Harm = 0.25", (1, 0.25, 1)),
        ("all = off, sexual", (0, 0, 1)),
        ("all = 0.5, hate: on", (1, 0.5, 0.5)),
        ("sexual", (1, 1, 1)),
        (" ,;\n", (1, 1, 1)),
    ],
)
def test_strengths(text, expected):
    assert strengths(text, SEVEN) == parse_categories(text, SEVEN) == expected
    assert strengths(text, SEVEN, 0.5) == tuple(value / 2 for value in expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", SEVEN),
        ("sexual, HATE", ("hate", "sexual")),
        ("sexual = off", ("hate", "self-harm")),
        ("all, sexual off", ("hate", "self-harm")),
        ("all = off, Self-Harm", ("self-harm",)),
    ],
)
def test_what_is_chosen(text, expected):
    assert chosen(text, SEVEN) == keep_categories(text, SEVEN) == expected


def test_a_category_may_have_two_words_and_the_name_of_a_value():
    assert parse_list("night off = off", ("night off",)) == {"night off": 0.0}
    assert parse_list("night off", ("night off",)) == {"night off": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("swords", "Unknown category 'swords' in 'swords': this HGR has hate, self-harm, sexual"),
        ("hate, Hate = 1", "'hate' is named twice"),
        ("hate = 2", "Expected `hate = ` on, off or a number from 0 to 1, but got '2'"),
        ("hate =", "but got ''"),
        ("all, all", "'all' is named twice"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(HGRError, match=message.replace("(", r"\(")):
        strengths(text, SEVEN)
