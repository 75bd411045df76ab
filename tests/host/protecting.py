"""What the tests of `SafeCFG Protect` share: the demo model, clean folders, a training of seconds."""

import folder_paths
import pytest
import torch
from safecfg.nodes.demo_world.demo_model import DemoModel
from safecfg.nodes.protect import library
from safecfg.nodes.protect.protect import Protect
from safecfg.nodes.training import plan


@pytest.fixture(scope="module", name="demo")
def protect_demo():
    with torch.inference_mode():
        return DemoModel.execute().result[:2]


@pytest.fixture(autouse=True, name="folders")
def protect_folders(tmp_path, monkeypatch):
    """A clean output folder and models/hgr without what ships, and a training of a few steps and prompts."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(library, "register_folder", lambda: None)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "hgr", ([str(tmp_path / "hgr")], {".safetensors"}))
    folder_paths.filename_list_cache.pop("hgr", None)
    monkeypatch.setattr(library, "PAIRS", 4)
    monkeypatch.setattr(library, "CLEAN", 30)
    monkeypatch.setitem(plan.PRESETS, library.PRESET, plan.Preset(3, 1, 1, 1))
    return tmp_path


def protected(model, clip, **widgets):
    with torch.inference_mode():
        return Protect.execute(model, clip, **widgets).result[0]


def files(folder):
    """What lies in models/hgr, but for the model cards."""
    return sorted(path.name for path in (folder / "hgr").glob("*") if path.suffix != ".md")
