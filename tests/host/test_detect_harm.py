"""`SafeCFG Detect Harm`: what it shows the HGR, its outputs for pictures of any size, and clear errors."""

import dataclasses
import json
from types import SimpleNamespace

import comfy.patcher_extension
import node_helpers
import pytest
import torch
from safecfg.hgr_models import HGRError
from safecfg.hgr_models.detection import LEVELS, Detection, Looks
from safecfg.nodes.detection import detector
from safecfg.nodes.detection.detect_harm import DetectHarm
from safecfg.nodes.detection.detector import fitted, heat_map, look
from safecfg.nodes.reporting import drawing

from fake_vae import Vae
from fakes import INFO, apply_hgr, make_hgr

CALIBRATED = dataclasses.replace(INFO, picture_thresholds=(0.5, 0.6))
WIDGETS = {"threshold": 0.0, "categories": "", "longest_side": 0, "draws": 1, "fixed_seed": 0}


@pytest.fixture
def latents():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pictures():
    return torch.rand(2, 24, 32, 3, generator=torch.Generator().manual_seed(0))


def detect(model, hgr, negative, **inputs):
    return DetectHarm.execute(model, hgr, negative, **{**WIDGETS, **inputs}).result


def test_defaults_are_the_schemas():
    assert {i.id: i.default for i in DetectHarm.define_schema().inputs if i.id in WIDGETS} == WIDGETS


def test_packed_weights_go_with_the_look(tiny_model, tiny_cond):
    """Those of `hgr_models.fused`; a stand-in, since the kernels need a GPU."""
    hgr = make_hgr()
    held = vars(hgr.patcher.model.guidance)
    held["fused"] = "packed"
    look(tiny_model, hgr, torch.zeros(1, 4, 8, 8), tiny_cond(1), tiny_cond(2))
    assert "fused" not in held


@torch.no_grad()
def test_the_model_sees_core_s_noised_latents(tiny_model, tiny_cond, latents, monkeypatch):
    seen, noise = {}, torch.randn(latents.shape)

    def fake(network, see, shape, looks, prompts):
        seen["now"], seen["shape"] = see(0.65, noise), shape
        return Detection(torch.zeros(2, 2), torch.zeros(2, 2, 4, 4))

    monkeypatch.setattr(detector, "detect", fake)
    look(tiny_model, make_hgr(), latents, tiny_cond(1), tiny_cond(2))
    now, sampling = seen["now"], tiny_model.model.model_sampling
    sigma = torch.full((2,), sampling.percent_to_sigma(0.65))
    x = latents * 0.18215 + noise * sigma[0]
    torch.testing.assert_close(now.sigma, sigma)
    torch.testing.assert_close(now.x_in, x / (1 + sigma[0] ** 2) ** 0.5)
    for denoised, seed in ((now.uncond_denoised, 1), (now.cond_denoised, 2)):
        tokens = tiny_cond(seed)[0][0].expand(2, -1, -1)
        torch.testing.assert_close(denoised, tiny_model.model.apply_model(x, sigma, c_crossattn=tokens), atol=1e-5, rtol=1e-5)
    assert seen["shape"] == (2, 4, 8, 8)
    look(tiny_model, make_hgr(), latents, tiny_cond(1))
    assert seen["now"].cond_denoised is None


def test_the_answer_is_the_same_every_time_and_alone(tiny_model, tiny_cond, latents):
    hgr = make_hgr()
    run = lambda which, **looks: look(tiny_model, hgr, which, tiny_cond(1), tiny_cond(2), Looks(**looks)).scores  # noqa: E731
    both = run(latents)
    assert torch.equal(run(latents), both) and not torch.equal(run(latents, seed=1), both)
    assert not torch.equal(run(latents, draws=2), both)
    torch.testing.assert_close(run(latents[1:]), both[1:], atol=1e-5, rtol=1e-5)


