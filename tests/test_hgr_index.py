"""The index of known HGRs: what it holds, which entry fits, and one error for everything that can be wrong with it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import info, small_hgr
from hgr_models import HGRError, file_hash, save_hgr
from hgr_models.architectures import ARCHITECTURES
from hgr_models.encoders import EncoderPrint
from hgr_models.hgr_index import KnownHGR, entry_of, fitting, main, read_index, with_entry, write_index

ROOT = Path(__file__).parents[1]
ENCODER = EncoderPrint(("l",), 16, 0, 0, (1.0, -2.0, 3.0))
KNOWN = KnownHGR(
    "a.safetensors", "0" * 64, "https://example.org/a", ("SDXL",), ("base",), ENCODER, ("drugs",), ("condition",), "mit"
)


@pytest.fixture
def hgr_file(tmp_path):
    path, hgr = tmp_path / "mine.safetensors", small_hgr()
    hgr.calibrate(info(architecture="SD1.5", base="abc", encoder=ENCODER.as_dict()))
    save_hgr(path, hgr)
    return path


def test_a_round_trip(tmp_path):
    path = tmp_path / "index.json"
    assert read_index(path) == []
    plain = KnownHGR("b.safetensors", "1" * 64)
    write_index(path, [KNOWN, plain])
    assert read_index(path) == [KNOWN, plain]
    assert with_entry([KNOWN, plain], replace(KNOWN, url="")) == [plain, replace(KNOWN, url="")]


def test_the_command_adds_an_entry_once(hgr_file, capsys):
    for url in ("https://example.org/1", "https://example.org/2"):
        main([str(hgr_file), "--url", url, "--for", "SDXL", "--for", "SD1.5", "--licence", "apache-2.0"])
    (entry,) = read_index(hgr_file.with_name("index.json"))
    assert entry == entry_of(hgr_file, "https://example.org/2", ("SDXL",), "apache-2.0")
    assert entry.architectures == ("SD1.5", "SDXL") and entry.bases == ("abc",) and entry.sha256 == file_hash(hgr_file)
    assert "https://example.org/2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: Expected http"):
        main([str(hgr_file), "--url", "ftp://example.org"])
    with pytest.raises(SystemExit, match="error: There is no HGR file"):
        main(["nowhere.safetensors"])


@pytest.mark.parametrize(
    "name, message",
    [("sdxl", "but got 'sdxl'. Did you mean 'SDXL'?"), ("flux1", "Did you mean 'Flux.1'?"), ("", "but got ''. There are: ")],
)
def test_an_architecture_that_nobody_asks_for_is_refused(hgr_file, name, message):
    with pytest.raises(SystemExit) as error:
        main([str(hgr_file), "--for", "SDXL", "--for", name])
    assert message in str(error.value) and all(known in str(error.value) for known in ("SD1.5", "SDXL", "Wan 2.1 / 2.2 14B"))
    assert not hgr_file.with_name("index.json").exists()


def test_the_architectures_are_those_of_the_docs():
    rows = (ROOT / "docs/MODELS.md").read_text(encoding="utf-8").splitlines()
    first = {row.split("|")[1].strip() for row in rows if row.startswith("| ")} - {"model"}
    assert set(ARCHITECTURES) == first


def test_which_entry_fits():
    far, other = replace(ENCODER, sketch=(-1.0, 2.0, 5.0)), EncoderPrint(("t5xxl",), 16, 0, 0, (1.0, -2.0, 3.0))
    named, of_base = replace(KNOWN, file="named.safetensors", bases=()), replace(KNOWN, file="base.safetensors", architectures=())
    entries = [named, of_base, replace(KNOWN, file="flux.safetensors", architectures=("Flux.1",), bases=(), encoder=None)]
    files = lambda **wanted: [entry.file for entry in fitting(entries, **wanted)]  # noqa: E731
    assert files(architecture="SDXL") == ["named.safetensors"]
    assert files(architecture="SDXL", base="base") == ["base.safetensors", "named.safetensors"]
    assert files(architecture="SDXL", encoder=ENCODER) == ["named.safetensors", "base.safetensors"]
    assert files(architecture="SDXL", base="base", encoder=far) == files(architecture="SDXL", encoder=other) == []
    assert files() == files(architecture="", base="") == []
    assert files(architecture="Flux.1", encoder=far) == ["flux.safetensors"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"file": "../a.safetensors"}, "plain name"),
        ({"file": "a.ckpt"}, "plain name"),
        ({"file": None}, "plain name"),
        ({"sha256": "0" * 63}, "64 hexadecimal"),
        ({"sha256": 10**400}, "64 hexadecimal"),
        ({"url": "javascript:alert(1)"}, "http"),
        ({"url": "https://a b"}, "http"),
        ({"url": "https://" + "a" * 1000}, "http"),
        ({"architectures": "SDXL"}, "architectures"),
        ({"categories": [["a"]]}, "categories"),
        ({"bases": ["a\nb"]}, "bases"),
        ({"licence": 3}, "licence"),
        ({"encoder": {"parts": ["l"]}}, "encoder"),
        ({"encoder": {**ENCODER.as_dict(), "sketch": [1e999]}}, "encoder"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, changed, message):
    path = tmp_path / "index.json"
    good = KNOWN.as_dict()
    path.write_text(json.dumps({"safecfg_index": 1, "hgrs": [good, {**good, **changed}]}), encoding="utf-8")
    with pytest.raises(HGRError, match=message) as error:
        read_index(path)
    assert "entry 2 of" in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b"\xff\xfe", b"[" * 10**5, b'{"safecfg_index": 2, "hgrs": []}', b'{"safecfg_index": 1, "hgrs": {}}',
        b'{"safecfg_index": 1, "hgrs": [3]}',
    ],
)  # fmt: skip
def test_another_file_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "index.json"
    path.write_bytes(content)
    with pytest.raises(HGRError, match="index.json"):
        read_index(path)


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "index.json"
    with open(path, "wb") as file:
        file.truncate(2**33)
    with pytest.raises(HGRError, match="larger"):
        read_index(path)


def test_unknown_keys_are_ignored(tmp_path):
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"safecfg_index": 1, "more": 1, "hgrs": [{**KNOWN.as_dict(), "stars": 5}]}), encoding="utf-8")
    assert read_index(path) == [KNOWN]
