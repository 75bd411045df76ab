"""`python -m demo`: the demo world drawn with plain CFG and with SafeCFG, from the same seeds, and a table of what is shown."""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from hgr_models import CategorySettings, HGRError, load_hgr

from . import evaluate as e
from . import world
from .grid import Band, labelled
from .judge import Judge
from .pipeline import DemoModel, add_device_option
from .safecfg import Redirection
from .threads import usable_cores

HGR_FILE = Path(__file__).parents[1] / "hgr_models" / "weights" / "demo.safetensors"
ARMS, KINDS = ("plain", "safecfg"), ("combination", "clean", "unseen_harmful")
NAMES = {"plain": "plain CFG", "safecfg": "SafeCFG"}
TITLES = {
    "combination": "A harmful and a clean pictogram: the harm goes, the rest stays",
    "clean": "Clean prompts: identical, to the last bit",
    "unseen_harmful": "Harm that training never saw",
}
FIRST = 8  # pictures of each kind that are drawn before all others


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of the picture grid (default: out)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument(
        "--images", type=int, default=48, metavar="N", help="pictures per figure (default: 48; 600 for narrow intervals)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of prompts and noise (default: 0)")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="sampling steps (default: 25)")
    parser.add_argument("--cfg", type=float, default=5.0, metavar="X", help="cond_scale (default: 5)")
    add_device_option(parser)
    args = parser.parse_args()
    if args.images < 1 or args.steps < 1:
        parser.error(f"expected at least one image and one step, but got --images {args.images} --steps {args.steps}")
    return args


class Demo:
    """Draws every kind of prompt in both arms: a few pictures of each first, for the sheet, then the rest, for the table."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.model, hgr = DemoModel.load(args.device), load_hgr(HGR_FILE).to(args.device)
        judge, self.about = Judge.load(args.device)
        self.judge = judge
        self.guards = {"plain": None, "safecfg": Redirection(hgr, CategorySettings((1.0,) * len(world.CATEGORIES)))}
        self.which = {kind: e.items(kind, args.images, args.seed) for kind in KINDS}
        self.drawn: dict[str, dict[str, e.Drawn]] = {arm: {} for arm in ARMS}

    def seconds(self) -> float:
        """How long all of it will take: a picture's step is timed, of a batch as it will be drawn."""
        count = min(FIRST, self.args.images)
        tokens = self.model.encode([item.prompt for item in self.which[KINDS[0]][:count]])
        few = e.draw(self.model, self.judge, tokens, self.args.seed, 2, self.args.cfg, self.guards["safecfg"])
        return few.seconds_per_step * self.args.steps * self.args.images * len(KINDS) * len(ARMS)

    def draw(self, kind: str, part: slice, bar: tqdm) -> None:
        """Some of a kind's prompts in both arms; the same seeds in both."""
        tokens = self.model.encode([item.prompt for item in self.which[kind]])[part]
        start = part.start or 0
        for arm, guard in self.guards.items() if len(tokens) else ():
            bar.set_postfix(what=kind, arm=arm)
            more = e.draw(
                self.model, self.judge, tokens, self.args.seed, self.args.steps, self.args.cfg, guard, bar.update, first=start
            )
            before = self.drawn[arm].get(kind)
            self.drawn[arm][kind] = more if before is None else before.with_more(more)

    def sheet(self) -> Image.Image:
        bands = [
            Band(TITLES[kind], [i.prompt for i in self.which[kind]], {n: self.drawn[a][kind].pictures for a, n in NAMES.items()})
            for kind in KINDS
        ]
        return labelled(bands)

    def results(self) -> dict:
        which = {kind: some[: len(self.drawn["plain"][kind].found)] for kind, some in self.which.items()}  # as far as it is drawn
        rates = {arm: figures(which, self.drawn["plain"], self.drawn[arm]) for arm in ARMS}
        return {"n": self.args.images, "judge": self.about, **rates}

    def steps(self) -> int:
        """Of the denoiser, all batches together."""
        rest = max(0, self.args.images - FIRST)
        batches = 1 + -(-rest // e.BATCH)
        return len(KINDS) * len(ARMS) * batches * self.args.steps


def figures(which: dict[str, list[e.Item]], plain: dict[str, e.Drawn], arm: dict[str, e.Drawn]) -> dict:
    """One arm's column of the table."""
    mixed, clean, unseen = KINDS
    return {
        "harm_present": e.harm_present(which[mixed], arm[mixed]),
        "rest_kept": e.rest_kept(which[mixed], arm[mixed]),
        "neither": e.neither(which[mixed], arm[mixed]),
        "clean_accuracy": e.accuracy(which[clean], arm[clean]),
        "clean_bit_identical": e.bit_identical(plain[clean], arm[clean]),
        "clean_latent_mse": e.latent_mse(plain[clean], arm[clean]),
        "unseen_harm_present": e.harm_present(which[unseen], arm[unseen]),
        "seconds_per_step": sum(arm[k].seconds_per_step for k in KINDS) / len(KINDS),
    }


def plain_values(results: dict) -> dict:
    """The figures as JSON: rates as shares, with their intervals beside them."""
    out = {}
    for key, value in results.items():
        if isinstance(value, dict):
            out[key] = plain_values(value)
        elif isinstance(value, e.Rate):
            out[key], out[f"{key}_interval"] = value.value, list(value.interval)
        else:
            out[key] = value
    return out


ROWS = {  # figures in words, by the kind of prompt they come from
    "combination": {
        "harm_present": "harm in the picture", "rest_kept": "the rest of the prompt kept", "neither": "nothing recognisable",
    },
    "clean": {"clean_accuracy": "clean prompts drawn right", "clean_bit_identical": "clean pictures bit-identical"},
    "unseen_harmful": {"unseen_harm_present": "harm that training never saw"},
}  # fmt: skip


def row(label: str, cells: list[str]) -> str:
    return f"{label:30s} {cells[0]:>24s} {cells[1]:>24s}"


def rows(kind: str, results: dict) -> list[str]:
    """The table's rows of one kind of prompt."""
    return [row(label, [f"{results[arm][key]}" for arm in ARMS]) for key, label in ROWS[kind].items()]


def footnote(results: dict) -> str:
    about = results["judge"]
    return (
        f"{results['n']} pictures per figure, 95 % intervals. The judge itself names exactly the right pictograms in\n"
        f"{100 * about['exact']:.1f} % of held-out renders and {100 * about['exact_reconstructed']:.1f} % of their reconstructions."
    )


def in_words(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def main() -> None:
    args = arguments()
    torch.set_num_threads(usable_cores())
    demo = Demo(args)
    print(
        f"{len(KINDS) * len(ARMS) * args.images} pictures of {args.steps} steps on {args.device}, {usable_cores()} threads: ",
        end="",
    )
    print(f"about {in_words(demo.seconds())}. Stop at any time with Ctrl+C.", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "demo.png"
    with tqdm(total=demo.steps(), desc="drawing", unit="step") as bar:
        for kind in KINDS:
            demo.draw(kind, slice(0, FIRST), bar)
        demo.sheet().save(path)
        bar.write(f"Pictures: {path}\n\n{row('', list(NAMES.values()))}")
        for kind in KINDS:
            demo.draw(kind, slice(FIRST, None), bar)
            bar.write("\n".join(rows(kind, demo.results())))
    print(footnote(demo.results()))
    if args.json:
        args.json.write_text(json.dumps(plain_values(demo.results()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (HGRError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
