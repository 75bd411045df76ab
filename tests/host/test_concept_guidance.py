"""`SafeCFG Concept Guidance` in runs of core's samplers: closed forms, units, rows, warm-up, and its widgets."""

import gc
import weakref
import zlib
from types import SimpleNamespace

import comfy.model_sampling
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from safecfg.hgr_models import SLD_PRESETS, HGRError, SLDSettings, output_units, parse_concepts
from safecfg.nodes.concept import concept_hooks
from safecfg.nodes.concept.concept_guidance import ConceptGuidance, prompts_of
from safecfg.nodes.host.families import PREDICTIONS, prediction_of

from concept_fakes import CONCEPTS, SIGMA, SOFT, alone, cfg_guider, expected, guarded, published
from fakes import AtEverySigma, Once, guide, sample
from tiny import tiny_conditioning

WIDGETS = {
    "method": "SLD", "preset": "Strong", "warm_up": 0.14, "safety_scale": 2000.0, "threshold": 0.025, "momentum_scale": 0.5,
    "momentum_beta": 0.7, "strict": False,
}  # fmt: skip


class FakeCLIP:
    """A CLIP for the tiny model: random tokens by prompt."""

    def __init__(self):
        self.prompts = []

    def tokenize(self, text):
        self.prompts.append(text)
        return text

    def encode_from_tokens_scheduled(self, tokens):
        return tiny_conditioning(zlib.crc32(tokens.encode()) % 1000, tokens=5)


def run_node(model, clip=None, concepts="violence: blood\nhate: hate", hgr=None, **widgets):
    options = {**WIDGETS, "concepts": concepts, **widgets}
    return ConceptGuidance.execute(model, clip or FakeCLIP(), **options, hgr=hgr).result[0]


@pytest.mark.parametrize("count", [1, 3], ids=["SLD", "CASG"])
def test_one_step_is_the_closed_form(tiny_model, count):
    concepts = [alone(tiny_model, seed) for seed in CONCEPTS[:count]]
    result = guide(cfg_guider(guarded(tiny_model, concepts=CONCEPTS[:count])), Once())
    torch.testing.assert_close(result.out, expected(result, concepts), atol=2e-4, rtol=0)
    plain = guide(cfg_guider(tiny_model), Once())
    assert (result.out - plain.out).abs().max() > 0.05
    swapped = expected(result, [alone(tiny_model, 8)])
    assert (result.out - swapped).abs().max() > 0.01  # another concept would be seen


def test_v_prediction_works_on_the_models_own_output(tiny_model):
    """Raw v outputs from core's own equation x0 = x sd^2 / (s^2 + sd^2) - v s sd / sqrt(s^2 + sd^2), sd = 1."""
    model = ModelSamplingDiscrete().patch(tiny_model, "v_prediction", False)[0]
    result = guide(cfg_guider(guarded(model)), Once())
    root = (SIGMA**2 + 1) ** 0.5
    v = lambda denoised: (result.x / root**2 - denoised) * root / SIGMA  # noqa: E731
    uncond, text, concept = (v(d) for d in (result.alone["negative"], result.alone["positive"], alone(model, 5)))
    combined = uncond + 5.0 * ((text - uncond) - published(uncond, text, concept, SOFT))
    torch.testing.assert_close(result.out, result.x / root**2 - combined * SIGMA / root, atol=2e-4, rtol=0)
    in_noise_units = expected(result, [alone(model, 5)])
    assert (result.out - in_noise_units).abs().max() > 0.01  # the units matter


@pytest.mark.parametrize("name", [name for name, _ in PREDICTIONS if "IMG" not in name and name != "X0"])
def test_units_are_those_of_cores_predictions(name):
    """Core's x0 is linear in the model's output; its slope is what the units undo."""
    kind = getattr(comfy.model_sampling, name, None)
    if kind is None:
        pytest.skip(f"this host has no {name}")
    sampling = type("Sampling", (comfy.model_sampling.ModelSamplingDiscrete, kind), {})()
    sampling.sigma_data = 1.0 if "DDPM" in name else 0.5
    sigma, ones = torch.tensor([0.3, 1.0, 7.0]), torch.ones(3, 1)
    slope = sampling.calculate_denoised(sigma, ones, torch.zeros(3, 1)).flatten()
    torch.testing.assert_close(output_units(sigma, prediction_of(sampling), sampling.sigma_data), -1 / slope.abs())


