"""What the networks need to know about layers that a host puts in place of torch's own."""

from torch import nn


def brings_weights(layer: nn.Module) -> bool:
    """Whether a ComfyUI layer brings its weights with every call, so that only the call has them: `_v` stands for dynamic VRAM,
    the functions for patches on weights in little VRAM."""
    own = vars(layer)
    return "_v" in own or bool(own.get("weight_function") or own.get("bias_function"))
