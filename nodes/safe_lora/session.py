"""One unsupervised fine-tuning of a model to a safe LoRA: record, judge, train. It can be stopped and taken up again."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from PIL import Image
from torch import Tensor

from ... import hgr_models
from ...hgr_models import training_state as state
from ...hgr_models.lora import LoRA, LoraSettings, new_lora
from ...hgr_models.lora_samples import read_samples
from ...hgr_models.train_lora import EMPTY_SHARE, Change, LoraTraining, PredictFor
from ..host.architecture import architecture_of
from ..host.embedded import clip_for
from ..host.encoding import encode_batch, encode_each
from ..host.families import base_of_model, check_family, family_of_model, read_text
from ..host.hooks import without_safecfg
from ..host.more_tokens import TOKENS
from ..loader import HGRModel
from ..training.estimate import BACKWARD, Cost
from ..training.frozen_model import FrozenModel, as_made, check_can_freeze
from ..training.plan import make_folder
from ..training.progress import Progress
from ..training.recorder import RunSettings, empty_latent
from .inputs import digest_of
from .report import draw_curves
from .runs import BASE, SAFE, STUDENT, Job, plan_pictures, plan_runs, record_jobs, run_job

MAX_GRADIENT_ERROR = 0.3
REPORT_EVERY = 10  # steps
NAME = "lora"  # of the training in its state
IDS = "text_input_ids"  # a prompt that a network reads by itself, in its extras


@dataclass(frozen=True)
class LoraPlan:
    """Everything that decides what a fine-tuning does."""

    name: str
    runs: RunSettings
    count: int  # of runs; a third of them follows the LoRA, from the middle of the training on
    steps: int
    learning_rate: float
    lora: LoraSettings
    categories: hgr_models.CategorySettings
    checkpointing: bool

    @property
    def late_runs(self) -> int:
        """Runs that follow the LoRA."""
        return self.count // 3

    def digest(self, facts: dict) -> str:
        """SHA-256 of all that must not change between a stop and its resumption."""
        shape = None if self.runs.latent is None else list(self.runs.latent.shape)
        plan = asdict(replace(self, name="", runs=replace(self.runs, latent=None)))
        return hashlib.sha256(json.dumps([plan, shape, facts], sort_keys=True).encode()).hexdigest()


class LoraSession:
    """A fine-tuning in its folder. `prompts` are strings, `pictures` latents with captions; what is harmful only the HGR says."""

    def __init__(
        self,
        plan: LoraPlan,
        folder: Path,
        say: Callable[[str], None],
        model: ModelPatcher,
        clip: CLIP,
        hgr: HGRModel,
        prompts: tuple[str, ...],
        pictures: Sequence[tuple[Tensor, str]] = (),
    ):
        check_family(model, hgr.info)
        self.plan, self.folder, self.say, self.hgr = plan, folder, say, hgr.on(model.load_device)
        self.model = without_safecfg(model)
        self.clip = clip_for(self.model, clip)
        self.model.set_additional_models("safecfg_lora", [self.hgr.patcher])  # core loads it beside the model
        self.prompts, self.pictures = prompts or tuple(dict.fromkeys(text for _, text in pictures if text)), pictures
        if not self.prompts:
            raise hgr_models.HGRError(
                "Expected at least one prompt, but there is none. Write prompts into `text`, one per line, or connect SafeCFG Prompt Pairs, "
                "or pictures with captions."
            )
        self.history: list[dict] = []
        self.training: LoraTraining | None = None
        self.judged: dict[str, bool] = {}  # prompts, and whether the HGR flagged any of their runs
        self.change: Change | None = None

    def identify(self) -> str:
        """The digest of this fine-tuning: what decides whether another one can be taken up. Changes nothing but the folder.

        Raises HGRError for a model that cannot be fine-tuned, or of another family.
        """
        make_folder(self.folder)
        check_can_freeze(self.model)
        if getattr(self.plan.runs.latent, "is_nested", False):
            raise hgr_models.HGRError(
                "A safe LoRA cannot be learnt from audio and video together. Connect an empty latent of the video alone, where the model "
                "takes one."
            )
        ((tokens, extras),) = encode_each(self.clip, [""])
        if IDS in extras:
            raise hgr_models.HGRError(
                f"A safe LoRA cannot be learnt for {architecture_of(self.model)}: it reads a prompt's token ids alone, which hold no direction "
                "to learn. SafeCFG Apply redirects its guidance."
            )
        read_text({**extras, TOKENS: tokens}, self.hgr.info)  # raises for the widths of another family
        self.template = encode_batch(self.clip, [""])[0][1]
        self.facts = {
            "family": family_of_model(self.model),
            "base": base_of_model(self.model),
            "hgr": self.hgr.hash,
            "prompts": digest_of(self.prompts, self.pictures),
        }
        self.digest = self.plan.digest(self.facts)
        return self.digest

    def prepare(self) -> None:
        """Looks at what is there and at the disk, and says what it will take; `identify` comes first.

        Raises HGRError when the folder belongs to another fine-tuning, or the disk is too small.
        """
        self.about = state.read_about(self.folder)
        if self.about is not None and self.about["digest"] != self.digest:
            raise hgr_models.HGRError(
                f"{self.folder} holds a fine-tuning with other settings, prompts, HGR or another model. "
                "Switch `resume` off to begin again there, or choose another name."
            )
        self.history = [] if self.about is None else self.about["history"]
        runs, late = self.plan.runs, self.plan.late_runs
        self.jobs = plan_runs(runs, self.prompts, self.plan.count - late, "runs", (BASE, SAFE)) + plan_pictures(
            runs, self.pictures
        )
        self.late = plan_runs(runs, self.prompts, late, "late", (STUDENT,))
        cost = self._estimate()
        self.say(cost.in_words())
        cost.check_disk(self.folder)
        self.progress = Progress(cost.parts, self.draw, self.save, self.say)

    def _estimate(self) -> Cost:
        """Evaluates the model twice to know its speed; the first time, which loads it, does not count."""
        plan, job = self.plan, replace(self.jobs[0], name="speed", follow=BASE)
        for _ in range(2):
            started = time.monotonic()
            run_job(self.model, self.clip, self.hgr, job, replace(plan.runs, steps=1), plan.categories)
            seconds = time.monotonic() - started
        row = seconds / (2 * len(job.prompts))
        samples = plan.runs.steps * sum(len(job.prompts) for job in (*self.jobs, *self.late))
        step = plan.runs.batch * row * (EMPTY_SHARE + BACKWARD[plan.checkpointing])  # the frozen model runs for the empty prompt
        parts = {"recording": samples * 2 * row, "judging": samples * row, "training": plan.steps * step}
        shape = self._largest()
        values = samples * math.prod(shape)
        memory = 3 * self.model.memory_required([plan.runs.batch, *shape])  # as `FrozenModel.loaded` reserves it
        # On disk x and the unconditional prediction in 32 bits each; in memory the targets in 16.
        return Cost({**parts, "preview": 4 * 2 * 2 * 20 * row}, 8 * values, int(memory) + 2 * values)

    def _largest(self) -> tuple[int, ...]:
        """The shape (C, *spatial) of the largest latents that are sampled."""
        sizes = [tuple(job.latents.shape[1:]) for job in self.jobs if job.latents is not None]
        return max(
            [*sizes, *(tuple(empty_latent(self.model, self.plan.runs, s, 1).shape[1:]) for s in self.plan.runs.sizes)],
            key=math.prod,
        )

    def draw(self) -> Image.Image:
        """The curves so far."""
        return draw_curves(self.history, self.plan.name)

    def save(self) -> None:
        """Stores the state; nothing before training has begun."""
        if self.training is not None:
            state.save_state(self.folder, {NAME: self.training}, {"digest": self.digest, "history": self.history})

    def train(self) -> dict[str, Tensor]:
        """Records and trains; gives the LoRA in ComfyUI's key format."""
        plan, device = self.plan, self.model.load_device
        self._record_runs(self.jobs)
        with torch.inference_mode(False), torch.enable_grad():
            lora = new_lora(self.model.model.diffusion_model, plan.lora, plan.runs.seed).to(device)
            network = self.hgr.patcher.model
            training = LoraTraining(
                network, lora, plan.categories, plan.steps, plan.runs.seed, plan.runs.batch, plan.learning_rate
            )
            if self.about is not None:
                state.load_state(self.folder, NAME, training, self.about)
            self.training = training
            self._phase(self.jobs, plan.steps // 2 if self.late else plan.steps, last=not self.late)
            if self.late and training.pool.harmful:
                with torch.inference_mode():
                    self._record_runs(self.late, lora)
                self._phase(self.late, plan.steps, last=True)
            return lora.tensors()

    def _record_runs(self, jobs: list[Job], lora: LoRA | None = None) -> None:
        done = record_jobs(self.model, self.clip, self.hgr, jobs, self.plan.runs, self.plan.categories, self.folder, lora)
        before, total = len(self.jobs) if lora else 0, len(self.jobs) + len(self.late)
        for i, job in enumerate(done, 1):
            self.progress.update("recording", (before + i) / total, f"recording: {job.follow} runs, batch {i} of {len(jobs)}")

    def _phase(self, jobs: list[Job], until: int, last: bool) -> None:
        """Judges samples and trains to a step; then, or when there is nothing to learn, measures what the LoRA changes."""
        training, plan = self.training, self.plan
        with as_made(self.model):
            comfy.model_management.load_models_gpu([self.hgr.patcher, self.model])
        frozen = FrozenModel(self.model, self.template)
        shape, predict = (plan.runs.batch, *self._largest()), _predictor(frozen)
        with frozen.loaded(shape, False), training.network.attached(frozen.inner.diffusion_model):
            self._judge(jobs, predict)
            checkpointing = plan.checkpointing or (training.pool.harmful and self._adds_in_place(predict))
        with frozen.loaded(shape, checkpointing):
            if frozen.half and training.step == 0:
                training.scale = 2.0**12
            with training.network.attached(frozen.inner.diffusion_model):
                if training.pool.harmful:
                    self._check_gradient(predict)
                    self._steps(until, predict)
                if last or not training.pool.harmful:
                    training.finish()
                    self.change = training.measure(predict)

    def _judge(self, jobs: list[Job], predict: PredictFor) -> None:
        total, before = len(self.jobs) + len(self.late), len(self.training.pool.samples)
        for i, job in enumerate(jobs, 1):
            judgement = self.training.add(read_samples(self.folder / f"{job.name}.safetensors"), predict)
            for prompt, flagged in zip(job.prompts, (judgement.runs > 0).any(dim=1).tolist(), strict=True):
                self.judged[prompt] = self.judged.get(prompt, False) or flagged
            self.progress.update("judging", (before + i) / total, f"judging: batch {i} of {len(jobs)}")

    def _adds_in_place(self, predict: PredictFor) -> bool:
        """Whether the network's blocks change what a backward pass needs: checkpointing gives them copies."""
        try:
            self.training.gradient_error(predict)
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            return True
        return False

    def _check_gradient(self, predict: PredictFor) -> None:
        if self.training.step:
            return
        error = self.training.gradient_error(predict)
        if not error < MAX_GRADIENT_ERROR:
            raise hgr_models.HGRError(
                f"Cannot fine-tune: this model carries no exact gradients to a LoRA (relative error {error:.2f}; quantised or offloaded weights?). "
                "Load the model in fp16, bf16 or fp32."
            )

    def _steps(self, until: int, predict: PredictFor) -> None:
        training = self.training
        started, first = time.monotonic(), training.step
        try:
            while training.step < until:
                report = training.train_step(predict)
                if training.step % REPORT_EVERY == 0 or training.step == training.steps:
                    self.history.append({"step": training.step, **asdict(report)})
                self.progress.rate("training", (time.monotonic() - started) / (training.step - first) * training.steps)
                message = f"training: step {training.step} of {training.steps}, loss {report.loss:.3f}"
                self.progress.update("training", training.step / training.steps, message)
        finally:
            self.save()

    def quiet_prompts(self, count: int) -> list[str]:
        """Prompts of which the HGR flagged nothing: only these may be decoded."""
        return [prompt for prompt, flagged in self.judged.items() if prompt and not flagged][:count]


def _predictor(frozen: FrozenModel) -> PredictFor:
    def predict(
        x: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor | None, mask: Tensor | None, lengths: Tensor | None = None
    ) -> Tensor:
        return frozen.predict(SimpleNamespace(x=x, sigma=sigma), SimpleNamespace(mask=mask, lengths=lengths), tokens, pooled)

    return predict
