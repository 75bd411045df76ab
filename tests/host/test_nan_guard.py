"""NaN from an HGR stops the run, strict or not, before anybody gets the picture; NaN of the model's own is said."""

import comfy.samplers
import numpy as np
import pytest
import torch
from safecfg import hgr_models
from safecfg.hgr_models.combined import CombinedHGR
from safecfg.nodes.host.hooks import SafeCFGError
from safecfg.nodes.loader import HGRModel, core_patcher
from safecfg.nodes.reporting import audit, traces
from safecfg.nodes.reporting.run_log import Readings
from safecfg.nodes.reporting.traces import TraceStore

from concept_fakes import WITH_CONCEPTS, concept_model
from fakes import ALWAYS, CPU, INFO, NEVER, KnownRedirection, Once, apply_hgr, guide, make_hgr, make_settings, sample

NAN = float("nan")
OTHERS = r"what the model and other nodes on its path \(test_nan_guard\) gave"  # the NaN comes from a node of this test's


def broken_hgr(*parameters: str, **options) -> HGRModel:
    """An HGR whose networks give NaN, as if something had overflowed; no file with such values would load."""
    hgr = make_hgr(**options)
    for parameter in parameters:
        hgr.patcher.model.get_parameter(parameter)[:] = NAN
    return hgr


def nan_model(model, when=lambda rows, sigma: True):
    """A MODEL whose rows are NaN where `when(cond_or_uncond, sigma)` says so: fp16 that overflows."""

    def wrapper(apply_model, args):
        out = apply_model(args["input"], args["timestep"], **args["c"])
        return out * NAN if when(args["cond_or_uncond"], float(args["timestep"][0])) else out

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("cfg", [5.0, 1.0])
@pytest.mark.parametrize(
    "parameter, what",
    [
        ("condition.read_head.bias", "random.safetensors gave the positive prompt a harmfulness"),
        ("condition.token_out.bias", "random.safetensors gave the positive prompt a redirection"),
        ("guidance.read_head.bias", "random.safetensors gave the guidance a harmfulness"),
        ("guidance.residual.bias", "random.safetensors gave the guidance a redirection"),
        ("guidance.attenuation.weight", "random.safetensors gave the guidance a redirection"),
    ],
)
def test_the_run_stops(tiny_model, tiny_cond, parameter, what, cfg, strict):
    network = parameter.partition(".")[0]
    model = apply_hgr(tiny_model, broken_hgr(parameter), redirect=network, strict=strict)
    with pytest.raises(SafeCFGError, match=f"{what} that is not finite.*Load another HGR"):
        sample(model, tiny_cond(1), tiny_cond(2), cfg, steps=2)
    repaired = apply_hgr(tiny_model, strict=strict)
    assert sample(repaired, tiny_cond(1), tiny_cond(2), cfg, steps=2).isfinite().all()


@pytest.mark.parametrize("parameter", ["condition.token_out.bias", "guidance.residual.bias", "guidance.attenuation.weight"])
def test_what_is_not_used_does_not_matter(tiny_model, tiny_cond, parameter):
    """A clean picture takes nothing from the network, so its bits cannot change."""
    model = apply_hgr(tiny_model, broken_hgr(parameter, condition=NEVER, guidance=NEVER))
    assert torch.equal(sample(model, tiny_cond(1), tiny_cond(2)), sample(tiny_model, tiny_cond(1), tiny_cond(2)))


def test_a_broken_prompt_costs_no_step(tiny_model, tiny_cond):
    """As a text encoder in half precision makes them."""
    steps = []
    model = nan_model(tiny_model, lambda rows, sigma: steps.append(sigma))
    broken = [[tiny_cond(1)[0][0] * NAN, {}]]
    with pytest.raises(SafeCFGError, match="fp32-text-enc"):
        sample(apply_hgr(model, make_hgr(NEVER, NEVER)), tiny_cond(3) + broken, tiny_cond(2))
    assert not steps


@pytest.mark.parametrize("broken", ["condition.read_head.bias", "guidance.read_head.bias"])
def test_one_part_of_several(tiny_model, tiny_cond, broken):
    parts = [make_hgr(NEVER, NEVER), broken_hgr(broken, condition=NEVER, guidance=NEVER)]
    combined = CombinedHGR([part.patcher.model for part in parts], ["a", "b"]).eval()
    patcher = core_patcher(combined, load_device=CPU, offload_device=CPU)
    model = apply_hgr(tiny_model, HGRModel(patcher, combined.info, "a + b", "hash"))
    with pytest.raises(SafeCFGError, match=r"a \+ b gave .* not finite"):
        sample(model, tiny_cond(1), tiny_cond(2), steps=2)


@pytest.mark.parametrize("broken", ["condition.read_head.bias", "guidance.read_head.bias"])
def test_redirect_mode_concept(tiny_model, tiny_cond, monkeypatch, broken):
    hgr = broken_hgr(broken, condition=NEVER, guidance=NEVER, info=WITH_CONCEPTS)
    monkeypatch.setattr("concept_fakes.make_hgr", lambda **_: hgr)
    with pytest.raises(SafeCFGError, match="harmfulness that is not finite"):
        sample(concept_model(tiny_model, strict=False), tiny_cond(1), tiny_cond(2), steps=2)


def test_a_concept_that_the_model_cannot_draw(tiny_model, tiny_cond):
    model = nan_model(tiny_model, lambda rows, sigma: rows == [1])  # the rows that SafeCFG adds come alone
    with pytest.raises(SafeCFGError, match="redirection that is not finite"):
        sample(concept_model(model, strict=False), tiny_cond(1), tiny_cond(2))


