"""`SafeCFG Protect` on core's real text-encoder classes: made, kept, found again by the encoder, refused by another one."""

import pytest
import torch
from safecfg import hgr_models
from safecfg.nodes.host.encoder_print import encoder_of
from safecfg.nodes.host.encoding import encode_batch, text_of
from safecfg.nodes.protect import library
from safecfg.nodes.training.prompt_recorder import LARGEST, bytes_of_prompt, plan_batches, write_prompts
from safetensors.torch import load_file

from protecting import files, protect_folders  # noqa: F401 (fixture)
from text_encoders import FAMILIES, small_clip

# parts, token width, pooled width, width of the narrower encoder along T
LAYOUTS = {
    "SD1.5": (("l",), 32, 32, 0),
    "SDXL": (("g", "l"), 80, 48, 0),
    "SD3": (("g", "l", "t5xxl"), 4096, 80, 0),  # core fills up to T5's width with zeros
    "Flux": (("l", "t5xxl"), 128, 32, 0),
    "Qwen-Image": (("qwen25_7b",), 64, 0, 0),
    "Z-Image": (("qwen3_4b",), 32, 0, 0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_hgr_is_made_for_the_encoder_and_found_again(family, folders):
    with torch.inference_mode():
        clip = small_clip(family)
        hgr = library.find_or_make(clip)
        assert files(folders) == [f"encoder-{encoder_of(clip).name}.safetensors"]
        found, again, other = hgr.info.encoder_print(), library.find(small_clip(family)), library.find(small_clip(family, 1))
        assert found.layout == LAYOUTS[family]
        assert again is not None and again.distance < 1e-3 and other is None
        texts = text_of(encode_batch(clip, ["a knife on a table", "a chef who cuts bread in a sunny kitchen"]), torch.zeros(2, 7))
        on = hgr_models.CategorySettings((1.0,) * 7, threshold_offset=-1.0)  # every prompt is flagged
        result = hgr_models.redirect_condition(hgr.patcher.model, texts.tokens, texts.pooled, on, texts.mask)
    assert result.tokens.shape == texts.tokens.shape and torch.isfinite(result.tokens).all()
    assert not torch.equal(result.tokens, texts.tokens)
    if texts.mask is not None:
        absent = texts.mask == 0
        assert torch.equal(result.tokens[absent], texts.tokens[absent])


def test_prompts_that_would_not_fit_the_disk_are_an_even_share():
    prompts = library.built_in_prompts()
    every, all_of_them = plan_batches(prompts, 1)
    count = lambda batches, kind: sum(len(pairs) for k, _, pairs in batches if k == kind)  # noqa: E731
    total = {kind: count(every, kind) for kind, _, _ in every}
    both_sides = sum(n * (2 if "pairs" in kind else 1) for kind, n in total.items())
    some, share = plan_batches(prompts, 2 * LARGEST // both_sides)
    assert all_of_them == 1 and share == pytest.approx(0.5, abs=0.01)
    assert all(count(some, kind) == max(1, int(share * n)) for kind, n in total.items())
    names = [pair.harmful for kind, _, pairs in some if kind == "pairs" for pair in pairs]
    places = [i for i, pair in enumerate(prompts.pairs) if pair.harmful in names]
    assert places[0] < 2 and places[-1] >= len(prompts.pairs) - 3  # of all categories, not the first ones


def test_what_the_shards_take_is_known_before(folders):
    """A language model gives every prompt tokens of its own count: what its shards take beside what was said, and no padding's worth."""
    with torch.inference_mode():
        clip, prompts = small_clip("Qwen-Image"), library.built_in_prompts()
        said = bytes_of_prompt(clip, prompts)
        folder = folders / "shards"
        list(write_prompts(clip, prompts, 0, folder, {}, []))
    stored = [load_file(path) for path in folder.glob("*.safetensors")]
    sides = [
        (t[name], t[name.replace("tokens", "mask")])
        for t in stored
        for name in t
        if name.endswith(".tokens") and name.replace("tokens", "mask") in t
    ]
    taken = sum(t[name].numel() * 2 for t in stored for name in t if name.endswith((".tokens", ".padding")))
    count = sum(len(t[name]) for t in stored for name in t if name.endswith(".tokens"))
    assert 0.5 < said * count / taken < 2
    assert sides and all(bool(mask[:, : tokens.shape[1]].any(dim=0).all()) for tokens, mask in sides)