def test_safecfg_and_caches_are_left_out_and_patches_are_not(tiny_model, tiny_cond, latents):
    hgr = make_hgr()
    run = lambda model: look(model, hgr, latents, tiny_cond(1), tiny_cond(2)).scores  # noqa: E731
    plain, redirected = run(tiny_model), apply_hgr(tiny_model)
    before = {kind: {key: list(functions) for key, functions in by.items()} for kind, by in redirected.wrappers.items()}

    def cached(executor, *args, **kwargs):
        raise AssertionError("a cache was asked")

    redirected.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "easycache", cached)
    assert torch.equal(run(redirected), plain)
    redirected.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "easycache")
    assert {k: v for k, v in redirected.wrappers.items() if v} == {k: v for k, v in before.items() if v}
    assert redirected.additional_models and not tiny_model.additional_models
    patched = tiny_model.clone()
    key = next(k for k in tiny_model.model.state_dict() if k.endswith("attn2.to_v.weight"))
    patched.add_patches({key: (torch.randn_like(tiny_model.model.state_dict()[key]),)}, 1.0)
    assert not torch.equal(run(patched), plain) and torch.equal(run(tiny_model), plain)


def test_a_detection_costs_at_most_four_steps(tiny_model, tiny_cond, latents):
    rows = []
    handle = tiny_model.model.diffusion_model.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))
    look(tiny_model, make_hgr(), latents, tiny_cond(1), tiny_cond(2))
    with_prompt = sum(rows)
    rows.clear()
    look(tiny_model, make_hgr(), latents, tiny_cond(1))
    handle.remove()
    assert with_prompt == 2 * len(latents) * len(LEVELS) <= 4 * 2 * len(latents) and sum(rows) == with_prompt / 2


def test_a_prompt_of_another_time_does_not_act(tiny_model, tiny_cond, latents):
    never = node_helpers.conditioning_set_values(tiny_cond(2), {"start_percent": 0.0, "end_percent": 0.1})
    late = node_helpers.conditioning_set_values(tiny_cond(2), {"start_percent": 0.7, "end_percent": 1.0})
    hgr = make_hgr()
    hgr.patcher.model.condition = None  # which reads words, whenever they act
    alone, always = (look(tiny_model, hgr, latents, tiny_cond(1), p).scores for p in (None, tiny_cond(2)))
    assert torch.equal(look(tiny_model, hgr, latents, tiny_cond(1), never).scores, alone)
    assert not torch.equal(look(tiny_model, hgr, latents, tiny_cond(1), late).scores, always)
    with pytest.raises(ValueError, match="negative prompt does not act at every noise level"):
        look(tiny_model, hgr, latents, never, tiny_cond(2))


def test_the_prompts_own_harmfulness_counts(tiny_model, tiny_cond, latents):
    """Per picture as core repeats the rows of a batch of prompts; the worst of combined prompts; what has no text adds nothing."""
    hgr, three = make_hgr(), latents[[0, 1, 0]]
    batch = [[torch.cat([tiny_cond(2)[0][0], tiny_cond(3)[0][0]]), {}]]
    apart, other = detector.detect_prompts(hgr, batch), detector.detect_prompts(hgr, tiny_cond(4))
    assert not torch.equal(apart[0], apart[1])
    expected = {"batch": apart[[0, 1, 0]], "both": torch.maximum(apart[[0, 1, 0]], other), "no text": torch.zeros(3, 2)}
    wordless = [[None, {"unclip_conditioning": []}]]
    prompts = {"batch": batch, "both": [*batch, *tiny_cond(4)], "no text": None}
    assert detector._prompts_of(tiny_model, hgr, wordless, 3) is None
    torch.testing.assert_close(detector._prompts_of(tiny_model, hgr, [*wordless, *batch], 3), expected["batch"])
    for name, positive in prompts.items():
        found = look(tiny_model, hgr, three, tiny_cond(1), positive).scores
        only = hgr.patcher.model.condition
        hgr.patcher.model.condition = None
        seen = look(tiny_model, hgr, three, tiny_cond(1), positive).scores
        hgr.patcher.model.condition = only
        torch.testing.assert_close(found, torch.maximum(seen, expected[name]), atol=1e-5, rtol=0)


def test_outputs(tiny_model, tiny_cond, pictures):
    hgr, vae = make_hgr(info=CALIBRATED), Vae()
    worst, text, harmful, flagged, heat, preview = detect(
        tiny_model, hgr, tiny_cond(1), positive=tiny_cond(2), image=pictures, vae=vae
    )
    content, (encoded, _) = json.loads(text), detector.encode(vae, pictures, hgr.info)
    expected = look(tiny_model, hgr, encoded, tiny_cond(1), tiny_cond(2))
    assert content["categories"] == {"red": 0.5, "blue": 0.6} and content["with_prompt"] is True
    rows = torch.tensor([[image["scores"]["red"], image["scores"]["blue"]] for image in content["images"]])
    torch.testing.assert_close(rows, expected.scores, atol=1e-6, rtol=0)
    assert worst == pytest.approx(float(expected.scores.max())) and harmful == any(flagged)
    assert flagged == [bool(f) for f in (expected.scores > torch.tensor([0.5, 0.6])).any(dim=1)]
    assert heat.shape == (2, 24, 32) and heat.min() >= 0 and heat.max() <= 1
    assert preview.shape[0] == 2 and preview.shape[3] == 3 and preview.min() >= 0 and preview.max() <= 1
    assert not torch.equal(preview[0], preview[1])


