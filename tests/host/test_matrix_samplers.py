"""The coverage matrix: every sampler that the host has."""

import comfy.samplers
import pytest

from matrix import Prompts, Scene, sample, with_safecfg
from matrix_check import TALLY, Case, check
from matrix_ideal import Known

COUPLED = ("dpm_adaptive",)  # its steps depend on the whole batch


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_redirections_are_evaluations(monkeypatch, matrix_model, sampler):
    """The condition redirector aside, every evaluation of the model is redirected once."""
    known, evaluations, model = Known(monkeypatch, {0, 1}), [], matrix_model.clone()

    def count(apply_model, args):
        evaluations.append(args["cond_or_uncond"])
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(count)
    sample("KSampler", with_safecfg(model), Prompts.make(), Scene.make(steps=3, sampler=sampler))
    assert known.guidance.count == len(evaluations) > 0 and all(len(rows) == 2 for rows in evaluations)
    TALLY["samplers"] += 1


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_case(monkeypatch, caplog, matrix_model, sampler):
    scene = Scene.make(steps=3, sampler=sampler)
    check(monkeypatch, caplog, matrix_model, Case("KSampler", Prompts.make(), scene, coupled=sampler in COUPLED))
