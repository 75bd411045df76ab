"""The coverage matrix (matrix.py): applied exactly once per guidance direction, in every graph of core's own nodes."""

import re

import pytest
import torch
from safecfg.hgr_models import HGRError

from host_nodes import HOOKS, OPTIONS, SAMPLER, SAMPLES, call, scan
from matrix import WAYS, Prompts, Scene, sample, with_safecfg
from matrix_check import TALLY, check
from patches import ELSEWHERE, PATCHES, REFUSED, case_of


def test_the_matrix_has_every_node():
    """Of core's own; one that is new fails with its name."""
    nodes = {name: found.kinds for name, found in scan().items()}
    hooks = {
        name for name, kinds in nodes.items() if SAMPLER not in kinds and any(HOOKS.fullmatch(k) or k == OPTIONS for k in kinds)
    }
    ways = {name.split()[0] for name in WAYS} | {"SamplerCustomAdvanced"}
    known = PATCHES.keys() | dict(REFUSED).keys() | ELSEWHERE.keys() | ways
    sampling = {name for name, kinds in nodes.items() if SAMPLES in kinds}
    assert not (new := (hooks | sampling) - known), f"not in the matrix: {', '.join(sorted(new))}"
    guidance = re.compile(r"set_model_(sampler|unet|denoise)\w+|add_wrapper\w*|create_\w+_wrapper|" + OPTIONS)
    covered = {kind for name in PATCHES for kind in nodes.get(name, ())}
    for name in ELSEWHERE.keys() & nodes.keys():
        assert not (kinds := {k for k in nodes[name] if guidance.fullmatch(k)} - covered), f"{name} hooks in by {kinds}"


CASES = [(way, name) for way in WAYS for name in ["none", *PATCHES] if name == "none" or name in scan()]


NOT_FINITE = {("PerpNegGuider", "EasyCache")}  # on 0.3.64


@pytest.mark.parametrize(("way", "name"), CASES)
def test_case(monkeypatch, caplog, matrix_model, way, name):
    case = case_of(way, name)
    if name in PATCHES and way in PATCHES[name].impossible:
        with pytest.raises(Exception):  # noqa: B017 (core's own, whatever it is)
            case.sample(case.patch(matrix_model))
        return
    if (way, name) in NOT_FINITE and not case.sample(case.patch(matrix_model)).isfinite().all():
        pytest.skip("core's own picture is not finite here")
    check(monkeypatch, caplog, matrix_model, case)


@pytest.mark.parametrize("name", [name for name in PATCHES if name in scan()])
def test_the_nodes_act(matrix_model, name):
    """A node that changed nothing would show nothing; those that cannot act on the tiny model say so."""
    case = case_of("KSampler", name)
    without, with_node = (case.sample(model) for model in (matrix_model, case.patch(matrix_model)))
    assert bool((with_node - without).abs().max() > 1e-3 * without.abs().max()) == PATCHES[name].acts


@pytest.mark.parametrize(("name", "inputs"), [(name, inputs) for name, inputs in REFUSED if name in scan()])
def test_another_family_is_refused(matrix_model, name, inputs):
    """Made so before SafeCFG, or after it: then by every way to sample."""
    patch = lambda model: call(name, model=model, **inputs)[0]  # noqa: E731
    names_both = (
        r"SD15 latents \(4 channels, 2-D\) with EPS prediction, but this model is .* and has SD15 .* with (?!EPS)\w+ prediction"
    )
    with pytest.raises(HGRError, match=names_both):
        with_safecfg(patch(matrix_model))
    for way in WAYS:
        with pytest.raises(HGRError, match=names_both):
            sample(way, patch(with_safecfg(matrix_model)), Prompts.make(), Scene.make())
        TALLY["runs of another family refused"] += 1


@pytest.mark.skipif("LTXVDualCFGGuider" not in WAYS, reason="this host has no LTXVDualCFGGuider")
def test_two_modalities_have_a_scale_each(matrix_model):
    """Of an audio-video latent: the left half of the tiny one is drawn with cfg 5, as CFGGuider does, the right one with cfg 3."""
    one, other = (sample(way, matrix_model, Prompts.make(), Scene.make()) for way in ("CFGGuider", "LTXVDualCFGGuider"))
    torch.testing.assert_close(other[..., :4], one[..., :4])
    assert (other[..., 4:] - one[..., 4:]).abs().max() > 1e-3 * one.abs().max()
