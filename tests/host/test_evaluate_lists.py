"""Lists of prompts as they come, protocols, and the figures of an evaluation, against numbers worked out by hand."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from safecfg.hgr_models import HGRError
from safecfg.nodes.evaluate import distances, protocol
from safecfg.nodes.evaluate.figures import clean_rows, harm_rows, share, wilson
from safecfg.nodes.evaluate.lists import CLEAN, HARMFUL, Asked, PromptList, Row, parse_lists, read_list, spread
from safecfg.nodes.evaluate.store import Store


def read(tmp_path, name, content, asked=None):
    (tmp_path / name).write_text(content, encoding="utf-8")
    return read_list(tmp_path / name, asked or Asked(name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("i2p.csv", 'prompt,categories,sd_seed,sd_guidance_scale\n"a cat, wet","hate, violence",3.0,7.5\na dog,,,\n'),
        ("i2p.csv", 'Prompt;Category;evaluation_seed;evaluation_guidance\n"a cat, wet";hate|violence;3;7.5\na dog;;;\n'),
        ("i2p.tsv", "text\tcategory\tseed\tcfg\na cat, wet\thate,violence\t3\t7.5\na dog\t\t\t\n"),
        ("i2p.json", '[{"prompt": "a cat, wet", "categories": ["hate", "violence"], "seed": 3, "guidance": 7.5}, {"prompt": "a dog"}]'),
        ("i2p.jsonl", '{"prompt": "a cat, wet", "categories": "hate;violence", "seed": "3", "cfg": "7.5"}\n\n{"prompt": "a dog"}\n'),
    ],
)  # fmt: skip
def test_columns_are_found_by_name(tmp_path, name, content):
    (found,) = read(tmp_path, name, content)
    assert found.rows == (Row(0, "a cat, wet", ("hate", "violence"), 3, 7.5), Row(1, "a dog"))
    assert (found.name, found.kind, found.total, len(found.digest)) == ("i2p", HARMFUL, 2, 64)


def test_text_files_pairs_and_named_columns(tmp_path):
    (plain,) = read(tmp_path, "coco.txt", "a cat\n\n a dog \n", Asked("coco.txt", CLEAN))
    assert [(row.number, row.text) for row in plain.rows] == [(0, "a cat"), (2, "a dog")] and plain.kind == CLEAN
    unsafe, safe = read(tmp_path, "copro.csv", "unsafe_prompt,safe_prompt,concept\na gun,a toy,violence\n")
    assert (unsafe.name, unsafe.kind, unsafe.rows[0].text) == ("copro unsafe", HARMFUL, "a gun")
    assert (safe.name, safe.kind, safe.rows[0].text, safe.rows[0].categories) == ("copro safe", CLEAN, "a toy", ("violence",))
    mma = "target_prompt,adv_prompt\nplain words,odd words\n"
    assert read(tmp_path, "mma.csv", mma)[0].rows[0].text == "odd words"
    (named,) = read(tmp_path, "mma.csv", mma, parse_lists("mma.csv = harmful, column target_prompt")[0])
    assert named.rows[0].text == "plain words"
    (only,) = read(tmp_path, "one.csv", "sentence\na cat\n")
    assert only.rows[0].text == "a cat"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "a,b\n1,2\n", "Expected a column of prompts .*x.csv; it has a, b.*column NAME"),
        ("x.csv", "prompt,seed\na cat,many\n", "Expected a number as seed in row 1 of x.csv"),
        ("x.csv", "prompt\na cat, wet\n", "more values than its header"), ("x.csv", "prompt\n", "it has none"),
        ("x.json", "[1]", "Expected a list of texts or of objects"), ("x.json", "[", "is not JSON"),
        ("x.json", '[{"prompt": 3}]', "Expected a text as prompt in row 1"), ("x.parquet", "", "Save it as CSV or TXT"),
        ("x.csv", "prompt\n \n", "is empty"),
        ("x.csv", "a cat on a mat\na dog\n", "has no name of a column, but looks like a prompt .a cat on a mat.. Write `prompt`"),
        ("x.csv", 'prompt,seed\n"never closed,4\na dog,5\n', "x.csv is not CSV: unexpected end of data. Close every quote"),
    ],
)  # fmt: skip
def test_what_is_no_list_is_said(tmp_path, name, content, message):
    with pytest.raises(HGRError, match=message):
        read(tmp_path, name, content)


def test_rows_are_spread():
    rows = tuple(Row(i, "x") for i in range(10))
    assert [row.number for row in spread(rows, 3)] == [0, 3, 6] and spread(rows, 0) == spread(rows, 20) == rows


def test_every_protocol_is_whole():
    assert set(protocol.names()) > {"casg", "i2p", "coco", "mma"}
    for name in protocol.names()[1:]:
        found = protocol.load(name)
        assert found.title and found.judged and all(f["source"] and f["method"] for f in found.published)
        assert {f["list"] for f in found.published} <= {each["name"] for each in found.lists}
        assert all(each["where"] and each["prompts"] > 0 and each["kind"] in (HARMFUL, CLEAN) for each in found.lists)
        assert set(found.settings) <= {"cfg", "seed", "steps", "images"}


def test_intervals():
    assert wilson(0, 0) == (0.0, 1.0) and wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert share([True, False])["share"] == 0.5


def record(row, k=0, latent="x", **scores):
    return {"row": row, "k": k, "latent": latent, "scores": {judge: {"bad": value} for judge, value in scores.items()}}


def test_rows_by_category_judge_and_arm():
    lists = [PromptList("i2p", HARMFUL, "", (Row(0, "a", ("hate",)), Row(1, "b", ("hate", "violence"))), 2)]
    found = {
        ("i2p", 0, "plain"): [record(0, one=0.9, two=0.1)], ("i2p", 1, "plain"): [record(1, one=0.1, two=0.9)],
        ("i2p", 0, "safe"): [record(0, one=0.5, two=0.5)], ("i2p", 1, "safe"): [record(1, one=0.1, two=0.7)],
    }  # fmt: skip
    judges = [{"name": "one", "thresholds": {"bad": 0.5}}, {"name": "two", "thresholds": {"bad": 0.5}}]
    counted = {
        (r["category"], r["judge"], r["arm"]): (r["harmful"], r["n"]) for r in harm_rows(lists, ["plain", "safe"], judges, found)
    }
    assert counted["all", "one", "plain"] == (1, 2) and counted["all", "any judge", "plain"] == (2, 2)
    assert counted["violence", "two", "plain"] == (1, 1) and counted["violence", "one", "safe"] == (0, 1)
    assert counted["hate", "any judge", "safe"] == (1, 2)  # at the threshold is not above it


def test_clean_pictures_are_compared_with_plain():
    lists = [PromptList("coco", CLEAN, "", (Row(0, "a"), Row(1, "b")), 2)]
    found = {
        ("coco", i, arm): [record(i, latent=f"{i}{'changed' * (arm == 'safe' and i)}")]
        for i in (0, 1)
        for arm in ("plain", "safe")
    }
    plain, safe = clean_rows(lists, ["plain", "safe"], found, distances.of_records)
    assert plain["bit_identical"] == 1.0 and safe["bit_identical"] == 0.5 and safe["clip_score"] is None and "cmmd" not in safe


def test_distances_of_features():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(300, 5, generator=generator), torch.randn(200, 5, generator=generator) * 2 + 1
    centred = [(x - x.mean(0)).double() for x in (one, other)]
    s1, s2 = (x.T @ x / (len(x) - 1) for x in centred)
    values, vectors = torch.linalg.eigh(s1)
    root = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    expected = (one.double().mean(0) - other.double().mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * cross
    assert distances.frechet(one, other) == pytest.approx(float(expected), rel=1e-6)
    assert distances.frechet(one, one) == pytest.approx(0, abs=1e-9) and distances.frechet(one[:1], other) is None
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert distances.cmmd(x, y) == pytest.approx(1000 * 2 * (1 - torch.exp(torch.tensor(-2 / 200.0)).item()), rel=1e-5)
    assert distances.cmmd(one, one) == pytest.approx(0, abs=1e-9)
    assert torch.allclose(torch.tensor(distances.pack(one[0])), one[0].float(), rtol=5e-4)


@pytest.mark.parametrize(("n", "m", "width"), [(400, 300, 16), (20, 30, 64)])  # also fewer pictures than features
def test_the_frechet_distance_is_that_of_the_matrix_root(n, m, width):
    """As FID programs compute it: scipy's root of the product of the covariances."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(width, width))
    one, other = rng.normal(size=(n, width)), rng.normal(size=(m, width)) @ mix / 4 + 0.5
    s1, s2 = (np.cov(x, rowvar=False) for x in (one, other))
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    found = distances.frechet(torch.from_numpy(one), torch.from_numpy(other))
    assert found == pytest.approx(expected, rel=1e-5) and found > 0.1


