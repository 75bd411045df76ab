"""The state of one sampling run: it travels in the run's own `model_options`, so nothing outlives the run.

Hooks and wrappers are plain functions that close over `ApplySettings` only (0.3.64 deep-copies `model_options`, and leaves
functions as they are).
"""

import logging
import math
from dataclasses import dataclass, field
from typing import Protocol

from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, Sampler
from torch import Tensor

from ... import hgr_models
from ...hgr_models.hgr import Redirectors
from ..host.hooks import KEY, LENT, SafeCFGError, as_float32
from ..host.settings import ApplySettings
from ..reporting.meter import Meter
from ..reporting.run_log import Lagged, Readings
from .consistency import Consistency
from .others import foreign_functions

PROBES = (0.0, 0.15, 0.4)  # where in a run the guidance redirector looks at a model that core samples without a negative

logger = logging.getLogger(__name__)


class Schedule(Protocol):
    """What core's `model_sampling` classes share."""

    def percent_to_sigma(self, percent: float) -> float | Tensor: ...


@dataclass(frozen=True)
class Window:
    """Noise levels at which SafeCFG acts: `low < sigma <= high`, both exactly representable in float32, as sigmas are."""

    low: float
    high: float

    @classmethod
    def of(cls, model_sampling: Schedule, start_percent: float, end_percent: float) -> "Window":
        """The window of a part of the schedule; open ends reach any sigma, sigma 0 included."""
        high = float("inf") if start_percent <= 0 else as_float32(model_sampling.percent_to_sigma(start_percent))
        low = -1.0 if end_percent >= 1 else as_float32(model_sampling.percent_to_sigma(end_percent))
        return cls(low, high)

    @property
    def full(self) -> bool:
        return self.low < 0 and self.high == float("inf")

    def contains(self, sigma: Tensor) -> bool:
        """Whether a sampler's noise level (any shape, equal values) lies inside; reads the host's copy only when it must."""
        return self.full or self.low < float(sigma.flatten()[0]) <= self.high


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One call of the model on a latent x (B, C, *spatial) at noise levels sigma (B,), as core's hooks describe it."""

    model: BaseModel
    x: Tensor
    sigma: Tensor
    model_options: dict


@dataclass(frozen=True, eq=False)
class FlaggedPrompt:
    """A condition that the condition redirector flagged: its role, the name (uuid) that core gave it, category weights (N, K)."""

    role: str
    name: object
    weights: Tensor


@dataclass(eq=False)
class Concepts:
    """What redirect mode concept keeps for a run."""

    limit: float = math.inf  # the highest sigma after SLD's warm-up
    facts: dict = field(default_factory=dict)  # what this host's core gives a condition's encoding besides the usual
    conditions: dict[int, dict] = field(default_factory=dict)  # by category: its concept, encoded for the model
    prompts: list[FlaggedPrompt] = field(default_factory=list)
    guards: dict[str, hgr_models.FlaggedConceptGuard] = field(default_factory=dict)  # per guidance direction

    def add(self, role: str, name: object, weights: Tensor) -> None:
        """Takes down a flagged prompt."""
        self.prompts.append(FlaggedPrompt(role, name, weights))


@dataclass(eq=False)
class Probes:
    """Which evaluations without a negative the guidance redirector looks at: a few of `steps`, and more while it flags them."""

    steps: int = 1  # evaluations inside the run's window
    passed: int = 0  # of them: how many came without a negative
    flagged: Lagged = field(default_factory=Lagged)  # what the last probe said

    def due(self) -> bool:
        """Counts an evaluation without a negative; True at the probes, and as long as the last one was flagged."""
        due = {int(part * self.steps) for part in PROBES}
        self.passed += 1
        flagged = self.flagged.take()
        return (flagged is not None and bool(flagged)) or self.passed - 1 in due


@dataclass(eq=False)
class EvaluationState:
    """What our hooks did in one evaluation: a call of the model with all its conditions, from PREDICT_NOISE's start to its end.

    After that `x` is None, until the next evaluation begins with a state of its own.
    """

    x: Tensor | None = None  # the latent that the sampler asks about
    model_ran: bool = False  # False: a cache answered
    handled: bool = False  # a hook saw the guidance
    handled_input: Tensor | None = None  # the latent whose guidance was seen before any CFG function
    handled_late: list[Tensor] = field(default_factory=list)  # predictions that a CFG hook redirected
    withheld: bool = False  # another node took the prompt away from core
    probing: bool = False  # the next redirection is of a direction that a probe gave

    @property
    def missed(self) -> bool:
        """Whether the model drew what no hook saw."""
        return self.model_ran and not self.handled

    def mark_handled(self, x: Tensor) -> None:
        """The guidance of the latent x was seen, or draws nothing."""
        self.handled, self.handled_input = True, x

    def close(self) -> None:
        """The evaluation is over: lets go of its tensors."""
        self.x = self.handled_input = None
        self.handled_late.clear()


