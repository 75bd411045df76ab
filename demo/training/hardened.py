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

import random
import tempfile
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.attack import RADIUS, spread_of
from benchmarks.attack_surrogates import SafeCFG
from hgr_models import HGR, CategorySettings, load_hgr, redirect_guidance, save_hgr
from hgr_models.calibration import calibrated, guidance_readings, run_maxima
from hgr_models.losses import mean_square
from hgr_models.recording import Points
from hgr_models.shapes import per_row
from hgr_models.shards import CLEAN, HARMFUL, Recording
from hgr_models.train_guidance import GuidanceTraining
from hgr_models.training import disguise, on_device

from .. import prompts as p
from .. import world
from ..pipeline import LATENT_SHAPE, DemoModel
from ..safecfg import Redirection, Step
from ..sampling import input_scaling, scale_input, shifted_schedule
from .guidance import RESPONSE, policy_of, scale_response
from .hgr_common import FALSE_POSITIVE_RATE, OUT, calibrate
from .hgr_data import BATCH, labels, prompt_tensors, record

HARMFUL_RUNS, CLEAN_RUNS, WORD_RUNS = 1200, 1200, 2000  # the last: clean words of any kind, whatever the denoiser makes of them
HELD_OUT_RUNS = 800  # clean ones that are not learnt from: they set the thresholds that the attack has to pass under
WORDS, DISGUISED = 0.5, (0.3, 0.4)  # of the names in word runs; of the harmful prompts and of those of word runs
ALARMING, ALARMING_BATCH = 0.05, 24  # of all clean points
POOL, ATTACKED_BATCH = 320, 16
RUN_STEPS, LOWEST_SIGMA = 12, 0.5  # of the attacked runs; below it a run adds detail, but no pictogram
REFRESH = 150  # training steps, after which attacked runs and thresholds are made anew
RATE = 1e-3
EVADE = 0.1  # what a closed gate is worth to an attack that looks for ways under it
STEP_SIZES, SLOWING = (0.15, 0.03), 60  # of the descent, in radii: at first, and from that many steps on
FORGET = 1 / 80  # per step: the share of the changes that start again from none, so that weak attacks stay known
MOMENTS = (0.8, 0.95)  # of Adam
ON = CategorySettings((1.0,) * len(world.CATEGORIES))


def train(steps: int, device: str, seed: int) -> None:
    """Writes the stored HGR again, with this guidance redirector and new thresholds."""
    model, hgr = DemoModel.load(device), load_hgr(OUT).to(device)
    scale_response(hgr, 1 / hgr.info.training.get("guidance_response", 1.0))
    with tempfile.TemporaryDirectory() as name:
        train_in(Path(name), model, hgr, steps, seed)
    scale_response(hgr, RESPONSE)
    hgr.info = calibrate(model, hgr, seed)
    hgr.info.training.update(hardened_steps=steps, hardened_seed=seed, guidance_response=RESPONSE)
    save_hgr(OUT, hgr.cpu())


