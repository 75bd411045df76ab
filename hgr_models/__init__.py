"""SafeCFG's science in plain torch: the Harmful Guidance Redirector (HGR), its equations, checkpoints and training."""

from .checkpoint import file_hash, fingerprint, load_hgr, read_info, save_hgr
from .concept import (
    DEFAULT_CONCEPTS,
    SLD_PRESETS,
    ConceptGuard,
    FlaggedConceptGuard,
    SLDSettings,
    output_units,
    parse_concepts,
    select_concept,
    select_flagged,
    sld_term,
    warm_up_steps,
)
from .errors import HGRError
from .fused import release_packed
from .hgr import HGR, HGRInfo
from .redirection import (
    CategorySettings,
    ConditionResult,
    GuidanceResult,
    category_weights,
    parse_categories,
    redirect_condition,
    redirect_guidance,
)

__all__ = [
    "DEFAULT_CONCEPTS", "SLD_PRESETS", "ConceptGuard", "SLDSettings", "output_units", "parse_concepts", "select_concept", "sld_term",
    "warm_up_steps", "FlaggedConceptGuard", "select_flagged", "HGR", "CategorySettings", "ConditionResult", "GuidanceResult",
    "HGRError", "HGRInfo", "category_weights", "file_hash", "fingerprint", "load_hgr", "parse_categories", "read_info", "redirect_condition",
    "redirect_guidance", "release_packed", "save_hgr",
]  # fmt: skip