@pytest.mark.parametrize("size", [(137, 153), (5, 9), (1, 1), (64, 160)])
def test_pictures_of_any_size(tiny_model, tiny_cond, size):
    hgr, vae, picture = make_hgr(info=CALIBRATED), Vae(), torch.rand(1, *size, 3)
    *_, heat, preview = detect(tiny_model, hgr, tiny_cond(1), image=picture, vae=vae)
    assert heat.shape == (1, *size) and torch.equal(vae.seen[:, : size[0], : size[1]], picture)  # every pixel is looked at


def test_large_pictures_can_be_scaled_down(tiny_model, tiny_cond):
    vae = Vae()
    *_, heat, _ = detect(
        tiny_model, make_hgr(info=CALIBRATED), tiny_cond(1), image=torch.rand(1, 300, 190, 3), vae=vae, longest_side=200
    )
    assert vae.seen.shape == (1, 200, 128, 3) and heat.shape == (1, 300, 190)
    assert fitted(torch.rand(1, 150, 130, 3), 200, 8)[1] == (150, 130)  # never larger


def test_the_heat_map_lies_over_the_picture():
    places = torch.zeros(1, 1, 4, 8)
    places[..., :2, 6:] = 1.0  # the top right corner of the padded picture
    found = Detection(torch.ones(1, 1), places)
    whole = heat_map(found, [True], (32, 64))
    assert whole[0, :12, 52:].min() > 0.9 and whole[0, 20:].max() == 0 and whole[0, :, :44].max() == 0
    part = heat_map(found, [True], (30, 56), (30 / 32, 56 / 64))
    assert torch.equal(part, whole[:, :30, :56])


def test_latents_with_and_without_a_vae(tiny_model, tiny_cond, latents):
    hgr = make_hgr(info=CALIBRATED)
    run = lambda vae: detect(tiny_model, hgr, tiny_cond(1), latent={"samples": latents}, vae=vae)  # noqa: E731
    grey, decoded = run(None), run(Vae())
    assert grey[1] == decoded[1] and grey[4].shape == decoded[4].shape == (2, 64, 64)
    assert not torch.equal(grey[5], decoded[5])


def test_a_video_vae_gets_one_picture_at_a_time(pictures):
    class VideoVae(Vae):
        def encode(self, pictures):
            assert len(pictures) == 1  # it would take more for frames
            return super().encode(pictures)[:, :, None]

    latents, _ = detector.encode(VideoVae(), pictures, dataclasses.replace(INFO, latent_dimensions=3))
    assert latents.shape == (2, 4, 1, 16, 16) and not torch.equal(latents[0], latents[1])


def test_thresholds_of_an_older_hgr(tiny_model, tiny_cond, pictures):
    with pytest.raises(HGRError, match="random.safetensors has no thresholds for pictures.*Check HGR.*threshold of your own"):
        detect(tiny_model, make_hgr(), tiny_cond(1), image=pictures, vae=Vae())
    low, high = (detect(tiny_model, make_hgr(), tiny_cond(1), image=pictures, vae=Vae(), threshold=t) for t in (1e-6, 1.0))
    assert low[3] == [True, True] and high[3] == [False, False] and low[0] == high[0]


