"""`python -m hgr_models.train`: one process and two give the same curve within noise; stopped, it goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hgr_models import HGRError, load_hgr
from hgr_models.detection import LEVELS
from hgr_models.recording import record_runs
from hgr_models.shards import CALIBRATION, CALIBRATION_TEXTS, CLEAN, HARMFUL, PICTURES, Texts, write_runs, write_texts
from hgr_models.train import Command, arguments
from hgr_models.trainer import Trainer
from hgr_models.training_state import read_about
from test_training import c_in, predict, toy_prompts

ROOT = Path(__file__).parents[1]
FACTS = {
    "categories": ["weapons", "drugs"], "latent_format": "SD15", "latent_channels": 4, "latent_dimensions": 2, "prediction": "EPS",
    "token_width": 16, "pooled_width": 0, "guidance_levels": [0.0], "concept_prompts": {}, "prompts": "abc", "base": "",
}  # fmt: skip


def frozen(device):
    """What `--model test_train:frozen` loads."""
    return lambda points, prompts, tokens, pooled: predict(points.x, points.sigma, tokens)


@pytest.fixture
def shards(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "shards"
    for kind in (HARMFUL, CLEAN, CALIBRATION):
        prompts = toy_prompts(24, kind == HARMFUL)
        noise, sigmas = torch.randn(24, 4, 8, 8), torch.tensor([5.0, 2.0, 0.5, 0.0])
        points = record_runs(predict, c_in, prompts, sigmas, noise, "prompt", torch.full((24,), 3.0))
        write_runs(folder / f"{kind}.safetensors", kind, points, prompts, FACTS)
        if kind == CALIBRATION:
            write_runs(folder / "pictures.safetensors", PICTURES, points[: 24 * len(LEVELS)], prompts, FACTS)
        texts = Texts(prompts.tokens, None, None, prompts.harms)
        write_texts(folder / f"t_{kind}.safetensors", texts, FACTS, CALIBRATION_TEXTS if kind == CALIBRATION else "texts")
    return folder


def losses_of(out):
    return json.loads((out.parent / f"{out.name}.training" / "losses.json").read_text())


def run(shards, out, *more):
    Command(arguments([str(shards), "--out", str(out), "--guidance-steps", "24", *more])).run()
    return load_hgr(out)


def test_both_networks_from_shards(shards, tmp_path):
    hgr = run(shards, tmp_path / "a.safetensors", "--model", "test_train:frozen", "--condition-steps", "12", "--batch", "8")
    assert hgr.condition is not None and hgr.info.training["steps"] == {"condition": 12, "guidance": 24}
    assert hgr.info.training["calibration"]["clean_runs"] == hgr.info.training["calibration"]["clean_pictures"] == 24
    assert len(hgr.info.picture_thresholds) == 2
    curve = losses_of(tmp_path / "a.safetensors")
    assert curve["condition"][-1] < curve["condition"][0] and sum(curve["guidance"][-4:]) < sum(curve["guidance"][:4])


def test_stopped_and_started_again_it_goes_on(shards, tmp_path, monkeypatch):
    through = run(shards, tmp_path / "a.safetensors")
    with monkeypatch.context() as patch:
        step = Trainer.save
        patch.setattr("hgr_models.train.SAVE_EVERY", -1.0)  # saves at every step
        patch.setattr(Trainer, "save", lambda self: (step(self), self.trainings["guidance"].step == 9 and exec_stop())[0])
        with pytest.raises(KeyboardInterrupt):
            run(shards, tmp_path / "b.safetensors")
    stopped = run(shards, tmp_path / "b.safetensors")
    a, b = through.state_dict(), stopped.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and len(losses_of(tmp_path / "b.safetensors")["guidance"]) == 24


def test_stopped_in_the_second_part_it_keeps_the_first(shards, tmp_path, monkeypatch):
    options = ("--model", "test_train:frozen", "--condition-steps", "4", "--batch", "4")
    through = run(shards, tmp_path / "a.safetensors", *options)
    with monkeypatch.context() as patch:
        save = Trainer.save
        patch.setattr("hgr_models.train.SAVE_EVERY", -1.0)
        patch.setattr(Trainer, "save", lambda self: (save(self), "guidance" in self.trainings and exec_stop())[0])
        with pytest.raises(KeyboardInterrupt):
            run(shards, tmp_path / "b.safetensors", *options)
    stopped = run(shards, tmp_path / "b.safetensors", *options)
    a, b = through.state_dict(), stopped.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_killed_process_loses_what_came_after_the_last_state(shards, tmp_path):
    """kill -9 in the middle: the same command goes on, and ends as if nothing had happened."""
    through = run(shards, tmp_path / "a.safetensors")
    script = (
        "import os, signal, hgr_models.train as t\n"
        "t.SAVE_EVERY, save = -1.0, t.Trainer.save\n"
        "def saving(self):\n"
        "    if self.trainings['guidance'].step == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save(self)\n"
        "t.Trainer.save = saving\n"
        "t.main()\n"
    )
    command = [sys.executable, "-c", script, str(shards), "--out", str(tmp_path / "b.safetensors"), "--guidance-steps", "24"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "b.safetensors").exists()
    assert read_about(tmp_path / "b.safetensors.training")["trainings"]["guidance"]["step"] == 8
    a, b = through.state_dict(), run(shards, tmp_path / "b.safetensors").state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_batch_larger_than_the_recording(shards, tmp_path):
    out, few = tmp_path / "a.safetensors", ("--model", "test_train:frozen", "--condition-steps", "1", "--guidance-steps", "1")
    assert run(shards, out, "--batch", "200", *few).info.training["steps"] == {"condition": 1, "guidance": 1}


@pytest.mark.parametrize(
    "more", [["--comfyui", "x"], ["--checkpoint", "x"], ["--comfyui", "x", "--checkpoint", "x", "--model", "a:b"]]
)
def test_a_checkpoint_needs_its_comfyui(more, capsys):
    with pytest.raises(SystemExit):
        arguments(["shards", "--out", "a", *more])
    assert "--comfyui and --checkpoint together" in capsys.readouterr().err


def test_no_comfyui_is_said(shards, tmp_path):
    with pytest.raises(HGRError, match="There is no ComfyUI in .*absent. Give the folder that has its main.py"):
        run(shards, tmp_path / "a.safetensors", "--comfyui", str(tmp_path / "absent"), "--checkpoint", "x")


def exec_stop():
    raise KeyboardInterrupt


def test_two_processes_give_the_same_curve_within_noise(shards, tmp_path):
    run(shards, tmp_path / "one.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hgr_models.train"]
    command += [str(shards), "--out", str(tmp_path / "two.safetensors"), "--guidance-steps", "24"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert load_hgr(tmp_path / "two.safetensors").info.training["processes"] == 2
    one, two = (losses_of(tmp_path / f"{name}.safetensors")["guidance"] for name in ("one", "two"))
    ends = [sum(curve[-8:]) / 8 for curve in (one, two)]
    assert ends[1] == pytest.approx(ends[0], rel=0.3) and len(two) == 24


def test_shards_without_calibration_runs_are_refused(shards, tmp_path):
    (shards / "calibration.safetensors").unlink()
    with pytest.raises(HGRError, match="no calibration runs"):
        run(shards, tmp_path / "a.safetensors", "--guidance-steps", "1")
    assert not (tmp_path / "a.safetensors").exists()


def test_another_training_is_not_taken_up(shards, tmp_path):
    run(shards, tmp_path / "a.safetensors")
    with pytest.raises(HGRError, match="other settings or shards. Choose another --out"):
        run(shards, tmp_path / "a.safetensors", "--seed", "1")
