"""Random weights for core's own networks that listen to their prompts. Also what the zoo of `tests/host` is made of."""

import torch


@torch.no_grad()
def randomise(network: torch.nn.Module, generator: torch.Generator) -> None:
    """Fills a network so that every layer keeps its input's size; core's zero-initialised layers would ignore the prompt.

    Numbers that core left as the memory was, in buffers, become small ones.
    """
    for name, value in network.named_parameters():
        if not value.dtype.is_floating_point:
            continue
        if value.ndim > 1:
            value.copy_(torch.randn(value.shape, generator=generator) * max(1, value[0].numel()) ** -0.5)
        elif name.endswith(("weight", "scale")) or "gamma" in name:
            value.fill_(1.0)
        else:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    for _, value in network.named_buffers():
        if value.dtype.is_floating_point and not torch.isfinite(value).all():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.02)
