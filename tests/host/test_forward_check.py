"""The check that needs no gradients: 1 without redirection, 0 for the partner's own tokens, between them half of the way."""

import dataclasses
from types import SimpleNamespace

import comfy.model_management as mm
import pytest
import torch
from safecfg.hgr_models import HGRError
from safecfg.hgr_models.condition import ConditionConfig, ConditionRedirector
from safecfg.nodes.host.encoding import encode_batch
from safecfg.nodes.training import forward_check
from safecfg.nodes.training.inputs import run_settings

from test_training import SMALL, demo, prompt_set  # noqa: F401 (demo is a fixture)


class Towards:
    """Moves the tokens of the one pair of `prompts` a part of the way to the partner's."""

    token_center, config = torch.zeros(1), SimpleNamespace(pooled_width=0)

    def __init__(self, clip, pair, part):
        one, other = (encode_batch(clip, [text])[0][0] for text in (pair.harmful, pair.safe))
        self.move = part * (other - one)

    def delta(self, tokens, pooled, weights, mask=None):
        return self.move.expand_as(tokens), None


@pytest.fixture
def pair():
    return prompt_set().pairs[0]


def ratio(demo, network, pair):  # noqa: F811
    prompts = prompt_set(pairs=(pair, *prompt_set().pairs[2:]), held_out_pairs=(pair,))
    with torch.inference_mode():
        return forward_check.error_ratio(*demo, network, prompts, run_settings(SMALL, demo[0]))


def test_an_untrained_redirector_changes_nothing(demo, pair):  # noqa: F811
    assert ratio(demo, ConditionRedirector(ConditionConfig(128, 2)), pair) == pytest.approx(1.0)


def test_the_partners_own_tokens_leave_nothing(demo, pair):  # noqa: F811
    near, half = (ratio(demo, Towards(demo[1], pair, part), pair) for part in (1.0, 0.5))
    assert near < 1e-6 < 0.02 < half < 1


def test_every_step_is_said_and_no_run_begins_after_the_time(demo):  # noqa: F811
    network, prompts, said = ConditionRedirector(ConditionConfig(128, 2)), prompt_set(), []
    runs = dataclasses.replace(run_settings(SMALL, demo[0]), batch=1)
    with torch.inference_mode():
        every = forward_check.error_ratio(*demo, network, prompts, runs, forward_check.Extent(2, 2), said.append)
        first = forward_check.error_ratio(*demo, network, prompts, runs, forward_check.Extent(2, 2, 0.0), said.append)
    lines = [f"asking the model, run {run} of 2: step {step} of 2" for run in (1, 2) for step in (1, 2)]
    assert said == lines + lines[:2] and every == first == pytest.approx(1.0)


def test_it_can_be_cancelled(demo):  # noqa: F811
    def cancel(text):
        if "step 2" in text:
            mm.interrupt_current_processing()

    network = ConditionRedirector(ConditionConfig(128, 2))
    with torch.inference_mode(), pytest.raises(mm.InterruptProcessingException):
        forward_check.error_ratio(*demo, network, prompt_set(), run_settings(SMALL, demo[0]), say=cancel)


def test_it_is_said_in_words():
    assert "3 % as far" in forward_check.in_words(0.03) and "good" in forward_check.in_words(0.03)
    assert "too far" in forward_check.in_words(0.4)


def test_numbers_that_are_not_finite_are_an_error(demo, pair):  # noqa: F811
    """Every comparison with NaN is false, so a ratio of NaN would pass for a good one."""
    with pytest.raises(HGRError, match="finite numbers from the MODEL"):
        ratio(demo, Towards(demo[1], pair, float("nan")), pair)


def test_a_model_that_draws_nothing_but_nan_is_refused_before_minutes_are_spent(demo):  # noqa: F811
    model, clip = demo
    forward_check.check_reads(model, clip, prompt_set(), run_settings(SMALL, model))
    model = model.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"]) * float("nan")
    )
    with pytest.raises(HGRError, match="download it again"):
        forward_check.check_reads(model, clip, prompt_set(), run_settings(SMALL, model))


def test_the_seconds_of_a_check_follow_from_a_row(demo):  # noqa: F811
    """Four roles in every step of every pair, larger pictures in proportion; a limit lets the run that has begun end."""
    runs = dataclasses.replace(run_settings(SMALL, demo[0]), batch=8, sizes=((64, 64), (32, 32)))
    assert forward_check.seconds_of(0.5, runs) == 0.5 * 4 * 4 * forward_check.Extent().steps * forward_check.Extent().pairs
    alone = dataclasses.replace(runs, batch=1, sizes=((32, 32),))
    assert forward_check.seconds_of(0.5, alone, forward_check.Extent(4, 2)) == 0.5 * 4 * 2 * 4
    assert forward_check.seconds_of(50.0, alone, forward_check.Extent(4, 2, seconds=60.0)) == 60.0 + 50.0 * 4 * 2
