"""`SafeCFG Protect`: made once, found again by the encoder, refused by another, loaded fast, and left alone when cancelled."""

import os
import shutil
import time
from pathlib import Path

import comfy.hooks
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import folder_paths
import pytest
import torch
from safecfg import hgr_models
from safecfg.hgr_models import pairs as pp
from safecfg.hgr_models.calibration import needed
from safecfg.hgr_models.encoders import RELATED, SAME, EncoderPrint, distance_between
from safecfg.nodes.demo_world.demo_model import DemoModel, demo_clip
from safecfg.nodes.host import encoder_print
from safecfg.nodes.host.encoder_print import encoder_of, is_patched, is_quantised, unpatched
from safecfg.nodes.host.hooks import KEY
from safecfg.nodes.protect import library
from safecfg.nodes.protect.protect import Protect
from safecfg.nodes.training import plan, session
from safecfg.nodes.training.progress import Progress

from text_encoders import small_clip


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return DemoModel.execute().result[:2]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
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


def test_another_encoder_gets_its_own(demo, folders):
    model, clip = demo
    protected(model, clip)
    other = demo_clip()
    other.cond_stage_model.transformer.proj.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    assert library.find(other, model) is None
    protected(model, other)
    assert len(files(folders)) == 2


def test_a_fine_tuned_encoder_is_told_apart_and_rounding_is_not(demo, folders, caplog):
    model, clip = demo
    protected(model, clip)
    rounded, tuned = demo_clip(), demo_clip()
    for tensor in rounded.cond_stage_model.transformer.parameters():
        tensor.data = tensor.data.to(torch.float8_e4m3fn).float()
    for tensor in tuned.cond_stage_model.transformer.parameters():
        tensor.data += 0.25 * tensor.std() * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    assert library.find(rounded, model).in_words() == ""
    found = library.find(tuned, model, library.RELATED)
    assert library.find(tuned, model) is None and "% differently" in found.in_words()


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


def test_a_damaged_file_is_left_out(demo, folders, caplog):
    (folders / "hgr").mkdir()
    (folders / "hgr" / "broken.safetensors").write_bytes(b"no model")
    assert library.find(demo[1], demo[0]) is None and "broken" in caplog.text


def test_the_print_of_a_clip_is_made_once_and_ignores_the_layer(demo, monkeypatch):
    clip = demo[1]
    first = encoder_of(clip)
    assert isinstance(first, EncoderPrint) and first.parts == ("l",) and first.token_width == 128
    monkeypatch.setattr(encoder_print, "print_of", lambda *_: pytest.fail("made again"))
    assert encoder_of(clip.clone()) is first


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


def with_lora(clip, size, strength=1.0):
    """A clone of a CLIP whose weights a patch changes by `size` of their spread, as Load LoRA patches them."""
    lent = clip.clone()
    noise = torch.Generator().manual_seed(2)
    weights = {f"{name}": p for name, p in clip.cond_stage_model.named_parameters() if p.ndim > 1}
    patches = {name: ("diff", (size * p.std() * torch.randn(p.shape, generator=noise),)) for name, p in weights.items()}
    assert len(lent.add_patches(patches, strength)) == len(weights)
    return lent


def test_loras_of_every_strength_share_the_encoders_own(demo, folders, caplog):
    """Minutes for every strength would be too much; the base encoder's is taken, or made, and how far it is is said."""
    model, clip = demo
    lent = with_lora(clip, 0.3)
    far = distance_between(encoder_of(lent), encoder_of(clip))
    assert SAME < far < RELATED and encoder_of(unpatched(lent)) == encoder_of(clip)
    protected(model, lent)
    (name,) = files(folders)
    assert name == f"encoder-{encoder_of(clip).name}.safetensors"
    assert f"{100 * far:.0f} % differently: it is the one without this CLIP's LoRAs" in caplog.text
    made = hgr_models.load_hgr(folders / "hgr" / name).info.encoder_print()
    assert distance_between(made, encoder_of(clip)) < 1e-3
    protected(model, with_lora(clip, 0.3, 0.8))
    assert files(folders) == [name]
    caplog.clear()
    protected(model, clip)
    assert files(folders) == [name] and "differently" not in caplog.text


def test_a_lora_that_makes_another_encoder_gets_its_own(demo, folders, caplog):
    model, clip = demo
    lent = with_lora(clip, 3.0)
    assert distance_between(encoder_of(lent), encoder_of(clip)) > RELATED
    protected(model, lent)
    assert files(folders) == [f"encoder-{encoder_of(lent).name}.safetensors"] and "CLIP from before them" in caplog.text


@pytest.mark.skipif(not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="this host has no such LoRAs")
def test_a_lora_beside_the_weights_counts(demo):
    """Core gives injected LoRAs no name of their own: a print that is remembered must not be taken for them."""
    clip = demo[1]
    base, lent = encoder_of(clip), clip.clone()
    layer = clip.cond_stage_model.transformer.proj
    forward = layer.forward
    add = lambda _: setattr(layer, "forward", lambda x: 3 * forward(x).sin())  # noqa: E731
    remove = lambda _: vars(layer).pop("forward", None)  # noqa: E731
    lent.patcher.set_injections("bypass_lora", [comfy.model_patcher.PatcherInjection(inject=add, eject=remove)])
    assert is_patched(lent) and not is_patched(clip)
    assert distance_between(encoder_of(lent), base) > SAME and encoder_of(unpatched(lent)) == base == encoder_of(clip)


def test_rounded_encoders_are_known_also_where_core_widened_them(demo, folders, monkeypatch, caplog):
    model, clip = demo
    plain, rounded = demo_clip(), demo_clip()
    for tensor in rounded.cond_stage_model.transformer.parameters():
        tensor.data = tensor.data.to(torch.float8_e5m2).float()
    assert is_quantised(rounded) and not is_quantised(plain)
    protected(model, clip)
    distance = library.distance_between
    monkeypatch.setattr(library, "distance_between", lambda one, other: 0.3 + distance(one, other))  # deeper encoders are so far
    monkeypatch.setattr(library, "make", lambda *_: pytest.fail("made again"))
    protected(model, rounded)
    assert "rounded to a byte a weight or less" in caplog.text
    with pytest.raises(pytest.fail.Exception, match="made again"):
        protected(model, plain)  # as far without a reason


def test_how_a_prompt_is_read_is_not_the_encoder(monkeypatch):
    """Core's T5 Tokenizer Options and CLIP Set Last Layer; hooks come and go along a run."""
    clip = small_clip("Flux")
    with torch.inference_mode():
        first, other = encoder_of(clip), clip.clone()
        other.set_tokenizer_option("t5xxl_min_length", 600)
        other.clip_layer(-2)
        other.patcher.forced_hooks, other.use_clip_schedule = comfy.hooks.HookGroup(), True
        monkeypatch.setattr(encoder_print, "_known", type(encoder_print._known)())
        assert encoder_of(other) == first
    assert other.tokenizer_options == {"t5xxl_min_length": 600} and other.layer_idx == -2 and other.use_clip_schedule


def test_what_is_no_text_encoder_is_said(demo, folders):
    model = demo[0]
    with pytest.raises(hgr_models.HGRError, match="this checkpoint has no text encoder"):
        protected(model, None)
    for value, words in ((0.0, "answers every text alike"), (float("nan"), "NaN")):
        broken = demo_clip()
        for tensor in broken.cond_stage_model.parameters():
            tensor.data.fill_(value)
        with pytest.raises(hgr_models.HGRError, match=words):
            protected(model, broken)
    assert not (folders / "output").exists()


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
