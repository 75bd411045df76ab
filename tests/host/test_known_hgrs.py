"""What the loader shows of an HGR, and which known HGR messages name for a model without one, or with another family's."""

import dataclasses
import json
from types import SimpleNamespace

import folder_paths
import pytest
from safecfg import hgr_models
from safecfg.hgr_models.hgr_index import KnownHGR, write_index
from safecfg.hgr_models.model_card import card_path, write_card
from safecfg.nodes import loader
from safecfg.nodes.demo_world.demo_model import DemoModel, demo_clip
from safecfg.nodes.host.architecture import architecture_of
from safecfg.nodes.host.encoder_print import encoder_of
from safecfg.nodes.host.families import base_of_model
from safecfg.nodes.protect import library
from safecfg.nodes.redirect.apply import Apply
from safecfg.nodes.training import cards

from fakes import INFO, apply_hgr, make_hgr


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/hgr."""
    path = tmp_path / "hgr"
    path.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "hgr", ([str(path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("hgr", None)
    return path


@pytest.fixture
def shown(monkeypatch):
    """What nodes show: (text, node)."""
    found = []
    monkeypatch.setattr(loader, "show_text", lambda text, node: found.append((text, node)))
    monkeypatch.setattr(loader, "get_executing_context", lambda: SimpleNamespace(node_id="7"))
    return found


def save(folder, name="mine.safetensors", **facts):
    info = dataclasses.replace(INFO, **facts)
    hgr_models.save_hgr(folder / name, make_hgr(info=info).patcher.model)
    return folder / name


def known(model, **facts) -> KnownHGR:
    values = {"file": "theirs.safetensors", "sha256": "ab" * 32, "url": "https://example.org/theirs", "categories": ("drugs",)}
    return KnownHGR(**{**values, "architectures": (architecture_of(model),), **facts})


def test_the_loader_shows_the_card(folder, shown, caplog):
    path = save(folder)
    write_card(path, evaluation={"rows": [{"list": "own", "category": "all", "arm": "protect", "n": 50, "share": 0.02}]})
    loader.LoadHGR.execute("mine.safetensors")
    (text, node), *_ = shown
    assert node == "7" and "red, blue" in text and "protect 2.0 % of 50" in text and not caplog.records
    card_path(path).write_text("<!-- safecfg {broken} -->\n", encoding="utf-8")
    loader.LoadHGR.execute("mine.safetensors")
    assert "not evaluated yet" in shown[1][0] and "mine.md" in caplog.text


def test_a_card_is_in_nobody_s_way(folder, caplog):
    path = save(folder)
    cards.refresh(path, check={"harmful_runs": 3})
    assert "| harmful runs | 3 |" in card_path(path).read_text(encoding="utf-8")
    cards.refresh(path, "another digest", check={"harmful_runs": 4})  # the file was replaced since it was loaded
    assert "| harmful runs | 3 |" in card_path(path).read_text(encoding="utf-8")
    cards.refresh(folder / "gone.safetensors")
    cards.refresh(loader.SHIPPED / "demo.safetensors")
    assert not card_path(loader.SHIPPED / "demo.safetensors").exists() and not caplog.records
    card_path(path).write_text("mine", encoding="utf-8")
    cards.refresh(path)
    assert "no model card was written" in caplog.text and card_path(path).read_text(encoding="utf-8") == "mine"


def test_without_an_hgr_apply_names_what_fits(folder, tiny_model):
    write_index(folder / "index.json", [known(tiny_model), known(tiny_model, file="flux.safetensors", architectures=("Flux.1",))])
    name = f"{architecture_of(tiny_model)}"
    save(folder, architecture=name)
    save(folder, "other.safetensors", architecture="Chroma")
    with pytest.raises(hgr_models.HGRError) as error:
        Apply.execute(tiny_model, loader.NoHGR())
    said = str(error.value)
    assert "There is no HGR for this model yet. In models/hgr there is for it: mine.safetensors." in said
    assert "theirs.safetensors from https://example.org/theirs (SHA-256 abababababab..., drugs)" in said and "flux" not in said
    assert "SafeCFG Protect makes one" in said


def test_another_family_s_hgr_names_what_fits(folder, tiny_model):
    write_index(folder / "index.json", [known(tiny_model, architectures=(), bases=(base_of_model(tiny_model),))])
    hgr = make_hgr(info=dataclasses.replace(INFO, prediction="FLOW"))
    with pytest.raises(hgr_models.HGRError, match="but this model is .* theirs.safetensors from https://example.org/theirs"):
        apply_hgr(tiny_model, hgr)
    (folder / "index.json").unlink()
    with pytest.raises(hgr_models.HGRError, match="SafeCFG Protect, which makes one.$"):
        apply_hgr(tiny_model, hgr)


def test_a_damaged_index_hides_no_message(folder, tiny_model, caplog):
    (folder / "index.json").write_text(json.dumps({"safecfg_index": 1, "hgrs": [{}]}), encoding="utf-8")
    with pytest.raises(hgr_models.HGRError, match="There is no HGR for this model yet. SafeCFG Protect"):
        Apply.execute(tiny_model, loader.NoHGR())
    assert "entry 1 of" in caplog.text


def test_an_encoder_s_hgr_is_known_by_its_encoder(folder, monkeypatch, caplog):
    model, clip = DemoModel.execute().result[0], demo_clip()
    entry = known(model, architectures=(), encoder=encoder_of(clip))
    write_index(folder / "index.json", [entry])
    with pytest.raises(hgr_models.HGRError, match="theirs.safetensors"):
        Apply.execute(model, loader.NoHGR(), clip=clip)
    monkeypatch.setattr(library, "register_folder", lambda: None)
    monkeypatch.setattr(library, "make", lambda *_: save(folder))
    library.find_or_make(clip, model, lambda text: None)
    assert "theirs.safetensors from https://example.org/theirs" in caplog.text
    far = dataclasses.replace(encoder_of(clip), sketch=tuple(-v for v in encoder_of(clip).sketch))
    write_index(folder / "index.json", [dataclasses.replace(entry, encoder=far)])
    with pytest.raises(hgr_models.HGRError) as error:
        Apply.execute(model, loader.NoHGR(), clip=clip)
    assert "theirs" not in str(error.value)
