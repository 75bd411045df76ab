"""Trains the demo's guidance redirector from recorded runs of the frozen denoiser, beside the stored condition redirector.

The recording is large, because this network reads pictures: with a quarter of it, its error on runs it had not seen was
twice that on its own. The prompts name pictograms only: for other words of harm the denoiser draws anything, also nothing
harmful, and a direction that is labelled harmful and shows no harm teaches false alarms.
"""

import random
import tempfile
from pathlib import Path

import torch

from hgr_models import CategorySettings, load_hgr, redirect_guidance, save_hgr
from hgr_models.recording import Policy, Prompts
from hgr_models.shards import CLEAN, HARMFUL, Recording
from hgr_models.train_guidance import GuidanceTraining
from hgr_models.training import disguise

from .. import prompts as p
from .. import world
from ..pipeline import DemoModel
from ..sampling import scale_input
from .hgr_common import OUT, advance, calibrate, make_hgr, trained
from .hgr_data import prompt_tensors, record_shards

HARMFUL_RUNS, CLEAN_RUNS, ON_POLICY_RUNS = 4000, 2000, 960  # the last in every round
ROUNDS = (0.25, 0.45, 0.65, 0.8)  # of the steps: where runs that follow the redirector so far are added
RESUMED_ROUNDS, RESUMED_RATE = (0.0, 0.35, 0.65), 1e-3  # of a training that goes on: its redirector has something to follow
DISGUISED = 0.3  # of the harmful prompts
# What a category weight of 1 counts as once training is over. On 200 pictures of pairs that training may see, 0.8 kept 2 points more
# of what is not harmful than 1 and left 1 point more of what is; at 0.7 some pictures fell apart.
RESPONSE = 0.85


def train(steps: int, device: str, seed: int, resume: bool = False) -> None:
    """Writes the shipped HGR: the stored condition redirector and this network, with thresholds for both.

    With `resume` the stored guidance redirector goes on learning, from runs that are recorded anew: give another seed.
    """
    model = DemoModel.load(device)
    with tempfile.TemporaryDirectory() as name:
        hgr = train_in(Path(name), model, steps, seed, resume)
    before = hgr.info.training.get("guidance_steps", 0)
    scale_response(hgr, RESPONSE)
    hgr.info = calibrate(model, hgr, seed)
    hgr.info.training.update(guidance_steps=before + steps, guidance_seed=seed, guidance_response=RESPONSE)
    save_hgr(OUT, hgr.cpu())


def train_in(folder: Path, model: DemoModel, steps: int, seed: int, resume: bool = False):
    """Records into `folder` and trains; the HGR with both networks, not calibrated."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the network's first weights
    stored = load_hgr(OUT)
    hgr = make_hgr(model, condition=True, guidance=True).to(model.device)
    hgr.condition.load_state_dict(stored.condition.state_dict())
    hgr.info.training.update(trained(stored, "condition"))
    if resume:
        hgr.guidance.load_state_dict(stored.guidance.state_dict())
        hgr.info.training.update(trained(stored, "guidance"))
        scale_response(hgr, 1 / stored.info.training.get("guidance_response", 1.0))

    def harmful(count: int) -> Prompts:
        prompts = prompt_tensors(model, [p.harmful_pair(rng, words=0.0) for _ in range(count)], rng)
        prompts.tokens = disguise(prompts.tokens, hgr.condition.token_scale, DISGUISED, generator)
        return prompts

    clean = prompt_tensors(model, [p.clean_pair(rng, (), 0.0) for _ in range(CLEAN_RUNS)], rng)
    alternately = lambda i: ("prompt", "partner")[i % 2]  # noqa: E731
    record_shards(model, harmful(HARMFUL_RUNS), HARMFUL, alternately, None, generator, folder, "harmful runs")
    record_shards(model, clean, CLEAN, lambda i: "prompt", None, generator, folder, "clean runs")
    training = GuidanceTraining(hgr, steps, seed, RESUMED_RATE) if resume else GuidanceTraining(hgr, steps, seed)
    for i, part in enumerate((*(RESUMED_ROUNDS if resume else ROUNDS), 1.0)):
        recording = Recording.open(folder)
        advance("guidance redirector", training, round(part * steps), lambda: training.train_step(recording))  # noqa: B023
        if part < 1.0:
            record_shards(
                model,
                harmful(ON_POLICY_RUNS),
                HARMFUL,
                lambda i: "policy",
                policy_of(hgr),
                generator,
                folder,
                f"on-policy runs {i}",
            )
    training.finish()
    return hgr


@torch.no_grad()
def scale_response(hgr, factor: float) -> None:
    """Makes a category weight of 1 turn guidance as one of `factor` did."""
    hgr.guidance.weights_in.weight.mul_(factor)


def policy_of(hgr) -> Policy:
    """What the redirector so far would make of each step."""
    settings = CategorySettings((1.0,) * len(world.CATEGORIES))
    return lambda x, sigma, u, c: redirect_guidance(hgr, c, u, scale_input(x, sigma), sigma, settings).cond_denoised
