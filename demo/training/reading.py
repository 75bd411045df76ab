"""Teaches the stored condition redirector to read words of harm that were added later; what it rewrites stays, bit for bit.

See `ConditionTraining.only_reading`.
"""

import random
import tempfile
from pathlib import Path

from tqdm import trange

from hgr_models import load_hgr, save_hgr
from hgr_models.shards import Recording
from hgr_models.train_condition import ConditionTraining

from .. import prompts as p
from ..pipeline import DemoModel
from .hgr_common import OUT, calibrate
from .hgr_data import write_prompts

PROMPTS = 6000  # clean ones, and as many harmful ones
WORDS = 0.5  # of the harms: words of harm rather than pictograms
RATE = 1e-3


def train(steps: int, device: str, seed: int) -> None:
    """Writes the stored HGR again, with thresholds for prompts and pictures that fit the new reading."""
    rng, model, hgr = random.Random(seed), DemoModel.load(device), load_hgr(OUT).to(device)
    training = ConditionTraining(hgr, steps, seed, rate=RATE)
    training.only_reading()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(model, [p.clean_pair(rng, p.harmless_words()[0], 0.4) for _ in range(PROMPTS)], folder, "clean")
        write_prompts(model, [p.harmful_pair(rng, words=WORDS) for _ in range(PROMPTS)], folder, "harmful")
        recording = Recording.open(folder)
        with trange(steps, desc="reading") as bar:
            for _ in bar:
                bar.set_postfix(loss=f"{training.read_step(recording):.4f}")
    training.finish()
    hgr.info = calibrate(model, hgr, seed, guidance=False)
    hgr.info.training.update(reading_steps=steps, reading_seed=seed)
    save_hgr(OUT, hgr.cpu())
