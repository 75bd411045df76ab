"""Tensor shapes."""

from torch import Tensor


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """One value per sample, (B,), as (B, 1, ..., 1): it broadcasts over `like` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))
