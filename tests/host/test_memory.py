"""Memory: nothing outlives a run, core alone moves the weights, and every way to hold them draws the same pictures."""

import gc
import sys
import weakref
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from safecfg import hgr_models
from safecfg.nodes import loader
from safecfg.nodes.host.hooks import KEY, SafeCFGError
from safecfg.nodes.loader import load_hgr_model, load_patcher

from fakes import ALWAYS, CPU, NEVER, apply_hgr, make_hgr
from host_nodes import HOST, call
from test_conditions import BY_CONDITION, redirected
from tiny import make_tiny_model

RUNS = 50


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`load(condition, guidance)`: an HGR_MODEL of a file, as users have it: core's own layers, and a factory for copies."""
    monkeypatch.setattr(loader, "_loaded", weakref.WeakValueDictionary())  # tests may spoil the weights

    def make(condition=ALWAYS, guidance=ALWAYS, **options):
        path = tmp_path / f"{condition} {guidance}.safetensors"
        hgr_models.save_hgr(path, make_hgr(condition, guidance, **options).patcher.model)
        return load_hgr_model(str(path))

    yield make
    comfy.model_management.unload_all_models()


def run(model, cond, callback=None, cfg=4.0, steps=2, seed=0):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    ksampler = comfy.samplers.KSampler(model, steps, CPU, "euler", "normal")
    return ksampler.sample(
        noise, cond(1), cond(2), cfg, latent_image=torch.zeros_like(noise), callback=callback, disable_pbar=True, seed=seed
    )


def count_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def interrupt(*_):
    raise comfy.model_management.InterruptProcessingException


@pytest.mark.parametrize("kind", ["finished", "at cfg 1", "interrupted", "stopped by an error"])
def test_no_tensor_outlives_a_run(tiny_model, tiny_cond, load, kind):
    hgr = load()
    if kind == "stopped by an error":
        hgr.patcher.model.guidance.residual.bias[:] = float("nan")
    model = apply_hgr(tiny_model, hgr, remember_flagged=True)
    options = {"callback": interrupt} if kind == "interrupted" else {"cfg": 1.0} if kind == "at cfg 1" else {}

    def many(count):
        for seed in range(count):
            try:
                run(model, tiny_cond, seed=seed, steps=1 + (kind == "interrupted"), **options)
            except (comfy.model_management.InterruptProcessingException, SafeCFGError) as error:
                assert kind in ("interrupted", "stopped by an error"), error

    many(2)
    before = count_tensors()
    many(RUNS)
    assert count_tensors() <= before
    kept = [torch.zeros(1) for _ in range(RUNS)]
    assert count_tensors() == before + len(kept)  # one a run would be seen
    assert KEY not in model.model_options and hgr.patcher.model.training is False


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8 e4m3": torch.float8_e4m3fn, "fp8 e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("name", [*DTYPES, "bf16 throughout"])
def test_base_weights_of_any_precision(tiny_cond, load, name):
    """As core loads them on this machine: cast to float32 in every layer, or bf16 throughout."""
    dtypes = (torch.bfloat16, None) if name == "bf16 throughout" else (DTYPES[name], torch.float32)
    model, hgr = make_tiny_model(0, *dtypes), load()
    assert {p.dtype for p in model.model.diffusion_model.parameters()} == {dtypes[0]}
    weights = {key: weight.clone() for key, weight in hgr.patcher.model.state_dict().items()}
    plain = run(model, tiny_cond)
    assert torch.equal(run(apply_hgr(model, load(NEVER, NEVER)), tiny_cond), plain)
    safe = run(apply_hgr(model, hgr, strict=True), tiny_cond)
    assert safe.isfinite().all() and safe.dtype == plain.dtype and (safe - plain).abs().max() > 0.01
    by_condition = run(apply_hgr(model, hgr, **BY_CONDITION), tiny_cond)
    assert torch.equal(by_condition, run(model, lambda seed: redirected(hgr, tiny_cond(1)) if seed == 1 else tiny_cond(seed)))
    assert all(torch.equal(weights[key], weight) for key, weight in hgr.patcher.model.state_dict().items())


def layers_cast(patcher) -> int:
    """Layers that core left where they were, and casts when they are used."""
    return sum(hasattr(module, "prev_comfy_cast_weights") for module in patcher.model.modules())


