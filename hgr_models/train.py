"""Trains an HGR's guidance redirector from recorded shards, on one process or many:

    torchrun --nproc_per_node N -m hgr_models.train SHARDS... --out FILE

SHARDS are folders that SafeCFG Record Guidance wrote; several machines may have recorded the same prompts with different
seeds. Gradients are averaged by torch's DistributedDataParallel. Stopped and started again with the same command, it goes
on. With --prompt-steps the condition redirector learns from the recorded prompts alone. With a model it learns through that,
afterwards or alone; every process loads one:

    --comfyui PATH --checkpoint NAME    a checkpoint of that ComfyUI, the one that was recorded; run this in its Python
    --model MODULE:FUNCTION             the function is called with the device and gives the frozen denoiser
                                        (`losses.PredictWith`); `demo.training.hgr_data:frozen` is that of the demo model
"""

import argparse
import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

import torch
import torch.distributed as dist
from tqdm import tqdm

from .checkpoint import save_hgr
from .condition import ConditionConfig
from .errors import HGRError
from .guidance import GuidanceConfig
from .hgr import HGR, NO_LATENTS, uncalibrated_info
from .losses import PredictWith
from .shards import CALIBRATION, Recording
from .train_condition import ConditionTraining
from .train_guidance import GuidanceTraining
from .train_text import TextTraining
from .trainer import CONDITION, GUIDANCE, PROMPTS, Phase, Step, Trainer, calibrate
from .training import StepReport, Training

SAVE_EVERY = 30.0  # seconds
CLI_MODEL = Path(__file__).resolve().parents[1] / "nodes" / "training" / "cli_model.py"  # all that knows ComfyUI


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hgr_models.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="+", type=Path, metavar="SHARDS")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the HGR; its state lies beside it while it learns"
    )
    parser.add_argument("--guidance-steps", type=int, default=4200, metavar="N", help="0: no guidance redirector")
    parser.add_argument(
        "--prompt-steps", type=int, default=0, metavar="N", help="of the condition redirector from recorded prompts alone"
    )
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
        self.losses: dict[str, list[float]] = {}
        more = {"losses": self.losses, "settings": self._settings()}
        self.trainer = Trainer(self.folder, more=more, save_every=SAVE_EVERY, stores=self.rank == 0)
        about = self.trainer.take_up()
        if about is not None and about["settings"] != self._settings():
            raise HGRError(
                f"{self.folder} holds a training with other settings or shards. Choose another --out, or delete it to begin again."
            )
        self.losses |= {} if about is None else about["losses"]

    def _settings(self) -> dict:
        """What must not change between a stop and its resumption."""
        args = {k: v for k, v in vars(self.args).items() if k not in ("out", "shards", "comfyui")}
        return {**args, "shards": sorted(shard.path.name for shard in self.recording.shards), "facts": self.facts}

    def run(self) -> HGR:
        """Trains and calibrates; the first process writes the file."""
        torch.manual_seed(self.args.seed)  # every process begins with the same weights
        hgr = self._new_hgr().to(self.device)
        if self.args.prompt_steps:
            text = TextTraining(hgr, self.args.prompt_steps, self.args.seed)
            text.measure(self.recording)
            self._train(PROMPTS, text, lambda: text.train_step(self.recording))
        if self.args.model or self.args.comfyui:
            polish = ConditionTraining(hgr, self.args.condition_steps, self.args.seed, self.args.batch)
            if not self.args.prompt_steps:
                polish.measure(self.recording)
            predict = load_model(self.args, self.device, self.recording)
            polish.scale = getattr(predict, "loss_scale", 1.0)
            self._train(CONDITION, polish, lambda: polish.train_step(self.training_part, predict))
        if hgr.guidance is not None:
            guidance = GuidanceTraining(hgr, self.args.guidance_steps, self.args.seed + 1)
            self._train(GUIDANCE, guidance, lambda: guidance.train_step(self.training_part))
            if self.rank == 0 and self.held_out is not None:
                error = guidance.error_on(self.held_out, 512)
                print(f"guidance: distance to the safe direction {error:.3f} on runs that were not trained on")
        if self.rank == 0:
            self._finish(hgr)
        if self.world > 1:
            dist.destroy_process_group()
        return hgr

    def _new_hgr(self) -> HGR:
        """The networks that are asked for; without the guidance redirector the HGR belongs to the text encoder."""
        facts = self.facts if self.args.guidance_steps else {**self.facts, **NO_LATENTS}
        info, k, width = uncalibrated_info(facts), len(self.facts["categories"]), self.facts.get("short_width", 0)
        asked = self.args.prompt_steps or self.args.model or self.args.comfyui
        condition = ConditionConfig(info.token_width, k, info.pooled_width, short_width=width) if asked else None
        guidance = GuidanceConfig(info.latent_channels, k, info.latent_dimensions) if self.args.guidance_steps else None
        return HGR(info, condition, guidance)

    def _train(self, name: str, training: Training, step: Callable[[], StepReport]) -> None:
        self.trainer.begin(name, training)
        losses = self.losses.setdefault(name, [])
        if self.world > 1:
            training.distribute(self.rank)
        with tqdm(total=training.steps, initial=training.step, desc=name, disable=self.rank > 0) as bar:

            def note(at: Step) -> None:
                losses.append(at.report.loss)
                bar.update()

            self.trainer.progress = note
            self.trainer.run(Phase(name, training, step, training.steps))

    def _finish(self, hgr: HGR) -> None:
        if hgr.guidance is not None and not self.recording.of_kind(CALIBRATION):
            raise HGRError("There are no calibration runs among the shards. Record with `calibration_runs` of at least 1.")
        info = calibrate(hgr, self.recording, self.args.false_positive_rate, self.device)
        steps = {name: training.step for name, training in self.trainer.trainings.items()}
        info.training.update(steps=steps, processes=self.world)
        save_hgr(self.args.out, hgr)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "losses.json").write_text(json.dumps(self.losses) + "\n", encoding="utf-8")


def load_model(args: argparse.Namespace, device: torch.device, recording: Recording) -> PredictWith:
    """The frozen denoiser for a device: of a checkpoint, or what MODULE:FUNCTION gives."""
    if args.model:
        return resolve_name(args.model)(device)
    try:
        return cli_model().frozen(device, args.comfyui, args.checkpoint, recording, args.batch)
    except ValueError as error:
        raise HGRError(str(error)) from error


def cli_model() -> ModuleType:
    """The one file outside this package that is needed for --comfyui, loaded by its path. Raises HGRError when it is not there."""
    if not CLI_MODEL.is_file():
        raise HGRError(f"--comfyui needs the whole pack, but there is no {CLI_MODEL}. Run this in its folder, or use --model.")
    spec = importlib.util.spec_from_file_location("safecfg_cli_model", CLI_MODEL)
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
