"""Both redirectors stood in for by known ones, and what a run with them must give.

`Ideal` computes it from core's own code and nothing of ours: the same run of the same graph without SafeCFG, whose model gives
the redirected direction by itself.
"""

from contextlib import contextmanager
from functools import partial

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from safecfg import hgr_models

from fakes import KnownRedirection, turned
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
    """Both redirectors, known: of some rows of every batch, while `on` and while the harm's category is switched on."""

    def __init__(self, monkeypatch, rows: set[int]):
        self.guidance, self.rows, self.on = KnownRedirection(monkeypatch, rows), rows, True
        monkeypatch.setattr(hgr_models, "redirect_guidance", self.redirect_guidance)
        monkeypatch.setattr(hgr_models, "redirect_condition", self.redirect_condition)

    def start(self, on: bool = True) -> None:
        self.on, self.guidance.count = on, 0

    def _sees(self, settings) -> bool:
        return self.on and settings.strengths[0] > 0

    def redirect_guidance(self, hgr, cond_denoised, uncond_denoised, x_in, sigma, settings, flagged=None):
        self.guidance.rows = self.rows if self._sees(settings) else ()
        return self.guidance(hgr, cond_denoised, uncond_denoised, x_in, sigma, settings, flagged)

    def redirect_condition(self, hgr, tokens, pooled, settings, mask=None):
        safe = rewritten(tokens) if self._sees(settings) else tokens
        weights = (safe != tokens).any(dim=(1, 2))[:, None].float().expand(-1, 2)
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
        if base in place:
            start = outs[place[base]]
        else:
            negative = getattr(self.guider, "_uncond_conds", roles[base])  # DualModelGuider prepares its negative apart
            with torch.random.fork_rng():  # ToMe draws random numbers: this evaluation must not be noticed
                start = self.real(model, [None, negative], x, sigma, options)[1]
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