class PromptSearch(Protocol):
    """What looks for prompts in other nodes' patches (patch_text.PatchText), which imports this module."""

    def find_all(self, run: "Run", patcher: ModelPatcher, conds: dict[str, list[dict]]) -> None: ...
    def find_new(self, run: "Run", patcher: ModelPatcher, model_options: dict, x: Tensor, sigma: Tensor) -> None: ...
    def restore(self, run: "Run") -> None: ...


@dataclass(eq=False)
class Run:
    """One sampling run, from OUTER_SAMPLE's start to its end; `current` is what lives for an evaluation only.

    Code that calls core's sampling function without a guider has neither start nor end: a run of `settings` alone.
    """

    # Given at the start, and the same for the whole run.
    settings: ApplySettings
    guider: CFGGuider | None = None
    sampler: Sampler | None = None
    window: Window = Window(-1.0, float("inf"))
    latent_shapes: tuple = ()  # of the latents that core packed into one (audio and video)
    patch_text: PromptSearch | None = None
    # Known when the prompts have been read (PREPARE_SAMPLING).
    saw_conditions: bool = False
    split_roles: list[tuple[str, object]] = field(default_factory=list)  # (role, uuid) of conditions to split by time
    concepts: Concepts = field(default_factory=Concepts)
    # Grows with every evaluation.
    current: EvaluationState = field(default_factory=EvaluationState)
    evaluations: int = 0  # how many there were, the current one included
    foreign: bool = False  # from the first on: code of another pack stands in for core's sampling function or guider
    probes: Probes = field(default_factory=Probes)
    flagged: dict[str, Tensor] = field(default_factory=dict)  # remembered category weights (B, K), per guidance direction
    networks: set[Redirectors] = field(default_factory=set)  # that redirected guidance: their packed weights go at the end
    consistency: Consistency = field(default_factory=Consistency)
    last_denoised: Tensor | None = None  # the sampler's last denoised latent
    noticed: set[str] = field(default_factory=set)
    readings: Readings = field(init=False)
    meter: Meter = field(init=False)

    def __deepcopy__(self, memo: dict) -> "Run":
        """Itself: some packs deep-copy a run's model options in every step, and this is still the same run."""
        return self

    def __post_init__(self) -> None:
        self.readings = Readings(self.settings.info, self.settings.categories)
        self.meter = Meter(self.settings.node_id, self.readings)

    @property
    def guider_name(self) -> str:
        return type(self.guider).__name__ if self.guider is not None else "This sampler"

    @property
    def path(self) -> str:
        """The guider, with the packs that stand in for core's sampling code."""
        others = foreign_functions()
        return f"{self.guider_name} ({', '.join(others)} replaced ComfyUI's sampling code)" if others else self.guider_name

    @property
    def is_dual(self) -> bool:
        """DualCFGGuider: two directions, of which no CFG hook sees the second."""
        return hasattr(self.guider, "cfg2") and "middle" in getattr(self.guider, "conds", {})

    def notice(self, message: str) -> None:
        """Warns once in this run; in strict mode raises SafeCFGError."""
        if self.settings.strict:
            raise SafeCFGError(f"SafeCFG (strict): {message}{self.settings.refusal}")
        if message not in self.noticed:
            self.noticed.add(message)
            logger.warning("SafeCFG: %s", message)

    def begin(self, x: Tensor) -> None:
        """A new evaluation of the latent x."""
        self.current = EvaluationState(x)
        self.evaluations += 1
        if self.evaluations == 1:
            of_guider = type(self.guider).__module__.partition(".")[0]
            self.foreign = bool(foreign_functions()) or of_guider not in ("comfy", "comfy_extras")

    def negative(self, base: str = "negative") -> list[dict] | None:
        """The guider's own negative, or the one that it was lent (already encoded for the model), for probing."""
        conds = getattr(self.guider, "conds", {})
        return conds.get(base) or conds.get("negative") or conds.get(LENT) or None

    def clear(self) -> None:
        """Lets go of everything that belongs to the run."""
        self.patch_text = None
        self.consistency.clear()
        self.guider = self.sampler = None
        for network in self.networks:
            hgr_models.release_packed(network)
        self.networks.clear()
        self.flagged.clear()
        self.concepts = Concepts()
        self.split_roles.clear()
        self.probes = Probes()
        self.last_denoised = None
        self.readings.clear()
        self.meter.clear()
        self.current.close()


def weight_patches(model: ModelPatcher) -> tuple[dict[str, int], list[str]]:
    """What tells whether a MODEL got another LoRA or merge: how many patches each weight has, and LoRAs that core injects."""
    counts = {key: len(patches) for key, patches in model.patches.items()}
    return counts, sorted(key for key in getattr(model, "injections", {}) if "lora" in key.lower())


def run_of(model_options: dict | None) -> Run | None:
    """The run that these model options belong to; None outside a run that SafeCFG follows."""
    return (model_options or {}).get(KEY)


def patcher_of(model_patcher: ModelPatcher | None) -> ModelPatcher | None:
    """The HGR's patcher that a MODEL carries (a copy on another GPU carries its own); None when another node removed it."""
    models = model_patcher.get_additional_models_with_key(KEY) if model_patcher is not None else []
    return models[0] if models else None
