"""Trains the demo's condition redirector from prompts alone, by back-propagation through the frozen denoiser.

Of two harms, one of them off: the partner shows that one alone. With a stand-in beside it, the denoiser would draw it less
often than plain CFG does.
"""

import random
import tempfile
from pathlib import Path

import torch

from hgr_models import load_hgr, save_hgr
from hgr_models.shards import HARMFUL, Recording
from hgr_models.train_condition import ConditionTraining
from hgr_models.training import disguise

from .. import prompts as p
from ..pipeline import DemoModel
from .hgr_common import OUT, advance, calibrate, make_hgr, trained
from .hgr_data import frozen, prompt_tensors, record_shards, write_prompts

RUNS, CLEAN_PROMPTS, HARMFUL_PROMPTS = 1920, 6000, 6000
WORDS = 0.5  # of the harmful prompts that are only read: words of harm rather than pictograms
TWO_HARMS = 0.5  # of the runs: only they show what a category that is off means


def train(steps: int, device: str, seed: int) -> None:
    """Writes an HGR with this network, beside the stored guidance redirector where there is one for this denoiser."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the network's first weights
    model = DemoModel.load(device)
    hgr = make_hgr(model, condition=True, guidance=False).to(device)
    stored = load_hgr(OUT) if OUT.exists() else None
    training = ConditionTraining(hgr, steps, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(model, [p.clean_pair(rng, p.harmless_words()[0], 0.4) for _ in range(CLEAN_PROMPTS)], folder, "clean")
        write_prompts(model, [p.harmful_pair(rng, words=WORDS) for _ in range(HARMFUL_PROMPTS)], folder, "harmful")
        training.measure(Recording.open(folder))
        prompts = prompt_tensors(model, [p.harmful_pair(rng, two=TWO_HARMS, alone=True) for _ in range(RUNS)], rng)
        hidden = disguise(prompts.tokens[RUNS // 2 :], hgr.condition.token_scale, 0.5, generator)
        prompts.tokens = torch.cat([prompts.tokens[: RUNS // 2], hidden])
        record_shards(model, prompts, HARMFUL, lambda i: ("prompt", "partner")[i % 2], None, generator, folder, "harmful runs")
        recording, predict = Recording.open(folder), frozen(model.device)
        advance("condition redirector", training, steps, lambda: training.train_step(recording, predict))
    training.finish()
    if stored is not None and stored.guidance is not None and stored.info.base == hgr.info.base:
        hgr.guidance = stored.guidance.to(device)
        hgr.info.training.update(trained(stored, "guidance"))
    hgr.info = calibrate(model, hgr, seed)
    hgr.info.training.update(condition_steps=steps, condition_seed=seed)
    save_hgr(OUT, hgr.cpu())
