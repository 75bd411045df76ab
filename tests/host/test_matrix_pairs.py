"""The coverage matrix: every way to sample with every feature of a run (matrix_features.py), and every two of these together."""

from itertools import combinations

import pytest
import torch

from matrix import COUPLED, WAYS, Prompts, Scene, sample
from matrix_check import Case, check
from matrix_features import FEATURES

ONE_BY_ONE = [
    (way, name)
    for way in WAYS
    for name, feature in FEATURES.items()
    if not (feature.custom_sampler and way.startswith("KSampler")) and name != "context windows"  # with every way: test_matrix.py
]
NEVER_TOGETHER = [  # core itself fails, or draws one picture only
    {"a mask", "a growing latent"},
    {"a mask", "context windows"},
    {"inpainting", "a growing latent"},
    {"four pictures of two prompts", "context windows"},
]
PAIRS = [pair for pair in combinations([name for name in FEATURES if name != "cfg 0"], 2) if set(pair) not in NEVER_TOGETHER]


def case_of(way: str, *names: str) -> Case:
    features = [FEATURES[name] for name in names]
    batch = 1 if any(feature.per_picture for feature in features) else 2
    prompts, scene = Prompts.make(batch), Scene.make(batch)
    for feature in features:
        prompts, scene = feature.prompts(prompts), feature.scene(scene)

    def patch(model):
        for feature in features:
            model = feature.patch(model)
        return model

    pictures = len(scene.latent["samples"])
    rows = frozenset(row for row in range(pictures) if row % batch == batch - 1)  # core repeats prompts over a batch
    return Case(way, prompts, scene, patch, rows, coupled=way in COUPLED)


@pytest.mark.parametrize(("way", "name"), ONE_BY_ONE)
def test_every_way_with_a_feature(monkeypatch, caplog, matrix_model, way, name):
    check(monkeypatch, caplog, matrix_model, case_of(way, name))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_features_together(monkeypatch, caplog, matrix_model, one, other):
    check(monkeypatch, caplog, matrix_model, case_of("SamplerCustom", one, other))


@pytest.mark.parametrize("name", FEATURES)
def test_the_features_act(matrix_model, name):
    case = case_of("SamplerCustom", name)
    batch = 1 if FEATURES[name].per_picture else 2
    without = sample(case.way, matrix_model, Prompts.make(batch), Scene.make(batch, steps=case.scene.steps))
    found = case.sample(case.patch(matrix_model))
    assert found.shape != without.shape or (found - without).abs().max() > 1e-3 * without.abs().max()
    assert torch.isfinite(found).all()
