"""What a training of an HGR was asked for, what it will take, and what its recording is of."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ... import hgr_models
from ...hgr_models.condition import ConditionConfig, narrower_width
from ...hgr_models.encoders import EncoderPrint
from ...hgr_models.guidance import GuidanceConfig
from ...hgr_models.hgr import NO_LATENTS, facts_of_text
from ...hgr_models.pairs import PromptSet
from ...hgr_models.redirection import SIGMA_FLOOR, log_snr_of
from ...hgr_models.shards import Texts
from ..host.architecture import architecture_of
from ..host.families import base_of_model, latents_of, prediction_of, refuse_image_to_image
from .recorder import RunSettings

HGR_BYTES = 16 * 2**20  # that a file of an HGR and its card take at most

LEVELS = (0.2, 0.5, 0.75)  # parts of the schedule at which the thresholds of the guidance redirector change

WIDTHS = {"small": (64, 64), "normal": (128, 128), "large": (256, 192)}  # of the condition and the guidance redirector

# What `train` asks for: the condition redirector in text space, through the denoiser, and the guidance redirector.
PROMPTS, WITH_GUIDANCE, THOROUGH = "prompts", "prompts + guidance", "thorough"
BOTH, CONDITION, GUIDANCE = "both", "condition", "guidance"  # without text space, as before
NETWORKS = (PROMPTS, WITH_GUIDANCE, THOROUGH, BOTH, CONDITION, GUIDANCE)


@dataclass(frozen=True)
class Preset:
    """Steps of the three trainings, the last two also where text space came first."""

    prompt_steps: int
    condition_steps: int
    polish_steps: int
    guidance_steps: int


PRESETS = {
    "quick": Preset(500, 700, 100, 1500),
    "normal": Preset(1000, 1400, 200, 4200),
    "thorough": Preset(3000, 2400, 600, 9000),
}


@dataclass(frozen=True)
class TrainPlan:
    """Everything that decides what a training does; the same plan and prompts can be resumed."""

    name: str
    networks: str  # of NETWORKS
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
    prompt_steps: int = 0

    @property
    def by_text(self) -> bool:
        """Whether the condition redirector learns in text space."""
        return self.networks in (PROMPTS, WITH_GUIDANCE, THOROUGH)

    @property
    def by_denoiser(self) -> bool:
        """Whether it learns through the model, afterwards or alone."""
        return self.networks in (THOROUGH, BOTH, CONDITION)

    @property
    def by_condition(self) -> bool:
        return self.by_text or self.by_denoiser

    @property
    def by_guidance(self) -> bool:
        return self.networks in (WITH_GUIDANCE, THOROUGH, BOTH, GUIDANCE)

    @property
    def records(self) -> bool:
        """Whether the model is needed, for more than its name."""
        return self.by_denoiser or self.by_guidance

    def family_facts(self, facts: dict) -> dict:
        """What an HGR says of its family: without a guidance redirector it belongs to the text encoder, not to a model."""
        return {**facts, **(NO_LATENTS if self.networks == PROMPTS else {})}

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

    def settings(self) -> dict:
        """What was asked for, for the HGR's metadata and its model card: numbers and short texts."""
        kept = ("networks", "size", "learning_rate", "false_positive_rate", "harmful_runs", "clean_runs", "calibration_runs")
        found = {name: vars(self)[name] for name in kept if self.records or not name.endswith("_runs")}
        return {**found, "seed": self.runs.seed}

    def digest(self, facts: dict) -> str:
        """SHA-256 of all that must not change between a stop and its resumption; `facts` are the recording's.

        Steps, counts of runs and the rate may: a training goes on with more of them.
        """
        return self.digest_of_runs(facts) if self.records else self.digest_of_text(facts)

    def digest_of_runs(self, facts: dict) -> str:
        """The same of what training with recorded runs depends on."""
        shape = None if self.runs.latent is None else list(self.runs.latent.shape)
        runs = asdict(replace(self.runs, latent=None))
        return _digest([self.by_text, runs, shape, self.learning_rate, self.size, facts])

    def digest_of_text(self, facts: dict) -> str:
        """The same of what training in text space depends on."""
        return _digest([self.by_text, self.runs.seed, self.learning_rate, self.size, facts_of_text(facts)])

    def continues(self, about: dict, facts: dict) -> bool:
        """Whether a stored state can be taken up; after training from prompts alone, polished or not, the other networks may follow."""
        if about["digest"] == self.digest(facts) or about.get("of_runs") == self.digest_of_runs(facts):
            return True
        return about.get("of_text") == self.digest_of_text(facts) and not about["trainings"].keys() - {PROMPTS}


def _digest(content: list) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def make_folder_for_hgr(path: Path) -> None:
    """The same, of a folder with room for an HGR: where there is none is better said before it is made."""
    make_folder(path)
    if (free := shutil.disk_usage(path).free) < HGR_BYTES:
        raise hgr_models.HGRError(
            f"Expected {in_bytes(HGR_BYTES)} of room for an HGR in {path}, but the disk has {in_bytes(free)} free. Free some space there."
        )


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


def recording_facts(model: ModelPatcher | None, prompts: PromptSet, sample: Texts, encoder: EncoderPrint) -> dict:
    """What every shard of a recording says, and later the HGR's metadata, as JSON: the family and the prompts.

    `sample` is any encoded prompt, `encoder` what made it. Without a model nothing is said of latents.
    """
    if model is not None:
        refuse_image_to_image(model)
    short = narrower_width(sample.tokens)
    return {
        "categories": list(prompts.categories),
        **(NO_LATENTS if model is None else _latent_facts(model, sample.tokens)),
        "token_width": sample.tokens.shape[-1],
        "pooled_width": 0 if sample.pooled is None else sample.pooled.shape[-1],
        "concept_prompts": dict(prompts.concept_prompts),
        "prompts": prompts.digest(),
        "encoder": encoder.as_dict(),
        **({"short_width": short} if short else {}),
    }


def _latent_facts(model: ModelPatcher, like: torch.Tensor) -> dict:
    latent, sampling = model.get_model_object("latent_format"), model.get_model_object("model_sampling")
    sigmas = [max(SIGMA_FLOOR, float(sampling.percent_to_sigma(part))) for part in LEVELS]
    return {
        "latent_format": type(latent).__name__,
        "latent_channels": latents_of(model).latent_channels,
        "latent_dimensions": latents_of(model).latent_dimensions,
        "prediction": prediction_of(sampling),
        "guidance_levels": [float(log_snr_of(like.new_tensor([s]))) for s in sigmas],
        "base": base_of_model(model),
        "architecture": architecture_of(model),
    }
