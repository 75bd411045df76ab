"""Hardens the stored guidance redirector: it goes on learning while somebody bends its prompts' tokens against it.

Every prompt of a pool has a change of its own inside the ball of `benchmarks.attack`. In every step some of them take one
step of that attack's descent, through the redirector as it is then and a smooth gate, at one point of a recorded run; the
directions that come out are what the redirector learns next, beside ordinary runs. Half of the pool looks for ways under the
gates, the other half for ways through the correction. Adversarial training of this kind is arXiv 1706.06083's; keeping the
changes between steps makes one step of descent do (arXiv 1904.12843).

What an attack can hide under is a threshold, and a threshold is as high as the most alarming clean run. So the clean points that
the redirector reads as most harmful are learnt most often (hard negatives, as in arXiv 1604.03540). Without them, hardening
bought its safety with false alarms on pictures of a kind that no training showed.
"""

import math
import random
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from demo.attack import RADIUS, SafeCFG, spread_of
from hgr_models import HGR, CategorySettings, HGRError, load_hgr, redirect_guidance, save_hgr
from hgr_models.calibration import calibrated, guidance_readings, run_maxima
from hgr_models.fused import without_fusing
from hgr_models.guidance import ELSEWHERE
from hgr_models.losses import mean_square
from hgr_models.recording import Points, Prompts
from hgr_models.redirection import read_guidance
from hgr_models.shapes import per_row
from hgr_models.shards import CLEAN, HARMFUL, stacked
from hgr_models.train_guidance import (
    CAP,
    CLEAN_BATCH,
    HARMFUL_BATCH,
    NO_DIRECTION,
    PARTNER_BATCH,
    GuidanceTraining,
    mixed,
    relative,
)
from hgr_models.training import autocast, disguise, learning_rate

from .. import prompts as p
from .. import world
from ..pipeline import LATENT_SHAPE, DemoModel
from ..replay import Replayed
from ..safecfg import Redirection, Step
from ..sampling import input_scaling, scale_input, shifted_schedule
from .guidance import RESPONSE, policy_of, scale_response
from .hgr_common import FALSE_POSITIVE_RATE, OUT, calibrate
from .hgr_data import BATCH, labels, prompt_tensors, runs

HARMFUL_RUNS, CLEAN_RUNS, WORD_RUNS = 1200, 1200, 2000  # the last: clean words of any kind, whatever the denoiser makes of them
HELD_OUT_RUNS = 800  # clean ones that are not learnt from: they set the thresholds that the attack has to pass under
WORDS, DISGUISED = 0.5, (0.3, 0.4)  # of the names in word runs; of the harmful prompts and of those of word runs
ALARMING, ALARMING_BATCH = 0.05, 24  # of all clean points
BIG_BATCH = 1000  # points that are read at a time, without gradients
POOL, ATTACKED_BATCH = 320, 16
RUN_STEPS, LOWEST_SIGMA = 12, 0.5  # of the attacked runs; below it a run adds detail, but no pictogram
REFRESH = 150  # training steps, after which attacked runs and thresholds are made anew
RATE = 1e-3
EVADE = 0.1  # what a closed gate is worth to an attack that looks for ways under it
STEP_SIZES, SLOWING = (0.15, 0.03), 60  # of the descent, in radii: at first, and from that many steps on
FORGET = 1 / 80  # per step: the share of the changes that start again from none, so that weak attacks stay known
MOMENTS = (0.8, 0.95)  # of Adam
ON = CategorySettings((1.0,) * len(world.CATEGORIES))


def train(steps: int, device: str, seed: int, times: int = 1) -> None:
    """Writes the stored HGR again, with this guidance redirector and new thresholds.

    `times` makes everything so many times as large: the pool, the batches of a step, the runs that are recorded.
    """
    model, hgr = DemoModel.load(device), load_hgr(OUT).to(device)
    scale_response(hgr, 1 / hgr.info.training.get("guidance_response", 1.0))
    with without_fusing():  # a replayed graph changes weights without a trace: packed ones would be those of before
        train_in(model, hgr, steps, seed, times)
    scale_response(hgr, RESPONSE)
    hgr.info = calibrate(model, hgr, seed)
    hgr.info.training.update(hardened_steps=steps, hardened_seed=seed, hardened_times=times, guidance_response=RESPONSE)
    save_hgr(OUT, hgr.cpu())