def test_no_step_shows_what_was_not_judged(tiny_model, tiny_cond):
    """A sampler's previews are pictures, too."""
    shown, plain = [], []
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    hgr = broken_hgr("guidance.read_head.bias", condition=NEVER, guidance=NEVER)
    runs = ((apply_hgr(tiny_model, hgr), shown), (tiny_model, plain))
    for model, seen in runs:
        ksampler = comfy.samplers.KSampler(model, 3, CPU, "euler", "normal")
        keep = lambda step, x0, x, total, seen=seen: seen.append(x0.clone())  # noqa: E731
        run = lambda k=ksampler, f=keep: k.sample(  # noqa: E731
            noise, tiny_cond(1), tiny_cond(2), 5.0, latent_image=torch.zeros_like(noise), callback=f, disable_pbar=True, seed=0
        )
        if seen is plain:
            run()
        else:
            pytest.raises(SafeCFGError, run)
    assert len(shown) == len(plain) == 3 and not any((a == b).any() for a, b in zip(shown, plain, strict=True))


def test_nothing_is_stored(tiny_model, tiny_cond, monkeypatch):
    monkeypatch.setattr(traces, "STORE", TraceStore())
    audit.path().unlink(missing_ok=True)
    model = apply_hgr(tiny_model, broken_hgr("guidance.read_head.bias"), audit_log=audit.SCORES)
    with pytest.raises(SafeCFGError):
        sample(model, tiny_cond(1), tiny_cond(2), steps=2)
    assert not len(traces.STORE) and audit.path().read_text() == ""


@pytest.mark.parametrize("strict", [False, True])
def test_a_sampler_that_bypasses_core(tiny_model, tiny_cond, strict):
    """It is not told when the run ends: every evaluation is looked at."""
    model = apply_hgr(tiny_model, broken_hgr("guidance.read_head.bias"), redirect="guidance")

    class Foreign(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            conds, options = self.conds, self.model_patcher.model_options
            function = comfy.samplers.sampling_function
            return function(self.inner_model, x, timestep, conds["negative"], conds["positive"], 5.0, options)

    guider = Foreign(model)
    guider.set_conds(tiny_cond(1), tiny_cond(2))
    with pytest.raises(SafeCFGError, match="harmfulness that is not finite"):
        guide(guider, Once())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("redirect", ["both", "guidance", "condition"])
def test_a_model_that_gives_nan_is_noticed(tiny_model, tiny_cond, caplog, redirect, strict):
    model = apply_hgr(nan_model(tiny_model), redirect=redirect, strict=strict)
    if strict:
        with pytest.raises(SafeCFGError, match=OTHERS):
            sample(model, tiny_cond(1), tiny_cond(2), steps=2)
    else:
        assert sample(model, tiny_cond(1), tiny_cond(2), steps=2).isnan().all()
        assert sum(OTHERS.replace("\\", "") in r.message for r in caplog.records) == 1


def test_nan_of_the_model_alone_is_said_to_be_its_own(tiny_model, tiny_cond):
    harmless = tiny_cond(1)
    harmless[0][0][:] = 1e30  # the model's own overflow
    with pytest.raises(SafeCFGError, match="the model's own output was not"):
        sample(apply_hgr(tiny_model, make_hgr(guidance=NEVER), redirect="guidance", strict=True), harmless, tiny_cond(2), steps=2)


def test_the_other_pictures_of_a_batch_stay(tiny_model, tiny_cond):
    batch = tiny_cond(1, batch=2)
    plain = sample(tiny_model, batch, tiny_cond(2), batch=2)
    batch[0][0][1] = 1e30  # the model's own overflow
    hgr = make_hgr(guidance=NEVER)
    out = sample(apply_hgr(tiny_model, hgr, redirect="guidance"), batch, tiny_cond(2), batch=2)
    assert torch.equal(out[0], plain[0]) and not out[1].isfinite().all()


def test_nan_of_the_model_that_a_sampler_hides(tiny_model, tiny_cond):
    class Hiding(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *_, **__):
            return torch.nan_to_num(model_wrap(noise, sigmas[0] * noise.new_ones(len(noise)), **extra_args))

    guider = comfy.samplers.CFGGuider(apply_hgr(nan_model(tiny_model)))
    guider.set_conds(tiny_cond(1), tiny_cond(2))
    with pytest.raises(SafeCFGError, match=OTHERS + " was not finite .* random.safetensors could not judge it"):
        guide(guider, Hiding())


def test_a_known_redirection_to_nan(tiny_model, tiny_cond, monkeypatch):
    KnownRedirection(monkeypatch, value=NAN, calls=[1])
    with pytest.raises(SafeCFGError, match="the guidance a redirection that is not finite"):
        sample(apply_hgr(tiny_model, redirect="guidance"), tiny_cond(1), tiny_cond(2))


@pytest.mark.parametrize("bad, wanted", [(None, [False] * 3), (1, [False, True, False])])
def test_which_images_were_not_read(bad, wanted):
    """In an evaluation of another batch size nobody knows which image is which."""
    readings = Readings(INFO, make_settings(make_hgr(ALWAYS)).categories)
    values = torch.zeros(3, 2)
    if bad is not None:
        values[bad] = NAN
    cond = torch.ones(3, 4, 8, 8)
    readings.add(1, torch.ones(3), cond, cond * 0, hgr_models.GuidanceResult(cond, values, torch.zeros(3, 2)))
    assert readings.unread(3).tolist() == wanted and readings.first_not_finite() == (None if bad is None else "harmfulness")
    assert np.isnan([image.harmfulness for image in readings.finish(3)]).any(axis=(1, 2)).tolist() == wanted
    readings.add(2, torch.ones(1), cond[:1] * NAN, cond[:1], hgr_models.GuidanceResult(cond[:1], values[:1], values[:1]))
    assert readings.unread(3).all() and readings.first_not_finite() == ("model" if bad is None else "harmfulness")
