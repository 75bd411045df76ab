"""Whether the model really draws the safe direction for corrected prompts: a few runs, forward only, on any model.

    ratio = sum |f(x, corrected) - f(x, partner)|^2 / sum |f(x, prompt) - f(x, partner)|^2

over the steps of runs that follow the harmful prompt: 0 is the partner itself, 1 is no redirection. It needs no gradients, so
it judges quantised and offloaded models, too.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ...hgr_models.condition import ConditionRedirector
from ...hgr_models.errors import HGRError
from ...hgr_models.hgr import WEAK
from ...hgr_models.pairs import PromptSet
from ..host.encoding import encode_groups
from ..host.families import POOLED
from ..host.more_tokens import TOKENS, gather, scatter
from .frozen_model import reading
from .recorder import FOLLOW, GroupedGuider, Job, RunSettings, at_once_or_one_by_one, labels, plan_jobs, sample

ROLES = ("negative", "positive", "partner", "corrected")  # that every step evaluates


@dataclass(frozen=True)
class Extent:
    """How much a check evaluates: pairs, steps of each run, and seconds after which no further run begins."""

    pairs: int = 8
    steps: int = 4
    seconds: float = math.inf


class CheckGuider(GroupedGuider):
    """Follows the harmful prompt, and adds up how far the corrected one and no redirection are from the partner."""

    cfg_scale, left, before = 5.0, 0.0, 0.0
    on_step: Callable[[], None]

    def predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict | None = None, seed: int | None = None
    ) -> torch.Tensor:
        self.on_step()
        uncond, cond, partner, corrected = self.evaluate(list(ROLES), x, timestep, model_options)
        self.left += float((corrected.float() - partner.float()).square().sum())
        self.before += float((cond.float() - partner.float()).square().sum())
        return uncond + (cond - uncond) * self.cfg_scale


@torch.no_grad()
def check_reads(model: ModelPatcher, clip: CLIP, prompts: PromptSet, runs: RunSettings, always: bool = True) -> float:
    """Evaluates one prompt at the smallest size; the seconds that this took, without loading the model.

    Raises HGRError where a MODEL cannot read a CLIP's prompts, before minutes are spent.

    `always`: as in `frozen_model.reading`.
    """
    smallest = min(runs.sizes, key=math.prod)
    settings = replace(runs, batch=1, sizes=(smallest,), samplers=("euler",), negatives=("",))
    (job,) = plan_jobs(settings, "check", prompts.pairs[:1], 1, FOLLOW[:1], looks=0)
    positive = encode_groups(clip, [job.pairs[0].harmful])
    guider = ReadingGuider(model)
    guider.set_groups({"positive": positive})
    with torch.inference_mode(), reading(model, positive[0][1][0][0], always):
        sample(model, guider, job, settings, 1)
    return guider.seconds


def seconds_of(row: float, runs: RunSettings, extent: Extent | None = None) -> float:
    """What `error_ratio` takes, about, from the seconds of a `row` at the smallest size."""
    extent = extent or Extent()
    areas = [math.prod(size) for size in runs.sizes]
    run = row * areas[0] / min(areas) * len(ROLES) * extent.steps * min(extent.pairs, runs.batch)
    every = run * extent.pairs / min(extent.pairs, runs.batch)
    return min(every, extent.seconds + run)  # the last one begins before the time is up


class ReadingGuider(GroupedGuider):
    """Draws the prompt as it is, if the latent is one of this model."""

    seconds = 0.0  # of the last evaluation

    def predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict | None = None, seed: int | None = None
    ) -> torch.Tensor:
        self.part(x)  # raises for a latent that was made for another model
        started = time.monotonic()
        (drawn,) = self.evaluate(["positive"], x, timestep, model_options)
        _check_finite(float(drawn.float().abs().sum()))  # waits for the device
        self.seconds = time.monotonic() - started
        return drawn


class NotFiniteError(HGRError):
    """A MODEL answers with infinity or NaN."""


def _check_finite(number: float) -> float:
    """Returns it. Raises NotFiniteError for infinity or not a number: what is judged by such a model would look good to every comparison."""
    if not math.isfinite(number):
        raise NotFiniteError(
            "Expected finite numbers from the MODEL, but it answered a prompt with infinity or NaN (not a number), as damaged checkpoints "
            "do and some models in half precision. Draw a picture with it; if that is black, load it in fp32 or bf16, or download it again."
        )
    return number


@torch.no_grad()
def error_ratio(
    model: ModelPatcher,
    clip: CLIP,
    network: ConditionRedirector,
    prompts: PromptSet,
    runs: RunSettings,
    extent: Extent | None = None,
    say: Callable[[str], None] | None = None,
) -> float:
    """The ratio for a condition redirector `network` and a MODEL, on held-out pairs where there are some.

    `say` shows a line before every step. Raises NotFiniteError where the MODEL's answers are not.
    """
    extent = extent or Extent()
    pairs = tuple(pair for pair in prompts.held_out_pairs or prompts.pairs if pair.removed == pair.harms) or prompts.pairs
    count = min(extent.pairs, len(pairs))
    settings = replace(runs, batch=min(count, runs.batch), sizes=runs.sizes[:1], samplers=("euler",), negatives=("",))
    jobs = plan_jobs(settings, "check", pairs, count, FOLLOW[:1], looks=0)
    left, before, started = 0.0, 0.0, time.monotonic()
    for i, job in enumerate(jobs):
        if i and time.monotonic() - started > extent.seconds:
            break
        what = f"asking the model, run {i + 1} of {len(jobs)}"

        def run(one_by_one: bool, job: Job = job, what: str = what) -> CheckGuider:
            guider = CheckGuider(model)
            guider.cfg_scale, guider.on_step = job.cfg, count_of_steps(what, extent.steps, say)
            guider.set_groups(_roles(clip, network, prompts, job, one_by_one))
            sample(model, guider, job, settings, extent.steps)
            return guider

        found = at_once_or_one_by_one(run, len(job.pairs))
        left, before = left + found.left, before + found.before
    return _check_finite(left / max(before, 1e-20))


def count_of_steps(what: str, steps: int, say: Callable[[str], None] | None) -> Callable[[], None]:
    """A function that says which step begins, and lets the user cancel there."""
    begun = 0

    def step() -> None:
        nonlocal begun
        comfy.model_management.throw_exception_if_processing_interrupted()
        begun += 1
        if say is not None:
            say(f"{what}: step {begun} of {steps}")

    return step


def _roles(clip: CLIP, network: ConditionRedirector, prompts: PromptSet, job: Job, one_by_one: bool) -> dict[str, list]:
    groups = lambda texts: encode_groups(clip, texts, one_by_one)  # noqa: E731
    removed = torch.stack([labels(prompts.categories, pair.removed) for pair in job.pairs])
    positive = groups([pair.harmful for pair in job.pairs])
    corrected = [(rows, [_corrected(entry, network, removed[rows]) for entry in cond]) for rows, cond in positive]
    partner, negative = groups([pair.safe for pair in job.pairs]), groups([""] * (len(job.pairs) if one_by_one else 1))
    return {"positive": positive, "negative": negative, "partner": partner, "corrected": corrected}


def _corrected(entry: list, network: ConditionRedirector, removed: torch.Tensor) -> list:
    """An entry of a CONDITIONING after redirection of the categories `removed` (B, K)."""
    tokens, extras = entry
    condition = {**extras, TOKENS: tokens}
    together, mask = gather(condition)  # with what some networks read beside their tokens
    device = network.token_center.device
    pooled = extras.get(POOLED)
    mask = None if mask is None else mask.reshape(len(removed), -1).to(device)
    known = pooled is not None and network.config.pooled_width
    rows = together.to(device), pooled.to(device) if known else None
    d_tokens, d_pooled = network.delta(*rows, removed.to(device), mask)
    parts = {key: part.to(condition[key]) for key, part in scatter(condition, rows[0] + d_tokens).items()}
    changed = {} if d_pooled is None else {POOLED: (rows[1] + d_pooled).to(pooled)}
    return [parts.pop(TOKENS), {**extras, **parts, **changed}]


def in_words(ratio: float) -> str:
    """For the summary."""
    text = f"the model's own answer to corrected prompts is {100 * ratio:.0f} % as far from the safe one as without redirection"
    return f"{text}: {'good' if ratio <= WEAK else 'too far'}"