def train_in(model: DemoModel, hgr: HGR, steps: int, seed: int, times: int = 1) -> None:
    """Trains `hgr.guidance`, which is not calibrated afterwards."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    model.unet.requires_grad_(False)
    learnt, held_out = recorded(model, hgr, rng, generator, times)
    training = Hardening(hgr, learnt, held_out, Adversary(model, hgr, rng, generator, times), steps, seed, times)
    with tqdm(total=steps, desc="hardened redirector") as bar:
        while training.step < steps:
            if training.step % REFRESH == 0:
                training.refresh()
            loss = training.harden()
            bar.update()
            if training.step % 10 == 0 or training.step == steps:
                bar.set_postfix(loss=f"{finite(loss, training.step):.3f}")
    training.finish()


def finite(loss: Tensor, step: int) -> float:
    """The value of a loss. Raises HGRError where it is none: a step does not look, since that would wait for the GPU."""
    if not math.isfinite(value := loss.item()):
        raise HGRError(f"The loss of step {step} is {value}, and so are the weights now. Start again with another --seed.")
    return value


class Hardening(GuidanceTraining):
    """Both sides of the training. A step is one function of random numbers that are drawn before, so that a GPU can replay it."""

    def __init__(self, hgr: HGR, learnt: "Held", held_out: Points, adversary: "Adversary", steps: int, seed: int, times: int):
        super().__init__(hgr, steps, seed, RATE)
        self.hgr, self.learnt, self.held_out, self.adversary, self.times = hgr, learnt, held_out, adversary, times
        self.mean.count = steps  # the first weights are no random ones: the average starts from them
        on_gpu, self.rate = self.device.type == "cuda", torch.tensor(RATE, device=self.device)
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), self.rate, (0.9, 0.99), weight_decay=1e-2, capturable=on_gpu
        )
        clean = learnt.kinds[CLEAN][0]
        self.alarming = torch.zeros(max(1, int(ALARMING * len(clean))), dtype=torch.long, device=self.device)  # rows of them
        self.both = Replayed(self._both, self.device)

    def refresh(self) -> None:
        """Thresholds, attacked runs and alarming points as they are with the redirector now; a graph keeps reading the same memory."""
        kept = self.hgr.guidance_thresholds
        runs = run_maxima(self.hgr, self.held_out, self.device, BIG_BATCH)
        self.hgr.calibrate(calibrated(self.hgr, None, runs, FALSE_POSITIVE_RATE))
        self.hgr.guidance_thresholds = kept.copy_(self.hgr.guidance_thresholds)
        self.adversary.refresh()
        self.alarming.copy_(most_alarming(self.hgr, self.learnt.kinds[CLEAN][0], len(self.alarming)))

    def harden(self) -> Tensor:
        """One step; its loss, which is overwritten by the next."""
        self.rate.fill_(learning_rate(self.step, self.steps, RATE))
        drawn, self.step = self._draw(), self.step + 1
        return self.both(*drawn)

    def _draw(self) -> list[Tensor]:
        """The random numbers of a step, on the CPU: rows of harmful, clean and alarming points; what is alarmed falsely and what is
        a picture alone, in [0, 1); moments of the attack, and what it forgets, in [0, 1)."""
        counts = [self.times * count for count in (HARMFUL_BATCH, PARTNER_BATCH, CLEAN_BATCH, ALARMING_BATCH, ATTACKED_BATCH)]
        harmful, partners, clean, alarming, attacked = counts
        rows = lambda of, count: torch.randint(of, (count,), generator=self.generator)  # noqa: E731
        part = lambda *shape: torch.rand(*shape, generator=self.generator)  # noqa: E731
        sizes = (len(self.learnt.kinds[kind][0]) for kind in (HARMFUL, CLEAN))
        return [
            *(rows(size, count) for size, count in zip(sizes, (harmful, clean), strict=True)),
            rows(len(self.alarming), alarming),
            part(partners + clean, len(world.CATEGORIES)),
            part(harmful + partners + clean),
            rows(self.adversary.count, attacked),
            part(attacked),
        ]

    def _both(
        self, harmful: Tensor, clean: Tensor, alarming: Tensor, alarm: Tensor, direction: Tensor, moments: Tensor, forget: Tensor
    ) -> Tensor:
        """A step of the attack, and one of the redirector against it."""
        attacked = self.adversary.bend(moments, forget)
        rows, about = self.learnt.at(HARMFUL, harmful)
        batch, harms, weights = mixed(rows, about, self.learnt.at(CLEAN, clean)[0], alarm)
        loss = self.loss(batch, harms, weights, (direction > NO_DIRECTION).float())[0]
        loss = loss + 0.5 * self._attacked_loss(*attacked)
        loss = loss + 0.5 * self._alarm_loss(self.learnt.at(CLEAN, self.alarming[alarming])[0])
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.mean.update(self.network)
        return loss.detach()

    def _attacked_loss(self, points: Points, harms: Tensor, counts: Tensor) -> Tensor:
        """What `counts` (B,) of attacked points: that their harm (B, K) is seen, and what is left of it with the correction in use."""
        with autocast(self.device):
            error, b, *_ = self.objective(points, harms, harms, points.partner_denoised, counts, ELSEWHERE)
        left = (relative(error, points).clamp(max=CAP) * counts).sum() / counts.sum().clamp(min=1)
        return left + b

    def _alarm_loss(self, points: Points) -> Tensor:
        """Cross-entropy of `b` at clean points."""
        x_in = points.x * per_row(points.c_in, points.x)
        with autocast(self.device):
            reading = read_guidance(self.network, points.cond_denoised, points.uncond_denoised, x_in, points.sigma)[2]
        return F.softplus(reading.direction_logits.float()).mean()


@dataclass(frozen=True)
class Held:
    """Runs by kind that stay on the device: points, and the prompts that `Points.prompt` numbers."""

    kinds: dict[str, tuple[Points, Prompts]]

    def at(self, kind: str, rows: Tensor) -> tuple[Points, Prompts]:
        """Points of a kind, with their prompts row for row."""
        points, prompts = self.kinds[kind]
        return points[rows], prompts[points.prompt[rows]]


def recorded(model: DemoModel, hgr: HGR, rng: random.Random, generator: torch.Generator, times: int) -> tuple[Held, Points]:
    """The runs to learn from, and the clean ones that are held out."""

    def sample(title: str, prompts: Prompts, follow=lambda i: "prompt", policy=None) -> tuple[Points, Prompts]:
        parts, batch = [], 2 * BATCH * times
        for i, (points, _) in enumerate(runs(model, prompts, follow, policy, generator, title, batch)):
            points.prompt = points.prompt.to(points.x.device) + i * batch
            parts.append(points)
        return Points.cat(parts), prompts

    harmful = prompt_tensors(model, [p.harmful_pair(rng, words=0.0) for _ in range(HARMFUL_RUNS * times)], rng)
    harmful.tokens = disguise(harmful.tokens, hgr.condition.token_scale, DISGUISED[0], generator)
    clean = prompt_tensors(model, [p.clean_pair(rng, (), 0.0) for _ in range(CLEAN_RUNS * times)], rng)
    words = prompt_tensors(model, [p.clean_pair(rng, p.harmless_words()[0], WORDS) for _ in range(WORD_RUNS * times)], rng)
    words.tokens = disguise(words.tokens, 2 * hgr.condition.token_scale, DISGUISED[1], generator)
    followed = lambda i: ("prompt", "partner", "policy")[i % 3]  # noqa: E731
    kinds = {HARMFUL: sample("harmful runs", harmful, followed, policy_of(hgr))}
    both = sample("clean runs", clean)[0], sample("clean words", words)[0]
    both[1].prompt += len(clean)
    kinds[CLEAN] = Points.cat(list(both)), stacked([clean, words])
    others = prompt_tensors(model, [p.clean_pair(rng, (), 0.0) for _ in range(HELD_OUT_RUNS * times)], rng)
    return Held(kinds), sample("clean runs held out", others)[0]


def most_alarming(hgr: HGR, clean: Points, count: int) -> Tensor:
    """The rows of the clean points that an HGR reads as most harmful."""
    b = torch.cat([guidance_readings(hgr, clean[rows], clean.x.device) for rows in torch.arange(len(clean)).split(BIG_BATCH)])
    return b.amax(dim=1).topk(count).indices


@dataclass
class Moments:
    """A point (N,) of runs that the attack works at: what it knows there, and whose prompt it is."""

    x: Tensor
    sigma: Tensor
    uncond_denoised: Tensor
    harmful_denoised: Tensor  # of the prompt as it was
    partner_denoised: Tensor
    row: Tensor  # of the pool

    def __getitem__(self, index) -> "Moments":
        return Moments(*(column[index] for column in vars(self).values()))

    @staticmethod
    def cat(parts: list["Moments"]) -> "Moments":
        return Moments(*map(torch.cat, zip(*(vars(part).values() for part in parts), strict=True)))


class Adversary:
    """A pool of harmful prompts with the changes of their tokens that an attack has found so far."""

    def __init__(self, model: DemoModel, hgr: HGR, rng: random.Random, generator: torch.Generator, times: int = 1):
        pairs, self.times = [_without_any_harm(rng) for _ in range(POOL * times)], times
        self.model, self.hgr, self.generator = model, hgr, generator
        self.predict = autocast(model.device)(model.denoised)
        self.tokens = model.encode([pair.prompt for pair in pairs])
        self.partners = model.encode([pair.partner for pair in pairs])
        self.harms = torch.stack([labels(pair.harms) for pair in pairs]).to(model.device)
        self.noise = torch.randn(len(pairs), *LATENT_SHAPE, generator=generator).to(model.device)
        self.evading = torch.arange(len(pairs), device=model.device) % 2 == 0
        self.radius = RADIUS * spread_of(model)
        self.delta, self.first, self.second = (torch.zeros_like(self.tokens) for _ in range(3))
        self.age = torch.zeros(len(pairs), device=model.device)
        self.defence = SafeCFG(Redirection(hgr, ON, "guidance"))
        hgr.guidance.requires_grad_(True)  # the attack asks for gradients of its changes alone; the redirector learns
        plain = self._runs(self.tokens, None)
        self.plain = self.count = len(plain.x)  # of the moments: so many are plain CFG's, and so many there are
        room = torch.zeros(RUN_STEPS * len(pairs), dtype=torch.long, device=model.device)
        self.moments = Moments.cat([plain, plain[room]])

    def refresh(self) -> None:
        """Draws the attacked pictures with the redirector as it is now: where these runs lead is where the attack goes on."""
        own = self._runs(self.tokens + self.delta * self.radius, self.hgr)
        self.count = self.plain + len(own.x)
        for column, found in zip(vars(self.moments).values(), vars(own).values(), strict=True):
            column[self.plain : self.count] = found

    def bend(self, index: Tensor, forget: Tensor) -> tuple[Points, Tensor, Tensor]:
        """Takes a step of the attack at these moments (B,); the points with their directions, their harms (B, K), and which count (B,).

        What no longer looks more like the harmful direction than like its partner's does not count: it need not be harmful.
        A change is forgotten where `forget` (B,), in [0, 1), is below FORGET.
        """
        here = self.moments[index]
        rows = here.row
        delta = self.delta[rows].requires_grad_(True)
        cond = self.predict(here.x, here.sigma, self.tokens[rows] + delta * self.radius).float()
        (gradient,) = torch.autograd.grad(self._loss(here, cond).sum(), delta)
        self._descend(rows, gradient, forget < FORGET)
        cond = cond.detach()
        points = Points(
            here.x, here.sigma, input_scaling(here.sigma), here.uncond_denoised, cond, here.partner_denoised, self.harms[rows], rows
        )  # fmt: skip
        harmful = mean_square(cond - here.harmful_denoised) < mean_square(cond - here.partner_denoised)
        return points, self.harms[rows], harmful.float()

    def _loss(self, here: Moments, cond: Tensor) -> Tensor:
        """The attack's loss per row (B,), as in `benchmarks.attack_search`."""
        evading, uncond = self.evading[here.row], here.uncond_denoised
        flagged = torch.where(evading[:, None], 0.0, self.harms[here.row])
        safe, quiet = self.defence.steer(Step(here.x, here.sigma, cond, uncond, 0), {"flagged": flagged}, remember=True)
        wanted = here.harmful_denoised - uncond
        size = mean_square(wanted) + 1e-4 * here.sigma**2 / (1 + here.sigma**2)
        return mean_square(safe - uncond - wanted) / size + EVADE * evading * quiet

    @torch.no_grad()
    def _descend(self, rows: Tensor, gradient: Tensor, forget: Tensor) -> None:
        """A step of Adam inside the ball, then none of it where it is to be forgotten (B,); a row that was drawn twice counts once."""
        b1, b2 = MOMENTS
        self.age[rows] += 1
        age = per_row(self.age[rows], gradient)
        self.first[rows] = b1 * self.first[rows] + (1 - b1) * gradient
        self.second[rows] = b2 * self.second[rows] + (1 - b2) * gradient.square()
        step = (self.first[rows] / (1 - b1**age)) / ((self.second[rows] / (1 - b2**age)).sqrt() + 1e-12)
        first, last = STEP_SIZES
        size = torch.clamp(first * (1 - age / SLOWING), min=last)
        self.delta[rows] = (self.delta[rows] - size * step).clamp(-1, 1)
        for memory in (self.delta, self.first, self.second, self.age):
            memory[rows] = torch.where(per_row(forget, memory), 0, memory[rows])

    @torch.no_grad()
    def _runs(self, tokens: Tensor, hgr: HGR | None) -> Moments:
        """Runs of all prompts with these tokens (N, T, D), under an HGR's guidance redirector or none."""
        sigmas = shifted_schedule(RUN_STEPS + 1, 0.5 * torch.rand(1, generator=self.generator).item())
        empty, found = self.model.encode([""]), []
        for rows in torch.arange(len(tokens), device=tokens.device).split(4 * BATCH * self.times):
            texts = torch.cat([empty.expand_as(tokens[rows]), tokens[rows], self.tokens[rows], self.partners[rows]])
            cond_scale = (3 + 4 * torch.rand(len(rows), generator=self.generator)).to(tokens.device)
            x, held = self.noise[rows] * (1 + sigmas[0] ** 2) ** 0.5, None
            for sigma, following in pairwise(sigmas.to(tokens.device)):
                if sigma < LOWEST_SIGMA:
                    break
                level = sigma.expand(len(rows))
                uncond, cond, *others = self.predict(x.repeat(4, 1, 1, 1), level.repeat(4), texts).float().chunk(4)
                found.append(Moments(x, level, uncond, *others, rows))
                if hgr is not None:
                    result = redirect_guidance(hgr, cond, uncond, scale_input(x, level), level, ON, held)
                    cond, held = result.cond_denoised, result.weights
                x = x + (x - (uncond + per_row(cond_scale, x) * (cond - uncond))) / sigma * (following - sigma)
        return Moments.cat(found)


def _without_any_harm(rng: random.Random) -> p.Pair:
    """A harmful pair whose partner lacks every harm."""
    while True:
        pair = p.harmful_pair(rng, words=0.0, two=0.15)
        if pair.removed == pair.harms:
            return pair
