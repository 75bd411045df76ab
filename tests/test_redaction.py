"""Redaction: which words are left out, and that everything else stays to the letter."""

import re

import pytest
import torch

from hgr_models.redaction import blame, clauses_of, differing, redact, redacted_pair, without, words_in

HARM = {"nude": 3.0, "gore": 2.0, "knife": 0.6, "blood": 0.6}


def excess(texts):
    """As an HGR whose words add up: 1 is the threshold."""
    return torch.tensor([sum(v for w, v in HARM.items() if w in re.findall("[a-z]+", t.lower())) - 1.0 for t in texts])


def shown(text):
    return [text[a:b] for a, b in words_in(text)]


def test_words_are_what_can_be_left_out():
    assert shown("a (red cat:1.3), embedding:bad-hands BREAK __animal__ <lora:x:0.5>") == ["a", "red", "cat"]
    assert shown(r"\(escaped\) {one|two} it's x-ray") == ["escaped", "one", "two", "it's", "x-ray"]
    assert shown("") == shown(" ,, ") == []


def test_clauses_are_between_commas():
    text = "a red cat, on a mat. BREAK rain"
    assert clauses_of(text, words_in(text)) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    "text, word, wanted",
    [
        ("a nude man", "nude", "a man"),
        ("nude, a man, oil", "nude", "a man, oil"),
        ("a man, nude, oil", "nude", "a man, oil"),
        ("a man, nude", "nude", "a man,"),
        ("a man, (nude:1.3), oil", "nude", "a man, oil"),
        ("a man, ((nude)), oil", "nude", "a man, oil"),
        ("a (nude man:1.3) walks", "nude", "a (man:1.3) walks"),
        ("a (man nude:1.3) walks", "nude", "a (man:1.3) walks"),
        ("a man BREAK nude BREAK oil", "nude", "a man BREAK BREAK oil"),
        ("{nude|dressed} man", "nude", "{|dressed} man"),
        ("a  man,   nude\nnext  line", "nude", "a  man,\nnext  line"),
        ("nude", "nude", ""),
        ("a nude and an apple", "nude", "an apple"),
        ("an apple and a nude, oil", "nude", "an apple, oil"),
        ("an apple, (a nude:1.2), oil", "nude", "an apple, oil"),
        ("The nude of a king in a park", "nude", "a king in a park"),
        ("a band with a nude on a wall", "nude", "a band on a wall"),
        ("embedding:nude, a nude cat, __nude__", "nude", "embedding:nude, a cat, __nude__"),
    ],
)
def test_a_word_goes_and_the_rest_stays(text, word, wanted):
    spans = [s for s in words_in(text) if text[slice(*s)] == word]
    assert without(text, spans) == wanted


def test_a_filler_stands_for_a_run_of_words():
    text = "a man, very nude, on (a nude beach:1.2)"
    spans = [s for s in words_in(text) if text[slice(*s)] in ("very", "nude")]
    assert without(text, spans, "dressed") == "a man, dressed, on (a dressed beach:1.2)"


def test_clean_prompts_come_back_as_they_are():
    text = " a  cat ,, (on a mat:1.1) BREAK knife "
    assert redact(text, excess).text is text and redact(text, excess).left_out == ()


def test_the_smallest_set_is_left_out():
    found = redact("a nude man with a knife, (gore:1.2), on a mat, embedding:x", excess)
    assert found.text == "a man with a knife, on a mat, embedding:x" and found.left_out == ("nude", "gore") and found.clean
    both = redact("a knife with blood on it", excess)  # either is enough: one is left in
    assert len(both.left_out) == 1 and both.clean
    assert redact("nude gore", excess).text == ""


def test_what_is_harmful_only_together_is_found():
    assert redact("a knife, on a mat, blood, in rain", excess).left_out in (("knife",), ("blood",))


def test_the_filler_is_used_where_it_is_clean():
    assert redact("a nude man", excess, "dressed").text == "a dressed man"
    assert redact("a nude man", excess, "gore").text == "a man"


def test_what_cannot_be_left_out_is_still_exceeded():
    always = lambda texts: torch.ones(len(texts))  # noqa: E731
    found = redact("a (cat:1.2), embedding:bad", always)
    assert not found.clean and found.text == "embedding:bad"


def test_blame_of_each_word():
    text = "a nude man with blood"
    found = {text[a:b]: round(value, 3) for (a, b), value in blame(text, excess)}
    assert found == {"a": 0.0, "nude": 3.0, "man": 0.0, "with": 0.0, "blood": 0.6}
    assert blame("", excess) == []


def test_a_pair_without_what_differs():
    harmful, safe = "a photo of a man robbing a bank at night, (sharp:1.2)", "a photo of a man baking bread at night, (sharp:1.2)"
    assert [harmful[a:b] for a, b in differing(harmful, safe)] == ["robbing", "a", "bank"]
    assert redacted_pair(harmful, safe) == "a photo of a man at night, (sharp:1.2)"
    assert redacted_pair(harmful, safe, "posing") == "a photo of a man posing at night, (sharp:1.2)"
    assert redacted_pair("nude", "dressed") == ""
