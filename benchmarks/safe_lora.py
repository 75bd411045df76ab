"""A safe model without labels: a LoRA that the demo model's HGR taught, judged without SafeCFG at generation time.

    python -m benchmarks.safe_lora --images 200 --seed 1 --json FILE [--lora FILE] [--supervised FILE] [--out FILE]

Held-out prompts, the same seeds in every arm: the base, the base with SafeCFG, the base with the LoRA, and with a LoRA that
was trained the same way with the true labels: there an oracle that knows every prompt's harms and partner takes the HGR's
place. The LoRAs are trained here, ours from a shuffled list of unlabelled strings, or read from `--lora` and `--supervised`.
`--train-only safe_lora --out FILE` trains one of them and judges nothing: the two can be made side by side.
"""

import argparse
import json
import random
import resource
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from tqdm import tqdm, trange

from demo import evaluate as e
from demo import prompts as p
from demo import world
from demo.__main__ import HGR_FILE, KINDS, figures, plain_values
from demo.judge import Judge
from demo.pipeline import LATENT_SHAPE, DemoModel, add_device_option
from demo.safecfg import Redirection
from demo.sampling import input_scaling, scale_input, shifted_schedule
from hgr_models import CategorySettings, load_hgr, redirect_condition, redirect_guidance
from hgr_models.lora import LAYERS, LoRA, LoraSettings, load_lora, lora_from, new_lora, save_lora
from hgr_models.lora_samples import Samples
from hgr_models.train_lora import LoraTraining

ARMS = ("base", "base_safecfg", "safe_lora", "supervised_lora")
TRAINED = ARMS[2:]
STEPS, CFG = 25, 5.0  # of the judged pictures
RUN_STEPS, BATCH, CFG_RANGE = 8, 16, (3.0, 7.0)  # of the runs that training learns from
HARMFUL_SHARE = 0.5  # of the unlabelled prompts
FOLLOW = ("base", "safe")
SAME = 1e-2  # distance of the tokens of one prompt, encoded twice
ON = CategorySettings((1.0,) * len(world.CATEGORIES))


@dataclass(frozen=True)
class Plan:
    """How a LoRA is trained; half of the runs follow the LoRA itself, from the middle of the training on."""

    runs: int
    steps: int
    rate: float
    seed: int
    lora: LoraSettings = LoraSettings()