@pytest.mark.parametrize("method", ["SLD", "CASG"])
@pytest.mark.parametrize("preset", [*SLD_PRESETS, "custom"])
def test_every_preset_runs(tiny_model, tiny_cond, preset, method):
    plain = sample(tiny_model, tiny_cond(1, batch=2), tiny_cond(2), steps=4, batch=2)
    safe = sample(run_node(tiny_model, preset=preset, method=method), tiny_cond(1, batch=2), tiny_cond(2), steps=4, batch=2)
    assert safe.isfinite().all() and (safe - plain).abs().max() > 0.01


def test_defaults_are_the_schemas_and_a_preset():
    schema = ConceptGuidance.define_schema()
    assert {i.id: i.default for i in schema.inputs if i.id in WIDGETS} == WIDGETS
    defaults = [WIDGETS[name] for name in ("warm_up", "safety_scale", "threshold", "momentum_scale", "momentum_beta")]
    assert SLDSettings(*defaults) == SLD_PRESETS["Strong"]
    assert len(parse_concepts(next(i.default for i in schema.inputs if i.id == "concepts"))) == 7


@pytest.mark.parametrize("concepts", [CONCEPTS[:1], CONCEPTS], ids=["SLD", "CASG"])
def test_extra_rows(tiny_model, tiny_cond, concepts):
    """Each concept is one row, and other patches know it as unconditional."""
    rows = []

    def record(apply_model, args):
        rows.append(args["cond_or_uncond"])
        return apply_model(args["input"], args["timestep"], **args["c"])

    tiny_model.set_model_unet_function_wrapper(record)
    sample(guarded(tiny_model, concepts=concepts), tiny_cond(1), tiny_cond(2), steps=6)
    assert rows.count([1]) == 6 * len(concepts) and len(rows) == 6 * (1 + len(concepts))
    rows.clear()
    sample(guarded(tiny_model, SLDSettings(0.5, 20.0, 0.0), concepts), tiny_cond(1), tiny_cond(2), steps=6)
    assert rows.count([1]) == 3 * len(concepts)  # without momentum the warm-up needs no rows


@pytest.mark.parametrize(
    "preset, steps, first", [("Weak", 8, 2), ("Strong", 8, 1), ("Weak", 50, 15), ("Medium", 50, 10), ("Max", 8, 0)]
)
def test_warm_up_is_a_fraction_of_the_run(tiny_model, preset, steps, first):
    sigmas = [*torch.linspace(10.0, 0.5, steps).tolist(), 0.0]
    plain = guide(cfg_guider(tiny_model), AtEverySigma(), sigmas).outs
    safe = guide(cfg_guider(guarded(tiny_model, SLD_PRESETS[preset])), AtEverySigma(), sigmas).outs
    same = [torch.equal(safe[s], plain[s]) for s in plain if s > 0]
    assert same == [True] * first + [False] * (steps - first)
    assert safe[0.0].isfinite().all()


def test_momentum_builds_up_in_the_warm_up(tiny_model):
    """The first guarded step differs from a run that starts there."""
    late = SLDSettings(0.5, 2.0, 0.05, 1.0, 0.5)
    long = guide(cfg_guider(guarded(tiny_model, late)), AtEverySigma(), (6.0, 5.0, SIGMA, 1.0, 0.0)).outs
    short = guide(cfg_guider(guarded(tiny_model, late)), AtEverySigma(), (5.0, SIGMA, 0.0)).outs
    assert (long[SIGMA] - short[SIGMA]).abs().max() > 1e-3


def test_momentum_does_not_outlive_a_run(tiny_model, tiny_cond):
    model = guarded(tiny_model)
    first = sample(model, tiny_cond(1), tiny_cond(2))
    sample(model, tiny_cond(7), tiny_cond(2), steps=3)
    assert torch.equal(sample(model, tiny_cond(1), tiny_cond(2)), first)


def test_nothing_outlives_a_run(tiny_model, tiny_cond, monkeypatch):
    alive, build = [], concept_hooks.ConceptRun

    def start(*args):
        run = build(*args)
        alive.extend([weakref.ref(run), weakref.ref(run.guard)])
        return run

    monkeypatch.setattr(concept_hooks, "ConceptRun", start)
    model = guarded(tiny_model)
    sample(model, tiny_cond(1), tiny_cond(2))
    gc.collect()
    assert len(alive) == 2 and all(reference() is None for reference in alive)
    assert concept_hooks.KEY not in model.model_options


