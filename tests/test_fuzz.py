"""Hostile checkpoints: damaged bytes, other metadata, other tensors, sizes that do not exist."""

import json
import os
import struct
import time

import pytest
import torch
from safetensors.torch import load, save, save_file

from fuzzing import CASES, as_json, attempt, damaged, fuzz, header_of, mutated, odd_text, peak_megabytes, safetensors_bytes
from helpers import info
from hgr_models import HGR, HGRError, load_hgr, save_hgr
from hgr_models.checkpoint import KEY
from hgr_models.condition import ConditionConfig
from hgr_models.guidance import GuidanceConfig
from hgr_models.shards import read_shard


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def hgr_file(folder) -> bytes:
    """A good checkpoint, as small as one can be."""
    facts = info(concept_prompts={"drugs": "pills"}, training={"steps": 3}, picture_thresholds=(0.5, 0.5))
    condition = ConditionConfig(16, 2, width=8, depth=1, delta_depth=1, heads=1)
    save_hgr(
        folder / "good.safetensors", HGR(facts, condition, GuidanceConfig(4, 2, width=8, read_depth=1, correct_depth=2, heads=1))
    )
    return (folder / "good.safetensors").read_bytes()


def use_hgr(path):
    """Loads a checkpoint; what comes back must be whole and finite, and work."""
    hgr = load_hgr(path)
    hgr.info.validate()
    assert all(t.isfinite().all() for t in hgr.state_dict().values())
    if hgr.condition is not None:
        p = hgr.condition.harmfulness(torch.ones(1, 3, hgr.info.token_width), None)
        assert p.shape == (1, len(hgr.info.categories))


def test_damaged_checkpoints(folder, hgr_file):
    size = struct.unpack("<Q", hgr_file[:8])[0] + 8
    path = folder / "damaged.safetensors"

    def make(rng):
        path.write_bytes(damaged(rng, hgr_file, size))
        return lambda: use_hgr(path)

    assert fuzz("damaged checkpoint", make) < CASES["damaged checkpoint"]


def test_checkpoints_with_other_metadata(folder, hgr_file):
    header, data = header_of(hgr_file)
    about, path = json.loads(header["__metadata__"][KEY]), folder / "metadata.safetensors"

    def make(rng):
        text = as_json(mutated(rng, about, rng.choice((0.02, 0.08, 0.3))))
        text = text if rng.random() < 0.95 else "[" * rng.randint(1, 200_000)
        path.write_bytes(safetensors_bytes({**header, "__metadata__": {KEY: text}}, data))
        return lambda: use_hgr(path)

    accepted = fuzz("metadata", make)
    assert 0 < accepted < CASES["metadata"]


def test_checkpoints_with_other_tensors(folder, hgr_file):
    header, data = header_of(hgr_file)
    path, names = folder / "tensors.safetensors", [name for name in header if name != "__metadata__"]
    kinds = ["F16", "F32", "F64", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "I4", "x"]

    def make(rng):
        changed = {name: dict(entry) for name, entry in header.items()}
        for name in rng.sample(names, rng.randint(1, 3)):
            what = rng.randrange(5)
            if what == 0:
                changed[name]["dtype"] = rng.choice(kinds)
            elif what == 1:
                changed[name]["shape"] = rng.choice([[], [0], [2**40, 2**40], [10**12], [-1], [3, 3], "x"])
            elif what == 2:
                changed[name]["data_offsets"] = rng.choice([[0, 2**62], [5, 3], [0], [len(data), len(data)], [-1, 4]])
            elif what == 3:
                del changed[name]
            else:
                changed[odd_text(rng) or "x"] = changed[name]
        path.write_bytes(safetensors_bytes(changed, data))
        return lambda: use_hgr(path)

    assert fuzz("tensors", make) < CASES["tensors"]


def test_checkpoints_with_sizes_that_do_not_exist(folder, hgr_file):
    """Networks of terabytes, or of a billion layers: refused before anything is allocated."""
    header, data = header_of(hgr_file)
    about, path = json.loads(header["__metadata__"][KEY]), folder / "sizes.safetensors"
    sizes = [0, -1, 1, 3, 7, 64, 65536, 10**6, 10**9, 10**18, 10**400, 1.5, "8", True, None]

    def make(rng):
        changed = json.loads(json.dumps(about))
        for _ in range(rng.randint(1, 3)):
            network = changed[rng.choice(["condition", "guidance"])]
            network[rng.choice(sorted(network))] = rng.choice(sizes)
        if rng.random() < 0.5:  # the metadata agree with each other
            changed["info"]["token_width"] = changed["condition"].get("token_width")
            changed["info"]["latent_channels"] = changed["guidance"].get("latent_channels")
        path.write_bytes(safetensors_bytes({**header, "__metadata__": {KEY: as_json(changed)}}, data))
        return lambda: use_hgr(path)

    fuzz("sizes", make)


def test_there_are_more_than_10_000_cases():
    assert sum(CASES.values()) > 10_000


def test_every_weight_must_be_finite(tmp_path, hgr_file):
    """NaN or infinity in any single tensor of a checkpoint."""
    good, header = load(hgr_file), header_of(hgr_file)[0]["__metadata__"]
    for name in good:
        for bad in (float("nan"), float("-inf")):
            broken = {k: v.clone() for k, v in good.items()}
            if broken[name].numel():
                broken[name].view(-1)[-1:] = bad
                save_file(broken, tmp_path / "x.safetensors", header)
                with pytest.raises(HGRError, match="not finite"):
                    load_hgr(tmp_path / "x.safetensors")


def test_huge_claims_cost_nothing(tmp_path):
    """A header of a petabyte, and one that is longer than the file."""
    claim = {"x": {"dtype": "F32", "shape": [2**48], "data_offsets": [0, 2**50]}, "__metadata__": {KEY: "{}"}}
    before, start = peak_megabytes(), time.monotonic()
    for content in (
        safetensors_bytes(claim, b""),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_999_999) + b"{}",
        b"",
        b"\0" * 8,
    ):
        (tmp_path / "x.safetensors").write_bytes(content)
        for read in (load_hgr, read_shard):
            with pytest.raises(HGRError, match="not a complete"):
                read(tmp_path / "x.safetensors")
    assert peak_megabytes() - before < 64 and time.monotonic() - start < 5


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")  # reading one would wait for ever
    for name in ("folder.safetensors", "pipe.safetensors", "gone.safetensors", "x" * 5000, "a\0b"):
        for read in (load_hgr, read_shard):
            assert not attempt(name[:20], lambda name=name, read=read: read(tmp_path / name))


# Failures that the fuzzing found; each once ended in something else than an HGRError.
FOUND_METADATA = {
    "a list as metadata": "[]",
    "a number of 5,000 digits": '{"format_version": 1' + "0" * 5000 + "}",
    "a deep nest": "[" * 200_000,
}


@pytest.mark.parametrize("text", FOUND_METADATA.values(), ids=FOUND_METADATA.keys())
def test_found_metadata_that_crashed(tmp_path, text):
    (tmp_path / "x.safetensors").write_bytes(save({"x": torch.zeros(1)}, {KEY: text, "safecfg_shard": text}))
    for read in (load_hgr, read_shard):
        with pytest.raises(HGRError):
            read(tmp_path / "x.safetensors")
