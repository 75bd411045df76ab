"""SafeCFG beside its best peers on the demo world, in one table:

    python -m benchmarks.safety --images 600 --seed 1 --json FILE --out DIR [--lora FILE] [--arms ...] [--conditions]

Held-out prompts and pictograms, the same seeds in every arm; an independent judge says what the pictures show. Arms: plain
CFG; a negative prompt, Safe Latent Diffusion (SLD: the paper's four settings and the best of more), CASG, SAFREE and CRG; SafeCFG's modes,
and `both` with one category off; the safe LoRA without SafeCFG (`benchmarks.safe_lora --out FILE` trains one). Every peer but SAFREE and CRG
has the setting that `--tune` found best on prompts and seeds of its own, and, as `_hardest`, the one that leaves the least harm
whatever it does to the rest. "Rest kept": the clean pictogram beside the harmful one; "neither": nothing recognisable.

Finished arms are kept in the JSON file, and their pictures in DIR: the same command again draws only what is missing.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from demo import evaluate as e
from demo import world
from demo.__main__ import HGR_FILE, KINDS, figures, plain_values
from demo.pipeline import add_device_option
from hgr_models import HGRError, file_hash, load_hgr
from hgr_models.lora import load_lora, lora_from

from . import safety_tables as tables
from . import safety_tuning as tuning
from .main_job import OFF, redirections
from .safety_peers import CANDIDATES, CHOSEN, HARDEST, UNTUNED, peer
from .safety_pictures import Arm, Condition, Pictures

OURS = ("condition", "guidance", "both", "concept", "one_off")
MAIN, LORA = "main", "safe_lora"
PEERS = {
    **CHOSEN,
    **UNTUNED,
    **{f"{name}_hardest": HARDEST[name] for name in ("negative_prompt", "sld", "casg") if HARDEST[name] != CHOSEN[name]},
}
ARMS = ("plain", *PEERS, *OURS, LORA)
CONDITIONS = {  # what differs from the main table
    "4 steps": {"steps": 4},
    "8 steps": {"steps": 8},
    "15 steps": {"steps": 15},
    "cfg 1": {"cfg": 1.0},
    "cfg 12": {"cfg": 12.0},
    "96x96": {"width": 96, "height": 96},
    "192x192": {"width": 192, "height": 192},
    "192x128": {"width": 192},
    "128x192": {"height": 192},
}
LABEL = 150  # pixels left of a row of pictures


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.safety", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100, metavar="N", help="pictures per figure (100)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="seed of prompts and noise (1)")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="sampling steps (25)")
    parser.add_argument("--cfg", type=float, default=5.0, metavar="X", help="cond_scale (5)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)} (all)")
    parser.add_argument("--hgr", type=Path, default=HGR_FILE, metavar="FILE", help="the HGR under test (the demo's)")
    parser.add_argument("--lora", type=Path, metavar="FILE", help="the safe LoRA; without it its arm is left out")
    parser.add_argument(
        "--conditions", nargs="*", choices=CONDITIONS, metavar="NAME", help=f"a second table: {', '.join(CONDITIONS)} (all)"
    )
    parser.add_argument(
        "--condition-images", type=int, metavar="N", help="pictures per figure of that table (a quarter of --images)"
    )
    parser.add_argument("--tune", action="store_true", help="choose the peers' settings instead, on a validation split")
    add_device_option(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures; those in it are not measured again")
    parser.add_argument("--out", type=Path, default=Path("out/safety"), metavar="DIR", help="the pictures (out/safety)")
    args = parser.parse_args(line)
    if args.condition_images is None:
        args.condition_images = max(1, args.images // 4)
    if args.conditions == []:
        args.conditions = list(CONDITIONS)
    if min(args.images, args.steps, args.condition_images) < 1 or not 0 <= args.seed < tuning.SEED:
        parser.error(f"expected at least one picture and step, and a seed from 0 to {tuning.SEED - 1}, but got {line or args}")
    return args


class Benchmark:
    """Fills a file of figures, arm by arm."""

    def __init__(self, args: argparse.Namespace):
        seed, items = (args.seed + tuning.SEED, tuning.validation_items) if args.tune else (args.seed, e.items)
        self.args, self.main = args, Condition(args.steps, args.cfg)
        self.pictures = Pictures(args.out, lambda kind, count: items(kind, count, seed), seed, args.device)
        facts = {"split": "validation" if args.tune else "test", "n": args.images, "seed": args.seed, "steps": args.steps}
        facts |= {"device": args.device, "cfg": args.cfg, "judge": self.pictures.judge_about, "weights": self.pictures.weights}
        self.results = tables.load_results(args.json, facts)

    def test(self, arms: dict[str, Arm]) -> None:
        """The main table's figures, and those of the conditions that were asked for."""
        self._fill(self.results, MAIN, arms, self.main, self.args.images)
        for name in self.args.conditions or ():
            condition = Condition(**{**asdict(self.main), **CONDITIONS[name]})
            facts = {"n": self.args.condition_images, **asdict(condition)}
            self._fill(tables.section(self.results, name, facts), name, arms, condition, self.args.condition_images)

    def _fill(self, found: dict, place: str, arms: dict[str, Arm], condition: Condition, count: int) -> None:
        for name in _missing(found, arms):
            plain, drawn = (self._drawn(place, arm, arms[arm], condition, KINDS, count) for arm in ("plain", name))
            which = {kind: self.pictures.items(kind, count) for kind in KINDS}
            values = figures(which, plain, drawn) | by_category(which[KINDS[0]], drawn[KINDS[0]])
            values["rows_per_step"] = sum(each.rows_per_step for each in drawn.values()) / len(drawn)
            if place == MAIN and name != "plain":
                values["time_ratio"] = self.pictures.time_ratio(arms[name], condition, KINDS[:2], count)
            self._add(found, name, values, arms[name])

    def tune(self) -> None:
        """The figures that the peers' settings are chosen by."""
        settings = sorted({setting for some in CANDIDATES.values() for setting in some})
        arms = {"plain": Arm(), **{setting: peer(setting) for setting in settings}}
        which = {kind: self.pictures.items(kind, self.args.images) for kind in tuning.KINDS}
        for name in _missing(self.results, arms):
            drawn = self._drawn("validation", name, arms[name], self.main, tuning.KINDS, self.args.images)
            self._add(self.results, name, tuning.validation_figures(which, drawn), arms[name])

    def _drawn(self, place: str, name: str, arm: Arm, condition: Condition, kinds, count: int) -> dict[str, e.Drawn]:
        return {kind: self.pictures.draw(place, name, arm, condition, kind, count) for kind in kinds}

    def _add(self, found: dict, name: str, values: dict, arm: Arm) -> None:
        found[name] = {**plain_values(values), "about": arm.about}
        tables.save_results(self.args.json, self.results)


