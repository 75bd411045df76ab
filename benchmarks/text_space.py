"""Does training in text space do what training through the denoiser would? `python -m benchmarks.text_space --steps 900 --out FILE`

Trains the demo's condition redirector from prompts alone, on pairs as SafeCFG Prompt Pairs gives them for the demo world, and
prints at some steps: the readers' error on held-out pairs, and the denoiser's own error (`losses.condition_error` over
`unredirected_error`, forward only) on points of held-out prompts; at the end how both correlate over these steps. `--out` keeps
the HGR, calibrated, for `benchmarks.main_job --hgr FILE`. Seconds are CPU seconds of this process. `--joint PATH`, in the Python
of the ComfyUI in that folder: beside the demo's denoiser, small random ones of core's classes judge, too (`joint_judges`).
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch

from demo import prompts as p
from demo import world
from demo.pipeline import DemoModel
from demo.training.hgr_common import make_hgr
from demo.training.hgr_data import frozen, labels, prompt_tensors, runs
from hgr_models import losses, save_hgr
from hgr_models.pair_shards import draw_pairs, write_pairs
from hgr_models.recording import Points, Prompts
from hgr_models.shards import CALIBRATION_TEXTS, HELD_OUT_PAIRS, TEXTS, Recording, Texts, write_texts
from hgr_models.textspace import PairTexts
from hgr_models.train import cli_model
from hgr_models.train_text import TextTraining
from hgr_models.trainer import PROMPTS, Phase, Step, Trainer, calibrate

from .joint_judges import judges, ratios

JOINT_PAIRS = 12  # held out, which random denoisers judge
PAIRS, CLEAN, HELD_OUT = 2160, 3600, 240  # prompts to learn from; pairs, and clean prompts, that are not
RATE = 0.01  # of false alarms
SHOWN = (1, 5, 10, 25, 50, 100, 150, 200, 300, 450, 600, 900, 1400)  # steps at which it is measured


def encoded(model: DemoModel, pairs: list[p.Pair]) -> PairTexts:
    """The tokens of pairs."""
    harms, removed = (torch.stack([labels(getattr(pair, name)) for pair in pairs]) for name in ("harms", "removed"))
    tokens, partners = (model.encode([getattr(pair, name) for pair in pairs]) for name in ("prompt", "partner"))
    return PairTexts(tokens, None, None, partners, None, None, harms, removed)


def held_out_pairs(rng: random.Random, count: int) -> list[p.Pair]:
    """Pairs of pictograms that no training shows together."""
    names = [tuple(pair) for kind in ("clean", "harmful") for pair in world.SPLIT[f"held_out_harmful_{kind}"]]
    made = []
    for pair in (rng.choice(names) for _ in range(count)):
        harms = sorted({c for c in map(p.category_of, pair) if c})
        made.append(p.make_pair(pair, frozenset(rng.sample(harms, rng.randint(1, len(harms)))), rng))
    return made


def write_recording(model: DemoModel, folder: Path, rng: random.Random) -> Recording:
    """Encoded pairs and clean prompts, in shards."""
    write_pairs(folder / "pairs.safetensors", encoded(model, [p.harmful_pair(rng) for _ in range(PAIRS)]), {})
    write_pairs(folder / "held_out.safetensors", encoded(model, held_out_pairs(rng, HELD_OUT)), {}, HELD_OUT_PAIRS)
    for kind, count, words in ((TEXTS, CLEAN, 0), (CALIBRATION_TEXTS, HELD_OUT, 1)):
        tokens = model.encode([p.clean_pair(rng, p.harmless_words()[words], 0.4).prompt for _ in range(count)])
        write_texts(folder / f"clean_{words}.safetensors", Texts(tokens, None, None, torch.zeros(count, 3)), {}, kind)
    return Recording.open(folder)


def recorded(model: DemoModel, count: int, rng: random.Random) -> tuple[Points, Prompts]:
    """Points of runs of held-out prompts, with their prompts row by row."""
    prompts = prompt_tensors(model, held_out_pairs(rng, count), rng)
    generator = torch.Generator().manual_seed(0)
    points, about = next(runs(model, prompts, lambda _: "prompt", None, generator, "points to judge with", batch=count))
    return points, about[points.prompt]


@torch.no_grad()
def denoiser_error(network, predict, points: Points, prompts: Prompts) -> float:
    """`condition_error` over `unredirected_error`: 0 is the partner itself, 1 no redirection."""
    after = losses.condition_error(network, predict, points, prompts).mean()
    return float(after / losses.unredirected_error(points).mean())


def correlation(pairs: list[tuple[float, float]]) -> float:
    """Pearson's, of the logarithms."""
    return float(torch.corrcoef(torch.tensor(pairs).clamp(min=1e-4).log().T)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--judges", type=int, default=16, metavar="N", help="held-out prompts whose runs judge")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--joint", type=Path, metavar="PATH", help="a ComfyUI, whose classes judge as well")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    model = DemoModel.load("cpu")
    hgr, found = make_hgr(model, condition=True, guidance=False), []
    with tempfile.TemporaryDirectory() as name:
        if args.joint:
            cli_model().start(args.joint, torch.device("cpu"), "--base-directory", str(Path(name, "comfy")))
        recording = write_recording(model, Path(name), rng)
        points, prompts = recorded(model, args.judges, rng)
        training, predict, began = TextTraining(hgr, args.steps, args.seed), frozen(model.device), time.process_time()
        training.measure(recording)
        pairs = draw_pairs(recording, JOINT_PAIRS, torch.Generator().manual_seed(1), HELD_OUT_PAIRS)
        random_judges = judges(hgr.condition, pairs) if args.joint else {}

        def show(at: Step) -> None:
            if at.step in SHOWN or at.step == args.steps:
                network = training.mean.module
                errors = {"readers": training.error_on(recording), "demo": denoiser_error(network, predict, points, prompts)}
                found.append(errors | ratios(random_judges, network))
                said = ", ".join(f"{name} {error:.3f}" for name, error in found[-1].items())
                print(f"step {at.step}: {said}, {time.process_time() - began:.0f} CPU s", flush=True)

        trainer = Trainer(None, progress=show)
        trainer.begin(PROMPTS, training)
        trainer.run(Phase(PROMPTS, training, lambda: training.train_step(recording), args.steps))
        info = calibrate(hgr, recording, RATE, torch.device("cpu"))
    for name in list(found[0])[1:]:
        value = correlation([(errors["readers"], errors[name]) for errors in found])
        print(f"correlation of the readers' error with {name}'s, of the logarithms over {len(found)} steps: {value:.3f}")
    print(f"thresholds {[round(t, 3) for t in info.condition_thresholds]}")
    if args.out:
        save_hgr(args.out, hgr)


if __name__ == "__main__":
    main()