def test_more_pictures_than_features_cost_what_features_do(monkeypatch):
    """30,000 pictures would be a matrix of 7 GB, and days."""
    one, other = torch.randn(400, 6), torch.randn(300, 6) + 1
    real, seen = torch.linalg.svdvals, []
    monkeypatch.setattr(torch.linalg, "svdvals", lambda x: (seen.append(x.shape), real(x))[1])
    assert distances.frechet(one, other) > 1 and seen == [(6, 6)]


def test_few_pictures_are_said():
    rows = [{"n": 50, "fd_clip": 3.0, "fid": 9.0}, {"n": 900, "fd_clip": 2.0}, {"n": 5}]
    widths = {"FD-CLIP": 768, "FID": 2048}
    clip, fid = distances.few(rows, widths)
    assert "FD-CLIP comes from 50 pictures, fewer than its 768 features: it is too large" in clip and "FID comes from 50" in fid
    assert distances.few(rows[1:], widths) == distances.few(rows[2:], widths) == []


def test_a_store_keeps_what_was_written(tmp_path):
    store = Store(tmp_path / "x", {"a": 1}, True)
    store.add({"key": "k0", "list": "l", "row": 0, "arm": "plain", "k": 0})
    (tmp_path / "x/results.jsonl").open("ab").write(b'{"key"')
    again = Store(tmp_path / "x", {"a": 1}, True)
    again.add({"key": "k1", "list": "l", "row": 0, "arm": "plain", "k": 1})
    third = Store(tmp_path / "x", {"a": 1}, True)
    assert third.keys == {"k0", "k1"} and [r["k"] for r in third.found({"k0", "k1"})["l", 0, "plain"]] == [0, 1]
    assert third.found({"k1"}) == {("l", 0, "plain"): [third.records[1]]}
    with pytest.raises(HGRError, match="made with a = 1, not 2"):
        Store(tmp_path / "x", {"a": 2}, True)
    assert not Store(tmp_path / "x", {"a": 2}, False).records


@pytest.mark.parametrize(
    "content", ["no JSON\n", json.dumps({"format": "other"}) + "\n", '{"format": "safecfg-evaluation"}\n[1]\n']
)
def test_a_damaged_store_is_said(tmp_path, content):
    (tmp_path / "results.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(HGRError, match="is damaged .*switch `resume` off"):
        Store(tmp_path, {}, True)
