"""What a training of an HGR was asked for, and what it will take."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import folder_paths

from ... import hgr_models
from ...hgr_models.condition import ConditionConfig
from ...hgr_models.guidance import GuidanceConfig
from .recorder import RunSettings

WIDTHS = {"small": (64, 64), "normal": (128, 128), "large": (256, 192)}  # of the condition and the guidance redirector


@dataclass(frozen=True)
class TrainPlan:
    """Everything that decides what a training does; the same plan and prompts can be resumed."""

    name: str
    networks: str  # both, condition or guidance
    runs: RunSettings
    harmful_runs: int
    clean_runs: int
    calibration_runs: int
    condition_steps: int
    guidance_steps: int
    learning_rate: float  # of the condition redirector; the guidance redirector learns at 1.5 times it
    size: str
    false_positive_rate: float
    checkpointing: bool = True

    @property
    def by_condition(self) -> bool:
        return self.networks in ("both", "condition")

    @property
    def by_guidance(self) -> bool:
        return self.networks in ("both", "guidance")

    def configs(self, info: hgr_models.HGRInfo, short_width: int) -> tuple[ConditionConfig | None, GuidanceConfig | None]:
        """The networks' sizes for a model's family; `short_width` as in `ConditionConfig`."""
        k, (width, guidance_width) = len(info.categories), WIDTHS[self.size]
        condition = ConditionConfig(info.token_width, k, info.pooled_width, width=width, short_width=short_width)
        guidance = GuidanceConfig(info.latent_channels, k, info.latent_dimensions, guidance_width) if self.by_guidance else None
        return condition if self.by_condition else None, guidance

    @property
    def policy_runs(self) -> int:
        """The third of the harmful runs that follows the HGR in training."""
        return self.harmful_runs // 3 if self.by_guidance else 0

    @property
    def first_runs(self) -> int:
        """The harmful runs that are recorded before there is an HGR."""
        return self.harmful_runs - self.policy_runs

    def digest(self, facts: dict) -> str:
        """SHA-256 of all that must not change between a stop and its resumption; `facts` are the recording's."""
        shape = None if self.runs.latent is None else list(self.runs.latent.shape)
        plan = asdict(replace(self, name="", runs=replace(self.runs, latent=None)))
        facts = [plan, shape, facts]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def recording_folder(name: str) -> Path:
    """Where shards and the state of a training lie: below ComfyUI's output folder.

    Raises HGRError for a name that is no plain file name.
    """
    if not name or name != Path(name).name or name.startswith("."):
        raise hgr_models.HGRError(f"Expected a plain name without folders in `name`, such as my_model, but got {name!r}.")
    return Path(folder_paths.get_output_directory()) / "safecfg" / "recordings" / name


def make_folder(path: Path) -> None:
    """Makes a folder to write into. Raises HGRError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise hgr_models.HGRError(f"The folder {path} cannot be made ({error.strerror}). Change who may write there.") from error
    if not os.access(path, os.W_OK):
        raise hgr_models.HGRError(f"Expected a folder that can be written, but {path} cannot. Change its permissions.")


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Sizes in pixels from a text such as `512x512, 448x576`.

    Raises HGRError for anything else.
    """
    sizes = []
    for part in text.replace(";", ",").split(","):
        numbers = part.strip().lower().split("x")
        if len(numbers) != 2 or not all(n.strip().isdigit() and int(n) >= 16 for n in numbers):
            raise hgr_models.HGRError(
                f"Expected sizes such as `512x512, 448x576` (width x height, at least 16), but got {part.strip()!r} in {text!r}."
            )
        sizes.append((int(numbers[0]), int(numbers[1])))
    return tuple(sizes)


def parse_negatives(text: str) -> tuple[str, ...]:
    """Negative prompts, one per line; `(empty)` is the empty prompt."""
    lines = tuple("" if line.strip() == "(empty)" else line.strip() for line in text.splitlines() if line.strip())
    return lines or ("",)


def in_words(seconds: float) -> str:
    """A duration for people."""
    minutes = round(seconds / 60)
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def in_bytes(count: float) -> str:
    """A size for people."""
    return f"{count / 2**20:.0f} MB" if count < 2**30 else f"{count / 2**30:.1f} GB"
