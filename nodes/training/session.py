"""One training of an HGR: encode, record, train both networks, calibrate. Every part can be stopped and taken up again."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import comfy.model_management
import torch
from PIL import Image

from ... import hgr_models
from ...hgr_models import training_state as state
from ...hgr_models.calibration import (
    calibrated,
    calibrated_on_pictures,
    harmful_readings,
    picture_readings,
    prompt_readings,
    run_maxima,
)
from ...hgr_models.condition import robust_units
from ...hgr_models.hgr import uncalibrated_info
from ...hgr_models.pairs import PromptSet
from ...hgr_models.shards import CALIBRATION, CLEAN, HARMFUL, PICTURES, Recording
from ...hgr_models.train_condition import ConditionTraining
from ...hgr_models.train_guidance import GuidanceTraining
from ...hgr_models.training import StepReport, Training
from . import curves, estimate
from .bare import without_safecfg
from .encoding import encode_batch, text_of
from .facts import recording_facts
from .frozen import FrozenModel, check_can_freeze, gradient_error
from .plan import TrainPlan, make_folder
from .progress import Progress
from .recorder import FOLLOW, clean_pairs, plan_jobs, record, write_prompts

MAX_GRADIENT_ERROR = 0.3
REPORT_EVERY = 10  # steps

logger = logging.getLogger(__name__)


class Session:
    """A training in its folder; `say` shows a line of text to the user. Without a model it trains from recorded shards."""

    def __init__(self, plan: TrainPlan, folder: Path, say: Callable[[str], None], model=None, clip=None, prompts=None):
        self.plan, self.folder, self.say, self.clip = plan, folder, say, clip
        self.prompts: PromptSet | None = prompts
        self.model = None if model is None else without_safecfg(model)
        self.history: list[dict] = []
        self.trainings: dict[str, Training] = {}
        self.facts: dict = {}
        self.notes: list[str] = []

    def encode(self, texts: list[str]) -> list:
        """A batched CONDITIONING of prompts."""
        return encode_batch(self.clip, texts)

    def new_info(self) -> hgr_models.HGRInfo:
        """Metadata of an HGR for this recording, not yet calibrated."""
        return uncalibrated_info(self.facts)

    def configs(self) -> tuple:
        """The networks' sizes for this recording's family."""
        return self.plan.configs(self.new_info(), self.facts.get("short_width", 0))

    @property
    def device(self) -> torch.device:
        """Where the redirectors learn."""
        return comfy.model_management.get_torch_device() if self.model is None else self.model.load_device

    def identify(self) -> str:
        """The digest of this training: what decides whether another one can be taken up. Changes nothing but the folder.

        Raises HGRError for a model of which no HGR can be trained, and where nothing is recorded and there is no model.
        """
        make_folder(self.folder)
        if self.model is not None:
            sample = text_of(self.encode([""]), torch.zeros(1, len(self.prompts.categories)))
            self.facts = recording_facts(self.model, self.prompts, sample)
        else:
            self.facts = Recording.open(self.folder).shards[0].about
        self.digest = self.plan.digest(self.facts)
        return self.digest

    def prepare(self, record_only: bool = False) -> None:
        """Looks at what is there, at the model and at the disk, and says what it will take; `identify` comes first.

        Raises HGRError when the folder belongs to another training, or the disk is too small.
        """
        if self.model is not None and self.plan.by_condition and not record_only:
            check_can_freeze(self.model)
        self.about = None if record_only else state.read_about(self.folder)
        if self.about is not None and self.about["digest"] != self.digest:
            raise hgr_models.HGRError(
                f"{self.folder} holds a training with other settings, prompts or another model. "
                "Switch `resume` off to begin again there, or choose another name."
            )
        self.history = [] if self.about is None else self.about["history"]
        cost = estimate.estimate(self, record_only)
        self.say(cost.in_words())
        cost.check_disk(self.folder)
        self.progress = Progress(cost.parts, self.draw, self.save, self.say)

    def draw(self) -> Image.Image:
        """The curves so far."""
        return curves.draw(self.history, tuple(self.facts["categories"]), self.plan.name, self.notes)

    def save(self) -> None:
        """Stores the state; nothing before the first training has begun."""
        if self.trainings:
            state.save_state(self.folder, self.trainings, {"digest": self.digest, "history": self.history, "facts": self.facts})

    def record(self) -> Recording:
        """Encodes the prompts and records all runs that need no HGR; without a model, what was recorded."""
        if self.model is None:
            return Recording.open(self.folder)
        for share in write_prompts(self.clip, self.prompts, self.plan.runs.seed, self.folder, self.facts):
            self.progress.update("prompts", share, "encoding prompts")
        recording = Recording.open(self.folder)
        self.scale = robust_units(recording.draw_texts(True, 64, torch.Generator().manual_seed(0)).tokens.flatten(0, 1))[1]
        plan, runs = self.plan, self.plan.runs
        jobs = plan_jobs(runs, HARMFUL, self.prompts.pairs, plan.first_runs, FOLLOW)
        if plan.by_guidance:
            jobs += plan_jobs(runs, CLEAN, clean_pairs(self.prompts.clean), plan.clean_runs, FOLLOW[:1])
            jobs += plan_jobs(
                runs, CALIBRATION, clean_pairs(self.prompts.held_out_clean), plan.calibration_runs, FOLLOW[:1], looks=0
            )
        self._record(jobs, "recording")
        return Recording.open(self.folder)

    def _record(self, jobs, part: str, policy=None) -> None:
        started = time.monotonic()
        done = record(self.model, self.clip, self.prompts, jobs, self.plan.runs, self.folder, self.facts, self.scale, policy)
        for i, job in enumerate(done, 1):
            self.progress.rate(part, (time.monotonic() - started) / i * len(jobs))
            self.progress.update(part, i / len(jobs), f"{part}: {job.kind} runs, batch {i} of {len(jobs)}")

    def train(self, recording: Recording) -> hgr_models.HGR:
        """Trains what the plan asks for, calibrates, and gives the HGR."""
        with torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(self.plan.runs.seed)  # the networks' first weights
            info = self.new_info()
            hgr = hgr_models.HGR(info, *self.configs()).to(self.device)
            if hgr.condition is not None and not self._train_condition(hgr, recording):
                hgr = hgr_models.HGR(info, None, self.configs()[1]).to(self.device)
            if hgr.guidance is not None:
                self._train_guidance(hgr, recording)
            for training in self.trainings.values():
                training.finish()
        hgr.eval().requires_grad_(False)
        hgr.calibrate(self._calibrate(hgr, recording))
        self.progress.update("calibration", 1.0, "calibrated")
        self.save()
        return hgr

    def _take_up(self, name: str, training: Training) -> None:
        if self.about is not None:
            state.load_state(self.folder, name, training, self.about)
        self.trainings[name] = training

    def _train_condition(self, hgr, recording: Recording) -> bool:
        """False when the model carries no gradients and the guidance redirector is to be trained alone."""
        plan = self.plan
        training = ConditionTraining(hgr, plan.condition_steps, plan.runs.seed, plan.runs.batch, plan.learning_rate)
        training.measure(recording)
        self._take_up("condition", training)
        if training.step >= plan.condition_steps:
            return True
        with torch.inference_mode():
            template = self.encode([""])[0][1]
        frozen = FrozenModel(self.model, template)
        points, prompts = recording.draw(HARMFUL, min(2, plan.runs.batch), torch.Generator().manual_seed(0))
        with frozen.loaded((plan.runs.batch, *points.x.shape[1:]), plan.checkpointing):
            error = gradient_error(frozen, points, prompts)
            if not error < MAX_GRADIENT_ERROR:
                return self._without_gradients(error)
            if frozen.half:
                training.scale = max(training.scale, 2.0**12) if training.step == 0 else training.scale
            recording, held_out = recording.divided()
            self._steps(
                "condition",
                training,
                plan.condition_steps,
                lambda: training.train_step(recording, frozen.predict),
                None if held_out is None else lambda: training.error_on(held_out, frozen.predict),
            )
        return True

    def _without_gradients(self, error: float) -> bool:
        message = (
            f"this model carries no exact gradients to its prompts (relative error {error:.2f}; quantised or offloaded weights?), "
            "so the condition redirector cannot be trained"
        )
        if not self.plan.by_guidance:
            raise hgr_models.HGRError(f"Cannot train: {message}. Load the model in fp16, bf16 or fp32, or train `guidance`.")
        del self.trainings["condition"]
        self.notes.append("guidance redirector alone: the model carries no gradients")
        logger.warning("SafeCFG: %s; training the guidance redirector alone.", message)
        self.say(f"{message}: the guidance redirector is trained alone")
        return False

    def _train_guidance(self, hgr, recording: Recording) -> None:
        training = GuidanceTraining(hgr, self.plan.guidance_steps, self.plan.runs.seed + 1, 1.5 * self.plan.learning_rate)
        self._take_up("guidance", training)
        half = training.steps // 2 if self.plan.policy_runs and self.model is not None else 0
        self._guidance_steps(training, recording, half)
        if half:
            recording = self._record_policy(hgr)
        self._guidance_steps(training, recording, training.steps)

    def _guidance_steps(self, training: GuidanceTraining, recording: Recording, until: int) -> None:
        comfy.model_management.free_memory(estimate.guidance_bytes(self), self.device)  # it learns without the model
        recording, held_out = recording.divided()
        error_on = None if held_out is None else lambda: training.error_on(held_out)
        self._steps("guidance", training, until, lambda: training.train_step(recording), error_on)

    def _record_policy(self, hgr) -> Recording:
        """Runs that follow the HGR in training: it must turn what it will meet."""
        jobs = plan_jobs(self.plan.runs, HARMFUL, self.prompts.pairs, self.plan.policy_runs, ("policy",))
        on = hgr_models.CategorySettings((1.0,) * len(hgr.info.categories))

        def policy(model, x, sigma, uncond_denoised, cond_denoised):
            x_in = model.model_sampling.calculate_input(sigma, x)
            return hgr_models.redirect_guidance(hgr, cond_denoised, uncond_denoised, x_in, sigma, on).cond_denoised

        self.save()
        with torch.inference_mode():
            self._record(jobs, "recording on-policy", policy)
        return Recording.open(self.folder)

    def _steps(
        self,
        part: str,
        training: Training,
        until: int,
        step: Callable[[], StepReport],
        held_out: Callable[[], float] | None,
    ) -> None:
        """Trains to a step; what is there is stored when it ends, for whatever reason. `held_out` measures on other runs."""
        started, first = time.monotonic(), training.step
        try:
            while training.step < until:
                report = step()
                if training.step % REPORT_EVERY == 0:
                    report.held_out = held_out() if held_out else None
                    self.history.append({"part": part, "step": training.step, **asdict(report)})
                each = (time.monotonic() - started) / (training.step - first)
                self.progress.rate(part, each * training.steps)
                message = f"{part} redirector: step {training.step} of {training.steps}, error {report.error:.2f}"
                self.progress.update(part, training.step / training.steps, message)
        finally:
            self.save()

    def _calibrate(self, hgr, recording: Recording) -> hgr_models.HGRInfo:
        """`hgr.info` with thresholds from prompts and runs that nothing else uses."""
        p = [prompt_readings(hgr, texts, self.device) for texts in recording.calibration_texts()] if hgr.condition else []
        b = [run_maxima(hgr, shard.runs(), self.device) for shard in recording.of_kind(CALIBRATION)] if hgr.guidance else []
        rate, harmful = self.plan.false_positive_rate, harmful_readings(hgr, recording, self.device)
        info = calibrated(hgr, torch.cat(p) if p else None, torch.cat(b) if b else None, rate, harmful=harmful)
        shards = recording.of_kind(PICTURES) if hgr.guidance else []
        if shards:
            scores = [picture_readings(hgr, shard.runs(), shard.prompts(), self.device) for shard in shards]
            info = calibrated_on_pictures(info, torch.cat(scores), rate)
        steps = {name: training.step for name, training in self.trainings.items()}
        info.training.update(steps=steps, prompts=self.facts["prompts"], digest=self.digest)
        return info