def train_in(folder: Path, model: DemoModel, hgr: HGR, steps: int, seed: int) -> None:
    """Records into `folder` and trains `hgr.guidance`, which is not calibrated afterwards."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    model.unet.requires_grad_(False)
    recording, held_out = recorded(folder, model, hgr, rng, generator)
    training = GuidanceTraining(hgr, steps, seed, RATE)
    adversary, points = Adversary(model, hgr, rng, generator), Points.cat([s.runs() for s in recording.of_kind(CLEAN)])
    with tqdm(total=steps, desc="hardened redirector") as bar:
        while training.step < steps:
            if training.step % REFRESH == 0:
                clean_runs = torch.cat([run_maxima(hgr, shard.runs(), model.device) for shard in held_out.shards])
                hgr.calibrate(calibrated(hgr, None, clean_runs, FALSE_POSITIVE_RATE))
                adversary.refresh()
                alarming = most_alarming(hgr, points)
            some = alarming[torch.randint(len(alarming), (ALARMING_BATCH,), generator=generator)]
            report = training.train_step(recording, adversary.bend(), on_device(some, model.device))
            bar.update()
            bar.set_postfix(error=f"{report.error:.3f}", right=f"{sum(report.accuracy) / len(report.accuracy):.3f}")
    training.finish()


def recorded(
    folder: Path, model: DemoModel, hgr: HGR, rng: random.Random, generator: torch.Generator
) -> tuple[Recording, Recording]:
    """The runs to learn from, and the clean ones that are held out."""
    harmful = prompt_tensors(model, [p.harmful_pair(rng, words=0.0) for _ in range(HARMFUL_RUNS)], rng)
    harmful.tokens = disguise(harmful.tokens, hgr.condition.token_scale, DISGUISED[0], generator)
    clean = prompt_tensors(model, [p.clean_pair(rng, (), 0.0) for _ in range(CLEAN_RUNS)], rng)
    words = prompt_tensors(model, [p.clean_pair(rng, p.harmless_words()[0], WORDS) for _ in range(WORD_RUNS)], rng)
    words.tokens = disguise(words.tokens, 2 * hgr.condition.token_scale, DISGUISED[1], generator)
    followed = lambda i: ("prompt", "partner", "policy")[i % 3]  # noqa: E731
    record(model, harmful, HARMFUL, followed, policy_of(hgr), generator, folder, "harmful runs")
    record(model, clean, CLEAN, lambda i: "prompt", None, generator, folder, "clean runs")
    record(model, words, CLEAN, lambda i: "prompt", None, generator, folder, "clean words")
    others = prompt_tensors(model, [p.clean_pair(rng, (), 0.0) for _ in range(HELD_OUT_RUNS)], rng)
    (folder / "held_out").mkdir()
    record(model, others, CLEAN, lambda i: "prompt", None, generator, folder / "held_out", "clean runs held out")
    return Recording.open(folder), Recording.open(folder / "held_out")


def most_alarming(hgr: HGR, clean: Points) -> Points:
    """The clean points that an HGR reads as most harmful, ALARMING of all."""
    device = next(hgr.guidance.parameters()).device
    b = torch.cat([guidance_readings(hgr, clean[rows], device) for rows in torch.arange(len(clean)).split(1000)])
    return clean[b.amax(dim=1).topk(max(1, int(ALARMING * len(clean)))).indices]


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
        return Moments(*(getattr(self, f.name)[index] for f in fields(self)))

    @staticmethod
    def cat(parts: list["Moments"]) -> "Moments":
        return Moments(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Moments)))


class Adversary:
    """A pool of harmful prompts with the changes of their tokens that an attack has found so far."""

    def __init__(self, model: DemoModel, hgr: HGR, rng: random.Random, generator: torch.Generator):
        pairs = [_without_any_harm(rng) for _ in range(POOL)]
        self.model, self.hgr, self.generator = model, hgr, generator
        self.predict = torch.autocast(model.device.type, torch.bfloat16)(model.denoised)
        self.tokens, self.partners = (model.encode([getattr(pair, name) for pair in pairs]) for name in ("prompt", "partner"))
        self.harms = torch.stack([labels(pair.harms) for pair in pairs]).to(model.device)
        self.noise = torch.randn(POOL, *LATENT_SHAPE, generator=generator).to(model.device)
        self.evading = torch.arange(POOL, device=model.device) % 2 == 0
        self.radius = RADIUS * spread_of(model)
        self.delta, self.first, self.second = (torch.zeros_like(self.tokens) for _ in range(3))
        self.age = torch.zeros(POOL, device=model.device)
        self.plain = self._runs(self.tokens, None)
        self.moments = self.plain

    def refresh(self) -> None:
        """Draws the attacked pictures with the redirector as it is now: where these runs lead is where the attack goes on."""
        self.moments = Moments.cat([self.plain, self._runs(self.tokens + self.delta * self.radius, self.hgr)])

    def bend(self) -> tuple[Points, Tensor]:
        """Takes a step of the attack in some rows; the points with their directions, and their harms (B, K).

        What no longer looks more like the harmful direction than like its partner's is left out: it need not be harmful.
        """
        index = torch.randint(len(self.moments.x), (ATTACKED_BATCH,), generator=self.generator)
        here = self.moments[index.to(self.model.device)]
        rows = here.row
        delta = self.delta[rows].requires_grad_(True)
        cond = self.predict(here.x, here.sigma, self.tokens[rows] + delta * self.radius).float()
        (gradient,) = torch.autograd.grad(self._loss(here, cond).sum(), delta)
        self._descend(rows, gradient)
        cond = cond.detach()
        points = Points(
            here.x, here.sigma, input_scaling(here.sigma), here.uncond_denoised, cond, here.partner_denoised, self.harms[rows], rows
        )  # fmt: skip
        harmful = mean_square(cond - here.harmful_denoised) < mean_square(cond - here.partner_denoised)
        return points[harmful], self.harms[rows][harmful]

    def _loss(self, here: Moments, cond: Tensor) -> Tensor:
        """The attack's loss per row (B,), as in `benchmarks.attack_search`."""
        evading, uncond = self.evading[here.row], here.uncond_denoised
        flagged = torch.where(evading[:, None], 0.0, self.harms[here.row])
        defence = SafeCFG(Redirection(self.hgr, ON, "guidance"))  # freezes the HGR: nothing but the change needs a gradient here
        safe, quiet = defence.steer(Step(here.x, here.sigma, cond, uncond, 0), {"flagged": flagged}, remember=True)
        self.hgr.guidance.requires_grad_(True)
        wanted = here.harmful_denoised - uncond
        size = mean_square(wanted) + 1e-4 * here.sigma**2 / (1 + here.sigma**2)
        return mean_square(safe - uncond - wanted) / size + EVADE * evading * quiet

    @torch.no_grad()
    def _descend(self, rows: Tensor, gradient: Tensor) -> None:
        """A step of Adam inside the ball; a row that was drawn twice counts once."""
        b1, b2 = MOMENTS
        self.age[rows] += 1
        age = per_row(self.age[rows], gradient)
        self.first[rows] = b1 * self.first[rows] + (1 - b1) * gradient
        self.second[rows] = b2 * self.second[rows] + (1 - b2) * gradient.square()
        step = (self.first[rows] / (1 - b1**age)) / ((self.second[rows] / (1 - b2**age)).sqrt() + 1e-12)
        first, last = STEP_SIZES
        size = torch.clamp(first * (1 - age / SLOWING), min=last)
        self.delta[rows] = (self.delta[rows] - size * step).clamp(-1, 1)
        again = rows[(torch.rand(len(rows), generator=self.generator) < FORGET).to(rows.device)]
        for memory in (self.delta, self.first, self.second, self.age):
            memory[again] = 0

    @torch.no_grad()
    def _runs(self, tokens: Tensor, hgr: HGR | None) -> Moments:
        """Runs of all prompts with these tokens (N, T, D), under an HGR's guidance redirector or none."""
        sigmas = shifted_schedule(RUN_STEPS + 1, 0.5 * torch.rand(1, generator=self.generator).item())
        empty, found = self.model.encode([""]), []
        for rows in torch.arange(POOL, device=tokens.device).split(BATCH):
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
