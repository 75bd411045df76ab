"""`SafeCFG Load HGR` and the checkpoints it accepts."""

import json
import os
from pathlib import Path

import comfy.ops
import folder_paths
import pytest
from safecfg import hgr_models
from safecfg.hgr_models import HGRError
from safecfg.nodes import loader
from safecfg.nodes.loader import LoadHGR, load_hgr_model

from fakes import make_hgr


@pytest.fixture
def folder():
    """This host's models/hgr, empty."""
    path = Path(folder_paths.models_dir) / "hgr"
    path.mkdir(parents=True, exist_ok=True)
    yield path
    for file in path.iterdir():
        file.unlink()


def save(path, **options):
    hgr_models.save_hgr(path, make_hgr(**options).patcher.model)
    return path


def test_the_folder_is_registered_and_lists_safetensors_only(folder):
    loader.register_folder()
    save(folder / "mine.safetensors")
    (folder / "pickle.pt").write_bytes(b"")
    names = LoadHGR.define_schema().inputs[0].options
    assert "mine.safetensors" in names and "pickle.pt" not in names
    paths, extensions = folder_paths.folder_names_and_paths["hgr"]
    assert paths[0] == str(folder) and str(loader.SHIPPED) in paths and extensions == {".safetensors"}


def test_the_same_bytes_share_their_weights(folder, tmp_path):
    first = LoadHGR.execute(save(folder / "mine.safetensors").name).result[0]
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((folder / "mine.safetensors").read_bytes())
    assert load_hgr_model(str(copy)) is first
    assert first.info.categories == ("red", "blue") and first.hash == hgr_models.file_hash(copy)
    other = load_hgr_model(str(save(tmp_path / "other.safetensors", condition=0.5)))
    assert other is not first and other.patcher is not first.patcher


def test_weights_belong_to_core(folder):
    patcher = LoadHGR.execute(save(folder / "mine.safetensors").name).result[0].patcher
    layers = [m for m in patcher.model.modules() if hasattr(m, "comfy_cast_weights")]
    assert layers and all(isinstance(m, comfy.ops.CastWeightBiasOp) and m.comfy_cast_weights for m in layers)
    factory, arguments = patcher.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert again.model is not patcher.model and again.model.info == patcher.model.info


def test_a_changed_file_is_loaded_again(folder):
    name = save(folder / "mine.safetensors").name
    before = LoadHGR.fingerprint_inputs(name)
    assert LoadHGR.fingerprint_inputs(name) == before
    save(folder / name, condition=0.5)
    os.utime(folder / name, ns=(1, 1))
    assert LoadHGR.fingerprint_inputs(name) != before


@pytest.mark.parametrize("damage", ["truncated", "not safetensors", "no metadata", "other version"])
def test_damaged_files_are_named(folder, damage):
    path = save(folder / "broken.safetensors")
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "not safetensors":
        path.write_bytes(b"not a model at all")
    else:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        if damage == "no metadata":
            del header["__metadata__"]
        else:
            about = json.loads(header["__metadata__"]["safecfg_hgr"])
            header["__metadata__"]["safecfg_hgr"] = json.dumps({**about, "format_version": 99})
        new = json.dumps(header).encode()
        path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])
    with pytest.raises(HGRError, match="broken.safetensors"):
        LoadHGR.execute("broken.safetensors")


def test_a_missing_file_is_named(folder):
    save(folder / "mine.safetensors")
    assert LoadHGR.validate_inputs("mine.safetensors") is True and LoadHGR.validate_inputs(None) is True
    assert "mine.safetensors" in LoadHGR.validate_inputs("gone.safetensors")
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        LoadHGR.execute("gone.safetensors")
