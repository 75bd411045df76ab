"""The state of one sampling run: it travels in the run's own `model_options`, so nothing outlives the run.

Hooks and wrappers are plain functions that close over `ApplySettings` only (0.3.64 deep-copies `model_options`, and leaves
functions as they are).
"""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ... import hgr_models
from ..host.hooks import KEY, LENT, SafeCFGError, as_float32
from ..host.settings import ApplySettings
from ..reporting.meter import Meter
from ..reporting.run_log import Lagged, Readings
from .consistency import Consistency
from .others import foreign_functions

PROBES = (0.0, 0.15, 0.4)  # where in a run the guidance redirector looks at a model that core samples without a negative

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """Noise levels at which SafeCFG acts: `low < sigma <= high`, both exactly representable in float32, as sigmas are."""

    low: float
    high: float

    @classmethod
    def of(cls, model_sampling, start_percent: float, end_percent: float) -> "Window":
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

    model: Any
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
class Run:
    """One sampling run. Evaluation: one call of the model with all its conditions."""

    settings: ApplySettings
    guider: Any = None
    window: Window = Window(-1.0, float("inf"))
    steps: int = 1  # inside the window
    latent_shapes: tuple = ()  # of the latents that core packed into one (audio and video)
    probes: int = 0  # evaluations inside the window that came without a negative
    probing: bool = False  # the next redirection is of a direction that a probe gave
    flagged_probe: Lagged = field(default_factory=Lagged)
    networks: set = field(default_factory=set)  # HGRs that redirected guidance: their packed weights go when the run ends
    flagged: dict[str, Tensor] = field(default_factory=dict)  # remembered category weights (B, K), per guidance direction
    concepts: Concepts = field(default_factory=Concepts)
    evaluation: int = 0  # how many there were, this one included
    saw_conditions: bool = False
    split_roles: list[tuple[str, object]] = field(default_factory=list)  # (role, uuid) of conditions to split by time
    evaluated: bool = False  # this evaluation: the model ran
    handled: bool = False  # this evaluation: a hook saw the guidance
    handled_input: Tensor | None = None
    handled_late: list[Tensor] = field(default_factory=list)  # this evaluation: predictions that were redirected after pre_cfg
    withheld: bool = False  # this evaluation: another node took the prompt away from core
    sampler: Any = None
    foreign: bool = False  # code of another pack stands in for core's sampling function or guider
    consistency: Consistency = field(default_factory=Consistency)
    patch_text: Any = None  # patch_text.PatchText: prompts in other nodes' patches
    input: Tensor | None = None
    last_denoised: Tensor | None = None  # the sampler's last denoised latent
    noticed: set[str] = field(default_factory=set)

    def __deepcopy__(self, memo) -> "Run":
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
        self.evaluated = self.handled = self.withheld = False
        self.evaluation += 1
        if self.evaluation == 1:
            of_guider = type(self.guider).__module__.partition(".")[0]
            self.foreign = bool(foreign_functions()) or of_guider not in ("comfy", "comfy_extras")
        self.input, self.handled_input = x, None

    def end(self) -> None:
        self.input = self.handled_input = None
        self.handled_late.clear()

    def mark_handled(self, x: Tensor) -> None:
        self.handled, self.handled_input = True, x

    def negative(self, base: str = "negative") -> list[dict] | None:
        """The guider's own negative, or the one that it was lent (already encoded for the model), for probing."""
        conds = getattr(self.guider, "conds", {})
        return conds.get(base) or conds.get("negative") or conds.get(LENT) or None

    def probe_due(self) -> bool:
        """Counts an evaluation without a negative; True at the probes, as long as the last one was flagged, and always where
        a concept's row has a flagged prompt to act on."""
        due = {int(part * self.steps) for part in PROBES}
        self.probes += 1
        flagged = self.flagged_probe.take()
        return (flagged is not None and bool(flagged)) or self.probes - 1 in due or bool(self.concepts.prompts)

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
        self.flagged_probe = Lagged()
        self.last_denoised = None
        self.readings.clear()
        self.meter.clear()
        self.end()


def weight_patches(model) -> tuple:
    """What tells whether a MODEL got another LoRA or merge: how many patches each weight has, and LoRAs that core injects."""
    counts = {key: len(patches) for key, patches in model.patches.items()}
    return counts, sorted(key for key in getattr(model, "injections", {}) if "lora" in key.lower())


def run_of(model_options: dict | None) -> Run | None:
    """The run that these model options belong to; None outside a run that SafeCFG follows."""
    return (model_options or {}).get(KEY)


def patcher_of(model_patcher) -> Any:
    """The HGR's patcher that a MODEL carries (a copy on another GPU carries its own); None when another node removed it."""
    models = model_patcher.get_additional_models_with_key(KEY) if model_patcher is not None else []
    return models[0] if models else None
