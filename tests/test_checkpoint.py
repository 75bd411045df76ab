"""The checkpoint: a round trip, and one clear error for everything that can be wrong with a file."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import info, small_hgr
from hgr_models import HGR, HGRError, file_hash, load_hgr, save_hgr
from hgr_models.checkpoint import KEY, fingerprint
from hgr_models.condition import ConditionConfig
from hgr_models.hgr import uncalibrated_info


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "hgr.safetensors"
    save_hgr(path, small_hgr())
    return path


def rewrite(path, about=lambda a: a, tensors=lambda t: t, metadata=None):
    """Saves the file again with something changed."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        old = json.loads(file.metadata()[KEY])
    save_file(tensors(load_file(path)), path, {KEY: json.dumps(about(old))} if metadata is None else metadata)


def test_round_trip(saved):
    hgr, again = small_hgr(), load_hgr(saved)
    assert again.info == hgr.info
    for key, value in hgr.state_dict().items():
        assert torch.allclose(again.state_dict()[key], value, rtol=1e-3, atol=1e-3), key
    assert not any(p.requires_grad for p in again.parameters())


def test_files_from_before_two_encoders_load(saved):
    """Their configuration has no `short_width`, and their tensors no units of a narrower encoder."""
    rewrite(saved, about=lambda a: {**a, "condition": {k: v for k, v in a["condition"].items() if k != "short_width"}})
    assert load_hgr(saved).condition.config.short_width == 0


def test_a_narrower_encoder_is_narrower(saved):
    rewrite(saved, about=lambda a: {**a, "condition": {**a["condition"], "short_width": 16}})
    with pytest.raises(HGRError, match="short_width below 16"):
        load_hgr(saved)


def test_two_encoders_survive_a_round_trip(tmp_path):
    config = ConditionConfig(16, 2, width=8, depth=1, delta_depth=1, heads=1, short_width=10)
    hgr = HGR(info(), config, None)
    hgr.condition.short_center[:10] = 1e5  # beyond fp16
    save_hgr(tmp_path / "two.safetensors", hgr)
    again = load_hgr(tmp_path / "two.safetensors").condition
    assert again.config == config and torch.equal(again.short_center, hgr.condition.short_center)


def test_saving_leaves_nothing_half_written(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(HGRError, match="hgr.safetensors cannot be written .disk full"):
        save_hgr(saved, small_hgr(1))
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_fingerprints_tell_names_and_values_apart():
    weights = {"a": torch.ones(3), "b": torch.zeros(3)}
    swapped = {"a": torch.zeros(3), "b": torch.ones(3)}
    renamed = {"a": torch.ones(3), "c": torch.zeros(3)}
    found = [fingerprint(some) for some in (weights, dict(reversed(weights.items())), swapped, renamed)]
    assert found[0] == found[1] and len(set(found)) == 3


@pytest.mark.parametrize("rows", [((0.5, 0.5),), ((0.5, 0.5), (0.5,)), ((0.5, 0.5),) * 3])
def test_thresholds_of_every_level_and_category(rows):
    with pytest.raises(HGRError, match="Expected 2 x 2 guidance thresholds"):
        info(guidance_thresholds=rows).validate()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"categories": ("a", " ")}, "distinct, non-empty category names"),
        ({"categories": ("a", "a")}, "distinct, non-empty category names"),
        ({"concept_prompts": {"weapons": 3}}, "Expected texts"),
    ],
)
def test_names_and_prompts_are_texts(changes, said):
    with pytest.raises(HGRError, match=said):
        info(**changes).validate()


def test_before_calibration_every_threshold_is_a_half():
    facts = {**vars(info()), "categories": ["a", "b", "c"], "guidance_levels": [-1.0, 1.0], "unknown": 1}
    facts = {name: value for name, value in facts.items() if name not in ("condition_thresholds", "guidance_thresholds")}
    found = uncalibrated_info(facts)
    assert found.condition_thresholds == (0.5,) * 3 and found.guidance_thresholds == ((0.5,) * 3,) * 3
    assert found.categories == ("a", "b", "c") and found.guidance_levels == (-1.0, 1.0)


@pytest.mark.parametrize("levels", [(1.0, 0.0), (0.0, 0.0)])
def test_noise_levels_that_do_not_ascend_are_refused(levels):
    with pytest.raises(HGRError, match="ascending guidance levels"):
        info(guidance_levels=levels, guidance_thresholds=((0.5, 0.5),) * 3).validate()


def test_hash_follows_the_content(saved):
    first = file_hash(saved)
    assert first == file_hash(saved) and len(first) == 64
    save_hgr(saved, small_hgr(1))
    assert file_hash(saved) != first


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit_info(**changes):
    return lambda path: rewrite(path, about=lambda a: {**a, "info": {**a["info"], **changes}})


def poison(path):
    def nan(tensors):
        tensors["condition.token_in.weight"][0, 0] = float("nan")
        return tensors

    rewrite(path, tensors=nan)


BROKEN = {
    "missing file": (lambda path: path.unlink(), "no HGR file"),
    "not safetensors": (lambda path: path.write_text("hello, I am no tensor"), "not a complete safetensors file"),
    "truncated": (truncate, "not a complete safetensors file"),
    "missing metadata": (lambda path: rewrite(path, metadata={"format": "pt"}), "no 'safecfg_hgr'"),
    "metadata is not JSON": (lambda path: rewrite(path, metadata={KEY: "{"}), "not JSON"),
    "incomplete metadata": (lambda path: rewrite(path, about=lambda a: {"format_version": 1}), "not that of an HGR"),
    "unknown format version": (lambda path: rewrite(path, about=lambda a: {**a, "format_version": 99}), "version 1 .* got 99"),
    "NaN weights": (poison, "'condition.token_in.weight' .* not finite"),
    "missing tensor": (
        lambda p: rewrite(p, tensors=lambda t: {k: v for k, v in t.items() if "erase" not in k}),
        "lacks 2 tensors",
    ),
    "foreign tensor": (lambda p: rewrite(p, tensors=lambda t: {**t, "lora": torch.zeros(1)}), "'lora'"),
    "wrong shape": (
        lambda p: rewrite(p, tensors=lambda t: {**t, "guidance.attenuation.bias": torch.zeros(3)}),
        r"shape \(1,\) .* \(3,\)",
    ),
    "wrong channels": (edit_info(latent_channels=16), "latent channels 16 .* has 4"),
    "wrong token width": (edit_info(token_width=768), "token width 768 .* has 16"),
    "duplicate categories": (edit_info(categories=["drugs", "drugs"]), "distinct, non-empty category"),
    "empty categories": (edit_info(categories=[]), "distinct, non-empty category"),
    "too few thresholds": (edit_info(condition_thresholds=[0.5]), "2 condition thresholds"),
    "threshold out of range": (edit_info(condition_thresholds=[0.5, 1.5]), "from 0 to 1"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_refused(saved, what):
    spoil, said = BROKEN[what]
    spoil(saved)
    with pytest.raises(HGRError, match=said) as error:
        load_hgr(saved)
    assert str(saved) in str(error.value)


def test_an_hgr_needs_a_network():
    from hgr_models import HGR

    with pytest.raises(HGRError, match="neither"):
        HGR(info(), None, None)
