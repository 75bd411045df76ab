"""`SafeCFG Protect`: made once, found again, checked by the model, loaded fast, and left alone when cancelled."""

import time

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from safecfg import hgr_models
from safecfg.hgr_models import pairs as pp
from safecfg.hgr_models.calibration import needed
from safecfg.hgr_models.encoders import EncoderPrint
from safecfg.nodes.demo_world.demo_model import demo_clip
from safecfg.nodes.host import encoder_print
from safecfg.nodes.host.hooks import KEY
from safecfg.nodes.protect import library
from safecfg.nodes.training import session
from safecfg.nodes.training.progress import Progress

from protecting import files, protect_demo, protect_folders, protected  # noqa: F401 (fixtures)
from text_encoders import small_clip


def test_the_first_use_makes_it_and_the_next_finds_it(demo, folders, monkeypatch):
    model, clip = demo
    first = protected(model, clip)
    (name,) = files(folders)
    info = hgr_models.load_hgr(folders / "hgr" / name).info
    card = (folders / "hgr" / name).with_suffix(".md").read_text(encoding="utf-8")
    assert "| settings networks | prompts |" in card and "every model that reads the text encoder" in card
    assert name.startswith("encoder-l-") and info.of_prompts and len(info.categories) == 7 and not info.base
    assert info.training["steps"] == {"prompts": 3} and info.training["calibration"]["clean_prompts"] >= 2
    assert "safecfg" in str(first.additional_models) and not model.additional_models
    assert not list((folders / "output" / "safecfg" / "recordings").glob("*/*"))  # gigabytes for real encoders
    monkeypatch.setattr(library, "make", lambda *_: pytest.fail("made again"))
    assert protected(model, clip).additional_models  # another execution
    monkeypatch.setattr(encoder_print, "_known", type(encoder_print._known)())
    assert protected(model, demo_clip()).additional_models  # another checkpoint with this encoder


def test_cancelled_it_leaves_no_file_and_goes_on(demo, folders, monkeypatch):
    model, clip = demo
    update, steps = Progress.update, []

    def cancel(self, part, share, message):
        update(self, part, share, message)
        if part == "prompts" and share > 0.5:
            raise mm.InterruptProcessingException

    monkeypatch.setattr(Progress, "update", cancel)
    with pytest.raises(mm.InterruptProcessingException):
        protected(model, clip)
    assert files(folders) == []
    monkeypatch.setattr(Progress, "update", update)
    run = session.TextTraining.train_step
    monkeypatch.setattr(session.TextTraining, "train_step", lambda self, rows: steps.append(self.step) or run(self, rows))
    protected(model, clip)
    assert steps == [2] and len(files(folders)) == 1


def test_cancelled_in_its_check_it_is_checked_next_time(demo, folders, monkeypatch):
    """What nobody has checked is not kept: a weak one would get no concept rows."""
    with monkeypatch.context() as patch:
        patch.setattr(library, "check", lambda *_: (_ for _ in ()).throw(mm.InterruptProcessingException()))
        with pytest.raises(mm.InterruptProcessingException):
            protected(*demo)
    assert files(folders) == []
    monkeypatch.setattr(session.TextTraining, "train_step", lambda *_: pytest.fail("learnt again"))
    protected(*demo)
    (name,) = files(folders)
    assert "forward_check" in hgr_models.load_hgr(folders / "hgr" / name).info.training


def test_another_models_clip_is_said_before_minutes_are_spent(demo, folders):
    with pytest.raises(hgr_models.HGRError, match="cannot read this CLIP's prompts, whose tokens are 32 wide"):
        protected(demo[0], small_clip("SD1.5"))
    assert not list((folders / "output").rglob("*.safetensors")) and files(folders) == []


