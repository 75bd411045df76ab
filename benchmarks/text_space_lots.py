"""Harm that no training showed, by lot: which pictograms and words are held out is drawn anew for every seed.

    python -m benchmarks.text_space_lots --lots 0 1 2 --steps 500

Of the 24 harmful pictograms of the demo world 10 are held out, and a third of every category's other words of harm. Trains from
the prompts of the others alone, as SafeCFG Train HGR does, and prints for prompts of what was held out: how many are flagged
(pictograms, words), the denoiser's own error after redirection (`losses.condition_error` over that of no redirection, forward
only, all harms removed), and pictures: harm present, nothing recognisable. Then the mean over the lots.
"""

import argparse
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from demo import evaluate as e
from demo import prompts as p
from demo import world
from demo.judge import Judge
from demo.pipeline import DemoModel
from demo.safecfg import Redirection
from demo.training.hgr_common import make_hgr
from demo.training.hgr_data import frozen, prompt_tensors, runs
from hgr_models import CategorySettings, redirect_condition
from hgr_models.pair_shards import write_pairs
from hgr_models.shards import CALIBRATION_TEXTS, TEXTS, Recording, Texts, write_texts
from hgr_models.train_text import TextTraining
from hgr_models.trainer import PROMPTS, Phase, Trainer, calibrate

from .text_space import CLEAN, HELD_OUT, PAIRS, RATE, denoiser_error, encoded

OUT, WORDS_OUT = 10, 1 / 3  # pictograms that are held out, and the share of each category's other words
READ, JUDGED = 400, 48  # prompts that are read, and that the denoiser is asked about
ON = CategorySettings((1.0,) * len(world.CATEGORIES))


@dataclass(frozen=True)
class Lot:
    """What is held out, and what is trained on."""

    pictograms_out: tuple[str, ...]
    words_out: tuple[str, ...]
    pictograms: tuple[str, ...]
    words: dict[str, tuple[str, ...]]

    @classmethod
    def draw(cls, seed: int) -> "Lot":
        """The same seed gives the same lot; every category keeps two pictograms at least."""
        rng = random.Random(f"lot {seed}")
        while True:
            out = set(rng.sample(world.HARMFUL, OUT))
            if all(len([n for n in world.HARMFUL if world.CATEGORY[n] == c and n not in out]) > 1 for c in world.CATEGORIES):
                break
        words_out = {w for c in world.CATEGORIES for w in rng.sample(p.HARM_WORDS[c], round(WORDS_OUT * len(p.HARM_WORDS[c])))}
        words = {c: tuple(w for w in p.HARM_WORDS[c] if w not in words_out) for c in world.CATEGORIES}
        return cls(tuple(sorted(out)), tuple(sorted(words_out)), tuple(n for n in world.HARMFUL if n not in out), words)

    def pair(self, rng: random.Random) -> p.Pair:
        """A training pair, as `demo.prompts.harmful_pair` draws them."""
        while True:
            one, other, clean = self._harm(rng), self._harm(rng), rng.choice(p.SEEN_CLEAN)
            names = ((one,), (one, clean), (one, other))[rng.choices((0, 1, 2), (0.3, 0.45, 0.25))[0]]
            if len(set(names)) == len(names):
                return p.make_pair(names, _some_of(names, rng), rng)

    def _harm(self, rng: random.Random) -> str:
        return rng.choice(self.pictograms if rng.random() > 0.25 else self.words[rng.choice(world.CATEGORIES)])


def _some_of(names: tuple[str, ...], rng: random.Random) -> frozenset[str]:
    harms = sorted({c for c in map(p.category_of, names) if c})
    return frozenset(rng.sample(harms, rng.randint(1, len(harms))))


def items(names: tuple[str, ...], count: int, rng: random.Random) -> list[e.Item]:
    """Prompts of these harms, alone or beside a clean pictogram."""
    return [e.item_of((rng.choice(names), *rng.sample(p.SEEN_CLEAN, rng.randint(0, 1))), rng) for _ in range(count)]


