"""The HGRs that ship with the pack keep their names; a text for the front end is only a text."""

import logging
import shutil
import types

import folder_paths
import pytest
from safecfg.hgr_models import HGRError, save_hgr
from safecfg.nodes import loader
from safecfg.nodes.host import server
from safecfg.nodes.training.check_hgr import save_path
from safecfg.nodes.training.train_hgr import check_output, output_path

from fakes import make_hgr


@pytest.fixture
def models(tmp_path, monkeypatch):
    """`models/hgr` in a folder of its own, before the pack's."""
    loader.register_folder()
    paths, extensions = folder_paths.folder_names_and_paths[loader.FOLDER]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, loader.FOLDER, ([str(tmp_path), *paths], extensions))
    folder_paths.filename_list_cache.pop(loader.FOLDER, None)
    return tmp_path


def test_a_shipped_hgr_cannot_be_shadowed(models, caplog):
    save_hgr(models / "demo.safetensors", make_hgr().patcher.model)
    with caplog.at_level(logging.WARNING):
        assert loader.hgr_file("demo.safetensors") == str(loader.SHIPPED / "demo.safetensors")
    assert str(models / "demo.safetensors") in caplog.text and "another name" in caplog.text
    (hgr,) = loader.LoadHGR.execute("demo.safetensors").result
    assert hgr.info.categories == ("weapons", "drugs", "death")


def test_names_of_ones_own_are_found(models):
    save_hgr(models / "mine.safetensors", make_hgr().patcher.model)
    (models / "sub").mkdir()
    shutil.copy(models / "mine.safetensors", models / "sub" / "demo.safetensors")
    assert loader.hgr_file("mine.safetensors") == str(models / "mine.safetensors")
    assert loader.hgr_file("sub/demo.safetensors") == str(models / "sub" / "demo.safetensors")
    with pytest.raises(HGRError, match="no HGR 'gone.safetensors'"):
        loader.hgr_file("gone.safetensors")


def test_nothing_is_saved_under_a_shipped_name(models):
    for check in (lambda: check_output(output_path("demo"), "x"), lambda: save_path("demo")):
        with pytest.raises(HGRError, match="ships with SafeCFG"):
            check()
    check_output(output_path("mine"), "x")
    assert save_path("mine") == models / "mine.safetensors"


def test_texts_for_the_front_end_hold_no_tags(monkeypatch):
    sent = []
    fake = types.SimpleNamespace(send_progress_text=lambda *arguments: sent.append(arguments))
    monkeypatch.setattr(server, "current_server", lambda: fake)
    server.show_text('column <img src="x" onerror=`a`> & 3 > 2', "7")
    server.show_text("plain", "7", "client")
    assert sent == [("column ‹img src=″x″ onerror=’a’› & 3 › 2", "7"), ("plain", "7", "client")]
    server.show_text("nowhere", None)
    assert len(sent) == 2
