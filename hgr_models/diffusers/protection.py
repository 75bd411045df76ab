"""What both ways into diffusers share: an HGR with settings, that redirects prompts and outputs of one family."""

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import load_hgr
from ..edges import Edge, redirect_outputs
from ..errors import HGRError
from ..hgr import Redirectors
from ..redirection import CategorySettings, parse_categories, redirect_condition
from .families import Family, edge_of, family_of, sigma_of

MODES = ("both", "condition", "guidance")

logger = logging.getLogger(__name__)


class Redirector:
    """An HGR and what a service asked for. `flagged`: how many pictures of the last run had a redirected prompt or guidance.

    hgr: a file, an HGR or several as one. categories: as in SafeCFG Apply, e.g. "violence = 0.5, hate = off". redirect: both,
    condition or guidance. strict: an error, not a warning, where something cannot be redirected. Raises HGRError for settings
    that are none, and for an HGR without a network that `redirect` names.
    """

    def __init__(
        self,
        hgr: str | os.PathLike | Redirectors,
        strength: float = 1.0,
        threshold_offset: float = 0.0,
        categories: str = "",
        redirect: str = "both",
        strict: bool = False,
    ):
        self.hgr = hgr if isinstance(hgr, Redirectors) else load_hgr(os.fspath(hgr))
        self.hgr.train(False).requires_grad_(False)
        if redirect not in MODES:
            raise HGRError(f"Expected `redirect` to be one of {', '.join(MODES)}, but got {redirect!r}.")
        if redirect != "both" and redirect not in self.hgr.redirectors:
            raise HGRError(f"Redirecting by {redirect!r} needs a {redirect} redirector, but this HGR has none. Load another HGR.")
        names = self.hgr.info.categories
        self.settings = CategorySettings(parse_categories(categories, names, strength), threshold_offset)
        self.by_condition = redirect != "guidance" and self.hgr.condition is not None
        self.by_guidance = redirect != "condition" and self.hgr.guidance is not None
        self.strict = strict
        self._noticed: set[str] = set()

    def check(self, denoiser: nn.Module, scheduler: Any) -> tuple[Family, Edge]:
        """The family of a pipeline and what it predicts. Raises HGRError where the HGR was trained for another one."""
        family, edge = family_of(denoiser), edge_of(scheduler)
        family.check(self.hgr.info, edge.prediction, self.by_guidance)
        return family, edge

    def notice(self, message: str) -> None:
        """Warns once; with `strict` raises HGRError."""
        if self.strict:
            raise HGRError(f"SafeCFG (strict): {message}")
        if message not in self._noticed:
            self._noticed.add(message)
            logger.warning("SafeCFG: %s", message)

    def prompts(self, tokens: Tensor, pooled: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Redirected tokens (B, T, D) and pooled vectors (B, P); unflagged rows to the last bit.

        Raises HGRError where the HGR's harmfulness is not finite: nothing is known about such a prompt.
        """
        if not self.by_condition:
            return tokens, pooled
        own = pooled if self.hgr.info.pooled_width else None
        result = redirect_condition(self.hgr.to(tokens.device), tokens, own, self.settings)
        if not torch.isfinite(result.harmfulness).all():
            raise HGRError(
                "The HGR gave a prompt a harmfulness that is not finite (NaN or infinity). Use float32 or another HGR."
            )
        return result.tokens, pooled if own is None else result.pooled

    def outputs(self, edge: Edge, scheduler: Any, timestep: Tensor | float, cond: Tensor, uncond: Tensor, x_in: Tensor) -> Tensor:
        """What to use in place of the denoiser's output `cond` (B, C, H, W); unflagged rows to the last bit."""
        sigma = torch.full((len(cond),), sigma_of(scheduler, edge, timestep), device=cond.device)
        return redirect_outputs(self.hgr.to(cond.device), edge, cond, uncond, x_in, sigma, self.settings)[0]
