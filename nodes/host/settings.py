"""What a `SafeCFG Apply` node was asked for."""

from dataclasses import dataclass, field

from ... import hgr_models


@dataclass(frozen=True)
class ApplySettings:
    """What a `SafeCFG Apply` node was asked for, and what its HGR is for. Closures hold it: nothing in it belongs to a run.

    `concepts`: per category the HGR's encoded concept prompt [tokens, extras], None where it is off; for redirect mode concept, and
    beside the redirectors of an HGR that is known to be weak.
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
    refusal: str = ""  # what a server that enforces SafeCFG adds to the message of a run that it stops
    weights: tuple = field(default=(), compare=False, repr=False)  # `weight_patches` of the MODEL when SafeCFG was put in

    @property
    def identity(self) -> tuple:
        """What decides about the pictures: equal for two executions of the same node."""
        concept = self.by_concept
        return self.hgr_hash, self.categories, self.redirect, self.start_percent, self.end_percent, self.remember_flagged, concept

    @property
    def by_condition(self) -> bool:
        return self.redirect in ("both", "condition", "concept")

    @property
    def by_guidance(self) -> bool:
        return self.redirect in ("both", "guidance", "concept")

    @property
    def by_concept(self) -> bool:
        """Whether flagged pictures get their category's concept row: instead of a redirection, or after it."""
        return self.judges_only or bool(self.concepts)

    @property
    def judges_only(self) -> bool:
        """Both redirectors then change nothing."""
        return self.redirect == "concept"

    @property
    def sees_guidance(self) -> bool:
        """Whether something of SafeCFG acts on the guidance."""
        return self.by_guidance or self.by_concept