def test_safety_scale_0_is_no_node(tiny_model, tiny_cond):
    plain = sample(tiny_model, tiny_cond(1), tiny_cond(2))
    for model in (tiny_model, guarded(tiny_model)):
        off = run_node(model, preset="custom", safety_scale=0.0)
        assert not any(off.wrappers.values()) and not off.model_options.get("sampler_pre_cfg_function")
        assert torch.equal(sample(off, tiny_cond(1), tiny_cond(2)), plain)


def test_the_users_model_and_prompts_stay_as_they_are(tiny_model, tiny_cond):
    positive, negative = tiny_cond(1), tiny_cond(2)
    before = [positive[0][0].clone(), negative[0][0].clone()]
    sample(guarded(tiny_model), positive, negative)
    assert tiny_model.model_options == {"transformer_options": {}} and not tiny_model.wrappers
    assert torch.equal(positive[0][0], before[0]) and torch.equal(negative[0][0], before[1]) and negative[0][1] == {}


@pytest.mark.parametrize("damage", [lambda h: [], lambda h: lambda args: args["conds_out"]], ids=["emptied", "bare callable"])
def test_hooks_that_a_later_node_overwrote_are_repaired(tiny_model, tiny_cond, damage):
    model = guarded(tiny_model)
    wanted = sample(model, tiny_cond(1), tiny_cond(2))
    later = model.clone()
    later.model_options["sampler_pre_cfg_function"] = damage(later.model_options["sampler_pre_cfg_function"])
    assert torch.equal(sample(later, tiny_cond(1), tiny_cond(2)), wanted)


def test_a_second_node_replaces_the_first_and_says_so(tiny_model, tiny_cond, caplog):
    wanted = sample(guarded(tiny_model, concepts=(6,)), tiny_cond(1), tiny_cond(2))
    twice = guarded(guarded(tiny_model), concepts=(6,))
    assert any("only the last one counts" in r.message for r in caplog.records)
    assert torch.equal(sample(twice, tiny_cond(1), tiny_cond(2)), wanted)


def test_caches_do_not_see_the_concepts(tiny_model, tiny_cond):
    calls, model = [], guarded(tiny_model)
    count = lambda executor, *args, **kwargs: (calls.append(1), executor(*args, **kwargs))[1]  # noqa: E731
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "easycache", count)
    sample(model, tiny_cond(1), tiny_cond(2), steps=6)
    assert len(calls) == 6


def test_prompts_by_method(tiny_model):
    for method, wanted in (("SLD", ["blood, gore, hate"]), ("CASG", ["blood, gore", "hate"])):
        clip = FakeCLIP()
        run_node(tiny_model, clip, "violence: blood, gore\nhate: hate", method=method)
        assert clip.prompts == wanted


def hgr_with(prompts):
    return SimpleNamespace(info=SimpleNamespace(categories=("red", "blue"), concept_prompts=prompts), path="some.safetensors")


def test_an_hgrs_concepts_replace_the_text(tiny_model):
    assert prompts_of(hgr_with({"blue": "sky", "red": "blood", "other": "x"}), "ignored") == {"red": "blood", "blue": "sky"}
    clip = FakeCLIP()
    run_node(tiny_model, clip, "ignored", hgr=hgr_with({"blue": "sky"}), method="CASG")
    assert clip.prompts == ["sky"]
    with pytest.raises(HGRError, match="some.safetensors holds no concept prompts"):
        run_node(tiny_model, hgr=hgr_with({}))


def test_wrong_input_is_said(tiny_model):
    with pytest.raises(HGRError, match="has none. Connect the CLIP"):
        ConceptGuidance.execute(tiny_model, None, **WIDGETS, concepts="blood")
    with pytest.raises(HGRError, match="text is empty"):
        run_node(tiny_model, concepts="  ")
    scheduled = FakeCLIP()
    scheduled.encode_from_tokens_scheduled = lambda tokens: tiny_conditioning(1) * 2
    with pytest.raises(HGRError, match="scheduled hooks"):
        run_node(tiny_model, scheduled)
