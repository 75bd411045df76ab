"""Draws, judges and keeps: every picture once, in an order that does not matter, so that it can stop at any time."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management
import comfy.utils
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor

from ...hgr_models import HGRError
from ..training.plan import in_words
from . import distances, features, keeping
from .arms import Arm
from .draw import Setup, decode, digest, draw
from .figures import is_harmful
from .inception import Embed
from .judges import Context, Judge, PictureError
from .lists import CLEAN, LAST_SEED, PromptList, Row
from .prompts import NEGATIVE, POSITIVE, Prompts
from .store import Store

SHOW_EVERY = 2.0  # seconds
MOST_IN_A_ROW = 5  # pictures that fail
AHEAD = 16  # pictures whose prompts are encoded together


@dataclass(frozen=True)
class Task:
    """One picture."""

    each: PromptList
    row: Row
    k: int
    arm: Arm
    seed: int
    key: str


@dataclass
class Session:
    """`images` pictures per prompt and arm; `say` shows a line on the node."""

    context: Context
    setup: Setup
    prompts: Prompts
    lists: list[PromptList]
    arms: list[Arm]
    judges: list[Judge]
    images: int
    seed: int
    keep: str
    folder: Path
    store: Store
    say: Callable[[str], None]
    score_clip: CLIP | None = None
    tower: tuple | None = None  # of `features.text_tower`
    inception: Embed | None = None  # features for FID, where this machine has them
    models: dict = field(default_factory=dict)  # the model of the arm that is drawn
    failed: list[str] = field(default_factory=list)  # why pictures of this run are left out
    in_a_row: int = 0  # of these, without one between them that worked
    encoded: dict = field(default_factory=dict)  # CONDITIONING by what `_texts` gives, of the pictures that come next

    def tasks(self) -> list[Task]:
        """Every picture, arm by arm within a list: a model is patched once per list and arm."""
        return [
            Task(each, row, k, arm, seed, _key(each, row, k, arm, seed, self.setup.cfg_of(row)))
            for each in self.lists
            for arm in self.arms
            for row in each.rows
            for k in range(self.images)
            for seed in [((self.seed + row.number if row.seed is None else row.seed) + k) & LAST_SEED]
        ]

    def run(self) -> dict:
        """Draws what is missing; the records of all pictures, by (list, row, arm). A picture that fails is left out, and tried again by
        the next run; PictureError when the first ones do, or several in a row."""
        tasks = self.tasks()
        missing = _each_arm_first([task for task in tasks if task.key not in self.store.keys])
        bar, started, shown = comfy.utils.ProgressBar(len(tasks)), time.monotonic(), 0.0
        bar.update(len(tasks) - len(missing))
        for number, task in enumerate(missing, start=1):
            comfy.model_management.throw_exception_if_processing_interrupted()
            if number % AHEAD == 1:
                self._encode(missing[number - 1 : number - 1 + AHEAD])
            self._add(task)
            bar.update(1)
            now = time.monotonic()
            if now - shown > SHOW_EVERY or number == len(missing):
                shown, left = now, (now - started) / number * (len(missing) - number)
                done = len(tasks) - len(missing) + number
                self.say(f"{done} of {len(tasks)} pictures" + (f", about {in_words(left)} left" if left else ""))
        self.models.clear()
        self.encoded.clear()
        return self.store.found({task.key for task in tasks})

    def _add(self, task: Task) -> None:
        """Draws, judges and keeps a picture; PictureError when nothing has worked yet, or too many fail in a row."""
        try:
            self.store.add(self._drawn(task))
            self.in_a_row = 0
        except PictureError as error:
            self.in_a_row += 1
            self.failed.append(f"{task.each.name}, row {task.row.number + 1}, {task.arm.name}: {error}")
            if not self.store.records or self.in_a_row >= MOST_IN_A_ROW:
                raise PictureError(
                    f"{self.failed[-1]} Stopped here (such pictures: {len(self.failed)}); the others are kept."
                ) from error

    def left_out(self) -> list[str]:
        """A note on the pictures of this run that failed."""
        if not self.failed:
            return []
        return [
            f"Left out of every figure, and tried again by the next run: {len(self.failed)} of the pictures. The first: {self.failed[0]}"
        ]

    def _texts(self, task: Task) -> tuple[tuple, tuple]:
        """Prompt and negative prompt of a picture, as `Prompts.encode` takes them."""
        negative = ", ".join(filter(None, (self.setup.negative.strip(), task.arm.negative)))
        return (POSITIVE, task.row.text, False), (NEGATIVE, negative, bool(task.arm.negative))

    def _encode(self, tasks: list[Task]) -> None:
        """The prompts of some pictures at once: where model and text encoder do not fit together, they take turns less often."""
        self.encoded = {text: self.prompts.encode(*text) for text in {t: None for task in tasks for t in self._texts(task)}}

    def _drawn(self, task: Task) -> dict:
        row, each = task.row, task.each
        model, conditions = self._model(task.arm, row.text), (self.encoded[text] for text in self._texts(task))
        started = time.perf_counter()
        latent = draw(model, *conditions, self.setup, self.setup.cfg_of(row), task.seed)
        picture = decode(self.context.vae, latent)
        seconds = time.perf_counter() - started
        record: dict = {
            "key": task.key,
            "list": each.name,
            "row": row.number,
            "k": task.k,
            "arm": task.arm.name,
            "seed": task.seed,
        }
        scores = {judge.name: judge.scores(picture)[0] for judge in self.judges}
        record |= {"latent": digest(latent), "scores": scores}
        record |= self._features(picture, row.text) | {"seconds": round(seconds, 4)}
        if self.inception is not None and each.kind == CLEAN:
            record["inception"] = distances.pack_wide(self.inception(picture))
        harmful = any(is_harmful(scores[judge.name], judge.thresholds) for judge in self.judges)
        keeping.keep(self.folder, picture, record, each.kind, self.keep, harmful)
        return record

    def _model(self, arm: Arm, text: str) -> ModelPatcher:
        """The model of an arm; one at a time, for arms differ in their weights."""
        key = (arm.name, text if arm.by_prompt else "")
        if key not in self.models:
            self.models.clear()
            self.models[key] = arm.make(text)
        return self.models[key]

    def _features(self, picture: Tensor, text: str) -> dict:
        if self.context.clip_vision is None:
            return {}
        found = features.embed_picture(self.context.clip_vision, picture)
        score = None
        if self.tower is not None:
            score = features.clip_score(found, features.embed_text(self.score_clip, self.tower, text))
        return {"features": distances.pack(found), "clip_score": score}


def _each_arm_first(tasks: list[Task]) -> list[Task]:
    """The first picture of every arm comes first: what an arm lacks shows in minutes, not behind all pictures of the others."""
    first = {task.arm.name: task for task in reversed(tasks)}
    return sorted(tasks, key=lambda task: first[task.arm.name] is not task)


def _key(each: PromptList, row: Row, k: int, arm: Arm, seed: int, cfg: float) -> str:
    """What tells a picture apart from all others of these facts."""
    facts = [each.name, row.number, row.text, k, arm.name, arm.about, arm.negative, seed, cfg]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def alarms_on(judges: list[Judge], pictures: list, folder: str) -> list[dict]:
    """How often each judge calls a user's own clean pictures harmful. Raises HGRError where there are none."""
    if not pictures:
        raise HGRError(f"There are no pictures in the folder {folder!r} of ComfyUI's input folder.")
    bar, found = comfy.utils.ProgressBar(len(pictures)), dict[str, list[bool]]({judge.name: [] for judge in judges})
    for picture in pictures:
        comfy.model_management.throw_exception_if_processing_interrupted()
        for judge in judges:
            found[judge.name].append(is_harmful(judge.scores(picture)[0], judge.thresholds))
        bar.update(1)
    return [{"judge": name, "hits": hits} for name, hits in found.items()]
