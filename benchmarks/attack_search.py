"""The attack of `benchmarks.attack`: looks for tokens near a prompt's that make a defended run draw what plain CFG draws.

    delta* = argmin over |delta| <= radius, elementwise, in units of the tokens' spread per channel, of the mean over steps of
             |guided_defended(x, sigma, tokens + delta) - guided_plain(x, sigma, harmful tokens)|^2 / |scale g_plain|^2
             + evade * quiet

It imitates, at one step of a recorded run at a time, the x0 prediction that plain CFG has there for the harmful prompt, as
Prompting4Debugging (arXiv 2309.06135) does with noise predictions. Where it succeeds at all steps, the defended run is the
plain one. One attack step costs one row of the denoiser forward and backward, whatever the defence, because all else is
recorded; back-propagation through a sampler of 8 steps costs over 20 times as much, and no judge is in the loss that a
picture without harm could fool.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from demo.attack import Surrogate
from demo.pipeline import DemoModel
from demo.replay import Replayed
from demo.safecfg import Guard, Steer, Step, generate, untouched

DECIDED = 1.0  # below this noise level a run adds detail, but no pictogram: the attack does not care what happens there
RATE, LAST = 0.15, 0.1  # of the first step, in units of the radius; what is left of it after a cosine


@dataclass(frozen=True)
class Scene:
    """What is attacked: `start` and `harmful` tokens (N, T, D), unit noise (N, C, h, w), the tokens' spread (D,), the sampler."""

    start: Tensor
    harmful: Tensor
    noise: Tensor
    spread: Tensor
    steps: int
    cfg: float

    def of(self, rows: Tensor) -> "Scene":
        return replace(self, start=self.start[rows], harmful=self.harmful[rows], noise=self.noise[rows])


@dataclass(frozen=True)
class Plan:
    """One restart: how much it wants gates closed, whether flags of the recorded run hold, and whether it starts at random."""

    evade: float
    remember: bool
    random_start: bool


def plan(restart: int) -> Plan:
    """Restarts take turns at two ways past a gate: under its threshold, and through the correction behind it."""
    return Plan(0.1, False, restart > 0) if restart % 2 == 0 else Plan(0.0, True, True)


@dataclass(frozen=True)
class Recorder:
    """A guard that keeps every step of a run, and lets another, or none, act on it."""

    guard: Guard | None
    kept: list[Step]

    def start(self, model: DemoModel, tokens: Tensor, steps: int) -> tuple[Tensor, Steer]:
        tokens, steer = (tokens, untouched) if self.guard is None else self.guard.start(model, tokens, steps)

        def keep(step: Step) -> Tensor:
            self.kept.append(step)
            return steer(step)

        return tokens, keep


def recorded(model: DemoModel, scene: Scene, tokens: Tensor, guard: Guard | None = None, negative: str = "") -> list[Step]:
    """Every step of a run."""
    kept: list[Step] = []
    generate(model, tokens, scene.noise, scene.steps, scene.cfg, Recorder(guard, kept), negative=negative)
    return kept


@dataclass
class Points:
    """Steps of recorded runs, (S, N, ...) each: x, sigma, base (what CFG starts from), wanted (guided x0), size, facts."""

    tensors: dict[str, Tensor]

    def pick(self, steps: Tensor) -> dict[str, Tensor]:
        """A step (N,) for every row."""
        rows = torch.arange(len(steps), device=steps.device)
        return {key: values[steps, rows] for key, values in self.tensors.items()}

    def of(self, rows: Tensor) -> "Points":
        return Points({key: values[:, rows] for key, values in self.tensors.items()})

    def joined(self, other: "Points") -> "Points":
        """The steps of both."""
        return Points({key: torch.cat([values, other.tensors[key]]) for key, values in self.tensors.items()})


@torch.no_grad()
def points_of(model: DemoModel, defence: Surrogate, scene: Scene, run: list[Step], plain: bool) -> Points:
    """What the attack needs to know at every step of a run; `plain`: it is the harmful prompt's under plain CFG."""
    base, none = (model.encode([prompt]) for prompt in (defence.negative, ""))
    run, found = [step for step in run if step.sigma[0] >= DECIDED], []
    for step in run:
        empty = step.uncond_denoised if plain or not defence.negative else step.predict(model, none)
        harmful = step.cond_denoised if plain else model.denoised(step.x, step.sigma, scene.harmful)
        guidance = scene.cfg * (harmful - empty)
        floor = (scene.cfg * 0.01) ** 2 * step.sigma**2 / (1 + step.sigma**2)
        found.append(
            {
                "x": step.x,
                "sigma": step.sigma,
                "base": step.predict(model, base) if plain and defence.negative else step.uncond_denoised,
                "wanted": empty + guidance,
                "size": guidance.square().flatten(1).mean(dim=1) + floor,
            }
        )
    stacked = {key: torch.stack([each[key] for each in found]) for key in found[0]}
    return Points({**stacked, **defence.facts(model, run, scene.steps)})


def objective(model: DemoModel, defence: Surrogate, here: dict[str, Tensor], tokens: Tensor, cfg: float, how: Plan) -> Tensor:
    """The loss per row (B,) of tokens (B, T, D) at recorded steps; 1 is about a prediction without any guidance."""
    rewritten, hidden = defence.rewrite(tokens)
    cond = model.denoised(here["x"], here["sigma"], rewritten)
    step = Step(here["x"], here["sigma"], cond, here["base"], 0)
    safe, quiet = defence.steer(step, here, how.remember)
    guided = here["base"] + cfg * (safe - here["base"])
    error = (guided - here["wanted"]).square().flatten(1).mean(dim=1) / here["size"]
    return error + how.evade * (hidden + quiet)


def search(
    model: DemoModel,
    defence: Surrogate,
    scene: Scene,
    points: Points,
    radius: float,
    steps: int,
    how: Plan,
    generator: torch.Generator,
    own: Callable[[Tensor], Points] | None = None,
    progress: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Tokens (N, T, D) after `steps` steps of Adam in the ball, and the mean loss of every step (steps,).

    `own` gives the steps of the defended run of the tokens found so far: asked half way, they join the points.
    """
    unit, delta = radius * scene.spread, torch.zeros_like(scene.start)
    if how.random_start:
        delta += torch.rand(delta.shape, generator=generator).to(delta) - 0.5
    delta.requires_grad_(True)
    rate = torch.tensor(RATE, device=delta.device)
    adam = torch.optim.Adam([delta], lr=rate, betas=(0.8, 0.95), capturable=delta.is_cuda)

    def descend(at: Tensor) -> Tensor:
        loss = objective(model, defence, points.pick(at), scene.start + delta * unit, scene.cfg, how)
        (delta.grad,) = torch.autograd.grad(loss.sum(), delta)
        adam.step()
        with torch.no_grad():
            delta.clamp_(-1, 1)
        return loss.detach().mean()

    order, step, losses = _orders(points, generator), Replayed(descend, delta.device), []
    for number in range(steps):
        if own is not None and number == steps // 2:
            points = points.joined(own((scene.start + delta * unit).detach()))
            order, step = _orders(points, generator), Replayed(descend, delta.device)
        rate.fill_(RATE * (LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * number / steps))))
        losses.append(step(next(order)).clone())
        progress()
    return (scene.start + delta * unit).detach(), torch.stack(losses)


def _orders(points: Points, generator: torch.Generator) -> Iterator[Tensor]:
    """A step (N,) for every row: all once, in another order for every row, and again."""
    x = points.tensors["x"]
    while True:
        yield from torch.rand(x.shape[:2], generator=generator).argsort(dim=0).to(x.device)