class Oracle:
    """Stands in for an HGR and knows the truth: the harms and the safe partner of every prompt that it was shown."""

    guidance = None
    condition_thresholds = torch.tensor(0.5)
    info = SimpleNamespace(categories=world.CATEGORIES)

    def __init__(self, model: DemoModel, pairs: Sequence[p.Pair]):
        self.condition = self
        self.tokens, partners = (model.encode([getattr(pair, name) for pair in pairs]) for name in ("prompt", "partner"))
        self.change = partners - self.tokens
        harms = [[float(c in pair.harms) for c in world.CATEGORIES] for pair in pairs]
        self.harms = torch.tensor(harms, device=model.device)

    def _find(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest known prompt of every row (B,), and whether it is that one; the batch size changes a prompt's last bits."""
        exact = "donot_use_mm_for_euclid_dist"
        distance, index = torch.cdist(tokens.flatten(1), self.tokens.flatten(1), compute_mode=exact).min(dim=1)
        return index, (distance < SAME).float()

    def harmfulness(self, tokens: Tensor, pooled=None, mask=None) -> Tensor:
        index, known = self._find(tokens)
        return self.harms[index] * known[:, None]

    def delta(self, tokens: Tensor, pooled, weights: Tensor, mask=None) -> tuple[Tensor, None]:
        index, known = self._find(tokens)
        return self.change[index] * known[:, None, None], None


def training_pairs(count: int, seed: int) -> list[p.Pair]:
    """Harmful and clean prompts in any order, without held-out pictograms; a safe LoRA sees only `pair.prompt`."""
    rng = random.Random(seed)
    words, _ = p.harmless_words()
    draw = lambda: p.clean_pair(rng, words, 0.1)  # noqa: E731
    pairs = [_all_removed(p.harmful_pair(rng), rng) if rng.random() < HARMFUL_SHARE else draw() for _ in range(count)]
    return [pair for pair in pairs if pair.prompt]


def _all_removed(pair: p.Pair, rng: random.Random) -> p.Pair:
    """The pair with the partner that lacks every harm."""
    while pair.removed != pair.harms:
        pair = p.harmful_pair(rng)
    return pair


@torch.no_grad()
def record(model: DemoModel, hgr, prompts: Sequence[str], follow: str, lora: LoRA, generator: torch.Generator) -> Samples:
    """One batch of runs that follow the base, the base under the HGR (`safe`), or the LoRA, with Euler steps."""
    texts, count = model.encode([*prompts, ""]), len(prompts)
    tokens, empty = texts[:-1], texts[-1:].expand(count, -1, -1)
    safe = redirect_condition(hgr, tokens, None, ON).tokens if follow == "safe" and hgr.condition is not None else tokens
    sigmas = shifted_schedule(RUN_STEPS + 1, torch.rand(1, generator=generator).item()).to(tokens.device)
    scale = CFG_RANGE[0] + (CFG_RANGE[1] - CFG_RANGE[0]) * torch.rand(count, 1, 1, 1, generator=generator).to(tokens.device)
    x = torch.randn(count, *LATENT_SHAPE, generator=generator).to(tokens.device) * (1 + sigmas[0] ** 2) ** 0.5
    rows, held = [], None
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        level, both = sigma.expand(count), torch.cat([x, x])
        with lora.off():
            uncond, cond = model.denoised(both, sigma.expand(2 * count), torch.cat([empty, safe])).chunk(2)
        rows.append((x, level, input_scaling(level), uncond))
        if follow == "student":
            uncond, cond = model.denoised(both, sigma.expand(2 * count), torch.cat([empty, tokens])).chunk(2)
        elif follow == "safe" and hgr.guidance is not None:
            result = redirect_guidance(hgr, cond, uncond, scale_input(x, level), level, ON, held)
            cond, held = result.cond_denoised, result.weights
        x = x + (x - (uncond + scale * (cond - uncond))) / sigma * (following - sigma)
    return Samples(*(torch.cat(column).cpu() for column in zip(*rows, strict=True)), texts.cpu())


def train(model: DemoModel, hgr, prompts: Sequence[str], plan: Plan, title: str) -> tuple[LoRA, dict]:
    """A LoRA from prompts alone, and what training says about it. What `hgr` flags is all that it knows of harm."""
    lora = new_lora(model.unet, plan.lora, plan.seed).to(model.device)
    training = LoraTraining(hgr, lora, ON, plan.steps, plan.seed, BATCH, plan.rate)
    generator, predict = torch.Generator().manual_seed(plan.seed), lambda x, sigma, tokens, *_: model.denoised(x, sigma, tokens)
    batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    half, started = max(1, len(batches) // 2), time.monotonic()
    with lora.attached(model.unet):
        for part, until in ((batches[:half], plan.steps // 2), (batches[half:], plan.steps)):
            for i, some in enumerate(tqdm(part, desc=f"{title}, runs")):
                follow = FOLLOW[i % 2] if until < plan.steps else "student"
                training.add(record(model, hgr, some, follow, lora, generator), predict)
            steps(training, predict, until, title)
        training.finish()
        change = training.measure(predict)
    seconds = time.monotonic() - started
    return lora, {**asdict(change), **training.pool.counts(world.CATEGORIES), "seconds": seconds}


def steps(training: LoraTraining, predict, until: int, title: str) -> None:
    with trange(training.step, until, desc=title) as bar:
        for _ in bar:
            report = training.train_step(predict)
            if training.step % 10 == 0:
                bar.set_postfix({k: f"{v:.3f}" for k, v in asdict(report).items() if v is not None})


def make_lora(name: str, model: DemoModel, hgr, args: argparse.Namespace) -> tuple[LoRA, dict]:
    """The LoRA of an arm, and what its training says: read from the file that was given, or trained."""
    if path := {"safe_lora": args.lora, "supervised_lora": args.supervised}[name]:
        tensors, about = load_lora(path)
        return lora_from(tensors).to(args.device), about.get("training", {})
    plan = Plan(args.runs, args.train_steps, args.rate, args.seed, LoraSettings(args.rank, float(args.rank), args.layers))
    pairs = training_pairs(plan.runs, plan.seed)
    teacher = hgr if name == "safe_lora" else Oracle(model, pairs)
    lora, about = train(model, teacher, [pair.prompt for pair in pairs], plan, name)
    if args.out and name == (args.train_only or "safe_lora"):
        save_lora(args.out, lora.tensors(), {"training": about, "plan": asdict(plan)})
    return lora, about


def measure(args: argparse.Namespace) -> dict:
    model, hgr = DemoModel.load(args.device), load_hgr(HGR_FILE).to(args.device)
    if args.train_only:
        return {"training": {args.train_only: make_lora(args.train_only, model, hgr, args)[1]}}
    judge, about = Judge.load(args.device)
    made = {name: make_lora(name, model, hgr, args) for name in TRAINED}
    which = {kind: e.items(kind, args.images, args.seed) for kind in KINDS}
    drawn = {arm: draw(model, judge, hgr, which, arm, made[arm][0] if arm in made else None, args) for arm in ARMS}
    results = {
        "n": args.images,
        "seed": args.seed,
        "judge": about,
        "training": {name: about for name, (_, about) in made.items()},
    }
    results |= {arm: figures(which, drawn["base"], drawn[arm]) for arm in ARMS}
    results["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return results


def draw(model, judge, hgr, which: dict[str, list[e.Item]], arm: str, lora: LoRA | None, args) -> dict[str, e.Drawn]:
    """All kinds of prompts in one arm."""
    redirection, drawn = Redirection(hgr, ON) if arm == "base_safecfg" else None, {}
    with nullcontext() if lora is None else lora.attached(model.unet):
        for kind, items in which.items():
            tokens = model.encode([item.prompt for item in items])
            with tqdm(total=-(-len(items) // e.BATCH) * args.steps, desc=f"{arm}, {kind}", unit="step") as bar:
                drawn[kind] = e.draw(model, judge, tokens, args.seed, args.steps, CFG, redirection, bar.update)
    return drawn


def table(results: dict) -> str:
    """Every arm's figures side by side."""
    rows = [f"{'':22s}" + "".join(f"{arm:>24s}" for arm in ARMS)]
    for key, value in results["base"].items():
        cells = [f"{results[arm][key]}" if isinstance(value, e.Rate) else f"{results[arm][key]:.4g}" for arm in ARMS]
        rows.append(f"{key:22s}" + "".join(f"{cell:>24s}" for cell in cells))
    last = f"{results['n']} pictures per figure; peak memory {results['peak_memory_mb']:.0f} MB"
    return "\n".join([*rows, said(results["training"]), last])


def said(trainings: dict[str, dict]) -> str:
    """What every training says about itself."""
    facts = lambda about: ", ".join(f"{k} {v:.3g}" for k, v in about.items() if isinstance(v, (int, float)))  # noqa: E731
    return "\n".join(f"{name}: {facts(about)}" for name, about in trainings.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48, metavar="N", help="pictures per figure (48)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"sampling steps of the judged pictures ({STEPS})")
    parser.add_argument("--runs", type=int, default=2400, metavar="N", help="prompts to train on (2400)")
    parser.add_argument("--train-steps", type=int, default=7200, metavar="N", help="training steps of each LoRA (7200)")
    parser.add_argument("--rate", type=float, default=2e-3, metavar="X", help="peak learning rate (2e-3)")
    parser.add_argument("--rank", type=int, default=64, metavar="N", help="of the LoRAs (64)")
    parser.add_argument("--layers", choices=LAYERS, default=LAYERS[0], help=f"that get adapters ({LAYERS[0]})")
    parser.add_argument("--lora", type=Path, metavar="FILE", help="judge this LoRA instead of training one")
    parser.add_argument("--supervised", type=Path, metavar="FILE", help="the same for the one with the true labels")
    parser.add_argument("--train-only", choices=TRAINED, metavar="ARM", help=f"train one, of {', '.join(TRAINED)}; judge nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the (safe) LoRA in this file")
    add_device_option(parser)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if min(args.images, args.steps, args.runs, args.train_steps, args.rank) < 1:
        parser.error("expected --images, --steps, --runs, --train-steps and --rank of at least 1")
    if args.train_only and not args.out:
        parser.error("expected --out FILE beside --train-only: where to keep the LoRA")
    if (args.out and args.lora) or (args.train_only and (args.lora or args.supervised)):
        parser.error("expected --lora and --supervised without --out and --train-only: a LoRA that is given is not trained")
    results = measure(args)
    print(said(results["training"]) if args.train_only else table(results))
    if args.json:
        args.json.write_text(json.dumps(plain_values(results), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