def recording(model: DemoModel, lot: Lot, folder: Path, rng: random.Random) -> Recording:
    """Encoded pairs and clean prompts, in shards."""
    write_pairs(folder / "pairs.safetensors", encoded(model, [lot.pair(rng) for _ in range(PAIRS)]), {})
    for kind, count, words in ((TEXTS, CLEAN, 0), (CALIBRATION_TEXTS, HELD_OUT, 1)):
        tokens = model.encode([p.clean_pair(rng, p.harmless_words()[words], 0.4).prompt for _ in range(count)])
        write_texts(
            folder / f"clean_{words}.safetensors", Texts(tokens, None, None, torch.zeros(count, len(world.CATEGORIES))), {}, kind
        )
    return Recording.open(folder)


def trained(model: DemoModel, lot: Lot, steps: int, seed: int):
    """An HGR from prompts alone, calibrated."""
    torch.manual_seed(seed)
    hgr = make_hgr(model, condition=True, guidance=False)
    with tempfile.TemporaryDirectory() as name:
        rows = recording(model, lot, Path(name), random.Random(seed))
        training = TextTraining(hgr, steps, seed)
        training.measure(rows)
        trainer = Trainer(None)
        trainer.begin(PROMPTS, training)
        trainer.run(Phase(PROMPTS, training, lambda: training.train_step(rows), steps))
        calibrate(hgr, rows, RATE, torch.device("cpu"))
    return hgr


@torch.no_grad()
def share_flagged(model: DemoModel, hgr, some: list[e.Item]) -> float:
    tokens = model.encode([item.prompt for item in some])
    weights = torch.cat([redirect_condition(hgr, rows, None, ON).weights for rows in tokens.split(200)])
    return float((weights > 0).any(dim=1).float().mean())


def judged(model: DemoModel, hgr, lot: Lot, seed: int, images: int) -> dict[str, float]:
    """The figures of a lot."""
    rng = random.Random(f"judge {seed}")
    pictograms, words = (items(names, READ, rng) for names in (lot.pictograms_out, lot.words_out))
    found = {"pictograms flagged": share_flagged(model, hgr, pictograms), "words flagged": share_flagged(model, hgr, words)}
    pairs = [p.make_pair(item.names, labels_of(item), rng) for item in pictograms[:JUDGED]]
    points, about = next(
        runs(
            model,
            prompt_tensors(model, pairs, rng),
            lambda _: "prompt",
            None,
            torch.Generator().manual_seed(0),
            "judge",
            batch=JUDGED,
        )
    )
    found["denoiser's error"] = denoiser_error(hgr.condition, frozen(model.device), points, about[points.prompt])
    if images:
        judge, drawn_items = Judge.load("cpu")[0], pictograms[-images:]
        tokens = model.encode([item.prompt for item in drawn_items])
        drawn = e.draw(model, judge, tokens, seed, 20, 5.0, Redirection(hgr, ON, "condition"))
        found["harm present"] = e.harm_present(drawn_items, drawn).value
        found["nothing recognisable"] = e.neither(drawn_items, drawn).value
    return found


def labels_of(item: e.Item) -> frozenset[str]:
    return frozenset(c for c in map(p.category_of, item.names) if c)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lots", type=int, nargs="+", default=[0, 1, 2], metavar="S")
    parser.add_argument("--steps", type=int, default=1000, metavar="N")
    parser.add_argument("--images", type=int, default=100, metavar="N", help="pictures per lot; 0: none")
    args = parser.parse_args()
    model, rows = DemoModel.load("cpu"), []
    for seed in args.lots:
        lot, began = Lot.draw(seed), time.process_time()
        hgr = trained(model, lot, args.steps, seed)
        rows.append(judged(model, hgr, lot, seed, args.images))
        said = ", ".join(f"{name} {100 * value:.1f} %" for name, value in rows[-1].items())
        print(
            f"lot {seed} (without {', '.join(lot.pictograms_out)}): {said}; {time.process_time() - began:.0f} CPU s", flush=True
        )
    print("mean: " + ", ".join(f"{name} {100 * sum(row[name] for row in rows) / len(rows):.1f} %" for name in rows[0]))


if __name__ == "__main__":
    main()
