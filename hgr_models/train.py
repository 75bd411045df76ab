"""Trains an HGR's guidance redirector from recorded shards, on one process or many:

    torchrun --nproc_per_node N -m hgr_models.train SHARDS... --out FILE

SHARDS are folders that SafeCFG Record Guidance wrote; several machines may have recorded the same prompts with different
seeds. Gradients are averaged by torch's DistributedDataParallel. Stopped and started again with the same command, it goes
on. With a model, it trains the condition redirector too; every process loads one:

    --comfyui PATH --checkpoint NAME    a checkpoint of that ComfyUI, the one that was recorded; run this in its Python
    --model MODULE:FUNCTION             the function is called with the device and gives the frozen denoiser
                                        (`losses.PredictWith`); `demo.training.hgr_data:frozen` is that of the demo model
"""

import argparse
import importlib
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from . import training_state
from .calibration import calibrated, calibrated_on_pictures, harmful_readings, picture_readings, prompt_readings, run_maxima
from .checkpoint import save_hgr
from .condition import ConditionConfig
from .errors import HGRError
from .guidance import GuidanceConfig
from .hgr import HGR, uncalibrated_info
from .losses import PredictWith
from .shards import CALIBRATION, PICTURES, Recording
from .train_condition import ConditionTraining
from .train_guidance import GuidanceTraining
from .training import Training

