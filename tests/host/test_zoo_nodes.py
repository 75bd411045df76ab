"""The nodes on models of the zoo: an HGR trained from prompts of different lengths, checked, applied, and made a LoRA.

Of the families that most people run; ZOO=all takes every variant.
"""

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from safecfg.hgr_models import HGRError, losses, shards
from safecfg.hgr_models.detection import Looks
from safecfg.hgr_models.train_condition import ConditionTraining
from safecfg.hgr_models.training_state import read_about
from safecfg.nodes.detection.detector import look
from safecfg.nodes.redirect.apply import Apply
from safecfg.nodes.safe_lora.fine_tune import FineTuneSafeLora
from safecfg.nodes.training.check_hgr import CheckHGR
from safecfg.nodes.training.plan import recording_folder

from test_fine_tune import SMALL as LORA
from test_training import APPLY, SMALL, folders, prompt_set, train  # noqa: F401 (folders is a fixture)
from test_zoo import EVERY, LONG, SHORT
from zoo_models import ALL, Encoder, build, encode, flat, guide, latents, note

MANY = ("SD3", "Flux", "QwenImage", "ZImage", "LTXAV", "HunyuanVideo15", "WAN22_T2V")
CHOSEN = [v for v in EVERY if ALL or v.name in MANY]
RUNS = {"scheduler": "simple", "cfg_min": 1.0, "cfg_max": 3.0, "samplers": "euler", "run_steps": 2}


@pytest.fixture(scope="module", params=CHOSEN, ids=lambda variant: variant.name)
def animal(request):
    yield request.param, build(request.param)
    comfy.model_management.unload_all_models()


def test_an_hgr_is_trained_checked_applied_and_made_a_lora(animal, tmp_path, monkeypatch):
    variant, model = animal
    if not variant.packed and variant.shape[0] > 1:
        pytest.skip("frames are rows: recorded from a picture, which the node has no input for")
    latent, clip = {"samples": latents(variant, 1, 0.0)}, Encoder(variant)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    hgr = train((model, clip), latent=latent, **RUNS)[0]
    networks = hgr.patcher.model
    note(variant, trained="gradient" if networks.condition is not None else "guidance alone")
    assert networks.guidance is not None and (networks.condition is not None) == variant.by_prompt
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    with torch.inference_mode():
        _check(model, clip, hgr, latent)
        (applied,) = Apply.execute(model, hgr, **{**APPLY, "strict": False}).result
        assert flat(guide(applied, variant, encode(variant, LONG))).isfinite().all()
        if not variant.packed:
            drawn = model.model.process_latent_out(latents(variant))  # as a sampler gives them
            found = look(model, hgr, drawn, encode(variant, SHORT), looks=Looks(draws=1))
            assert found.scores.shape == (1, 2) and found.scores.isfinite().all()
            note(variant, lora=_fine_tune(variant, model, clip, hgr, latent, tmp_path, monkeypatch))


def _check(model, clip, hgr, latent):
    settings = {
        key: value for key, value in {**SMALL, **RUNS}.items() if key not in ("harmful_runs", "clean_runs", "calibration_runs")
    }
    text = CheckHGR.execute(model, clip, hgr, prompt_set(), 2, 2, 0.05, "", **settings, latent=latent).result[1]
    assert "2 harmful runs" in text and "2 clean runs" in text


def _fine_tune(variant, model, clip, hgr, latent, tmp_path, monkeypatch):
    """Whether there is a LoRA in a file that core's loader takes, and that changes what the model draws; else a clear refusal."""
    (tmp_path / "loras").mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    on = _always(hgr)
    values = {
        **LORA,
        **RUNS,
        "steps": 4,
        "runs": 3,
        "layers": "linear",
        "latent": latent,
        "model": model,
        "clip": clip,
        "hgr": on,
    }
    inputs = {key: [value] for key, value in values.items()}
    if "text_input_ids" in encode(variant, LONG)[0][1]:
        with pytest.raises(HGRError, match="it reads a prompt's token ids alone"):
            FineTuneSafeLora.execute(**inputs)
        return False
    lora = FineTuneSafeLora.execute(**inputs).result[0]
    changed, _ = comfy.sd.load_lora_for_models(model, None, lora, 50.0, 0.0)
    plain = flat(guide(model, variant, encode(variant, LONG)))
    assert not torch.equal(flat(guide(changed, variant, encode(variant, LONG))), plain)
    return True


def _always(hgr):
    """The HGR with thresholds that every prompt exceeds: there must be something to learn."""
    from dataclasses import replace

    info = replace(
        hgr.info, condition_thresholds=(0.0,) * len(hgr.info.categories),
        guidance_thresholds=tuple((0.0,) * len(row) for row in hgr.info.guidance_thresholds),
    )  # fmt: skip
    hgr.patcher.model.calibrate(info)
    return replace(hgr, info=info)


@torch.no_grad()
def error_on_the_same(training, held_out, predict) -> float:
    """The mean distance to the partner's direction on the same runs at every step."""
    draws = [held_out.draw(shards.HARMFUL, training.batch, torch.Generator().manual_seed(seed)) for seed in range(8)]
    return sum(losses.condition_error(training.network, predict, *draw).mean().item() for draw in draws) / len(draws)


def test_the_error_on_held_out_runs_falls(animal, monkeypatch):
    """In a few steps by the node, on runs that it does not learn from."""
    variant, model = animal
    if variant.name not in ("QwenImage", "WAN22_T2V"):
        pytest.skip("two architectures say it; each takes half a minute")
    monkeypatch.setattr(shards, "HELD_OUT", 3)  # so few runs would all be learnt from
    monkeypatch.setattr(ConditionTraining, "error_on", error_on_the_same)
    many = {**RUNS, "train": "condition", "condition_steps": 60, "harmful_runs": 12, "learning_rate": 3e-3, "run_steps": 4}
    train((model, Encoder(variant)), "falls", latent={"samples": latents(variant, 1, 0.0)}, **many)
    history = read_about(recording_folder("falls"))["history"]
    held_out = [entry["held_out"] for entry in history]
    assert held_out[-1] < 0.8 * held_out[0], held_out  # the loss of a step is that of a few other points each time
