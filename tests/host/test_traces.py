"""Traces: what a run notes, and by which latents it is found again."""

import dataclasses
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import numpy as np
import pytest
import torch
from comfy_extras import nodes_custom_sampler
from safecfg.hgr_models import CategorySettings, GuidanceResult
from safecfg.nodes.host.hooks import KEY
from safecfg.nodes.reporting import traces
from safecfg.nodes.reporting.run_log import Readings
from safecfg.nodes.reporting.traces import STORE, TraceStore, trace_of

import nodes
from fakes import INFO, NEVER, KnownRedirection, apply_hgr, make_hgr

ONLY_GUIDANCE = {"redirect": "guidance"}


@pytest.fixture(autouse=True)
def empty_store(monkeypatch):
    monkeypatch.setattr(traces, "STORE", TraceStore())


def empty(batch=1):
    return {"samples": torch.zeros(batch, 4, 8, 8)}


def ksampler(model, cond, latent=None, seed=0, **options):
    """The LATENT of core's KSampler node."""
    options = {"steps": 6, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", **options}
    (out,) = nodes.common_ksampler(model, seed, positive=cond(1), negative=cond(2), latent=latent or empty(), **options)
    return out


def custom(model, cond, sigmas, seed=0):
    """The LATENTs (output, denoised output) of core's SamplerCustom node."""
    sampler = comfy.samplers.sampler_object("euler")
    out = nodes_custom_sampler.SamplerCustom().sample(model, True, seed, 5.0, cond(1), cond(2), sampler, sigmas, empty())
    return getattr(out, "result", out)


def test_a_step_in_numbers():
    readings = Readings(INFO, CategorySettings((1.0, 0.0), 0.25))
    cond, uncond = torch.zeros(2, 4, 64, 96), torch.zeros(2, 4, 64, 96)
    cond[:, 0] = 3.0  # guidance (3, 0, 0, 0) everywhere
    safe = cond.clone()
    safe[1, 1, :32, :48] = 6.0  # image 1: twice the guidance's length, in its upper left quarter
    result = GuidanceResult(safe, torch.tensor([[0.1, 0.2], [0.9, 0.4]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    readings.add(3, torch.tensor([2.0, 2.0]), cond, uncond, result)
    clean, turned = readings.finish(2, seed=7, hgr_hash="abc")
    assert clean.turned.tolist() == [0.0] and not clean.redirected.any() and not clean.heat_map.any()
    assert turned.turned.tolist() == [pytest.approx(2 * 0.25**0.5)] and turned.redirected.tolist() == [True, False]
    assert turned.heat_map.shape == (22, 32)  # cells of 3 x 3
    assert np.allclose(turned.heat_map[:10, :16], 2.0) and not turned.heat_map[11:].any() and not turned.heat_map[:, 16:].any()
    assert turned.evaluations.tolist() == [3] and turned.sigmas.tolist() == [2.0] and turned.seed == 7 and turned.index == 1
    assert np.allclose(turned.thresholds, 0.25) and turned.flagged.tolist() == [True, True] and not clean.flagged.any()
    summary = turned.summary()
    assert summary["flagged"] and summary["harmfulness"] == pytest.approx(0.9) and summary["redirected"] == ["red"]
    assert summary["prompt"] is None and summary["guidance"] == {"red": pytest.approx(0.9), "blue": pytest.approx(0.4)}


def test_thresholds_are_those_of_the_noise_level():
    info = dataclasses.replace(INFO, guidance_levels=(-2.0, 1.0), guidance_thresholds=((0.1, 0.2), (0.3, 0.4), (0.5, 0.95)))
    readings = Readings(info, CategorySettings((1.0, 1.0), 0.1))
    sigmas = torch.tensor([14.0, 1.0, 0.1, 0.0])
    hgr = make_hgr().patcher.model
    hgr.calibrate(info)
    wanted = (hgr.guidance_thresholds_at(sigmas) + 0.1).clamp(0, 1)
    assert np.array_equal(readings.thresholds_at(sigmas.numpy()), wanted.numpy())
    assert readings.thresholds_at(sigmas.numpy())[3].tolist() == pytest.approx([0.6, 1.0])


def test_ksamplers_latent_finds_its_trace(tiny_model, tiny_cond, monkeypatch):
    known = KnownRedirection(monkeypatch, rows={1}, calls=[2, 3])
    model = apply_hgr(tiny_model, **ONLY_GUIDANCE)
    latent = ksampler(model, tiny_cond, empty(3), seed=11)
    images = trace_of(latent, model.get_attachment(KEY).identity).images
    assert [image.redirected.any() for image in images] == [False, True, False]
    assert images[1].weights[:, 0].tolist() == [0, 0, 1, 1, 0, 0] and images[1].seed == 11
    assert (images[1].turned > 0).tolist() == [False, False, True, True, False, False] and images[1].heat_map.shape == (8, 8)
    assert images[0].sigmas.tolist() == pytest.approx(known.sigmas) and images[0].evaluations.tolist() == [1, 2, 3, 4, 5, 6]
    assert [image.index for image in images] == [0, 1, 2] and not images[0].prompts


def test_both_outputs_of_a_custom_sampler(tiny_model, tiny_cond, monkeypatch):
    """A schedule that ends before sigma 0: its outputs differ."""
    KnownRedirection(monkeypatch)
    output, denoised = custom(apply_hgr(tiny_model, **ONLY_GUIDANCE), tiny_cond, torch.tensor([10.0, 5.0, 2.0, 1.0]))
    assert not torch.equal(output["samples"], denoised["samples"])
    assert trace_of(output).images[0] is trace_of(denoised).images[0]
    assert trace_of(output).images[0].sigmas.tolist() == [10.0, 5.0, 2.0]


def test_masks_and_denoise(tiny_model, tiny_cond, monkeypatch):
    KnownRedirection(monkeypatch)
    latent = {"samples": torch.randn(2, 4, 8, 8), "noise_mask": torch.ones(2, 1, 64, 64).tril()}
    found = trace_of(ksampler(apply_hgr(tiny_model, **ONLY_GUIDANCE), tiny_cond, latent, denoise=0.5))
    assert all(len(image.sigmas) == 6 and image.sigmas.max() < 5 for image in found.images)


@pytest.mark.skipif(not hasattr(comfy.model_management, "intermediate_dtype"), reason="this host's latents are always float32")
def test_latents_in_half_precision(tiny_model, tiny_cond, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "intermediate_dtype", lambda: torch.float16)
    latent = ksampler(apply_hgr(tiny_model, **ONLY_GUIDANCE), tiny_cond)
    assert latent["samples"].dtype == torch.float16 and trace_of(latent) is not None


def test_parts_and_mixtures_of_batches(tiny_model, tiny_cond, monkeypatch):
    KnownRedirection(monkeypatch, rows={0})
    model = apply_hgr(tiny_model, **ONLY_GUIDANCE)
    first, second = (
        ksampler(model, tiny_cond, empty(2), seed=1)["samples"],
        ksampler(model, tiny_cond, empty(2), seed=2)["samples"],
    )
    changed = first[:1] + 1e-6
    images = trace_of({"samples": torch.cat([second[1:], changed, first[:1]])}).images
    assert images[0].seed == 2 and images[0].index == 1 and images[1] is None and images[2].seed == 1 and images[2].index == 0
    assert trace_of({"samples": changed}) is None and trace_of({"samples": torch.zeros(1, 4, 8, 8)}) is None


def test_equal_pictures_of_two_applies_have_a_trace_each(tiny_model, tiny_cond):
    """What is never flagged is bit-identical, whatever the settings."""
    hgr = make_hgr(NEVER, NEVER)
    one, other = (apply_hgr(tiny_model, hgr, redirect=redirect) for redirect in ("guidance", "condition"))
    latent, same = ksampler(one, tiny_cond), ksampler(other, tiny_cond)
    assert torch.equal(latent["samples"], same["samples"])
    identities = [model.get_attachment(KEY).identity for model in (one, other)]
    found = [trace_of(latent, identity).images[0] for identity in identities]
    assert len(found[0].sigmas) == 6 and not found[0].prompts and not len(found[1].sigmas) and found[1].prompts
    assert trace_of(latent).images[0] is found[1]  # the newest
    again = apply_hgr(tiny_model, hgr, redirect="guidance")  # the node ran again, and its sampler came from the cache
    assert trace_of(latent, again.get_attachment(KEY).identity).images[0] is found[0]
    assert trace_of(latent, (*identities[0][:-1], "other")) is None


def test_prompts_are_read_per_image(tiny_model, tiny_cond):
    model = apply_hgr(tiny_model, make_hgr(condition=0.5), redirect="condition")
    positive, noise = tiny_cond(1, batch=2), empty(3)
    (latent,) = nodes.common_ksampler(model, 0, 3, 5.0, "euler", "normal", positive, tiny_cond(2), noise)
    network = make_hgr().patcher.model.condition
    with torch.no_grad():
        wanted = network.harmfulness(positive[0][0])
    images = trace_of(latent).images
    for image, row in zip(images, (0, 1, 0), strict=True):  # core repeats prompts over the batch
        (prompt,) = image.prompts
        assert prompt.role == "positive" and np.allclose(prompt.harmfulness, wanted[row], atol=1e-5)
        assert image.redirected.tolist() == (wanted[row] > 0.5).tolist() and not len(image.sigmas)


def test_two_directions_are_one_step(tiny_model, tiny_cond, monkeypatch):
    KnownRedirection(monkeypatch, calls=[1])
    guider = nodes_custom_sampler.Guider_DualCFG(apply_hgr(tiny_model, **ONLY_GUIDANCE))
    guider.set_conds(tiny_cond(1), tiny_cond(3), tiny_cond(2))
    guider.set_cfg(3.0, 5.0)
    noise = torch.randn(1, 4, 8, 8)
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([5.0, 2.0, 0.0])
    (image,) = trace_of({"samples": guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)}).images
    assert image.sigmas.tolist() == [5.0, 2.0] and image.weights[:, 0].tolist() == [1.0, 0.0]


def test_a_run_that_fails_leaves_no_trace(tiny_model, tiny_cond):
    noise = torch.randn(1, 4, 8, 8)

    def stop(step, *_):
        if step == 2:
            raise InterruptedError

    sampler = comfy.samplers.KSampler(apply_hgr(tiny_model), 6, torch.device("cpu"), "euler", "normal")
    with pytest.raises(InterruptedError):
        sampler.sample(noise, tiny_cond(1), tiny_cond(2), 5.0, torch.zeros_like(noise), callback=stop, disable_pbar=True)
    assert not len(traces.STORE)


def test_no_tensor_stands_behind_a_trace(tiny_model, tiny_cond):
    trace = trace_of(ksampler(apply_hgr(tiny_model), tiny_cond)).images[0]
    arrays = [v for v in vars(trace).values() if isinstance(v, np.ndarray)]
    arrays += [v for p in trace.prompts for v in vars(p).values() if isinstance(v, np.ndarray)]
    assert len(arrays) == 10
    for array in arrays:
        while array.base is not None:
            array = array.base
            assert isinstance(array, np.ndarray)
        assert array.nbytes <= trace.size  # not a piece of something larger


def test_the_store_is_bounded(tiny_model, tiny_cond):
    trace = trace_of(ksampler(apply_hgr(tiny_model), tiny_cond)).images[0]
    few, small = TraceStore(entries=3), TraceStore(bytes=5 * trace.size // 2)
    for store, kept in ((few, "234"), (small, "34")):
        for name in "01234":
            store.put(name, "settings", trace)
        assert "".join(name for name in "01234" if store.get(name)) == kept
        store.put(kept[0], "settings", trace)  # again: now the newest
        store.put("5", "settings", trace)
        assert store.get(kept[0]) and not store.get(kept[1]) and len(store) == len(kept)
    assert STORE.entries >= 1000 and STORE.bytes <= 2**27


def test_nested_latents_are_known_by_their_values():
    picture, sound = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 2, 5, 7)
    nested = SimpleNamespace(is_nested=True, unbind=lambda: [picture, sound])
    packed = torch.cat([t.reshape(2, 1, -1) for t in (picture, sound)], dim=-1)  # as core packs them
    assert traces.digests(nested) == traces.digests(packed) != traces.digests(packed + 1)
