"""`SafeCFG Protect` and its folders: full, not writable, vanished, damaged, left by a killed server or an older version."""

import os
import shutil
from pathlib import Path

import comfy.model_management as mm
import folder_paths
import pytest
from safecfg import hgr_models
from safecfg.nodes.protect import library
from safecfg.nodes.training import plan
from safecfg.nodes.training.progress import Progress

from protecting import files, protect_demo, protect_folders, protected  # noqa: F401 (fixtures)


def test_what_an_older_version_began_is_not_in_the_way(demo, folders, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hgr_models, "save_hgr", lambda *_: (_ for _ in ()).throw(mm.InterruptProcessingException()))
        with pytest.raises(mm.InterruptProcessingException):
            protected(*demo)
    monkeypatch.setattr(library, "CLEAN", 25)  # the update's prompts are others
    protected(*demo)
    assert len(files(folders)) == 1


def test_a_folder_that_cannot_be_made_is_said_before_minutes_are_spent(demo, folders):
    (folders / "hgr").write_bytes(b"")
    with pytest.raises(hgr_models.HGRError, match="hgr cannot be made"):
        protected(*demo)
    assert not (folders / "output").exists()


def test_a_shared_folder_that_cannot_be_written_is_not_in_the_way(demo, folders, monkeypatch):
    """models/hgr of the machine; users write into the next folder of extra_model_paths.yaml."""
    (folders / "hgr").write_bytes(b"")
    monkeypatch.setattr(library, "SHIPPED", folders / "shipped")
    paths = ([str(folders / name) for name in ("hgr", "shipped", "mine")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "hgr", paths)
    protected(*demo)
    assert len(list((folders / "mine").glob("*.safetensors"))) == 1 and not (folders / "shipped").exists()


def test_a_damaged_file_is_left_out(demo, folders, caplog):
    (folders / "hgr").mkdir()
    (folders / "hgr" / "broken.safetensors").write_bytes(b"no model")
    assert library.find(demo[1], demo[0]) is None and "broken" in caplog.text


def test_a_file_that_is_gone_since_it_was_listed_is_left_out(folders, monkeypatch):
    monkeypatch.setattr(library.known_hgrs, "names", lambda: ["gone.safetensors"])
    assert library.candidates() == []


def test_a_full_disk_is_said_before_minutes_are_spent_and_another_folder_is_taken(demo, folders, monkeypatch):
    usage = plan.shutil.disk_usage
    full = lambda path: usage(path)._replace(free=2**20) if Path(path).name == "hgr" else usage(path)  # noqa: E731
    monkeypatch.setattr(plan.shutil, "disk_usage", full)
    with pytest.raises(hgr_models.HGRError, match="16 MB of room for an HGR in .*, but the disk has 1 MB free"):
        protected(*demo)
    assert not (folders / "output").exists()
    both = [str(folders / "hgr"), str(folders / "shared")]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "hgr", (both, {".safetensors"}))
    protected(*demo)
    assert files(folders) == [] and list((folders / "shared").glob("encoder-l-*.safetensors"))
    monkeypatch.setattr(library, "make", lambda *_: pytest.fail("made again"))
    protected(*demo)


def test_a_folder_that_vanishes_is_made_again(demo, folders):
    protected(*demo)
    (name,) = files(folders)
    shutil.rmtree(folders / "hgr")  # core remembers when it listed it
    protected(*demo)
    assert files(folders) == [name]


def test_prompts_that_vanish_while_others_are_encoded_are_encoded_again(demo, folders, monkeypatch):
    """Or an HGR would learn from the rest alone."""
    update = Progress.update

    def lose(self, part, share, message):
        update(self, part, share, message)
        if part == "encoding" and share > 0.5:
            monkeypatch.setattr(Progress, "update", update)
            (folder,) = (folders / "output" / "safecfg" / "recordings").glob("*")
            shutil.rmtree(folder)

    monkeypatch.setattr(Progress, "update", lose)
    with pytest.raises(hgr_models.HGRError, match=r"files with encoded prompts were removed from .* Start again"):
        protected(*demo)
    assert files(folders) == []
    protected(*demo)
    assert len(files(folders)) == 1


def test_what_a_killed_server_left_is_removed_when_nobody_writes_it(demo, folders):
    """Killed while it wrote the file, or between that and tidying up."""
    protected(*demo)
    (name,) = files(folders)
    begun = folders / "output" / "safecfg" / "recordings" / f"{name.removesuffix('.safetensors')}-{library.PRESET}"
    begun.mkdir()
    (begun / "texts-pairs-00000.safetensors").write_bytes(b"gigabytes")
    left, young = (folders / "hgr" / f".{name}.{pid}-0123456789ab.part" for pid in ("1f", "2f"))
    for part in (left, young):
        part.write_bytes(b"half")
    os.utime(left, (0, 0))
    protected(*demo)
    assert not left.exists() and young.exists() and not begun.exists()
