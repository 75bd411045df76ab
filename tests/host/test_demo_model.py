"""The demo world in core's own classes: the same pictures as in plain torch, and core's nodes work on it."""

import pytest
import torch
from safecfg.demo import files, sampling
from safecfg.demo.pipeline import DemoModel as PlainDemo
from safecfg.nodes.demo_world.demo_model import DemoModel, demo_unet

import nodes as core

PROMPT = "a frog and a strawberry"


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():  # as core executes nodes
        return DemoModel.execute().result


@pytest.fixture(scope="module")
def plain():
    return PlainDemo.load()


def encode(clip, text):
    return core.CLIPTextEncode().encode(clip, text)[0]


def sample(model, positive, negative, steps=4, cfg=5.0):
    latent = core.EmptyLatentImage().generate(128, 128, 1)[0]
    return core.KSampler().sample(model, 3, steps, cfg, "euler", "normal", positive, negative, latent)[0]["samples"]


def test_tokens_are_those_of_plain_torch(demo, plain):
    assert torch.equal(encode(demo[1], PROMPT)[0][0], plain.encode([PROMPT]))
    long = " ".join(["a", "rabbit"] * 12)  # two chunks
    assert torch.equal(encode(demo[1], long)[0][0], plain.encode([long]))


@torch.inference_mode()
def test_latents_are_those_of_plain_torch(demo, plain):
    tokens, none = plain.encode([PROMPT]), plain.encode([""])
    noise = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(3))

    def denoise(x, sigma):
        uncond_denoised = plain.denoised(x, sigma, none)
        return uncond_denoised + 5.0 * (plain.denoised(x, sigma, tokens) - uncond_denoised)

    wanted = sampling.sample_euler(denoise, noise, sampling.normal_schedule(25))  # some of its sigmas lie between two timesteps
    got = demo[0].model.process_latent_in(sample(demo[0], encode(demo[1], PROMPT), encode(demo[1], ""), steps=25))
    assert (got - wanted).abs().max() < 1e-4 * wanted.std()


@torch.inference_mode()
def test_pictures_are_those_of_plain_torch(demo, plain):
    latents = torch.randn(2, 4, 16, 16, generator=torch.manual_seed(0))
    picture = core.VAEDecode().decode(demo[2], {"samples": demo[0].model.process_latent_out(latents)})[0]
    torch.testing.assert_close(picture.movedim(-1, 1), plain.decode(latents), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_vae_nodes(demo):
    vae = demo[2]
    latents = demo[0].model.process_latent_out(torch.randn(1, 4, 24, 16, generator=torch.manual_seed(0)))
    picture = core.VAEDecode().decode(vae, {"samples": latents})[0]
    assert picture.shape == (1, 192, 128, 3) and picture.min() >= 0 and picture.max() <= 1
    assert core.VAEDecodeTiled().decode(vae, {"samples": latents}, 64, 16)[0].shape == picture.shape
    encoded = core.VAEEncode().encode(vae, picture)[0]["samples"]
    assert encoded.shape == latents.shape
    assert core.VAEEncodeTiled().encode(vae, picture, 64, 16)[0]["samples"].shape == latents.shape
    masked = core.VAEEncodeForInpaint().encode(vae, picture, torch.ones(1, 192, 128))[0]
    assert masked["samples"].shape == latents.shape


def test_weights_in_prompts(demo):
    clip = demo[1]
    plain, heavy, light = (encode(clip, text)[0][0] for text in ("a knife", "a (knife:1.3)", "a (knife:0.5)"))
    empty = encode(clip, "")[0][0]
    torch.testing.assert_close(heavy[0, 2], empty[0, 2] + 1.3 * (plain[0, 2] - empty[0, 2]))
    torch.testing.assert_close(light[0, 2], empty[0, 2] + 0.5 * (plain[0, 2] - empty[0, 2]))
    assert torch.equal(heavy[0, :2], plain[0, :2])
    assert torch.equal(encode(clip, r"a \(knife\)")[0][0], plain)


def test_clip_nodes(demo):
    clip = demo[1]
    wanted = encode(clip, PROMPT)[0][0]
    assert torch.equal(encode(core.CLIPSetLastLayer().set_last_layer(clip, -2)[0], PROMPT)[0][0], wanted)
    tokens = clip.tokenize(PROMPT, return_word_ids=True)["l"]
    assert len(tokens[0]) == 16 and tokens[0][1][2] == 1
    words = clip.tokenizer.untokenize(clip.tokenize(PROMPT)["l"][0])
    assert [word for _, word in words[:3]] == ["<start>", "a", "frog"]
    assert clip.tokenizer.decode([token[0] for token, _ in words]) == PROMPT
    assert clip.get_sd() and clip.clone().cond_stage_model is clip.cond_stage_model


@torch.inference_mode()
def test_conditions_of_every_shape_sample(demo):
    model, clip, _ = demo
    one, other, negative = encode(clip, PROMPT), encode(clip, " ".join(["an", "apple"] * 10)), encode(clip, "")
    half = core.ConditioningSetTimestepRange().set_range(one, 0.0, 0.5)[0]
    rest = core.ConditioningSetTimestepRange().set_range(other, 0.5, 1.0)[0]
    for positive in (
        core.ConditioningCombine().combine(half, rest)[0],
        core.ConditioningConcat().concat(one, other)[0],
        core.ConditioningAverage().addWeighted(one, other, 0.3)[0],
        core.ConditioningSetArea().append(one, 64, 64, 32, 0, 1.0)[0],
        core.ConditioningZeroOut().zero_out(one)[0],
    ):
        assert sample(model, positive, negative, steps=2).isfinite().all()


@torch.inference_mode()
def test_core_patches_act_on_it(demo):
    model, clip, _ = demo
    plain = sample(model, encode(clip, PROMPT), encode(clip, ""), steps=2)
    keys = model.model.state_dict()
    patched = model.clone()
    key = next(k for k in keys if k.endswith("attn2.to_k.weight"))
    assert patched.add_patches({key: (torch.randn_like(keys[key]),)}, 1.0)
    assert not torch.equal(sample(patched, encode(clip, PROMPT), encode(clip, ""), steps=2), plain)
    assert torch.equal(sample(model, encode(clip, PROMPT), encode(clip, ""), steps=2), plain)


def test_copies_for_other_devices(demo):
    for patcher in (demo[0], demo[2].patcher):
        factory, arguments = patcher.cached_patcher_init
        again = factory(*arguments, disable_dynamic=True)
        assert again.model is not patcher.model
        for key, weight in again.model.state_dict().items():
            assert torch.equal(weight, patcher.model.state_dict()[key])


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="unet.safetensors are missing. .*demo.train"):
        demo_unet()
