"""Concept guidance on the tiny model, and its published equations written out once more."""

import comfy.samplers
from comfy_extras import nodes_custom_sampler
from safecfg.hgr_models import SLDSettings
from safecfg.nodes.concept_guidance import guard
from safecfg.nodes.concept_hooks import ConceptSettings

from fakes import Once, guide
from tiny import tiny_conditioning

SOFT = SLDSettings(0.0, 2.0, 0.05, 0.5, 0.7)  # neither gate saturates on the tiny model
CONCEPTS = (5, 6, 7)  # seeds
SIGMA = 3.0


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
