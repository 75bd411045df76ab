"""`SafeCFG Train HGR` from prompts alone: without a model, polished through one, taken up again with more steps, and refused."""

# ruff: noqa: F811 (a fixture and the arguments that ask for it have one name)

import pathlib

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from safecfg import hgr_models
from safecfg.hgr_models.shards import Recording
from safecfg.nodes.demo_world.demo_model import demo_clip
from safecfg.nodes.redirect.apply import Apply
from safecfg.nodes.training import session
from safecfg.nodes.training.plan import recording_folder

from test_training import APPLY, demo, folders, prompt_set, train  # noqa: F401 (two are fixtures)


def test_prompts_alone_need_no_model_and_go_on_with_guidance(demo, monkeypatch):
    """An HGR of the text encoder; the same name then records the model, and nothing that was learnt is learnt again."""
    hgr = train((None, demo[1]), train="prompts")[0]
    info = hgr.info
    assert info.of_prompts and not info.base and info.encoder_print().parts == ("l",)
    assert info.training["steps"] == {"prompts": 5} and hgr.patcher.model.guidance is None
    Apply.execute(demo[0], hgr, **{**APPLY, "redirect": "condition"})
    assert Recording.open(recording_folder("mine")).kinds() == ["calibration texts", "pairs", "texts"]
    learnt = spy_on(monkeypatch, session.TextTraining)
    both = train(demo, train="thorough")[0].info
    assert both.training["steps"] == {"prompts": 5, "condition": 4, "guidance": 6} and both.latent_format == "SD15"
    assert not learnt


def test_weak_prompts_are_polished_through_a_model_that_is_there(demo):
    """Five steps teach next to nothing, which the forward check sees; the HGR still belongs to the text encoder."""
    hgr, _, _, text = train(demo, train="prompts", harmful_runs=4)
    assert hgr.info.of_prompts and hgr.info.training["steps"] == {"prompts": 5, "condition": 4}
    assert hgr.info.training["forward_check"] > 0.15 and "too far" in text


def test_more_steps_go_on_from_the_end(demo, monkeypatch):
    train((None, demo[1]), train="prompts")
    steps, run = [], session.TextTraining.train_step
    monkeypatch.setattr(session.TextTraining, "train_step", lambda self, rows: steps.append(self.step) or run(self, rows))
    assert train((None, demo[1]), train="prompts", prompt_steps=8)[0].info.training["steps"] == {"prompts": 8}
    assert steps == [5, 6, 7]


def spy_on(monkeypatch, training):
    """The numbers of the steps that a kind of training does from here on."""
    steps, run = [], training.train_step
    monkeypatch.setattr(training, "train_step", lambda self, *data: steps.append(self.step) or run(self, *data))
    return steps


def test_more_steps_after_a_polish_are_polished_anew_and_the_guidance_redirector_may_follow(demo, monkeypatch):
    """A polish of fewer steps would undo the new ones; another `train` with the same runs takes up all of it."""
    train(demo, train="prompts", harmful_runs=4)
    text, polish = spy_on(monkeypatch, session.TextTraining), spy_on(monkeypatch, session.ConditionTraining)
    train(demo, train="prompts", harmful_runs=4, prompt_steps=7)
    assert text == [5, 6] and polish == [0, 1, 2, 3]
    info = train(demo, train="thorough", harmful_runs=4, prompt_steps=7)[0].info
    assert len(text) == 2 and len(polish) == 4 and info.training["steps"] == {"prompts": 7, "condition": 4, "guidance": 6}


def test_prompts_that_changed_before_the_first_step_are_not_trained_on(demo, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            session.Session,
            "train",
            lambda *_: mm.interrupt_current_processing() or mm.throw_exception_if_processing_interrupted(),
        )
        with pytest.raises(mm.InterruptProcessingException):
            train((None, demo[1]), train="prompts")
    other = prompt_set(concept_prompts={"weapons": "a gun", "drugs": "drugs"})
    with pytest.raises(hgr_models.HGRError, match="recorded with other prompts.*Switch `resume` off"):
        train((None, demo[1]), train="prompts", prompts=other)
    train((None, demo[1]), train="prompts", prompts=other, resume=False)


def test_another_text_encoder_is_told_and_can_begin_again(demo):
    train((None, demo[1]), train="prompts")
    pathlib.Path(folder_paths.get_full_path("hgr", "mine.safetensors")).unlink()
    other = demo_clip()
    other.cond_stage_model.transformer.proj.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    with pytest.raises(hgr_models.HGRError, match="another text encoder.*Switch `resume` off"):
        train((None, other), train="prompts")
    assert train((None, other), train="prompts", resume=False)[0].info.of_prompts


def test_what_is_missing_is_said(demo):
    with pytest.raises(hgr_models.HGRError, match="learns from runs of the model.*Set|set `train` to prompts"):
        train((None, demo[1]), train="prompts + guidance")
    with pytest.raises(hgr_models.HGRError, match="learns through the model"):
        train((None, demo[1]), train="thorough")
    with pytest.raises(hgr_models.HGRError, match="Expected one of quick, normal, thorough"):
        train((None, demo[1]), train="prompts", preset="fast")
