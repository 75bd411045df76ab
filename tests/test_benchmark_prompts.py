"""The benchmark of reading prompts: lists by column, figures, and the layout of the stand-in encoder. Without the encoder itself."""

import json

import pytest
import torch

from benchmarks.prompt_encoder import MiniLM, weighted_parts
from benchmarks.prompt_lists import CLEAN, HARMFUL, SOURCES, Source, read_all, read_column, spread
from benchmarks.prompt_peers import keywords
from benchmarks.prompts import (
    QUICK_TOKENS,
    REFERENCE,
    auroc,
    evaluate,
    first_tokens,
    table_of,
    train_reading,
    wilson,
    write_recording,
)
from hgr_models.pairs import PromptPair, PromptSet


def test_columns_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.csv").write_text('x,prompt\n1,"a cat, red"\n2,a dog\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text('Prompt\tNote\na "cat\t\n', encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a cat"}, {"text": None}]), encoding="utf-8")
    (tmp_path / "a.txt").write_text("a cat\n\na dog\n", encoding="utf-8")
    assert read_column(tmp_path / "a.csv", "prompt") == ["a cat, red", "a dog"]
    assert read_column(tmp_path / "a.tsv", "Prompt") == ['a "cat']
    assert read_column(tmp_path / "a.json", "text") == ["a cat", ""]
    assert read_column(tmp_path / "a.txt", "") == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="Expected a column 'y' in a.csv; there is x, prompt"):
        read_column(tmp_path / "a.csv", "y")


def test_even_and_odd_rows_and_labelled_ones(tmp_path):
    rows = "\n".join(f"p{i}" for i in range(10))
    (tmp_path / "i2p.csv").write_text(f"prompt\n{rows}\n", encoding="utf-8")
    (tmp_path / "geneval.txt").write_text(rows, encoding="utf-8")
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"clear": {"3": "violence"}, "border": [5, 6]}), encoding="utf-8")
    even = {source.name: texts for source, texts in read_all(tmp_path, labels).items()}
    assert even == {"I2P clear": ["p3"], "I2P border": ["p5", "p6"], "I2P none": [], "GenEval": ["p0", "p2", "p4", "p6", "p8"]}
    extra = Source("mine", "i2p.csv", "prompt", CLEAN)
    odd = read_all(tmp_path, None, [extra], parity=1)
    assert {source.name for source in odd} == {"GenEval", "mine"} and odd[extra] == ["p1", "p3", "p5", "p7", "p9"]
    assert spread(list("abcdef"), 3) == ["a", "c", "e"] and spread(["a"], 3) == ["a"]
    assert len({source.name for source in SOURCES}) == len(SOURCES)


def test_shares_areas_and_lengths():
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])) == 0.875  # one tie in four comparisons
    assert wilson(0, 100) == pytest.approx((0.0, 0.037), abs=1e-3) and wilson(50, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    bad, good = Source("bad", "", "", HARMFUL), Source(REFERENCE, "", "", CLEAN)
    scores = {bad: torch.tensor([[3.0, 0.0], [0.0, 0.0]]), good: torch.tensor([[0.0, 2.5], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])}
    found = evaluate(scores, {bad: [1, 1], good: [3, 30, 9, 8]}, torch.tensor([1.0, 2.0]))
    assert found["bad"]["share"] == 0.5 and found["bad"]["categories"] == [0.5, 0.0] and found["bad"]["auroc"] == 0.6875
    assert found[REFERENCE]["share"] == 0.25 and found[REFERENCE]["lengths"]["0-8"] == {
        "share": 0.5, "interval": wilson(1, 2), "count": 2,
    }  # fmt: skip
    assert "| bad" in table_of([found, found], ("x", "y")) and "0.500 0.500" in table_of([found, found], ("x", "y"))


def test_keywords_of_harmful_prompts_score_high():
    score = keywords(["a bad cat", "a bad dog"], ["a cat", "a dog"])
    bad, good, unknown = score(["bad", "a cat", "zebra"])
    assert bad > good and unknown == 0


def test_weights_are_read_as_in_comfyui():
    assert weighted_parts("a (red cat:1.3), on (a mat)") == [("a ", 1.0), ("red cat", 1.3), (", on (a mat)", 1.0)]
    states = torch.arange(3.0)[:, None].expand(3, 2)
    laid = MiniLM._laid_out(states)
    assert laid.shape == (77, 2) and laid[:3, 0].tolist() == [0, 1, 2] and (laid[3:] == 2).all()


def test_the_end_of_a_short_prompt_counts_for_its_padding():
    short, long = (torch.arange(77.0).clamp(max=last)[:, None] for last in (2, 70))
    tokens, mask = first_tokens(torch.stack([short, long]).repeat(1, 2, 1), 5)  # of two chunks
    assert tokens[..., 0].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert mask.tolist() == [[1, 1, 75, 0, 0], [1, 1, 1, 1, 1]]


class Letters:
    """Stands in for the encoder: a prompt is its first letter's token, 77 times."""

    def batches(self, texts, size=32):
        yield torch.stack([torch.randn(384, generator=torch.Generator().manual_seed(ord(t[0]))).expand(77, 384) for t in texts])


def test_quick_steps_read_the_start_of_prompts_and_learn(tmp_path):
    one = frozenset(("hate",))
    pairs = [PromptPair(f"{a} x", f"{b} x", one, one, a) for a, b in ("ab", "cd", "ef")]
    prompts = PromptSet(("hate",), tuple(pairs), tuple("ghij"), tuple(pairs), tuple("klmn"), {"hate": "x"})
    recording = write_recording(prompts, Letters(), tmp_path / "shards", QUICK_TOKENS)
    generator = torch.Generator().manual_seed(0)
    drawn = recording.draw_texts(True, 4, generator)
    assert drawn.tokens.shape == (4, QUICK_TOKENS, 384) and drawn.mask[:, 0].tolist() == [77] * 4
    assert next(iter(recording.calibration_texts())).tokens.shape[1] == 77  # thresholds are for whole prompts
    hgr = train_reading(recording, 12, 0, quick=True)
    high, low = (torch.logit(hgr.condition.harmfulness(next(Letters().batches(texts)))).mean() for texts in ("ace", "bdf"))
    assert high - low > 1
