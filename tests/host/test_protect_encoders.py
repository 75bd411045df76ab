"""Which HGR `SafeCFG Protect` takes for a text encoder: the same one, rounded, fine-tuned, with LoRAs, or none at all."""

import comfy.hooks
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from safecfg import hgr_models
from safecfg.hgr_models.encoders import RELATED, SAME, EncoderPrint, distance_between
from safecfg.nodes.demo_world.demo_model import demo_clip
from safecfg.nodes.host import encoder_print
from safecfg.nodes.host.encoder_print import encoder_of, is_patched, is_quantised, unpatched
from safecfg.nodes.protect import library

from protecting import files, protect_demo, protect_folders, protected  # noqa: F401 (fixtures)
from text_encoders import small_clip


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


def test_the_print_of_a_clip_is_made_once_and_ignores_the_layer(demo, monkeypatch):
    clip = demo[1]
    first = encoder_of(clip)
    assert isinstance(first, EncoderPrint) and first.parts == ("l",) and first.token_width == 128
    monkeypatch.setattr(encoder_print, "print_of", lambda *_: pytest.fail("made again"))
    assert encoder_of(clip.clone()) is first


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


@pytest.mark.skipif(not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="this host has no such LoRAs")
def test_a_lora_beside_the_weights_is_read_once_per_run(demo, folders, monkeypatch):
    model, clip = demo
    protected(model, clip)
    lent = clip.clone()
    nothing = comfy.model_patcher.PatcherInjection(inject=lambda _: None, eject=lambda _: None)
    lent.patcher.set_injections("bypass_lora", [nothing])
    made, print_of = [], encoder_print.print_of
    monkeypatch.setattr(encoder_print, "print_of", lambda *args: made.append(1) or print_of(*args))
    protected(model, lent)
    assert len(made) == 1 and len(files(folders)) == 1


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
