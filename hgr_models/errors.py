"""The one exception that this package raises for input it cannot use."""


class HGRError(ValueError):
    """Says what was expected, what came, which file, and what to do."""

    __module__ = "hgr_models"  # a host that loads the package from a path would tell clients that path
