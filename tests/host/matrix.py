"""The coverage matrix: every way to sample x every core node that changes guidance or output x SafeCFG before and after it.

Both redirectors are stood in for by known ones. What a run must give is computed by `Ideal`, from core's own code and nothing
of ours: the same run of the same graph without SafeCFG, whose model gives the redirected direction by itself.
"""

import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from safecfg import hgr_models

from fakes import KnownRedirection, apply_hgr, make_hgr, turned
from host_nodes import call, scan
from tiny import tiny_conditioning

SLOT = "sampler_calc_cond_batch_function"
BASES = ("empty_negative_prompt", "negative")  # of guidance, the first that a guider has
HARM = 3.0  # in the first channel of a harmful prompt's tokens; clean prompts have 0 there


def rewritten(tokens: torch.Tensor) -> torch.Tensor:
    """A known redirection of prompts (B, T, D): of those that carry the mark. It leaves the mark: applied twice, it is seen."""
    harmful = (tokens[..., 0].amax(dim=1) > 0.3 * HARM)[:, None, None]
    return torch.where(harmful, 0.7 * torch.cat([tokens[..., :1], tokens[..., 1:].roll(3, dims=-1)], dim=-1), tokens)


def safe_prompt(conditioning: list) -> list:
    """The CONDITIONING that the user would have had to write."""
    return [[rewritten(tokens), dict(extras)] for tokens, extras in conditioning]


def prompt(seed: int, batch: int, harmful: bool = True) -> list:
    """A CONDITIONING whose last row is harmful."""
    ((tokens, extras),) = tiny_conditioning(seed, batch=batch)
    tokens[..., 0] = 0.0
    if harmful:
        tokens[-1, :, 0] = HARM
    return [[tokens, extras]]


class Known:
    """Both redirectors, known: of the last picture of every batch, while `on`."""

    def __init__(self, monkeypatch, batch: int = 2):
        self.guidance = KnownRedirection(monkeypatch, rows={batch - 1})
        self.rows, self.on = self.guidance.rows, True
        monkeypatch.setattr(hgr_models, "redirect_condition", self.redirect_condition)

    def start(self, on: bool = True) -> None:
        self.on, self.guidance.count, self.guidance.rows = on, 0, self.rows if on else ()

    def redirect_condition(self, hgr, tokens, pooled, settings, mask=None):
        safe = rewritten(tokens) if self.on else tokens
        weights = (safe != tokens).any(dim=(1, 2))[:, None].float().expand(-1, 2) if self.on else torch.zeros(len(tokens), 2)
        return hgr_models.ConditionResult(safe, pooled, weights, weights)


class Ideal:
    """Redirects what the model itself gives a guider, before anything of core's or of a node's sees it.

    `count`: guidance directions. The first evaluation of conditions in a guider's step is the guider's own; later ones are by
    nodes, for terms of theirs.
    """

    def __init__(self, rows: set[int], blind: bool):
        self.rows, self.blind, self.count, self.due, self.guider = rows, blind, 0, False, None
        self.real = comfy.samplers.calc_cond_batch

    def watch(self, model):
        model = model.clone()
        model.add_wrapper(WrappersMP.PREDICT_NOISE, self.predict_noise)
        return model

    def predict_noise(self, executor, x, sigma, options, *args):
        self.guider, self.due = executor.class_obj, not self.blind
        if SLOT in options and not self.blind:
            options = {**options, SLOT: partial(self.slot, options[SLOT])}
        return executor(x, sigma, options, *args)

    def slot(self, function, args):
        """In place of a node's function that evaluates the conditions in several calls."""
        self.due = False
        outs = function(args)
        return self.redirected(args["model"], args["conds"], outs, args["input"], args["sigma"], args["model_options"])

    def calc_cond_batch(self, model, conds, x, sigma, options):
        outs = self.real(model, conds, x, sigma, options)
        if not self.due:
            return outs
        self.due = False
        return self.redirected(model, conds, outs, x, sigma, options)

    def redirected(self, model, conds, outs, x, sigma, options):
        """negative -> middle -> positive, of those that the guider evaluates."""
        roles, outs = self.guider.conds, list(outs)
        base = next((role for role in BASES if role in roles), None)
        place = {role: i for role in roles for i, cond in enumerate(conds) if cond is roles[role]}
        if base is None:
            return outs
        start = outs[place[base]] if base in place else self.real(model, [None, roles[base]], x, sigma, options)[1]
        safe, chosen = start, torch.tensor([i in self.rows for i in range(len(x))])[:, None, None, None]
        for role in ("middle", "positive"):
            if role in place:
                end = outs[place[role]]
                safe = torch.where(chosen, safe + turned(end - start), end)
                start, outs[place[role]] = end, safe
                self.count += 1
        return outs


