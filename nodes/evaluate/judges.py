"""Judges of pictures: a small fixed interface, and which ones there are on this machine. Nothing is downloaded."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...hgr_models import HGRError
from ..loader import HGRModel

FOLDER = "safety_judges"
AUTO = "auto"


class PictureError(HGRError):
    """One picture that cannot be decoded or judged; others may."""


@dataclass(frozen=True, eq=False)
class Judge:
    """Pictures in, scores by label out.

    look: pictures (B, H, W, 3) float in [0, 1], of one size -> scores (B, L), one per label. A picture is harmful where a label of
    `thresholds` scores above its threshold. `source` says where judge and thresholds come from, `errors` what it is known to get
    wrong; `independent` is False for a judge that has a part in what it judges.
    """

    name: str
    labels: tuple[str, ...]
    thresholds: dict[str, float]
    look: Callable[[Tensor], Tensor]
    source: str
    licence: str
    errors: str
    version: str = ""  # changes when its scores may
    independent: bool = True

    def scores(self, pictures: Tensor) -> list[dict[str, float]]:
        """Scores by label of every picture. Raises PictureError for a judge that fails, or does not answer as it should."""
        try:
            found = torch.as_tensor(self.look(pictures)).float().cpu()
        except (HGRError, comfy.model_management.OOM_EXCEPTION, comfy.model_management.InterruptProcessingException):
            raise
        except Exception as error:  # other people's code
            raise PictureError(f"The judge {self.name} failed: {type(error).__name__}: {str(error)[:200]}") from error
        if found.shape != (len(pictures), len(self.labels)) or not found.isfinite().all():
            raise PictureError(
                f"Expected {len(pictures)} x {len(self.labels)} finite scores from the judge {self.name}, but got {tuple(found.shape)}."
            )
        return [dict(zip(self.labels, (round(value, 6) for value in row), strict=True)) for row in found.tolist()]

    def facts(self) -> dict:
        """What a table says of it."""
        return {
            "name": self.name, "labels": list(self.labels), "thresholds": self.thresholds, "source": self.source, "licence": self.licence,
            "errors": self.errors, "version": self.version, "independent": self.independent,
        }  # fmt: skip


@dataclass
class Context:
    """What a judge may need of the evaluation: sockets of the node. `is_demo`: the model draws the demo world."""

    model: ModelPatcher | None = None
    clip: CLIP | None = None
    vae: VAE | None = None
    hgr: HGRModel | None = None
    clip_vision: ClipVisionModel | None = None
    is_demo: bool = False
    folders: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """A judge, or FID's network, that this machine may have: `missing` says exactly what it lacks ("": nothing), `open` loads it."""

    name: str
    missing: str
    open: Callable[[], Any]
    automatic: bool = True  # `auto` takes it


def register_folder() -> None:
    """Registers `models/safety_judges` with ComfyUI, so that extra_model_paths.yaml can name other places."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER), is_default=True)


def judge_folders() -> list[Path]:
    """Where judges' files may lie, the default first."""
    register_folder()
    return [Path(path) for path in folder_paths.get_folder_paths(FOLDER)]


def parse_judges(text: str) -> dict[str, float | None]:
    """`open_nsfw, nsfw_image_detection = 0.7`: names, and a threshold for all of a judge's labels where one is given.

    Raises HGRError for a threshold that is no number.
    """
    found: dict[str, float | None] = {}
    for part in filter(None, (part.strip() for part in re.split(r"[,\n]", text))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            found[name] = float(value) if equals else None
        except ValueError:
            raise HGRError(f"Expected a number as the threshold of the judge {name!r}, but got {value!r}.") from None
    return found


def open_judges(text: str, entries: list[Entry]) -> list[Judge]:
    """The judges that a widget names; `auto`: every independent one that is there, else the HGR's own reading.

    Raises HGRError for one that is unknown or lacks something, naming the file, its licence and its folder.
    """
    known, asked = {entry.name: entry for entry in entries}, parse_judges(text) or {AUTO: None}
    if AUTO in asked:
        there = [entry.name for entry in entries if entry.automatic and not entry.missing]
        own = [entry.name for entry in entries if not entry.automatic and not entry.missing]
        asked = {**{name: None for name in there or own[:1]}, **{name: v for name, v in asked.items() if name != AUTO}}
        if not asked:
            raise HGRError(f"There is no judge on this machine.\n{what_there_is(entries)}")
    judges = []
    for name, limit in asked.items():
        if name not in known:
            raise HGRError(f"There is no judge {name!r}.\n{what_there_is(entries)}")
        if known[name].missing:
            raise HGRError(f"The judge {name} is not there: {known[name].missing}")
        judge = known[name].open()
        judges.append(judge if limit is None else replace(judge, thresholds=dict.fromkeys(judge.thresholds, limit)))
    return judges


def what_there_is(entries: list[Entry]) -> str:
    """Every judge with what it lacks, one per line."""
    lines = [f"- {entry.name}: {entry.missing or 'is there'}" for entry in entries]
    return "\n".join([*lines, "- NudeNet and other programs of your own: see the help page of SafeCFG Evaluate"])
