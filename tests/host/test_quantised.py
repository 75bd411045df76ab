"""Bases that are quantised, or larger than the device: gradients through their own layers, and blocks that come one by one."""

import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import comfy.ops
import comfy.supported_models
import pytest
import torch
from safecfg.hgr_models.recording import Prompts
from safecfg.nodes.host.encoding import encode_batch, text_of
from safecfg.nodes.training import frozen_model
from safecfg.nodes.training.estimate import Cost
from safecfg.nodes.training.frozen_model import FrozenModel
from safecfg.nodes.training.gradient import _noise, probe_gradient

from test_training import folders, train  # noqa: F401 (folders is a fixture)
from test_zoo import LONG, settings_of
from test_zoo_nodes import RUNS
from zoo_models import Encoder, build, encode, flat, guide, latents
from zoo_pictures import PICTURES

ZOO = {variant.name: variant for variant in PICTURES}
QWEN = replace(ZOO["QwenImage"], config={**ZOO["QwenImage"].config, "num_layers": 6})
FLUX = replace(ZOO["Flux"], config={**ZOO["Flux"].config, "depth": 4, "depth_single_blocks": 4})


def plain_fp8(variant):
    """Weights stored in fp8 without scales, computed in fp32, as core casts them."""
    model = build(variant)
    for module in model.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
            module.comfy_cast_weights = True
    return model


def packed_weight(weight, layout: str) -> dict:
    """What a checkpoint holds of a weight in one of core's layouts, by the end of its key."""
    found = comfy.quant_ops.QuantizedTensor.from_float(weight, layout)
    params = found._params
    scales = {"weight_scale": params.scale}
    if getattr(params, "block_scale", None) is not None:
        scales = {"weight_scale": params.block_scale, "weight_scale_2": params.scale}
    return {"weight": found._qdata, **{key: value.clone() for key, value in scales.items()}}


def quantised(variant, monkeypatch, kind: str):
    """Weights in core's mixed-precision layers, as a checkpoint of a quantised model loads them."""
    known = getattr(getattr(comfy, "quant_ops", None), "QUANT_ALGOS", {})
    if kind not in known:
        pytest.skip("this host has no such layers")
    weights = build(variant).model.diffusion_model.state_dict()
    core = variant.core_class
    monkeypatch.setattr(core, "custom_operations", comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True))
    model = build(variant)
    network, loaded = model.model.diffusion_model, {}
    linear = {
        name for name, module in network.named_modules() if type(module).__name__ == "Linear" and f"{name}.weight" in weights
    }
    for name, value in weights.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in linear and "transformer_blocks" in name:
            packed = packed_weight(value, known[kind]["comfy_tensor_layout"])
            loaded |= {f"{layer}.{key}": part for key, part in packed.items()}
            loaded[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
        else:
            loaded[name] = value
    network.load_state_dict(loaded, strict=False)
    network.requires_grad_(False)
    kinds = {type(parameter).__name__ for parameter in network.parameters()} | {
        type(p.data).__name__ for p in network.parameters()
    }
    assert any("Quantized" in kind for kind in kinds), kinds
    return model


class PackedLinear(torch.nn.Module):
    """As a GGUF loader's layer: packed bytes, unpacked in the forward pass."""

    def __init__(self, linear):
        super().__init__()
        low, high = linear.weight.min(), linear.weight.max()
        self.step, self.low = (high - low) / 255, low
        self.packed = torch.nn.Parameter(((linear.weight - low) / self.step).round().to(torch.uint8), requires_grad=False)
        self.bias = linear.bias

    @property
    def weight(self):
        return self.packed.float() * self.step + self.low

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def gguf_like(variant):
    model = build(variant)
    for block in model.model.diffusion_model.transformer_blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, PackedLinear(child))
    return model


GGUF = Path(os.environ.get("PACKS", "-")).expanduser() / "ComfyUI-GGUF"  # the real pack, where a folder of packs is given


def from_gguf_pack(variant, monkeypatch, folder: Path):
    """A file of Q8_0 weights, read by the pack's own loader into its own layers and its own ModelPatcher."""
    if not GGUF.is_dir():
        pytest.skip("PACKS=<folder of custom nodes> has no ComfyUI-GGUF")
    gguf = pytest.importorskip("gguf")
    pack = sys.modules.setdefault("gguf_pack", ModuleType("gguf_pack"))
    pack.__path__ = [str(GGUF)]
    ops, loader, nodes = (importlib.import_module(f"gguf_pack.{name}") for name in ("ops", "loader", "nodes"))
    writer, q8 = gguf.GGUFWriter(folder / "base.gguf", "qwen_image"), gguf.GGMLQuantizationType.Q8_0
    for name, value in build(variant).model.diffusion_model.state_dict().items():
        packed = value.ndim == 2 and value.shape[1] % 32 == 0 and "transformer_blocks" in name
        data = gguf.quants.quantize(value.numpy(), q8) if packed else value.numpy()
        writer.add_tensor(name, data, raw_dtype=q8 if packed else gguf.GGMLQuantizationType.F32)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    monkeypatch.setattr(variant.core_class, "custom_operations", ops.GGMLOps)
    model = build(variant)
    read = loader.gguf_sd_loader(str(folder / "base.gguf"))
    read = read[0] if isinstance(read, tuple) else read  # newer versions give more
    missing, unexpected = model.model.diffusion_model.load_state_dict(read, strict=False)
    assert not missing and not unexpected
    assert sum(ops.is_quantized(p) for p in model.model.diffusion_model.parameters()) > 20
    return nodes.GGUFModelPatcher.clone(model)


