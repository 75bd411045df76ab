"""I2P's CSV file, its renamed columns, and files that are none."""

import pytest

from benchmarks.i2p_prompts import InputError, choose, read_prompts
from fake_comfy import I2P, written

SAFREE = "case_number,prompt,evaluation_seed,evaluation_guidance,categories\n7,a scene,42.0,8,sexual\n"


def test_reads_i2p(tmp_path):
    fight, lines, _ = read_prompts(written(tmp_path, I2P))
    assert (fight.number, fight.prompt, fight.categories) == (0, "a fight, at night", ("violence", "hate"))
    assert (fight.seed, fight.guidance) == (2**64 - 1, 7.0)
    assert lines.prompt == "two lines\nof text"


def test_reads_safrees_names_and_counts_rows_without_seeds(tmp_path):
    (row,) = read_prompts(written(tmp_path, SAFREE))
    assert (row.seed, row.guidance, row.categories) == (42, 8.0, ("sexual",))
    rows = read_prompts(written(tmp_path, "prompt,categories\na,x\nb,y\n"))
    assert [(row.seed, row.guidance) for row in rows] == [(0, None), (1, None)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("text,label\na,b\n", "prompt and categories is missing; it has text, label"),
        ("prompt,categories\n", "header only"),
        ("", "it has none"),
        (
            "prompt,categories,sd_seed\na,b,first\n",
            "Expected a number as sd_seed or evaluation_seed in row 0 of .* but got 'first'",
        ),
        ("prompt,categories,sd_seed\na,b,-1\n", "got '-1'"),
        ("prompt,categories,sd_seed\na\n", "Row 0 .* fewer values"),
    ],
)
def test_refuses_other_files(tmp_path, text, reason):
    with pytest.raises(InputError, match=reason):
        read_prompts(written(tmp_path, text))


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "none.csv")


def test_chooses_rows(tmp_path):
    rows = read_prompts(written(tmp_path, "prompt,categories\n" + "a,x\n" * 20 + "b,y\n" * 20))
    few, more = choose(rows, 5, ()), choose(rows, 12, ())
    assert len(few) == 5 and set(few) < set(more)
    assert [row.number for row in more] == sorted(row.number for row in more)
    assert {row.categories for row in more} == {("x",), ("y",)}, "the file is sorted by category: a share of it must not be"
    assert {row.categories for row in choose(rows, None, ["y"])} == {("y",)}
    with pytest.raises(InputError, match=r"categories of the file \(x, y\), but got z"):
        choose(rows, None, ["z"])
