"""SafeCFG in diffusers: `protect(pipe, hgr)` for a pipeline, `SafeGuidance` for a modular one. Needs the package diffusers."""

from .guider import SafeGuidance
from .pipelines import Protection, protect

__all__ = ["Protection", "SafeGuidance", "protect"]
