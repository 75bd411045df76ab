"""`python -m hgr_models.train --comfyui PATH --checkpoint NAME`: every process loads the checkpoint through this ComfyUI."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from safecfg import hgr_models
from safecfg.hgr_models.shards import HARMFUL, Recording
from safecfg.nodes.training.plan import recording_folder
from safecfg.nodes.training.record_guidance import RecordGuidance

from test_training import SMALL, folders, prompt_set  # noqa: F401 (folders is a fixture)
from test_training_families import POOLED, WIDTH, TinyClip
from tiny_checkpoint import write_checkpoint

PACK, HOST = Path(__file__).parents[2], Path(os.environ["COMFYUI_PATH"])
CPU = torch.device("cpu")


def cli_model():
    """The file as the command loads it."""
    spec = importlib.util.spec_from_file_location("loaded_by_path", PACK / "nodes" / "training" / "cli_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A checkpoint with a name that the loader knows."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path)], {".safetensors"}))
    return write_checkpoint(tmp_path / "tiny.safetensors", WIDTH, POOLED)


@pytest.fixture
def recording(checkpoint):
    model = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False, output_clip=False)[0]
    with torch.inference_mode():
        RecordGuidance.execute(model, TinyClip(), prompt_set(), "shared", **{**SMALL, "sizes": "64x64"})
    return Recording.open(recording_folder("shared"))


def test_the_checkpoint_is_the_recorded_model_and_carries_gradients(checkpoint, recording):
    predict = cli_model().frozen(CPU, HOST, "tiny.safetensors", recording, 2)
    points, prompts = recording.draw(HARMFUL, 3, torch.Generator().manual_seed(1))
    tokens = prompts.tokens.requires_grad_(True)
    denoised = predict(points, prompts, tokens, prompts.pooled)
    torch.testing.assert_close(denoised, points.cond_denoised, atol=0.02, rtol=0.02)
    assert torch.autograd.grad(denoised.square().sum(), tokens)[0].any() and predict.loss_scale == 1.0
    predict.close()  # else this process would go on as one that trains: core's flag, without inference mode
    assert not getattr(comfy.model_management, "in_training", False)


def test_what_cannot_be_loaded_is_said(checkpoint, recording, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint 'absent'"):
        cli_model().frozen(CPU, HOST, "absent", recording, 2)
    other = write_checkpoint(tmp_path / "other.safetensors", WIDTH, POOLED, seed=1)
    with pytest.raises(ValueError, match="recorded with another model than .*other.safetensors"):
        cli_model().frozen(CPU, HOST, str(other), recording, 2)


def test_two_processes_train_both_networks(checkpoint, recording, tmp_path):
    out = tmp_path / "both.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hgr_models.train"]
    command += [str(recording_folder("shared")), "--out", str(out), "--comfyui", str(HOST), "--checkpoint", str(checkpoint)]
    command += ["--condition-steps", "3", "--guidance-steps", "2", "--batch", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=PACK, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    hgr = hgr_models.load_hgr(out)
    assert hgr.info.training["steps"] == {"condition": 3, "guidance": 2} and hgr.info.training["processes"] == 2
    assert hgr.condition is not None and hgr.info.latent_format == "SD3" and hgr.condition.token_out.weight.any()
