"""One trainer of an HGR for the node, the command line and the demo: phases in order, then calibration.

    prompts      the condition redirector in text space (`train_text`): needs encoded pairs, no denoiser
    condition    the same network through the frozen denoiser (`train_condition`): a polish, or all of its training
    guidance     the guidance redirector (`train_guidance`): needs recorded runs
    calibration  thresholds from clean prompts and clean runs (`calibration`)

A phase is a value; what it trained is stored under its name, and a stopped training goes on to the same bits.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import training_state
from .calibration import (
    calibrated,
    calibrated_on_pictures,
    harmful_readings,
    picture_readings,
    prompt_readings,
    run_maxima,
)
from .hgr import HGR, HGRInfo
from .shards import CALIBRATION, PICTURES, Recording
from .training import StepReport, Training
from .training_state import Part

PROMPTS, CONDITION, GUIDANCE = "prompts", "condition", "guidance"
REPORT_EVERY = 10  # steps


@dataclass(frozen=True)
class Phase:
    """A part of a training: `step` does one step of `training`, until it has done `until` in all.

    `held_out` gives the error on samples that are not trained on, or None where there are none. `followed_by` names the phases
    that go on from its network.
    """

    name: str
    training: Training
    step: Callable[[], StepReport]
    until: int
    held_out: Callable[[], float | None] = lambda: None
    followed_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """Where a phase is: the step of how many, the last report, and seconds per step of this run."""

    phase: str
    step: int
    steps: int
    report: StepReport
    seconds: float


def nothing(*_: object) -> None:
    """A callback that does nothing."""


@dataclass
class Trainer:
    """Runs phases and remembers them; `folder` holds the state (None: nothing is stored).

    `progress` is called after every step and may raise to interrupt: what was done is stored first. `digest`, `facts` and
    `more` are kept with the state, to tell whether it can be taken up.
    """

    folder: Path | None
    digest: str = ""
    facts: dict = field(default_factory=dict)
    more: dict = field(default_factory=dict)
    progress: Callable[[Step], object] = nothing
    save_every: float = 30.0  # seconds
    history: list[dict] = field(default_factory=list)
    trainings: dict[str, Training] = field(default_factory=dict)
    about: dict | None = None
    stores: bool = True  # False: another process does
    _parts: dict[str, "Part"] = field(default_factory=dict)
    _done: dict[str, "Part"] = field(default_factory=dict)
    _saved: float = field(default_factory=time.monotonic)

    def take_up(self) -> dict | None:
        """What the folder's last state says (None: nothing is there); phases then go on from it."""
        self.about = None if self.folder is None else training_state.read_about(self.folder)
        self.history = [] if self.about is None else self.about.get("history", [])
        for name, facts in {} if self.about is None else self.about["trainings"].items():
            # Kept until the phase begins: an earlier one may be stored once more before.
            self._parts[name] = Part(training_state.read_tensors(self.folder, name), facts)
        return self.about

    def save(self) -> None:
        """Stores the state of every phase that has begun."""
        if self.folder is not None and self.stores and self.trainings:
            about = {**self.more, "digest": self.digest, "history": self.history, "facts": self.facts}
            training_state.save_state(self.folder, {**self._parts, **self.trainings, **self._done}, about)
        self._saved = time.monotonic()

    def begin(self, name: str, training: Training) -> Training:
        """Takes up a phase's stored state, if there is any; its steps may have become more or fewer since."""
        if name in self._parts:
            steps = training.steps
            training_state.put_state(self._parts.pop(name), training, self.folder)
            training.steps = steps
        self.trainings[name] = training
        return training

    def run(self, phase: Phase) -> None:
        """Trains a phase until a step; what is there is stored when it ends, for whatever reason.

        At the end of all its steps the averaged weights are put into the network, which another phase may go on with: what
        such a phase learnt from fewer steps is forgotten, since it would undo the new ones.
        """
        training, started, first = phase.training, time.monotonic(), phase.training.step
        if training.step < phase.until:
            self._forget(phase.followed_by)
        try:
            while training.step < phase.until:
                report = phase.step()
                if training.step % REPORT_EVERY == 0:
                    report.held_out = phase.held_out()
                    self.history.append({"part": phase.name, "step": training.step, **asdict(report)})
                each = (time.monotonic() - started) / (training.step - first)
                self.progress(Step(phase.name, training.step, training.steps, report, each))
                if time.monotonic() - self._saved > self.save_every:
                    self.save()
        finally:
            if training.step > first:
                self.save()
        if training.step >= training.steps:
            self.end(phase.name)

    def _forget(self, names: tuple[str, ...]) -> None:
        for name in names:
            self._parts.pop(name, None)
        self.history = [entry for entry in self.history if entry["part"] not in names]

    def end(self, name: str) -> None:
        """Puts a phase's averaged weights into its network; its state stays as it was."""
        tensors, facts = self.trainings[name].state()
        self._done[name] = Part({key: value.detach().clone() for key, value in tensors.items()}, facts)
        self.trainings[name].finish()


def calibrate(hgr: HGR, recording: Recording, rate: float, device: torch.device) -> HGRInfo:
    """Gives an HGR thresholds from prompts and runs that nothing else uses, and its metadata.

    `rate` is the share of clean pictures that may be redirected, both networks and all categories together.
    """
    hgr.train(False).requires_grad_(False)
    p = [prompt_readings(hgr, texts, device) for texts in recording.calibration_texts()] if hgr.condition else []
    b = [run_maxima(hgr, shard.runs(), device) for shard in recording.of_kind(CALIBRATION)] if hgr.guidance else []
    harmful = harmful_readings(hgr, recording, device)
    info = calibrated(hgr, torch.cat(p) if p else None, torch.cat(b) if b else None, rate, harmful=harmful)
    if hgr.guidance and (shards := recording.of_kind(PICTURES)):
        scores = torch.cat([picture_readings(hgr, shard.runs(), shard.prompts(), device) for shard in shards])
        info = calibrated_on_pictures(info, scores, rate)
    hgr.calibrate(info)
    return info


def share_flagged(hgr: HGR, recording: Recording, device: torch.device) -> float:
    """The share of a recording's harmful runs that the guidance redirector flags for a harm that they show."""
    _, b = harmful_readings(hgr, recording, device)
    limits = torch.tensor(hgr.info.guidance_thresholds)
    return float((b.nan_to_num(0.0) > limits).flatten(1).any(dim=1).float().mean())
