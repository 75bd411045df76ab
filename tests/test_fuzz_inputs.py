"""Hostile recordings, prompt files and texts of widgets."""

import json
import struct

import pytest
import torch

from fuzzing import CASES, as_json, damaged, fuzz, header_of, mutated, odd_text, safetensors_bytes
from hgr_models import parse_categories, parse_concepts
from hgr_models.pairs import category_name, keep_categories, parse_own, read_file
from hgr_models.recording import Points, Prompts
from hgr_models.shards import CLEAN, HARMFUL, TEXTS, Recording, Texts, read_shard, write_runs, write_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def points_and_prompts(kind: str, rows: int = 6):
    x = torch.randn(rows, 4, 2, 2)
    harms = torch.ones(2, 2) if kind == HARMFUL else torch.zeros(2, 2)
    prompts = Prompts(torch.randn(2, 3, 5), None, None, harms, harms, torch.randn(2, 4), torch.ones(2, 3))
    numbers = torch.arange(rows) % 2
    return Points(x, torch.ones(rows), torch.ones(rows), x, x, x, torch.zeros(rows, 2), numbers), prompts


@pytest.fixture(scope="module")
def shard_files(folder) -> list[bytes]:
    (folder / "shards").mkdir()
    for kind in (HARMFUL, CLEAN):
        write_runs(folder / "shards" / f"{kind}.safetensors", kind, *points_and_prompts(kind), {"seed": 1})
    write_texts(
        folder / "shards" / "t.safetensors", Texts(torch.randn(3, 2, 5), None, torch.ones(3, 2), torch.ones(3, 2)), {"seed": 1}
    )
    return [path.read_bytes() for path in sorted((folder / "shards").iterdir())]


def use_shard(path):
    """Reads a shard and everything in it; values that are not finite show at the latest here."""
    shard = read_shard(path)
    rows = torch.arange(shard.size)
    if shard.kind in (HARMFUL, CLEAN):
        points, prompts = shard.points(rows)
        assert all(t.isfinite().all() for t in (points.x, points.cond_denoised, points.partner_denoised, prompts.tokens))
        Recording([shard]).draw(shard.kind, 3, torch.Generator().manual_seed(0))
    elif shard.kind == TEXTS:
        assert shard.texts(rows).tokens.isfinite().all()
        Recording([shard])


def test_damaged_shards(folder, shard_files):
    path = folder / "shard.safetensors"

    def make(rng):
        content = rng.choice(shard_files)
        size = struct.unpack("<Q", content[:8])[0] + 8
        path.write_bytes(damaged(rng, content, size if rng.random() < 0.7 else len(content)))
        return lambda: use_shard(path)

    assert fuzz("damaged shard", make) < CASES["damaged shard"]


def test_shards_with_other_columns(folder, shard_files):
    path = folder / "columns.safetensors"
    originals = [header_of(content) for content in shard_files]

    def make(rng):
        header, data = rng.choice(originals)
        changed = {name: dict(entry) for name, entry in header.items()}
        names = [name for name in header if name != "__metadata__"]
        if rng.random() < 0.6:
            about = json.loads(header["__metadata__"]["safecfg_shard"])
            changed["__metadata__"]["safecfg_shard"] = as_json(mutated(rng, about, 0.15))
        if rng.random() < 0.7:
            first, second = rng.sample(names, 2)
            if rng.random() < 0.5:
                changed[first], changed[second] = changed[second], changed[first]
            else:
                shape, kind = changed[first]["shape"], rng.choice(["shape", "dtype"])
                changed[first][kind] = (
                    rng.choice([shape[::-1], [*shape, 1], [1, *shape]]) if kind == "shape" else rng.choice(["F16", "BF16"])
                )
        path.write_bytes(safetensors_bytes(changed, data))
        return lambda: use_shard(path)

    fuzz("columns", make)


def test_texts_of_widgets():
    names = ("weapons", "drugs", "a/b")

    def categories(text):
        strengths = parse_categories(text, names, 0.5)
        assert len(strengths) == 3 and all(0 <= s <= 0.5 for s in strengths)

    def concepts(text):
        found = parse_concepts(text)
        assert found and all(words.strip() for words in found.values())

    uses = [categories, concepts, lambda t: keep_categories(t, names), category_name, lambda t: parse_own(t, "brand")]

    def make(rng):
        use, text = rng.choice(uses), odd_text(rng)
        return lambda: use(text)

    accepted = fuzz("texts", make)
    assert 0 < accepted < CASES["texts"]


def test_prompt_files(folder):
    rows = [{"harmful": "a gun", "safe": "a flower", "category": ["weapons"], "subject": "x"}, {"safe": "a tree"}]
    good = {"pairs": rows, "clean": ["a house"]}
    csv = 'harmful,safe,category,removed,subject\na gun,a flower,weapons,,x\n"a, b","c ""d""",x|y,x,\n,a tree,,,\n'

    def make(rng):
        kind = rng.choice(["json", "csv", "CSV", "txt"])
        path = folder / f"prompts.{kind}"
        if kind == "json":
            content = as_json(mutated(rng, rng.choice([good, rows]), 0.1)).encode("utf-8", "surrogatepass")
            content = content if rng.random() < 0.9 else b"[" * rng.randint(1, 200_000)
        else:
            lines = csv.splitlines(keepends=True)
            lines.insert(rng.randrange(len(lines) + 1), odd_text(rng) + "\n")
            content = "".join(lines).encode("utf-8", "surrogatepass")
        path.write_bytes(content if rng.random() < 0.5 else damaged(rng, content, len(content)))
        return lambda: read_file(path, "brand")

    accepted = fuzz("prompt files", make)
    assert 0 < accepted < CASES["prompt files"]