SAVE_EVERY = 30.0  # seconds
HOST_MODEL = Path(__file__).resolve().parents[1] / "nodes" / "training" / "host_model.py"  # all that knows ComfyUI


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hgr_models.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="+", type=Path, metavar="SHARDS")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the HGR; its state lies beside it while it learns"
    )
    parser.add_argument("--guidance-steps", type=int, default=4200, metavar="N")
    parser.add_argument("--condition-steps", type=int, default=1400, metavar="N", help="with a model")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="the frozen denoiser, for the condition redirector")
    parser.add_argument("--comfyui", type=Path, metavar="PATH", help="the folder of a ComfyUI, with --checkpoint")
    parser.add_argument("--checkpoint", metavar="NAME", help="a checkpoint as its loader lists it, or a path")
    parser.add_argument("--false-positive-rate", type=float, default=0.01, metavar="P")
    parser.add_argument("--batch", type=int, default=24, metavar="N", help="samples per process and step through the model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(line)
    if bool(args.comfyui) != bool(args.checkpoint) or (args.comfyui and args.model):
        parser.error("expected --comfyui and --checkpoint together, or --model, or none of them")
    return args


def start_processes() -> tuple[int, int, torch.device]:
    """Rank, number of processes and device of this one, as torchrun set them."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return rank, world, device


class Command:
    """One run of the command in one process."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.rank, self.world, self.device = start_processes()
        self.recording = Recording.open(*args.shards)
        self.training_part, self.held_out = self.recording.divided()
        self.facts = self.recording.shards[0].about
        self.folder = args.out.parent / f"{args.out.name}.training"
        self.trainings: dict[str, Training] = {}
        self.losses: dict[str, list[float]] = {}
        self.about = training_state.read_about(self.folder)
        if self.about is not None and self.about["settings"] != self._settings():
            raise HGRError(
                f"{self.folder} holds a training with other settings or shards. Choose another --out, or delete it to begin again."
            )

    def _settings(self) -> dict:
        """What must not change between a stop and its resumption."""
        args = {k: v for k, v in vars(self.args).items() if k not in ("out", "shards", "comfyui")}
        return {**args, "shards": sorted(shard.path.name for shard in self.recording.shards), "facts": self.facts}

    def run(self) -> HGR:
        """Trains and calibrates; the first process writes the file."""
        torch.manual_seed(self.args.seed)  # every process begins with the same weights
        info, k = uncalibrated_info(self.facts), len(self.facts["categories"])
        width = self.facts.get("short_width", 0)
        condition = ConditionConfig(info.token_width, k, info.pooled_width, short_width=width)
        condition = condition if self.args.model or self.args.comfyui else None
        hgr = HGR(info, condition, GuidanceConfig(info.latent_channels, k, info.latent_dimensions)).to(self.device)
        if hgr.condition is not None:
            training = ConditionTraining(hgr, self.args.condition_steps, self.args.seed, self.args.batch)
            training.measure(self.recording)
            predict = load_model(self.args, self.device, self.recording)
            training.scale = getattr(predict, "loss_scale", 1.0)
            self._train("condition", training, lambda: training.train_step(self.training_part, predict).loss)
        training_b = GuidanceTraining(hgr, self.args.guidance_steps, self.args.seed + 1)
        self._train("guidance", training_b, lambda: training_b.train_step(self.training_part).loss)
        if self.rank == 0 and self.held_out is not None:
            print(
                f"guidance: distance to the safe direction {training_b.error_on(self.held_out, 512):.3f} on runs that were not trained on"
            )
        if self.rank == 0:
            self._finish(hgr)
        if self.world > 1:
            dist.destroy_process_group()
        return hgr

    def _train(self, name: str, training: Training, step: Callable[[], float]) -> None:
        if self.about is not None:
            training_state.load_state(self.folder, name, training, self.about)
        self.losses[name] = [] if self.about is None else self.about["losses"].get(name, [])
        self.trainings[name] = training
        if self.world > 1:
            training.distribute(self.rank)
        saved, bar = time.monotonic(), tqdm(total=training.steps, initial=training.step, desc=name, disable=self.rank > 0)
        with bar:
            while training.step < training.steps:
                self.losses[name].append(step())
                bar.update()
                if time.monotonic() - saved > SAVE_EVERY:
                    self._save()
                    saved = time.monotonic()
        self._save()
        training.finish()

    def _save(self) -> None:
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            training_state.save_state(self.folder, self.trainings, {"losses": self.losses, "settings": self._settings()})

    def _finish(self, hgr: HGR) -> None:
        hgr.eval().requires_grad_(False)
        texts, shards = self.recording.calibration_texts(), self.recording.of_kind(CALIBRATION)
        if not shards:
            raise HGRError("There are no calibration runs among the shards. Record with `calibration_runs` of at least 1.")
        p = torch.cat([prompt_readings(hgr, t, self.device) for t in texts]) if hgr.condition else None
        b = torch.cat([run_maxima(hgr, shard.runs(), self.device) for shard in shards])
        harmful = harmful_readings(hgr, self.recording, self.device)
        hgr.info = calibrated(hgr, p, b, self.args.false_positive_rate, harmful=harmful)
        if shards := self.recording.of_kind(PICTURES):
            q = torch.cat([picture_readings(hgr, shard.runs(), shard.prompts(), self.device) for shard in shards])
            hgr.info = calibrated_on_pictures(hgr.info, q, self.args.false_positive_rate)
        hgr.info.training.update(steps={name: t.step for name, t in self.trainings.items()}, processes=self.world)
        save_hgr(self.args.out, hgr)
        (self.folder / "losses.json").write_text(json.dumps(self.losses) + "\n", encoding="utf-8")


def load_model(args: argparse.Namespace, device: torch.device, recording: Recording) -> PredictWith:
    """The frozen denoiser for a device: of a checkpoint, or what MODULE:FUNCTION gives."""
    if args.model:
        module, _, function = args.model.partition(":")
        return getattr(importlib.import_module(module), function)(device)
    try:
        return host_model().frozen(device, args.comfyui, args.checkpoint, recording, args.batch)
    except ValueError as error:
        raise HGRError(str(error)) from error


def host_model():
    """The one file outside this package that is needed for --comfyui, loaded by its path. Raises HGRError when it is not there."""
    if not HOST_MODEL.is_file():
        raise HGRError(f"--comfyui needs the whole pack, but there is no {HOST_MODEL}. Run this in its folder, or use --model.")
    spec = importlib.util.spec_from_file_location("safecfg_host_model", HOST_MODEL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    try:
        Command(arguments()).run()
    except HGRError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