@contextmanager
def ideal(monkeypatch, rows: set[int], blind: bool):
    """Inside, core evaluates conditions through an Ideal."""
    with monkeypatch.context() as patched:
        found = Ideal(rows, blind)
        patched.setattr(comfy.samplers, "calc_cond_batch", found.calc_cond_batch)
        yield found


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What a way to sample can be given."""

    positive: list
    middle: list
    negative: list
    empty: list

    @classmethod
    def make(cls, batch: int = 2) -> "Prompts":
        """Harmful in the last row, the negative ones too: those must stay as they are."""
        return cls(*(prompt(seed, batch) for seed in (1, 3, 2, 4)))

    def changed(self, change: Callable[[list], list]) -> "Prompts":
        """With other prompts to draw."""
        return dataclasses.replace(self, positive=change(self.positive), middle=change(self.middle))


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything else of a run. `sampler`: a name, or a SAMPLER."""

    latent: dict
    steps: int = 1
    cfg: float = 5.0
    denoise: float = 1.0
    sampler: object = "euler"

    @classmethod
    def make(cls, batch: int = 2, size: int = 8, **settings) -> "Scene":
        return cls({"samples": torch.zeros(batch, 4, size, size)}, **settings)

    def sigmas(self, model) -> torch.Tensor:
        return comfy.samplers.KSampler(model, self.steps, torch.device("cpu"), "euler", "normal", self.denoise).sigmas


def _ksampler(model, prompts, scene):
    return call(
        "KSampler", model=model, seed=0, steps=scene.steps, cfg=scene.cfg, sampler_name=scene.sampler, scheduler="normal",
        positive=prompts.positive, negative=prompts.negative, latent_image=scene.latent, denoise=scene.denoise,
    )  # fmt: skip


def _ksampler_advanced(model, prompts, scene):
    steps = round(scene.steps / scene.denoise)
    return call(
        "KSamplerAdvanced", model=model, add_noise="enable", noise_seed=0, steps=steps, cfg=scene.cfg, sampler_name=scene.sampler,
        scheduler="normal", positive=prompts.positive, negative=prompts.negative, latent_image=scene.latent,
        start_at_step=steps - scene.steps, end_at_step=steps, return_with_leftover_noise="disable",
    )  # fmt: skip


def _sampler_of(scene):
    return comfy.samplers.sampler_object(scene.sampler) if isinstance(scene.sampler, str) else scene.sampler


def _sampler_custom(model, prompts, scene):
    return call(
        "SamplerCustom", model=model, add_noise=True, noise_seed=0, cfg=scene.cfg, positive=prompts.positive,
        negative=prompts.negative, sampler=_sampler_of(scene), sigmas=scene.sigmas(model), latent_image=scene.latent,
    )  # fmt: skip


def _with_guider(name: str, inputs: Callable[[Prompts, float], dict]):
    def run(model, prompts, scene):
        (guider,) = call(name, model=model, **inputs(prompts, scene.cfg))
        return call(
            "SamplerCustomAdvanced", noise=call("RandomNoise", noise_seed=0)[0], guider=guider, sampler=_sampler_of(scene),
            sigmas=scene.sigmas(model), latent_image=scene.latent,
        )  # fmt: skip

    return run


def _dual(style: str):
    return _with_guider(
        "DualCFGGuider",
        lambda p, cfg: dict(
            cond1=p.positive, cond2=p.middle, negative=p.negative, cfg_conds=3.0, cfg_cond2_negative=cfg, style=style
        ),
    )


def _dual_model(model, prompts, scene):
    inputs = lambda p, cfg: dict(model_negative=model, positive=p.positive, negative=p.negative, cfg=cfg)  # noqa: E731
    return _with_guider("DualModelGuider", inputs)(model, prompts, scene)


WAYS = {  # by name: the nodes, and a run with them
    "KSampler": (["KSampler"], _ksampler),
    "KSamplerAdvanced": (["KSamplerAdvanced"], _ksampler_advanced),
    "SamplerCustom": (["SamplerCustom"], _sampler_custom),
    "CFGGuider": (
        ["CFGGuider", "SamplerCustomAdvanced"],
        _with_guider("CFGGuider", lambda p, cfg: dict(positive=p.positive, negative=p.negative, cfg=cfg)),
    ),
    "BasicGuider": (["BasicGuider"], _with_guider("BasicGuider", lambda p, cfg: dict(conditioning=p.positive))),
    "DualCFGGuider regular": (["DualCFGGuider"], _dual("regular")),
    "DualCFGGuider nested": (["DualCFGGuider"], _dual("nested")),
    "PerpNegGuider": (
        ["PerpNegGuider"],
        _with_guider(
            "PerpNegGuider",
            lambda p, cfg: dict(positive=p.positive, negative=p.negative, empty_conditioning=p.empty, cfg=cfg, neg_scale=0.7),
        ),
    ),
    "DualModelGuider": (["DualModelGuider"], _dual_model),
}
WAYS = {name: run for name, (needed, run) in WAYS.items() if all(node in scan() for node in needed)}


def is_blind(way: str, cfg: float) -> bool:
    """Whether a guider gives the guidance redirector nothing to look at; the condition redirector still works."""
    return way == "BasicGuider" or (way == "DualModelGuider" and cfg == 1)


def sample(way: str, model, prompts: Prompts, scene: Scene) -> torch.Tensor:
    return WAYS[way](model, prompts, scene)[0]["samples"]


_hgr = cache(make_hgr)  # one for all: its networks are stood in for


def with_safecfg(model, strict: bool = True):
    return apply_hgr(model, _hgr(), strict=strict, remember_flagged=True)