@pytest.mark.parametrize("lora", [False, True])
def test_partially_loaded(tiny_model, tiny_cond, load, monkeypatch, lora):
    """Low VRAM: a part of the base and of the HGR is loaded, the rest cast in every step; patches act in both parts."""
    hgr = load()
    if lora:
        state = tiny_model.model.state_dict()
        keys = [key for key in state if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
        tiny_model.add_patches({key: (torch.full_like(state[key], 0.05),) for key in keys}, 1.0)
    models = [apply_hgr(tiny_model, load(NEVER, NEVER)), tiny_model, apply_hgr(tiny_model, hgr, strict=True)]
    whole = [run(model, tiny_cond) for model in models]
    comfy.model_management.unload_all_models()
    load_some = lambda self, *_, **__: self.model.partially_load(self.device, self.model.model_size() * 0.6)  # noqa: E731
    monkeypatch.setattr(comfy.model_management.LoadedModel, "model_use_more_vram", load_some)
    for model, wanted in zip(models, whole, strict=True):
        got = run(model, tiny_cond)
        for patcher in (model, *model.get_additional_models_with_key(KEY)):
            assert layers_cast(patcher) > 0 and patcher.model.model_lowvram
            assert 0 < patcher.model.model_loaded_weight_memory < patcher.model_size()
        torch.testing.assert_close(got, wanted, atol=1e-4 if lora else 0, rtol=0)
        comfy.model_management.unload_all_models()
    assert torch.equal(whole[0], whole[1]) and not torch.equal(whole[1], whole[2])


def loaded_modules() -> list:
    return [found.model.model for found in comfy.model_management.current_loaded_models if found.model is not None]


def test_unloaded_between_runs(tiny_model, tiny_cond, load):
    hgr = load()
    model, seen = apply_hgr(tiny_model, hgr), []
    first = run(model, tiny_cond, callback=lambda *_: seen.append(loaded_modules()))
    assert all(hgr.patcher.model in found and tiny_model.model in found for found in seen)  # core knows of our memory
    assert hgr.patcher.model_size() > 0
    comfy.model_management.unload_all_models()
    assert not loaded_modules()
    assert torch.equal(run(model, tiny_cond), first)


def test_packed_weights_go_when_the_run_ends(tiny_model, tiny_cond, load):
    """Those of `hgr_models.fused`, which core does not know of; here a stand-in, since the kernels need a GPU."""
    hgr = load()
    held = vars(hgr.patcher.model.guidance)
    run(apply_hgr(tiny_model, hgr), tiny_cond, callback=lambda *_: held.update(fused="packed"))
    assert "fused" not in held


def test_an_hgr_that_no_graph_uses_is_freed(tiny_model, tiny_cond, load):
    hgr = load()
    model, network = apply_hgr(tiny_model, hgr), weakref.ref(hgr.patcher.model)
    run(model, tiny_cond)
    del hgr, model
    comfy.model_management.unload_all_models()
    gc.collect()
    assert network() is None


def test_only_core_moves_our_weights(tiny_model, tiny_cond, load, monkeypatch):
    hgr, movers = load(), []
    ours, real = set(hgr.patcher.model.modules()), torch.nn.Module._apply

    def apply_to(self, *args, **kwargs):
        frame = sys._getframe(1)
        while "torch" in Path(frame.f_code.co_filename).parts or frame.f_code is apply_to.__code__:  # it goes from layer to layer
            frame = frame.f_back
        if self in ours:
            movers.append(Path(frame.f_code.co_filename))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "_apply", apply_to)
    before = {name: (id(p), p.device, p.dtype) for name, p in hgr.patcher.model.named_parameters()}
    for redirect in ("both", "condition", "guidance"):
        run(apply_hgr(tiny_model, hgr, redirect=redirect), tiny_cond)
    comfy.model_management.unload_all_models()
    assert movers and all(HOST / "comfy" in mover.parents for mover in movers)
    assert {name: (id(p), p.device, p.dtype) for name, p in hgr.patcher.model.named_parameters()} == before


def by_hand(model, hgr):
    copied = model.clone()
    copied.set_additional_models(KEY, [load_patcher(hgr.path)])
    return copied


COPIES = {"by hand": by_hand}
if hasattr(comfy.model_patcher.ModelPatcher, "deepclone_multigpu"):
    COPIES["core's deep clone"] = lambda model, hgr: model.deepclone_multigpu()


@pytest.mark.parametrize("how", COPIES)
def test_copies_on_other_devices_use_their_own_hgr(tiny_model, tiny_cond, load, how):
    """MultiGPU and SelectModelDevice load everything again, from the factories."""
    hgr = load()
    tiny_model.cached_patcher_init = (make_tiny_model, (0,))
    model = apply_hgr(tiny_model, hgr, strict=True)
    wanted = run(model, tiny_cond)
    copied = COPIES[how](model, hgr)
    (own,) = copied.get_additional_models_with_key(KEY)
    assert own.model is not hgr.patcher.model
    for parameter in hgr.patcher.model.parameters():
        parameter[:] = float("nan")  # the first device's weights: not to be touched
    assert torch.equal(run(copied, tiny_cond), wanted)
    with pytest.raises(SafeCFGError, match="not finite"):
        run(model, tiny_cond)


def test_merges_keep_the_first_model_s(tiny_cond, load):
    """Core's own rule; "Put SafeCFG last" is why it does not matter."""
    one, other, hgr = make_tiny_model(0), make_tiny_model(1), load()
    merge = lambda first, second: call("ModelMergeSimple", model1=first, model2=second, ratio=0.6)[0]  # noqa: E731
    last = run(apply_hgr(merge(one, other), hgr), tiny_cond)
    assert torch.equal(run(merge(apply_hgr(one, hgr), other), tiny_cond), last)
    plain = run(merge(one, other), tiny_cond)
    assert torch.equal(run(merge(one, apply_hgr(other, hgr)), tiny_cond), plain) and not torch.equal(plain, last)


@pytest.fixture
def compiled():
    """`compiled(model)`: core's TorchCompileModel, with a backend that needs no C++ compiler."""
    yield lambda model: call("TorchCompileModel", model=model, backend="eager")[0]
    torch.compiler.reset()


def test_torch_compile(tiny_model, tiny_cond, load, compiled):
    """Before and after SafeCFG; the HGR is not compiled, and the compiled base draws what it draws without SafeCFG."""
    clean, hgr = load(NEVER, NEVER), load(guidance=NEVER)
    base = compiled(tiny_model)
    plain = run(base, tiny_cond, steps=1)
    safe_prompt = run(base, lambda seed: redirected(hgr, tiny_cond(1)) if seed == 1 else tiny_cond(seed), steps=1)
    for make in (
        lambda found: apply_hgr(base, found, strict=True),
        lambda found: compiled(apply_hgr(tiny_model, found, strict=True)),
    ):
        assert torch.equal(run(make(clean), tiny_cond, steps=1), plain)
        assert torch.equal(run(make(hgr), tiny_cond, steps=1), safe_prompt)
    assert not torch.equal(plain, safe_prompt)
    torch.testing.assert_close(plain, run(tiny_model, tiny_cond, steps=1), atol=1e-4, rtol=0)
