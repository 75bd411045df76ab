"""`SafeCFG Load HGR` and the checkpoints it accepts."""

import copy
import json
import os
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import folder_paths
import pytest
import torch
from safecfg import hgr_models
from safecfg.hgr_models import HGRError
from safecfg.nodes import loader
from safecfg.nodes.enforcement.enforced_model import enforced
from safecfg.nodes.host.hooks import KEY
from safecfg.nodes.loader import LoadHGR, load_hgr_model, load_patcher
from safecfg.nodes.redirect.apply import Apply
from safecfg.nodes.redirect.combine_hgr import CombineHGR

from fakes import apply_hgr, make_hgr


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


def test_layers_without_weights_until_they_are_loaded(folder):
    """Newer hosts make such layers on Windows."""
    path = save(folder / "mine.safetensors")
    usual = hgr_models.load_hgr(path, ops=comfy.ops.manual_cast).state_dict()
    made = []

    class Late(comfy.ops.manual_cast.Linear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append((self.weight, self.bias))
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict, prefix, *args):
            for name in ("weight", "bias"):
                setattr(self, name, torch.nn.Parameter(state_dict[prefix + name], requires_grad=False))

    ops = type("Ops", (comfy.ops.manual_cast,), {"Linear": Late})
    late = hgr_models.load_hgr(path, ops=ops).state_dict()
    assert made and late.keys() == usual.keys() and all(torch.equal(late[key], usual[key]) for key in usual)


def test_the_host_s_own_layers_on_windows(folder, monkeypatch):
    if not hasattr(comfy.ops.disable_weight_init, "_lazy_load_from_state_dict"):
        pytest.skip("this host's layers always have weights")
    monkeypatch.setattr(comfy.model_management, "WINDOWS", True)
    monkeypatch.setattr("comfy.memory_management.aimdo_enabled", True)
    path = save(folder / "mine.safetensors")
    loaded = hgr_models.load_hgr(path, ops=comfy.ops.manual_cast).state_dict()
    monkeypatch.undo()
    usual = hgr_models.load_hgr(path, ops=comfy.ops.manual_cast).state_dict()
    assert loaded.keys() == usual.keys() and all(torch.equal(loaded[key], usual[key]) for key in usual)


def test_a_model_on_another_device_gets_the_hgr_there(folder, tiny_model):
    hgr = load_hgr_model(str(save(folder / "mine.safetensors")))
    here, there = hgr.patcher.load_device, torch.device("cpu", 0)
    assert here != there and hgr.on(here) is hgr
    copy = hgr.on(there)
    assert copy.patcher.load_device == there and copy.patcher.model is not hgr.patcher.model
    assert hgr.on(there) is copy and (copy.path, copy.hash, copy.info) == (hgr.path, hgr.hash, hgr.info)
    model = tiny_model.clone()
    model.load_device = there
    for safe in (apply_hgr(model, hgr), enforced(model, [hgr])):
        (patcher,) = safe.get_additional_models_with_key(KEY)
        assert patcher is copy.patcher
    (patcher,) = apply_hgr(tiny_model, hgr).get_additional_models_with_key(KEY)
    assert patcher is hgr.patcher


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


def test_never_of_dynamic_vram(folder, monkeypatch):
    """Its layers would bring their weights with every call."""
    path = save(folder / "mine.safetensors")
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", None, raising=False)
    patcher = load_patcher(str(path))
    assert type(patcher) is comfy.model_patcher.ModelPatcher


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
    with pytest.raises(HGRError, match="gone.safetensors"):
        LoadHGR.execute("gone.safetensors")


def test_without_an_hgr_the_node_that_uses_it_says_what_to_do(tiny_model):
    """Load HGR opens in every template without an error."""
    assert LoadHGR.validate_inputs(loader.NONE_YET) is True
    assert LoadHGR.fingerprint_inputs(loader.NONE_YET) == loader.NONE_YET
    (hgr,) = LoadHGR.execute(loader.NONE_YET).result
    with pytest.raises(HGRError, match="no HGR for this model yet.*03 Make an HGR for your checkpoint.*Concept Guidance"):
        Apply.execute(tiny_model, hgr)
    with pytest.raises(HGRError, match="no HGR for this model yet"):
        CombineHGR.execute(hgr, hgr)
    assert not hasattr(hgr, "get_ram_usage")  # core asks
    copy.deepcopy(hgr)
