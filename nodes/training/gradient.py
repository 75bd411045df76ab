"""Whether a model carries gradients from its prediction back to a prompt: tried in seconds, before anything is recorded."""

import logging
import math
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ... import hgr_models
from ...hgr_models.recording import Points, Prompts
from ...hgr_models.shapes import per_row
from ..host.families import POOLED, latents_of
from ..host.more_tokens import MASK
from .frozen_model import FrozenModel, first_line, reading
from .recorder import RunSettings, empty_latent

PART = 0.5  # of the schedule, at which gradients are tried
STEPS = (0.02, 0.002, 0.0002)  # of the tokens' spread: how far the check moves them
MAX_GRADIENT_ERROR = 0.3  # of a gradient that can be learnt from
CONVINCING = 0.05  # an error after which no smaller step is tried

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GradientCheck:
    """Whether training can follow gradients through a model: their relative error, and why there are none."""

    error: float
    reason: str = ""
    checkpointing: bool = True  # how the model is to be loaded for them
    streamed: bool = False  # its weights do not fit on the device beside a backward pass

    @property
    def passed(self) -> bool:
        """Whether they are exact enough to learn from."""
        return self.error <= MAX_GRADIENT_ERROR

    def in_words(self) -> str:
        """What to tell the user of a model that did not pass."""
        return f"this model carries no exact gradients to its prompts ({self.reason or f'relative error {self.error:.2f}'})"


def probe_gradient(model: ModelPatcher, conditioning: list, settings: RunSettings, checkpointing: bool = True) -> GradientCheck:
    """Tries gradients on one latent of noise of the smallest size, with the first row of a CONDITIONING."""
    tokens, extras = conditioning[0]
    row = lambda key: None if extras.get(key) is None else extras[key][:1].float().cpu()  # noqa: E731
    tokens = tokens[:1].float().cpu()
    none = torch.zeros(1, 0)
    prompts = Prompts(tokens, None, None, none, none, row(POOLED), row(MASK))
    with torch.inference_mode(False):  # what was made in it refuses a backward pass
        prompts = Prompts(*(None if t is None else t.clone() for t in vars(prompts).values()))
        return check_gradient(FrozenModel(model, extras, settings.latent), _noise(model, settings), prompts, checkpointing)


def _noise(model: ModelPatcher, settings: RunSettings) -> Points:
    """One point of pure noise on the way of a run."""
    latent = empty_latent(model, settings, min(settings.sizes, key=math.prod), 1)
    sampling = model.get_model_object("model_sampling")
    sigma = torch.full((1,), float(sampling.percent_to_sigma(PART)))
    noise = comfy.sample.prepare_noise(latent, 0)
    parts = noise.unbind() if getattr(noise, "is_nested", False) else [noise]
    facts = latents_of(model)
    places = [i for i, t in enumerate(parts) if t.ndim == facts.latent_dimensions + 2 and t.shape[1] == facts.latent_channels]
    x = parts[places[0]] * per_row(sigma.clamp(min=1.0), parts[places[0]])
    others = [t.flatten(1) for i, t in enumerate(parts) if i != places[0]]
    points = Points(x, sigma, torch.ones(1), x, x, x, torch.zeros(1, 0), torch.zeros(1, dtype=torch.long))
    return replace(points, rest=torch.cat(others, dim=1)) if others else points


def check_gradient(frozen: FrozenModel, points: Points, prompts: Prompts, checkpointing: bool = True) -> GradientCheck:
    """Tries a backward pass through a model as it would be trained, and with checkpointing where that fails.

    Whatever happens in a network without a backward pass is an answer; only an interruption and a lack of memory are raised.
    """
    found = _try_gradient(frozen, points, prompts, checkpointing)
    if not found.passed and not checkpointing:  # blocks that add in place need copies of their inputs
        found = _try_gradient(frozen, points, prompts, True)
    return found


def _try_gradient(frozen: FrozenModel, points: Points, prompts: Prompts, checkpointing: bool) -> GradientCheck:
    try:
        loaded, read = frozen.loaded(tuple(points.x.shape), checkpointing), reading(frozen.model, prompts.tokens)
        with torch.inference_mode(False), torch.enable_grad(), loaded, read:
            error = gradient_error(frozen, points, prompts)
            return GradientCheck(error, checkpointing=checkpointing, streamed=frozen.streaming is not None)
    except (comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError, hgr_models.HGRError):
        raise
    except Exception as error:
        logger.debug("SafeCFG: the check of the gradient failed.", exc_info=True)
        return GradientCheck(float("inf"), first_line(error), checkpointing)


def gradient_error(frozen: FrozenModel, points: Points, prompts: Prompts) -> float:
    """How far the gradient of a loss at a prompt is from its finite difference, relative: 0 is exact, 1 or more is wrong.

    Of the tokens and the pooled vector together. Large where a model's layers cut the graph, or give wrong gradients in
    silence. The smaller of two errors: a large step drowns rounding, a small one curvature.
    """
    text = [t.clone().requires_grad_(True) for t in (prompts.tokens, prompts.pooled) if t is not None]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(points.x.shape, generator=generator).to(points.x)

    def loss(tokens: Tensor, pooled: Tensor | None = None) -> Tensor:
        return (frozen.predict(points, prompts, tokens, pooled).cpu().double() * weights).sum()

    gradients = torch.autograd.grad(loss(*text), text, allow_unused=True)
    pairs = [(t.detach(), torch.zeros_like(t) if g is None else g) for t, g in zip(text, gradients, strict=True)]
    directions = [_direction(t, g, generator) for t, g in pairs]
    error = float("inf")
    for step in STEPS:
        with torch.no_grad():
            there, back = ([t + sign * step * d for (t, _), d in zip(pairs, directions, strict=True)] for sign in (1, -1))
            found = float(loss(*there) - loss(*back))
        expected = sum(float(2 * step * (g * d).sum()) for (_, g), d in zip(pairs, directions, strict=True))
        error = min(error, abs(found - expected) / max(abs(found), abs(expected), 1e-20))
        if error < CONVINCING:
            break
    return error


def _direction(text: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
    """Half along the gradient, where there is most to see, and half at random, where a gradient of 0 would be seen."""
    other = torch.randn(text.shape, generator=generator).to(text) * (text != 0)  # padding stays padding
    direction = gradient / gradient.norm().clamp(min=1e-20) + other / other.norm().clamp(min=1e-20)
    return direction * text.std() * text.numel() ** 0.5 / direction.norm()
