"""SafeCFG's science in plain torch: the Harmful Guidance Redirector (HGR), its equations, checkpoints and training."""

from .checkpoint import file_hash, load_hgr, save_hgr
from .errors import HGRError
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
    "HGR", "CategorySettings", "ConditionResult", "GuidanceResult", "HGRError", "HGRInfo", "category_weights",
    "file_hash", "load_hgr", "parse_categories", "redirect_condition", "redirect_guidance", "save_hgr",
]  # fmt: skip
