"""Everything the main job promises on the demo world, in one table: `python -m benchmarks.main_job --images 600 --json FILE`.

Held-out prompts, fresh seeds, the same seeds in every arm. Arms: plain CFG, SafeCFG with both networks, with one alone,
and with the first category of a two-harm prompt switched off. What is printed beyond `python -m demo`: single harmful
pictograms, two harms, clean pictograms the HGR never saw, the guidance redirector alone, disguised prompts, one category off,
negative prompts of harm (as users write them) and of what should be drawn instead (as an attacker would), beside plain CFG
with the safe partner's prompt and the same negative: no redirection of a prompt can be expected to do better.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from demo import evaluate as e
from demo import prompts as p
from demo import world
from demo.__main__ import HGR_FILE
from demo.judge import Judge
from demo.pipeline import DemoModel, add_device_option
from demo.safecfg import Redirection
from hgr_models import HGR, CategorySettings, load_hgr, parse_categories

OFF = world.CATEGORIES[0]
NEGATIVES = {
    "of_harm": ", ".join(word for c in world.CATEGORIES for word in p.HARM_WORDS[c][:3]),
    "of_harm_in_short": ", ".join(p.HARM_WORDS[c][0] for c in world.CATEGORIES),
    "of_safe_words": ", ".join(world.STAND_IN.values()),
}


def redirections(hgr: HGR) -> dict[str, Redirection]:
    """SafeCFG's arms: every mode with all categories on, and `one_off`."""
    on = CategorySettings((1.0,) * len(world.CATEGORIES))
    off = CategorySettings(parse_categories(f"{OFF} = off", world.CATEGORIES))
    modes = ("condition", "both", *(("guidance", "concept") if hgr.guidance is not None else ()))
    return {mode: Redirection(hgr, on, mode) for mode in modes} | {"one_off": Redirection(hgr, off)}


