"""Small HGRs for tests."""

import torch

from hgr_models import HGR, HGRInfo
from hgr_models.condition import ConditionConfig
from hgr_models.guidance import GuidanceConfig


def info(**changes) -> HGRInfo:
    values = {
        "categories": ("weapons", "drugs"),
        "condition_thresholds": (0.5, 0.5),
        "guidance_levels": (0.0,),
        "guidance_thresholds": ((0.5, 0.5), (0.6, 0.6)),
        "latent_format": "SD15",
        "latent_channels": 4,
        "latent_dimensions": 2,
        "prediction": "EPS",
        "token_width": 16,
        "pooled_width": 0,
    }
    return HGRInfo(**{**values, **changes})


def small_hgr(seed: int = 0, zero: bool = False, pooled_width: int = 0, dimensions: int = 2, channels: int = 4) -> HGR:
    """An HGR of a few thousand parameters; random output heads unless `zero`."""
    torch.manual_seed(seed)
    facts = info(pooled_width=pooled_width, latent_dimensions=dimensions, latent_channels=channels)
    condition = ConditionConfig(16, 2, pooled_width, width=32, depth=1, delta_depth=1, heads=2)
    guidance = GuidanceConfig(channels, 2, dimensions, width=16, read_depth=1, correct_depth=2, heads=2)
    hgr = HGR(facts, condition, guidance)
    if not zero:
        for head in (
            hgr.condition.token_out,
            hgr.condition.erase,
            hgr.condition.pooled_out,
            hgr.guidance.residual,
            hgr.guidance.attenuation,
        ):
            if head is not None:
                torch.nn.init.normal_(head.weight, std=0.3)
    return hgr.eval().requires_grad_(False)