NAN = torch.full((2, 24, 32, 3), 0.5)
NAN[1, 3, 3, 0] = float("nan")
WRONG = {
    "neither": ({}, "an image or a latent, but got neither"),
    "both": ({"image": torch.rand(1, 8, 8, 3), "latent": {"samples": torch.zeros(1, 4, 8, 8)}}, "got both"),
    "no vae": ({"image": torch.rand(1, 8, 8, 3), "vae": None}, "Connect the model's VAE"),
    "alpha": ({"image": torch.rand(1, 8, 8, 4)}, "3 channels, but got 4, which is an alpha channel"),
    "mask": ({"image": torch.rand(1, 8, 8, 1)}, "3 channels, but got 1"),
    "empty batch": ({"image": torch.rand(0, 8, 8, 3)}, "at least one picture"),
    "no pixels": ({"image": torch.rand(1, 0, 8, 3)}, "at least one picture"),
    "nan": ({"image": NAN}, "picture 2 holds NaN"),
    "empty latent": ({"latent": {"samples": torch.zeros(0, 4, 8, 8)}}, "at least one latent"),
    "latent of another family": ({"latent": {"samples": torch.zeros(1, 16, 8, 8)}}, "4 channels .* shape \\(1, 16, 8, 8\\)"),
    "video latent": ({"latent": {"samples": torch.zeros(1, 4, 1, 8, 8)}}, "2 dimensions .*VAE that belongs"),
    "nan latent": ({"latent": {"samples": torch.full((1, 4, 8, 8), float("inf"))}}, "latent 1 holds NaN or infinity"),
    "nested latent": ({"latent": {"samples": SimpleNamespace(is_nested=True)}}, "nested ones"),
    "categories": ({"latent": {"samples": torch.zeros(1, 4, 8, 8)}, "categories": "green = off"}, "Unknown category 'green'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_inputs_are_said(tiny_model, tiny_cond, what):
    inputs, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        detect(tiny_model, make_hgr(info=CALIBRATED), tiny_cond(1), **{"vae": Vae(), **inputs})


def test_another_family_is_refused(tiny_model, tiny_cond, pictures):
    for info, message in (
        (dataclasses.replace(CALIBRATED, latent_format="SDXL"), "trained for a model of SDXL latents"),
        (dataclasses.replace(CALIBRATED, prediction="V"), "V prediction"),
    ):
        with pytest.raises(HGRError, match=message):
            detect(tiny_model, make_hgr(info=info), tiny_cond(1), image=pictures, vae=Vae())
    for info, why in ((CALIBRATED, "for prompts only"), (dataclasses.replace(INFO, latent_format=""), "from prompts alone")):
        with pytest.raises(HGRError, match=f"needs a guidance redirector, but random.safetensors has none: it was trained {why}"):
            detect(tiny_model, make_hgr(info=info, networks=("condition",)), tiny_cond(1), image=pictures, vae=Vae())
    other = Vae()
    other.latent_channels = 16
    with pytest.raises(ValueError, match="VAE with 4 latent channels .* has 16"):
        detect(tiny_model, make_hgr(info=CALIBRATED), tiny_cond(1), image=pictures, vae=other)


def test_a_prompt_that_nothing_reads_is_said(tiny_model, tiny_cond, latents, caplog):
    hgr = make_hgr(info=CALIBRATED, networks=("guidance",))
    _, text, *_ = detect(tiny_model, hgr, tiny_cond(1), latent={"samples": latents}, positive=tiny_cond(2))
    assert json.loads(text)["with_prompt"] is False and "the prompt's own harm is not judged" in caplog.text


def test_a_model_that_gives_nan_is_said(tiny_model, tiny_cond, latents):
    handle = tiny_model.model.diffusion_model.register_forward_hook(lambda unet, args, out: out * float("nan"))
    with pytest.raises(HGRError, match="not finite .* picture 1, 2"):
        look(tiny_model, make_hgr(), latents, tiny_cond(1))
    handle.remove()


def test_drawings_show_what_they_are_given():
    picture = torch.zeros(20, 30, 3)
    heat = torch.zeros(20, 30)
    heat[:10] = 1.0
    over = drawing.overlay(picture, heat)
    assert over[0, 0, 0] > 0.5 and not over[15].any()
    bars = [drawing.Bar("weapons", 0.9, 0.5), drawing.Bar("drugs", 0.1, 0.5), drawing.Bar("death", 0.9, None)]
    assert [bar.flagged for bar in bars] == [True, False, False]
    drawn = drawing.detection(picture, heat, bars, "picture 1 of 1")
    red = (drawn * 255 - torch.tensor(drawing.HARM)).abs().amax(dim=2) < 2
    green = (drawn * 255 - torch.tensor(drawing.CLEAN)).abs().amax(dim=2) < 2
    assert red.sum() > 8 * green.sum() > 0  # 0.9 against 0.1; the category that is off is grey
