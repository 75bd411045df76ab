"""Output heads that change nothing until they have learned something."""

from torch import nn


def start_at_zero(head: nn.Module) -> None:
    """Zeroes a layer's weights, if it has any yet: on Windows a host's layers get theirs when they are loaded."""
    for parameter in (head.weight, head.bias):
        if parameter is not None:
            nn.init.zeros_(parameter)
