"""Concept guidance and redirect mode `concept` on the tiny model, and the published equations written out once more."""

import dataclasses

import comfy.samplers
import torch
from comfy_extras import nodes_custom_sampler
from safecfg import hgr_models
from safecfg.hgr_models import SLDSettings
from safecfg.nodes.concept.concept_guidance import guard
from safecfg.nodes.concept.concept_hooks import ConceptSettings

from fakes import INFO, Once, apply_hgr, guide, make_hgr
from tiny import tiny_conditioning

SOFT = SLDSettings(0.0, 2.0, 0.05, 0.5, 0.7)  # neither gate saturates on the tiny model
CONCEPTS = (5, 6, 7)  # seeds
SIGMA = 3.0
PROMPTS = {"red": "blood", "blue": "sky"}
SEEDS = {"red": 5, "blue": 6}  # of the categories' concepts
WITH_CONCEPTS = dataclasses.replace(INFO, concept_prompts=PROMPTS)


def guarded(model, sld=SOFT, concepts=CONCEPTS[:1], strict=False):
    return guard(model, ConceptSettings(sld, tuple(tiny_conditioning(seed, tokens=5)[0] for seed in concepts), strict))


def cfg_guider(model, cfg=5.0):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny_conditioning(1), tiny_conditioning(2))
    guider.set_cfg(cfg)
    return guider


def basic_guider(model, seed=1):
    guider = nodes_custom_sampler.Guider_Basic(model)
    guider.set_conds(tiny_conditioning(seed, tokens=5 if seed in CONCEPTS else 7))
    return guider


def alone(model, seed):
    """A concept's own x0 prediction, on the noise that `guide` uses."""
    return guide(basic_guider(model, seed), Once()).out


def published(uncond, text, concept, sld):
    """The published first step: what SLD subtracts from the guidance; all in units of the model's output."""
    difference = text - concept
    phi = (difference.abs() * sld.scale).clamp(max=1) * (difference < sld.threshold)
    return phi * (concept - uncond)


def expected(result, concepts, cfg=5.0, sld=SOFT, text=None):
    """One step of core's CFG with SLD (of CASG's choice among several), in noise units, back to x0."""
    noise = lambda denoised: (result.x - denoised) / SIGMA  # noqa: E731
    uncond, text = noise(result.alone["negative"]), noise(result.alone["positive"] if text is None else text)
    noises = [noise(concept) for concept in concepts]
    scores = [float(((c - uncond) * (text - uncond)).sum() / (c - uncond).norm()) for c in noises]
    gamma = published(uncond, text, noises[scores.index(max(scores))], sld)
    return result.x - SIGMA * (uncond + cfg * ((text - uncond) - gamma))


class KnownFlags:
    """Both redirectors judge as told: `prompt` and `guidance` are category weights (N, 2), the latter for the calls that `calls`
    names; what they would draw instead is nonsense, which must not be seen."""

    def __init__(self, monkeypatch, prompt=((0.0, 0.0),), guidance=((0.0, 0.0),), calls=None):
        self.prompt, self.guidance, self.calls, self.count = torch.tensor(prompt), torch.tensor(guidance), calls, 0
        monkeypatch.setattr(hgr_models, "redirect_condition", self.redirect_condition)
        monkeypatch.setattr(hgr_models, "redirect_guidance", self.redirect_guidance)

    def redirect_condition(self, hgr, tokens, pooled, settings, mask=None):
        weights = self.prompt.expand(len(tokens), -1) if len(self.prompt) == 1 else self.prompt
        return hgr_models.ConditionResult(tokens + 7.0, pooled, weights, weights)

    def redirect_guidance(self, hgr, cond_denoised, uncond_denoised, x_in, sigma, settings, flagged=None):
        told = self.calls is None or self.count in self.calls
        self.count += 1
        weights = self.guidance.expand(len(x_in), -1) * told
        weights = weights if flagged is None else torch.maximum(weights, flagged)
        return hgr_models.GuidanceResult(cond_denoised + 7.0, weights, weights)


def concept_model(model, strict=True, concepts=SEEDS, **settings):
    encoded = tuple(tiny_conditioning(concepts[name], tokens=5)[0] for name in INFO.categories)
    hgr = make_hgr(info=WITH_CONCEPTS)
    return apply_hgr(model, hgr, redirect="concept", strict=strict, concepts=encoded, **settings)


def record_rows(model):
    rows = []

    def record(apply_model, args):
        rows.append(args["cond_or_uncond"])
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(record)
    return rows