def test_a_gpu_encodes_all_built_in_prompts_and_a_cpu_enough_to_calibrate(demo, monkeypatch):
    few, many = library.built_in_prompts(), library.built_in_prompts(fast=True)
    assert many == pp.default_prompts(library.SEED) and len(few.held_out_clean) > library.HELD_OUT * library.CLEAN
    assert needed(0.01) <= library.CALIBRATION  # the rate that it is calibrated to
    monkeypatch.setattr(library, "encoder_of", lambda _: EncoderPrint(("l",), 1, 0, 0, (1.0,)))
    asked = []
    monkeypatch.setattr(library, "built_in_prompts", lambda fast: asked.append(fast) or 1 / 0)
    for kind in ("cpu", "cuda"):
        clip = demo[1].clone()
        clip.patcher.load_device = torch.device(kind)
        with pytest.raises(ZeroDivisionError):
            library.make(clip, lambda _: None)
    assert asked == [False, True]


def test_what_ships_for_a_model_is_taken(demo, folders, monkeypatch):
    shipped = str(library.hgr_models.__path__[0]) + "/weights"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "hgr", ([str(folders / "hgr"), shipped], {".safetensors"}))
    found = library.find(demo[1], demo[0])
    assert found.path.endswith("demo.safetensors") and found.networks == ("condition", "guidance")


def test_strength_0_is_the_model_alone_and_categories_are_checked(demo, folders):
    model, clip = demo
    assert not protected(model, clip, strength=0.0).additional_models
    with pytest.raises(hgr_models.HGRError, match="sexual"):
        protected(model, clip, categories="cats = off")


def test_the_model_checks_a_new_hgr_and_a_weak_one_is_backed_by_concepts(demo, folders, caplog):
    """Three steps teach nothing: the file says how far the model's answer stayed, and flagged runs get the concept's row as well."""
    protected_model = protected(*demo)
    (name,) = files(folders)
    info = hgr_models.load_hgr(folders / "hgr" / name).info
    assert info.training["forward_check"] > 0.5 and info.weak
    settings = protected_model.get_attachment(KEY)
    assert [concept is not None for concept in settings.concepts] == [bool(info.concept_prompts.get(c)) for c in info.categories]
    assert any(concept is not None for concept in settings.concepts) and "concept row" in caplog.text
    again = protected(demo[0], demo[1], categories="sexual = off").get_attachment(KEY)
    assert again.concepts[info.categories.index("sexual")] is None


def test_a_model_that_cannot_be_checked_keeps_its_hgr(demo, folders, monkeypatch, caplog):
    tried = []

    def fail(model, clip, network, prompts, runs, *_):
        tried.append(runs.batch)
        raise RuntimeError("this model takes no batches")

    monkeypatch.setattr(library.forward_check, "error_ratio", fail)
    settings = protected(*demo).get_attachment(KEY)
    (name,) = files(folders)
    assert tried == [1] and "takes no batches" in caplog.text
    assert "forward_check" not in hgr_models.load_hgr(folders / "hgr" / name).info.training and settings.concepts == ()


def test_a_model_that_draws_nan_is_refused_before_anything_is_learnt(demo, folders, monkeypatch):
    model, clip = demo
    broken = model.clone()
    broken.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"]) + float("nan")
    )
    monkeypatch.setattr(library.Session, "prepare", lambda *_: pytest.fail("minutes are spent"))
    with pytest.raises(hgr_models.HGRError, match="finite numbers from the MODEL"):
        protected(broken, clip)
    assert not files(folders)


def test_an_hgr_with_which_a_model_draws_nan_is_not_kept(demo, folders, monkeypatch):
    def fail(*_):
        raise library.forward_check.NotFiniteError("not a number")

    monkeypatch.setattr(library.forward_check, "error_ratio", fail)
    with pytest.raises(hgr_models.HGRError, match="not a number"):
        protected(*demo)
    assert not files(folders)


def test_the_time_that_is_said_includes_the_models_check(demo, folders, caplog):
    caplog.set_level("INFO")
    model = demo[0].clone()

    def slowly(apply, given):
        time.sleep(0.1)
        return apply(given["input"], given["timestep"], **given["c"])

    model.set_model_unet_function_wrapper(slowly)
    protected(model, demo[1])
    (said,) = (record.getMessage() for record in caplog.records if "takes about" in record.getMessage())
    assert "asking the model" in said
