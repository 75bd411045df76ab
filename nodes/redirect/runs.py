"""The state of one sampling run: it travels in the run's own `model_options`, so nothing outlives the run.

Hooks and wrappers are plain functions that close over `ApplySettings` only (0.3.64 deep-copies `model_options`, and leaves
functions as they are).
"""

import logging
import math
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ... import hgr_models
from ..reporting.meter import Meter
from .readings import Lagged, Readings

KEY = "safecfg"  # of wrappers, additional models and the run in model_options
LENT = f"{KEY}_negative"  # a role of our own: the negative that the node lends a guider without one (lent_negative.py)
NEGATIVE_ROLES = ("negative", "empty_negative_prompt", LENT)  # every other role of a guider's conditions is a prompt to draw
PROBES = (0.0, 0.15, 0.4)  # where in a run the guidance redirector looks at a model that core samples without a negative

logger = logging.getLogger(__name__)


class SafeCFGError(RuntimeError):
    """Raised when an HGR's readings are not finite, and in strict mode when something cannot be redirected; the model stays usable."""


@dataclass(frozen=True)
class ApplySettings:
    """What a `SafeCFG Apply` node was asked for, and what its HGR is for. Closures hold it: nothing in it belongs to a run.

    `concepts`: per category the HGR's encoded concept prompt [tokens, extras], None where it is off; for redirect mode concept.
    `negative`: the user's CONDITIONING for guiders without a negative.
    """

    info: hgr_models.HGRInfo
    categories: hgr_models.CategorySettings
    redirect: str = "both"  # condition, guidance, both or concept
    start_percent: float = 0.0
    end_percent: float = 1.0
    strict: bool = False
    remember_flagged: bool = False
    audit_log: str = "off"  # audit.LEVELS
    hgr_hash: str = ""
    node_id: str | None = None  # of the SafeCFG Apply node that asked, for its meter
    concepts: tuple[list | None, ...] = field(default=(), compare=False, repr=False)
    hgr_name: str = "the HGR"  # its file, for messages
    negative: list | None = field(default=None, compare=False, repr=False)

    @property
    def identity(self) -> tuple:
        """What decides about the pictures: equal for two executions of the same node."""
        return self.hgr_hash, self.categories, self.redirect, self.start_percent, self.end_percent, self.remember_flagged

    @property
    def by_condition(self) -> bool:
        return self.redirect in ("both", "condition", "concept")

    @property
    def by_guidance(self) -> bool:
        return self.redirect in ("both", "guidance", "concept")

    @property
    def by_concept(self) -> bool:
        """Both redirectors then only judge."""
        return self.redirect == "concept"


@dataclass(frozen=True)
class Window:
    """Noise levels at which SafeCFG acts: `low < sigma <= high`, both exactly representable in float32, as sigmas are."""

    low: float
    high: float

    @classmethod
    def of(cls, model_sampling, start_percent: float, end_percent: float) -> "Window":
        """The window of a part of the schedule; open ends reach any sigma, sigma 0 included."""
        high = float("inf") if start_percent <= 0 else _float32(model_sampling.percent_to_sigma(start_percent))
        low = -1.0 if end_percent >= 1 else _float32(model_sampling.percent_to_sigma(end_percent))
        return cls(low, high)

    @property
    def full(self) -> bool:
        return self.low < 0 and self.high == float("inf")

    def contains(self, sigma: Tensor) -> bool:
        """Whether a sampler's noise level (any shape, equal values) lies inside; reads the host's copy only when it must."""
        return self.full or self.low < float(sigma.flatten()[0]) <= self.high


def _float32(value) -> float:
    return float(np.float32(float(value)))


def is_active(conditions: list[dict] | None, sigma: Tensor) -> bool:
    """Whether core evaluates any of these conditions at a noise level; of the others its output is zeros."""
    if not conditions:
        return False
    bounds = [(c.get("timestep_start"), c.get("timestep_end")) for c in conditions]
    if any(start is None and end is None for start, end in bounds):
        return True
    now = float(sigma.flatten()[0])  # core reads it too where a condition has bounds
    return any((start is None or now <= _float32(start)) and (end is None or now >= _float32(end)) for start, end in bounds)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One call of the model on a latent x (B, C, *spatial) at noise levels sigma (B,), as core's hooks describe it."""

    model: object
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


@dataclass(eq=False)
class Run:
    """One sampling run. Evaluation: one call of the model with all its conditions."""

    settings: ApplySettings
    guider: object = None
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
    input: Tensor | None = None
    last_denoised: Tensor | None = None  # the sampler's last denoised latent
    noticed: set[str] = field(default_factory=set)

    def __post_init__(self):
        self.readings = Readings(self.settings.info, self.settings.categories)
        self.meter = Meter(self.settings.node_id, self.readings)

    @property
    def guider_name(self) -> str:
        return type(self.guider).__name__ if self.guider is not None else "This sampler"

    @property
    def is_dual(self) -> bool:
        """DualCFGGuider: two directions, of which no CFG hook sees the second."""
        return hasattr(self.guider, "cfg2") and "middle" in getattr(self.guider, "conds", {})

    def notice(self, message: str) -> None:
        """Warns once in this run; in strict mode raises SafeCFGError."""
        if self.settings.strict:
            raise SafeCFGError(f"SafeCFG (strict): {message}")
        if message not in self.noticed:
            self.noticed.add(message)
            logger.warning("SafeCFG: %s", message)

    def begin(self, x: Tensor) -> None:
        """A new evaluation of the latent x."""
        self.evaluated = self.handled = False
        self.evaluation += 1
        self.input, self.handled_input = x, None

    def end(self) -> None:
        self.input = self.handled_input = None

    def mark_handled(self, x: Tensor) -> None:
        self.handled, self.handled_input = True, x

    def negative(self, base: str = "negative") -> list[dict] | None:
        """The guider's own negative, or the one that it was lent (already encoded for the model), for probing."""
        conds = getattr(self.guider, "conds", {})
        return conds.get(base) or conds.get("negative") or conds.get(LENT) or None

    def probe_due(self) -> bool:
        """Counts an evaluation without a negative; True at the probes, as long as the last one was flagged, and always where
        redirect mode concept has a flagged prompt to redirect."""
        due = {int(part * self.steps) for part in PROBES}
        self.probes += 1
        flagged = self.flagged_probe.take()
        return (flagged is not None and bool(flagged)) or self.probes - 1 in due or bool(self.concepts.prompts)

    def clear(self) -> None:
        """Lets go of everything that belongs to the run."""
        self.guider = None
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


def run_of(model_options: dict | None) -> Run | None:
    """The run that these model options belong to; None outside a run that SafeCFG follows."""
    return (model_options or {}).get(KEY)


def patcher_of(model_patcher):
    """The HGR's patcher that a MODEL carries (a copy on another GPU carries its own); None when another node removed it."""
    models = model_patcher.get_additional_models_with_key(KEY) if model_patcher is not None else []
    return models[0] if models else None
