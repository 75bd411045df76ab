"""Bytes on the GPU while an HGR is trained through a large model whose blocks are streamed: counted on the meta device, nothing runs.

    COMFYUI_PATH=PATH python -m benchmarks.training_memory      (in the Python of that ComfyUI)

Counted: weights outside the blocks, the largest block's weights, the inputs that all blocks keep, and what autograd keeps of the
block that is computed again. Not counted: the text encoder (it is unloaded), temporary buffers of single operations, torch itself.
"""

import os
import sys
from collections.abc import Callable

import torch

GIB = 2**30


def start() -> None:
    """Makes this process one of a ComfyUI on the CPU, with this pack as `safecfg`."""
    import importlib.util
    from pathlib import Path

    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    line, sys.argv = sys.argv, ["main.py", "--cpu", "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    assert comfy.cli_args.args.cpu
    sys.argv = line
    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("safecfg", root / "__init__.py", submodule_search_locations=[str(root)])
    sys.modules["safecfg"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def size_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def kept_by(run: Callable[[], object]) -> int:
    """Bytes that autograd keeps of a forward pass, without the network's weights."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.data_ptr() == 0:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return size_of({id(t): t for t in kept}.values())


def count(network, run: Callable[[], object]) -> dict[str, float]:
    """GiB of each part."""
    from safecfg.nodes.training.recompute import blocks_of, recomputed

    network.requires_grad_(False)
    blocks = list(blocks_of(network))
    inside = {id(p) for block in blocks for p in block.parameters()}
    weights = max(size_of(block.parameters()) for block in blocks)
    with recomputed(network):
        inputs, within = kept_by(run), 0
        for block in {type(block).__name__ + str(size_of(block.parameters())): block for block in blocks}.values():
            own = block.forward
            del block.forward
            within = max(within, kept_by(run) - inputs)
            block.forward = own
    parts = {
        "weights": size_of(network.parameters()),
        "outside blocks": size_of(p for p in network.parameters() if id(p) not in inside),
        "largest block": weights,
        "inputs of blocks": inputs,
        "one block again": within,
    }
    found = {name: value / GIB for name, value in parts.items()}
    kept = found["inputs of blocks"] + found["one block again"]
    found["streamed"] = kept + found["outside blocks"] + found["largest block"]
    found["unstreamed"] = kept + found["weights"]
    return found


def flux(batch: int):
    """Flux.1 dev, 12 billion parameters, bf16, 1024 x 1024."""
    import comfy.ldm.flux.model
    import comfy.ops

    config = dict(
        in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=19,
        depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
    )  # fmt: skip
    dtype = torch.bfloat16
    network = comfy.ldm.flux.model.Flux(**config, dtype=dtype, device="meta", operations=comfy.ops.disable_weight_init)
    make = lambda *shape: torch.empty(*shape, device="meta", dtype=dtype)  # noqa: E731
    tokens = make(batch, 256, 4096).requires_grad_(True)
    return network, lambda: network(make(batch, 16, 128, 128), make(batch), tokens, make(batch, 768), make(batch))


def sdxl(batch: int):
    """SDXL, fp16, 1024 x 1024."""
    import comfy.ldm.modules.diffusionmodules.openaimodel as unet
    import comfy.ops

    dtype = torch.float16
    network = unet.UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4],
        transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], transformer_depth_middle=10,
        context_dim=2048, num_head_channels=64, use_spatial_transformer=True, use_linear_in_transformer=True, adm_in_channels=2816,
        num_classes="sequential", dtype=dtype, device="meta", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    make = lambda *shape: torch.empty(*shape, device="meta", dtype=dtype)  # noqa: E731
    tokens = make(batch, 77, 2048).requires_grad_(True)
    return network, lambda: network(make(batch, 4, 128, 128), make(batch), tokens, make(batch, 2816))


def main() -> None:
    start()
    from safecfg.nodes.training.frozen_model import in_training

    for name, make, batch in (("Flux.1 dev", flux, 1), ("Flux.1 dev", flux, 2), ("SDXL", sdxl, 1), ("SDXL", sdxl, 4)):
        with in_training():
            found = count(*make(batch))
        print(f"{name}, batch {batch}: " + ", ".join(f"{part} {value:.2f}" for part, value in found.items()) + " GiB", flush=True)


if __name__ == "__main__":
    main()
