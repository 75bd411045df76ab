"""One training of an HGR: encode, record, train both networks, calibrate. Every part can be stopped and taken up again."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from PIL import Image

from ... import hgr_models
from ...hgr_models.condition import robust_units
from ...hgr_models.hgr import WEAK, uncalibrated_info
from ...hgr_models.pairs import PromptSet
from ...hgr_models.shards import CALIBRATION, CLEAN, HARMFUL, PAIRS, Recording
from ...hgr_models.train_condition import ConditionTraining
from ...hgr_models.train_guidance import GuidanceTraining
from ...hgr_models.train_text import TextTraining
from ...hgr_models.trainer import CONDITION, GUIDANCE, PROMPTS, Phase, Step, Trainer, calibrate, share_flagged
from ...hgr_models.training import Training
from ..host.embedded import clip_for
from ..host.encoder_print import encoder_of, first_shard, recorded_print
from ..host.encoding import QUOTED, encode_batch, text_of
from ..host.hooks import without_safecfg
from . import curves, estimate, forward_check
from .frozen_model import FrozenModel, check_can_freeze
from .gradient import probe_gradient
from .plan import WITH_GUIDANCE, TrainPlan, make_folder, recording_facts
from .progress import Progress
from .prompt_recorder import write_prompts
from .recorder import FOLLOW, Job, Policy, clean_pairs, plan_jobs, record_shards

WORDS = {PROMPTS: "condition redirector from prompts", CONDITION: "condition redirector", GUIDANCE: "guidance redirector"}

BEGIN_AGAIN = "Switch `resume` off to begin again there, or choose another name."

INERT = 0.1  # share of the harmful runs that a guidance redirector flags, below which it is none

logger = logging.getLogger(__name__)


class OtherTraining(hgr_models.HGRError):
    """A folder holds another training or recording."""


class Session:
    """A training in its folder; `say` shows a line of text to the user. Without CLIP and prompts it trains from recorded shards."""

    def __init__(
        self,
        plan: TrainPlan,
        folder: Path,
        say: Callable[[str], None],
        model: ModelPatcher | None = None,
        clip: CLIP | None = None,
        prompts: PromptSet | None = None,
    ):
        self.plan, self.folder, self.say = plan, folder, say
        self.prompts: PromptSet | None = prompts
        self.model = None if model is None else without_safecfg(model)
        self.trainer = Trainer(folder, progress=self._show)
        self.clip = clip if model is None else clip_for(self.model, clip)
        self.facts: dict = {}
        self.notes: list[str] = []
        self.checking = 0.0  # seconds of the model's checks, about; 0: unknown, or there is none
        self.asked = 0  # checks so far

    @property
    def history(self) -> list[dict]:
        """Step reports so far, of all phases."""
        return self.trainer.history

    @property
    def trainings(self) -> dict[str, Training]:
        """What has begun, by the name of its phase."""
        return self.trainer.trainings

    def encode(self, texts: list[str]) -> list:
        """A batched CONDITIONING of prompts."""
        return encode_batch(self.clip, texts)

    def new_info(self) -> hgr_models.HGRInfo:
        """Metadata of an HGR for this recording, not yet calibrated."""
        return uncalibrated_info(self.plan.family_facts(self.facts))

    def configs(self) -> tuple:
        """The networks' sizes for this recording's family."""
        return self.plan.configs(self.new_info(), self.facts.get("short_width", 0))

    @property
    def checks(self) -> int:
        """How often the model is asked whether it draws what corrected prompts say: before a polish that may be needed, and at the end."""
        if self.model is None or not self.plan.by_condition:
            return 0
        return 2 if self.plan.by_text and not self.plan.by_denoiser else 1

    @property
    def device(self) -> torch.device:
        """Where the redirectors learn."""
        return comfy.model_management.get_torch_device() if self.model is None else self.model.load_device

    def identify(self, anew: bool = False) -> str:
        """The digest of this training: what decides whether another one can be taken up. Changes nothing but the folder.

        `anew`: what the folder holds is about to be deleted, and need not fit. Raises HGRError for a model of which no HGR can be
        trained, and where nothing is recorded and there is no CLIP.
        """
        make_folder(self.folder)
        if self.clip is None:
            self.facts = Recording.open(self.folder).shards[0].about
        else:
            sample = text_of(self.encode([QUOTED]), torch.zeros(1, len(self.prompts.categories)))
            found = encoder_of(self.clip)
            self.facts = recording_facts(self.model, self.prompts, sample, recorded_print(self.folder, found, anew))
        self.trainer.facts, self.trainer.digest = self.facts, self.plan.digest(self.facts)
        self.trainer.more = {"of_text": self.plan.digest_of_text(self.facts), "of_runs": self.plan.digest_of_runs(self.facts)}
        return self.digest

    @property
    def digest(self) -> str:
        """Of this training; `identify` makes it."""
        return self.trainer.digest

    def prepare(self, record_only: bool = False) -> None:
        """Looks at what is there, at the model and at the disk, and says what it will take; `identify` comes first.

        Raises HGRError when the folder belongs to another training, or the disk is too small.
        """
        if self.model is not None and self.plan.by_denoiser and not self.plan.by_text and not record_only:
            check_can_freeze(self.model)
        about = None if record_only else self.trainer.take_up()
        if about is not None and not self.plan.continues(about, self.facts):
            raise OtherTraining(f"{self.folder} holds a training with other settings, prompts or another model. {BEGIN_AGAIN}")
        if (first := first_shard(self.folder)) is not None and not first.belongs_to(self.facts):
            raise OtherTraining(f"{self.folder} was recorded with other prompts or another model. {BEGIN_AGAIN}")
        if self.model is not None and self.clip is not None:
            row = forward_check.check_reads(self.model, self.clip, self.prompts, self.plan.runs)
            self.checking = self.checks * forward_check.seconds_of(row, self.plan.runs)
        if self.model is not None and self.plan.by_denoiser and not record_only:
            self._check_gradient()
        cost = estimate.estimate(self, record_only)
        self.say(cost.in_words())
        cost.check_disk(self.folder)
        self.progress = Progress(cost.parts, self.draw, self.save, self.say)

    def _check_gradient(self) -> None:
        """Asks the model for gradients before anything is recorded; without them its part of the training is left out.

        Raises HGRError where nothing is left to train.
        """
        text = self.prompts.pairs[0].harmful
        self.gradient = probe_gradient(self.model, self.encode([text]), self.plan.runs, self.plan.checkpointing)
        if self.gradient.passed:
            return
        message = f"{self.gradient.in_words()}, so the condition redirector cannot be trained through it"
        if not self.plan.by_guidance:
            raise hgr_models.HGRError(f"Cannot train: {message}. Set `train` to prompts, which needs no gradients.")
        note = "guidance redirector alone" if not self.plan.by_text else "not polished through the model"
        self.plan = replace(self.plan, networks=WITH_GUIDANCE if self.plan.by_text else GUIDANCE)
        self.notes.append(f"{note}: the model carries no gradients")
        logger.warning("SafeCFG: %s: %s.", message, note)
        self.say(f"{message}: {note}")

    def draw(self) -> Image.Image:
        """The curves so far."""
        plan, categories = self.plan, tuple(self.facts["categories"])
        wanted = {PROMPTS: plan.by_text, CONDITION: plan.by_denoiser, GUIDANCE: plan.by_guidance}
        return curves.draw(
            self.history, categories, plan.name, self.notes, self.progress.lines(), [part for part in wanted if wanted[part]]
        )

    def save(self) -> None:
        """Stores the state; nothing before the first training has begun."""
        self.trainer.save()

    def _show(self, at: Step) -> None:
        self.progress.rate(at.phase, at.seconds * at.steps)
        message = (
            f"{WORDS[at.phase]}: step {at.step} of {at.steps}, distance {at.report.error:.2f} (before {at.report.before:.2f})"
        )
        self.progress.update(at.phase, at.step / max(1, at.steps), message)

    def make_recording(self) -> Recording:
        """Encodes the prompts and records all runs that need no HGR; without a CLIP, what was recorded."""
        if self.clip is None:
            return Recording.open(self.folder)
        for share in write_prompts(self.clip, self.prompts, self.plan.runs.seed, self.folder, self.facts, self.notes):
            self.progress.update("encoding", share, "encoding prompts")
        self.progress.finish("encoding")
        plan, runs, recording = self.plan, self.plan.runs, Recording.open(self.folder)
        if not plan.records:
            return recording
        self._measure_scale(recording)
        jobs = plan_jobs(runs, HARMFUL, self.prompts.pairs, plan.first_runs, FOLLOW)
        if plan.by_guidance:
            jobs += plan_jobs(runs, CLEAN, clean_pairs(self.prompts.clean), plan.clean_runs, FOLLOW[:1])
            held_out = clean_pairs(self.prompts.held_out_clean)
            jobs += plan_jobs(runs, CALIBRATION, held_out, plan.calibration_runs, FOLLOW[:1], looks=0)
        self._record_shards(jobs, "recording")
        self.progress.finish("recording")
        return Recording.open(self.folder)

    def _measure_scale(self, recording: Recording) -> None:
        """The tokens' spread per channel, by which prompts are disguised."""
        self.scale = robust_units(recording.draw_texts(True, 64, torch.Generator().manual_seed(0)).tokens.flatten(0, 1))[1]

    def _record_shards(self, jobs: list[Job], part: str, policy: Policy | None = None) -> None:
        started = time.monotonic()
        done = record_shards(
            self.model, self.clip, self.prompts, jobs, self.plan.runs, self.folder, self.facts, self.scale, policy
        )
        for i, job in enumerate(done, 1):
            self.progress.rate(part, (time.monotonic() - started) / i * len(jobs))
            self.progress.update(part, i / len(jobs), f"{part}: {job.kind} runs, batch {i} of {len(jobs)}")

    def train(self, recording: Recording) -> hgr_models.HGR:
        """Trains what the plan asks for, calibrates, and gives the HGR."""
        with torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(self.plan.runs.seed)  # the networks' first weights
            info = self.new_info()
            hgr = hgr_models.HGR(info, *self.configs()).to(self.device)
            if self.plan.by_text:
                self._train_text(hgr, recording)
                if self.model is not None and not self.plan.by_denoiser:
                    recording = self._polish_where_weak(hgr, recording)
            if self.plan.by_denoiser:
                self._train_condition(hgr, recording)
            if hgr.guidance is not None:
                self._train_guidance(hgr, recording)
        info = calibrate(hgr, recording, self.plan.false_positive_rate, self.device)
        steps = {name: training.step for name, training in self.trainings.items()}
        info.training.update(steps=steps, prompts=self.facts["prompts"], digest=self.digest, settings=self.plan.settings())
        self._judge(hgr, recording)
        self.progress.update("calibration", 1.0, "calibrated")
        return hgr

    def _polish_where_weak(self, hgr: hgr_models.HGR, recording: Recording) -> Recording:
        """Trains through the model, too, where prompts alone have not taught enough and the model carries gradients."""
        ratio = self._ratio(hgr)
        if ratio <= WEAK:
            return recording
        self.say(f"{forward_check.in_words(ratio)}; trying to learn through the model")
        try:
            check_can_freeze(self.model)
            text = self.encode([self.prompts.pairs[0].harmful])
            self.gradient = probe_gradient(self.model, text, self.plan.runs, self.plan.checkpointing)
            reason = "" if self.gradient.passed else self.gradient.in_words()
        except hgr_models.HGRError as error:
            reason = str(error)
        if reason:
            self.notes.append(f"not polished through the model: {reason}")
            return recording
        self._measure_scale(recording)
        self._record_shards(plan_jobs(self.plan.runs, HARMFUL, self.prompts.pairs, self.plan.first_runs, FOLLOW), "recording")
        recording = Recording.open(self.folder)
        self._train_condition(hgr, recording)
        return recording

    def _ratio(self, hgr: hgr_models.HGR) -> float:
        """How far the model's answer to corrected prompts is from the safe one, forward only; see `forward_check`."""
        with torch.inference_mode():
            ratio = forward_check.error_ratio(self.model, self.clip, hgr.condition, self.prompts, self.plan.runs, say=self.say)
        self.asked += 1
        self.progress.update("check", min(1.0, self.asked / max(1, self.checks)), "the model was asked")
        return ratio

    def _judge(self, hgr: hgr_models.HGR, recording: Recording) -> None:
        """Says what each network does, and leaves out a guidance redirector that does nothing beside a condition redirector."""
        if hgr.condition is not None and self.model is not None:
            ratio = self._ratio(hgr)
            hgr.info.training["forward_check"] = ratio
            self.notes.append(forward_check.in_words(ratio))
            if ratio > WEAK:
                self.notes.append(
                    "flagged runs therefore get their category's concept row as well, one row more per step, in SafeCFG Protect and in "
                    "SafeCFG Apply with `clip`; more prompt_steps, more pairs or `train` = thorough would help"
                )
        if hgr.guidance is None or not recording.of_kind(HARMFUL):
            return
        share = share_flagged(hgr, recording, self.device)
        self.notes.append(f"the guidance redirector flags {100 * share:.0f} % of the harmful runs that it learnt from")
        if share < INERT and self.plan.by_text:
            hgr.guidance = None
            self.notes.append(
                "it does next to nothing, so the HGR has none: more harmful_runs, and preset = thorough, would help"
            )

    def _train_text(self, hgr: hgr_models.HGR, recording: Recording) -> None:
        if not recording.buckets(PAIRS):
            raise hgr_models.HGRError(
                f"{self.folder} was recorded before HGRs were trained from prompts, and has no pairs. Connect `clip` and `prompts`."
            )
        plan = self.plan
        training = TextTraining(hgr, plan.prompt_steps, plan.runs.seed, rate=plan.learning_rate)
        training.measure(recording)
        self.trainer.begin(PROMPTS, training)
        self._free(estimate.text_bytes(self.facts))  # it learns without any model
        step, held_out = lambda: training.train_step(recording), lambda: training.error_on(recording)
        self.trainer.run(Phase(PROMPTS, training, step, plan.prompt_steps, held_out, (CONDITION,)))
        self.progress.finish(PROMPTS)

    def _train_condition(self, hgr: hgr_models.HGR, recording: Recording) -> None:
        plan = self.plan
        training = ConditionTraining(hgr, plan.condition_steps, plan.runs.seed, plan.runs.batch, plan.learning_rate)
        if not plan.by_text:
            training.measure(recording)
        self.trainer.begin(CONDITION, training)
        if training.step >= plan.condition_steps:
            self.trainer.end(CONDITION)
            self.progress.finish(CONDITION)
            return
        with torch.inference_mode():
            template = self.encode([""])[0][1]
        frozen = FrozenModel(self.model, template, plan.runs.latent)
        points, _ = recording.draw(HARMFUL, 1, torch.Generator().manual_seed(0))
        with frozen.loaded((plan.runs.batch, *points.x.shape[1:]), self.gradient.checkpointing):
            if frozen.half:
                training.scale = max(training.scale, 2.0**12) if training.step == 0 else training.scale
            recording, held_out = recording.divided()
            error_on = (lambda: None) if held_out is None else lambda: training.error_on(held_out, frozen.predict)
            step = lambda: training.train_step(recording, frozen.predict)  # noqa: E731
            self.trainer.run(Phase(CONDITION, training, step, plan.condition_steps, error_on))

    def _train_guidance(self, hgr: hgr_models.HGR, recording: Recording) -> None:
        training = GuidanceTraining(hgr, self.plan.guidance_steps, self.plan.runs.seed + 1, 1.5 * self.plan.learning_rate)
        self.trainer.begin(GUIDANCE, training)
        if self.plan.policy_runs and self.model is not None:
            self._guidance_steps(training, recording, training.steps // 2)
            recording = self._record_policy(hgr)
        self.progress.finish("recording on-policy")
        self._guidance_steps(training, recording, training.steps)
        self.progress.finish(GUIDANCE)

    def _guidance_steps(self, training: GuidanceTraining, recording: Recording, until: int) -> None:
        self._free(estimate.guidance_bytes(self))  # it learns without the model
        recording, held_out = recording.divided()
        error_on = (lambda: None) if held_out is None else lambda: training.error_on(held_out)
        self.trainer.run(Phase(GUIDANCE, training, lambda: training.train_step(recording), until, error_on))

    def _free(self, count: int) -> None:
        """Asks core for room on the device, in the mode of nodes: it moves weights, and makes quantised ones anew."""
        with torch.inference_mode():
            comfy.model_management.free_memory(count, self.device)

    def _record_policy(self, hgr: hgr_models.HGR) -> Recording:
        """Runs that follow the HGR in training: it must turn what it will meet."""
        jobs = plan_jobs(self.plan.runs, HARMFUL, self.prompts.pairs, self.plan.policy_runs, ("policy",))
        on = hgr_models.CategorySettings((1.0,) * len(hgr.info.categories))

        def policy(
            model: BaseModel, x: torch.Tensor, sigma: torch.Tensor, uncond_denoised: torch.Tensor, cond_denoised: torch.Tensor
        ) -> torch.Tensor:
            x_in = model.model_sampling.calculate_input(sigma, x)
            return hgr_models.redirect_guidance(hgr, cond_denoised, uncond_denoised, x_in, sigma, on).cond_denoised

        self.save()
        with torch.inference_mode():
            self._record_shards(jobs, "recording on-policy", policy)
        return Recording.open(self.folder)
