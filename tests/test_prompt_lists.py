"""Lists of prompts alone: files of every kind, and words that leave prompts out."""

import pytest

from hgr_models import HGRError
from hgr_models.pairs import distinct, read_prompts, without_words


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("a.txt", "a cat\n\n a dog, oil \n", ["a cat", "a dog, oil"]),
        ("a.csv", 'id,Prompt\n1,"a cat, red"\n2,a dog\n3,\n', ["a cat, red", "a dog"]),
        ("a.csv", "whatever\na cat\n", ["a cat"]),
        ("a.tsv", "caption\tx\na cat\t1\n", ["a cat"]),
        ("a.csv", "text;prompt\nno;a cat\n", ["a cat"]),
        ("a.json", '["a cat", {"text": "a dog", "id": 3}]', ["a cat", "a dog"]),
    ],
)
def test_files_of_prompts(tmp_path, name, content, wanted):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_prompts(tmp_path / name) == wanted


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "\n \n", "Expected prompts in a.txt, but it has none"),
        ("a.csv", "a,b\n1,2\n", "Expected a column prompt, positive.* in the first line of a.csv, but got 'a,b'"),
        ("a.csv", 'prompt\n"open\n', "a.csv is not CSV"),
        ("a.json", "{}", "Expected a list of prompts in a.json"),
        ("a.json", '["x", 3]', "a.json, entry 2: expected a text"),
        ("a.json", '[{"id": 3}]', "a.json, entry 1: expected a text, or an object"),
        ("a.json", "[", "a.json is not JSON"),
        ("a.doc", "x", "Expected a file of prompts .*but got a.doc"),
        ("b.txt", None, "b.txt cannot be read"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(HGRError, match=message):
        read_prompts(tmp_path / name)


def test_every_prompt_once():
    assert distinct(["a  Cat", "a dog", "A cat", "a dog"]) == ["a  Cat", "a dog"]


def test_prompts_with_a_word_are_left_out():
    prompts = ["a nude man", "nudes", "Nude, art", "a man without clothes", "a man with clothes"]
    assert without_words(prompts, "nude, without clothes") == (["nudes", "a man with clothes"], 3)
    assert without_words(prompts, " ,\n") == (prompts, 0)