def _missing(figures: dict, arms: dict[str, Arm]) -> list[str]:
    """The arms that these figures lack, or hold for another HGR, LoRA or setting."""
    return [name for name, arm in arms.items() if figures.get(name, {}).get("about") != arm.about]


def by_category(which: list[e.Item], drawn: e.Drawn) -> dict[str, e.Rate]:
    """Harm of a category in the pictures of the prompts that name it, for every category that some prompt names."""
    rates = {f"{c}_present": e.named_harm_present(which, drawn, c) for c in world.CATEGORIES}
    return {key: rate for key, rate in rates.items() if rate.n}


def make_arms(args: argparse.Namespace) -> dict[str, Arm]:
    """The arms that were asked for; plain CFG always, for the others are compared with it."""
    hgr, about = load_hgr(args.hgr).to(args.device), {"hgr": file_hash(args.hgr)}
    arms = {"plain": Arm(), **{name: peer(setting) for name, setting in PEERS.items()}}
    arms |= {name: Arm(guard, about={**about, "arm": name}) for name, guard in redirections(hgr).items()}
    if args.lora:
        arms[LORA] = Arm(lora=lora_from(load_lora(args.lora)[0]).to(args.device), about={"lora": file_hash(args.lora)})
    elif LORA in args.arms:
        print(f"{LORA}: left out. `python -m benchmarks.safe_lora --out FILE` trains one, --lora FILE judges it.")
    return {name: arm for name, arm in arms.items() if name in ("plain", *args.arms)}


def grid(pictures: Pictures, place: str, arms: list[str]) -> Image.Image | None:
    """The arms that were drawn into this folder, one per row, the same seeds below each other; None without any."""
    shown = {arm: [pictures.shown(place, arm, kind) for kind in KINDS] for arm in arms}
    rows = {arm: torch.cat([p for some in found for p in some], dim=2) for arm, found in shown.items() if None not in found}
    if not rows:
        return None
    height, width = next(iter(rows.values())).shape[1:]
    sheet = Image.new("RGB", (LABEL + width, height * len(rows)), "white")
    for number, (arm, row) in enumerate(rows.items()):
        sheet.paste(Image.fromarray((row * 255).round().byte().permute(1, 2, 0).numpy()), (LABEL, number * height))
        ImageDraw.Draw(sheet).text((4, number * height + height // 2), arm, fill="black")
    return sheet


def save_grids(benchmark: Benchmark) -> None:
    """The picture grids of the main table and of every condition."""
    out = benchmark.args.out
    for place in (MAIN, *(benchmark.args.conditions or ())):
        if (sheet := grid(benchmark.pictures, place, list(ARMS))) is not None:
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"safety {place}.png".replace(" ", "_")
            sheet.save(path)
            print(f"Pictures: {path} (from the left: " + ", ".join(KINDS) + ")")


def print_tables(results: dict) -> None:
    about = results["judge"]
    print(
        f"\n{results['n']} pictures per figure, seed {results['seed']}, {results['steps']} steps, cfg {results['cfg']:g}; 95 % intervals."
    )
    print(f"The judge names exactly the right pictograms in {100 * about['exact']:.1f} % of held-out renders.\n")
    print(tables.table(results, ARMS))
    print(f"\none_off: category {OFF} is switched off.\n")
    print(tables.categories_table(results, ARMS, world.CATEGORIES))
    if "conditions" in results:
        print("\n" + tables.conditions_table(results["conditions"], ARMS))


def run(args: argparse.Namespace) -> dict:
    """The figures, printed and as in the JSON file."""
    benchmark = Benchmark(args)
    if args.tune:
        benchmark.tune()
        print(tuning.report(benchmark.results))
    else:
        benchmark.test(make_arms(args))
        print_tables(benchmark.results)
        save_grids(benchmark)
    return benchmark.results


def main() -> None:
    try:
        run(arguments())
    except (HGRError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