KINDS = ["fp8", "GGUF-like", "float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise", REAL := "ComfyUI-GGUF"]


def make_base(kind: str, monkeypatch, folder: Path):
    makers = {"fp8": plain_fp8, "GGUF-like": gguf_like, REAL: lambda variant: from_gguf_pack(variant, monkeypatch, folder)}
    return makers[kind](QWEN) if kind in makers else quantised(QWEN, monkeypatch, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_carries_gradients(kind, monkeypatch, tmp_path):
    check = probe_gradient(make_base(kind, monkeypatch, tmp_path), encode_batch(Encoder(QWEN), [LONG]), settings_of(QWEN))
    assert check.error <= 0.1, check.reason


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "GGUF-like", REAL])
def test_a_quantised_base_is_trained_by_the_node_streamed_or_not(kind, monkeypatch, tmp_path, capsys):
    """A whole training of both networks: the same HGR, a base that draws as before, and far fewer bytes of weights at once."""
    with torch.inference_mode():  # as core's loaders make it
        model = make_base(kind, monkeypatch, tmp_path)
        before = flat(guide(model, QWEN, encode(QWEN, LONG)))
    latent, found, seen, made = {"samples": latents(QWEN, 1, 0.0)}, {}, [], frozen_model.Streaming
    for name, streams in (("unstreamed", False), ("streamed", True)):
        with monkeypatch.context() as patched:
            patched.setattr(FrozenModel, "streams", lambda self, shape, streams=streams: streams)
            patched.setattr(frozen_model, "Streaming", lambda device: (seen.append(made(device)), seen[-1])[1])
            hgr, losses, _, _ = train((model, Encoder(QWEN)), name, latent=latent, **RUNS)
            found[name] = {key: value.clone() for key, value in hgr.patcher.model.state_dict().items()}
        assert bool(seen) == streams and hgr.patcher.model.condition is not None and hgr.patcher.model.guidance is not None
    for key, value in found["unstreamed"].items():
        torch.testing.assert_close(
            found["streamed"][key], value, atol=1e-4, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
        )
    with torch.inference_mode():
        assert torch.equal(flat(guide(model, QWEN, encode(QWEN, LONG))), before)
    peak, whole = max(each.peak for each in seen), model.model_size()
    with capsys.disabled():
        print(f"\n{kind}, a training of both networks: weights at once {peak} bytes streamed, {whole} unstreamed")
    assert peak < 0.7 * whole


def gradients_of(variant, model, limit):
    """(gradient of the tokens, the FrozenModel) under a limit of the device's bytes."""
    conditioning, points = encode_batch(Encoder(variant), [LONG]), _noise(model, settings_of(variant))
    text = text_of(conditioning, torch.zeros(1, 2))
    prompts = Prompts(text.tokens, None, None, text.harms, text.harms, text.pooled, text.mask)
    frozen = FrozenModel(model, conditioning[0][1], None, limit)
    tokens = text.tokens.clone().requires_grad_(True)
    with frozen.loaded(tuple(points.x.shape), True):
        loss = frozen.predict(points, prompts, tokens, text.pooled).square().sum()
        (gradient,) = torch.autograd.grad(loss, tokens)
    return gradient, frozen


@pytest.mark.parametrize("variant", [QWEN, FLUX], ids=lambda v: v.name)
def test_blocks_that_do_not_fit_are_streamed_with_the_same_gradients(variant, capsys):
    model = build(variant)
    before = {name: value.data_ptr() for name, value in model.model.state_dict().items()}
    own, frozen = gradients_of(variant, model, None)
    assert frozen.streaming is None
    streamed, frozen = gradients_of(variant, model, 1)
    torch.testing.assert_close(streamed, own)
    whole = frozen.model.model_size()
    with capsys.disabled():
        print(f"\n{variant.name}: weights on the device at once: {frozen.streaming.peak} bytes streamed, {whole} unstreamed")
    assert frozen.streaming.peak < 0.7 * whole and frozen.streaming.resident == 0
    assert {name: value.data_ptr() for name, value in model.model.state_dict().items()} == before


def test_a_lora_in_the_model_is_there_when_it_is_streamed():
    model = build(QWEN)
    patched, key = model.clone(), "diffusion_model.transformer_blocks.0.attn.to_q.weight"
    patched.add_patches({key: ("diff", (torch.ones_like(model.model.state_dict()[key]),))}, 0.05)
    own, _ = gradients_of(QWEN, patched, None)
    streamed, _ = gradients_of(QWEN, patched, 1)
    plain, _ = gradients_of(QWEN, model, 1)
    torch.testing.assert_close(streamed, own)
    assert not torch.equal(streamed, plain)


def test_what_fits_is_not_streamed(monkeypatch):
    model = build(QWEN)
    frozen = FrozenModel(model, encode(QWEN, LONG)[0][1], None, 2**40)
    assert not frozen.streams((1, 16, 1, 8, 8)) and not FrozenModel(model, {}).streams((1, 16, 1, 8, 8))
    assert frozen_model.ROOM < 1 and FrozenModel(model, {}, None, frozen.model.model_size()).streams((1, 16, 1, 8, 8))


def test_the_estimate_says_how_the_model_is_held():
    say = lambda **mode: Cost({"condition": 10.0}, 0, 0, **mode).in_words()  # noqa: E731
    assert say(streamed=True, weights=3 * 2**30).endswith(
        "The model (3.0 GB) does not fit beside that: its blocks come to the device one by one, which is slower"
    )
    assert say(streamed=False, weights=2**20).endswith("The model (1 MB) stays on the device as a whole")
    assert "The model" not in say()  # no gradients go through it