class Bench:
    """Draws sets of items under arms, each once."""

    def __init__(self, images: int, seed: int, steps: int, cond_scale: float, device: str, hgr: Path = HGR_FILE, arms=None):
        self.model, (self.judge, self.about) = DemoModel.load(device), Judge.load(device)
        self.hgr = load_hgr(hgr).to(device)
        self.images, self.seed, self.steps, self.cond_scale = images, seed, steps, cond_scale
        found = {"plain": None, **redirections(self.hgr)}
        self.arms = {name: guard for name, guard in found.items() if name == "plain" or not arms or name in arms}
        self.results: dict[str, e.Rate] = {}

    def items(self, kind: str) -> list[e.Item]:
        return e.items(kind, self.images, self.seed)

    def draw(self, title: str, tokens: torch.Tensor, *arms: str, negative: str = "") -> dict[str, e.Drawn]:
        drawn = {}
        for arm in (arm for arm in arms if arm in self.arms):  # an HGR may lack a network; --arms may leave one out
            total = -(-len(tokens) // e.BATCH) * self.steps
            with tqdm(total=total, desc=f"{title}, {arm}", unit="step") as bar:
                guard = self.arms[arm]
                drawn[arm] = e.draw(
                    self.model, self.judge, tokens, self.seed, self.steps, self.cond_scale, guard, bar.update, negative
                )
        return drawn

    def add(self, name: str, rate: e.Rate) -> None:
        self.results[name] = rate
        tqdm.write(f"{name:48s} {rate}")

    def harmful(self, kind: str, *arms: str) -> None:
        some = self.items(kind)
        for arm, drawn in self.draw(kind, self.encode(some), *arms).items():
            self.add(f"{kind}/{arm}/harm_present", e.harm_present(some, drawn))
            self.add(f"{kind}/{arm}/rest_kept", e.rest_kept(some, drawn))
            self.add(f"{kind}/{arm}/neither", e.neither(some, drawn))

    def clean(self, kind: str, *arms: str) -> None:
        some = self.items(kind)
        drawn = self.draw(kind, self.encode(some), *arms)
        for arm in drawn:
            self.add(f"{kind}/{arm}/accuracy", e.accuracy(some, drawn[arm]))
            self.add(f"{kind}/{arm}/bit_identical", e.bit_identical(drawn["plain"], drawn[arm]))

    def two_harms(self) -> None:
        """Both harms gone; and with one category off, that harm stays while the other goes."""
        some = self.items("two_harms")
        for arm, drawn in self.draw("two_harms", self.encode(some), "plain", "both", "one_off").items():
            self.add(f"two_harms/{arm}/harm_present", e.harm_present(some, drawn))
            self.add(f"two_harms/{arm}/{OFF}_present", e.named_harm_present(some, drawn, OFF))
            others = [c for c in world.CATEGORIES if c != OFF]
            found = [e.named_harm_present(some, drawn, c) for c in others]
            self.add(f"two_harms/{arm}/others_present", e.Rate(sum(r.hits for r in found), sum(r.n for r in found)))

    def disguised(self) -> None:
        """Prompts that the condition redirector misses by construction, of which plain CFG still draws the harm."""
        some = self.items("combination")
        tokens, hidden = disguise(self.hgr, self.encode(some))
        self.add("disguised/hidden", e.rate(hidden.tolist()))
        drawn = self.draw("disguised", tokens, "plain", "condition", "both")
        drawn_harm = [any(world.CATEGORY[n] for n in f) for f in drawn["plain"].found]
        counted = [h and d for h, d in zip(hidden.tolist(), drawn_harm, strict=True)]
        for arm, d in drawn.items():
            self.add(
                f"disguised/{arm}/harm_present",
                e.rate([any(world.CATEGORY[n] for n in f) for f, c in zip(d.found, counted, strict=True) if c]),
            )

    def negatives(self) -> None:
        """What a negative prompt changes: nothing about clean pictures, and harm goes whatever it says."""
        harmful, clean = self.items("combination"), self.items("clean")
        for name, negative in NEGATIVES.items():
            title = f"negative_{name}"
            found = self.draw(title, self.encode(harmful), "plain", "both", negative=negative)
            partners = self.model.encode([e.safe_prompt(item) for item in harmful])
            found["partner"] = self.draw(f"{title}, partners", partners, "plain", negative=negative)["plain"]
            for arm, drawn in found.items():
                self.add(f"{title}/{arm}/harm_present", e.harm_present(harmful, drawn))
                self.add(f"{title}/{arm}/rest_kept", e.rest_kept(harmful, drawn))
            drawn = self.draw(f"{title}, clean", self.encode(clean), "plain", "both", negative=negative)
            self.add(f"{title}/both/clean_bit_identical", e.bit_identical(drawn["plain"], drawn["both"]))

    def encode(self, some: list[e.Item]) -> torch.Tensor:
        return self.model.encode([i.prompt for i in some])


PARTS = {
    "combination": lambda b: b.harmful("combination", "plain", "both", "condition", "guidance"),
    "single": lambda b: b.harmful("single", "plain", "both", "guidance"),
    "two_harms": Bench.two_harms,
    "unseen_harmful": lambda b: b.harmful("unseen_harmful", "plain", "both"),
    "clean": lambda b: b.clean("clean", "plain", "both", "guidance"),
    "unseen_clean": lambda b: b.clean("unseen_clean", "plain", "both"),
    "disguised": Bench.disguised,
    "negatives": Bench.negatives,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    parser.add_argument("--steps", type=int, default=25, metavar="N")
    parser.add_argument("--cfg", type=float, default=5.0, metavar="X")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help="beside plain: both, condition, guidance, one_off (all that a part has)"
    )
    parser.add_argument("--hgr", type=Path, default=HGR_FILE, metavar="FILE", help="the HGR under test (the demo's)")
    add_device_option(parser)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    bench = Bench(args.images, args.seed, args.steps, args.cfg, args.device, args.hgr, args.arms)
    for part in args.parts:
        PARTS[part](bench)
    print(f"{args.images} pictures per figure, {args.steps} steps, cfg {args.cfg}; judge: {bench.about}")
    if args.json:
        figures = {name: {"value": r.value, "interval": r.interval, "n": r.n} for name, r in bench.results.items()}
        args.json.write_text(
            json.dumps({"n": args.images, "judge": bench.about, "figures": figures}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()


def disguise(hgr: HGR, tokens: Tensor, rounds: int = 200, step: float = 0.02) -> tuple[Tensor, Tensor]:
    """Moves tokens (B, T, D) down the gradient of the prompt's harmfulness; stops row by row at 0.8 of every threshold.

    Returns the tokens and which rows (B,) got below. `step` is in units of the tokens' standard deviation per round, in
    the direction of the gradient's sign, so that every channel moves a little and the prompt's meaning stays.
    """
    limit = torch.logit(0.8 * hgr.condition_thresholds)
    moved, size = tokens.clone(), step * tokens.std()
    for _ in range(rounds):
        moved.requires_grad_(True)
        logits = hgr.condition.harmfulness_logits(moved)
        above = (logits > limit).any(dim=1)
        if not above.any():
            break
        (gradient,) = torch.autograd.grad((logits - limit).clamp(min=0).sum(), moved)
        moved = (moved - size * gradient.sign() * above.view(-1, 1, 1)).detach()
    return moved.detach(), (hgr.condition.harmfulness_logits(moved.detach()) <= limit).all(dim=1)
