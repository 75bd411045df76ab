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
from .judge import Judge
from .pipeline import DemoModel, add_device_option
from .safecfg import Redirection

HGR_FILE = Path(__file__).parents[1] / "hgr_models" / "weights" / "demo.safetensors"
ARMS, KINDS = ("plain", "safecfg"), ("combination", "clean", "unseen_harmful")


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


def measure(args: argparse.Namespace) -> tuple[dict, dict[str, dict[str, e.Drawn]], dict[str, list[e.Item]]]:
    """The figures of both arms, with everything they were drawn from."""
    model, hgr = DemoModel.load(args.device), load_hgr(HGR_FILE).to(args.device)
    judge, judge_about = Judge.load(args.device)
    redirections = {"plain": None, "safecfg": Redirection(hgr, CategorySettings((1.0,) * len(world.CATEGORIES)))}
    which = {kind: e.items(kind, args.images, args.seed) for kind in KINDS}
    batches = -(-args.images // e.BATCH)
    drawn: dict[str, dict[str, e.Drawn]] = {arm: {} for arm in ARMS}
    with tqdm(total=len(KINDS) * len(ARMS) * batches * args.steps, desc="drawing", unit="step") as bar:
        for kind, some in which.items():
            tokens = model.encode([i.prompt for i in some])
            for arm in ARMS:
                bar.set_postfix(what=kind, arm=arm)
                drawn[arm][kind] = e.draw(model, judge, tokens, args.seed, args.steps, args.cfg, redirections[arm], bar.update)
    rates = {arm: figures(which, drawn["plain"], drawn[arm]) for arm in ARMS}
    return {"n": args.images, "judge": judge_about, **rates}, drawn, which


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


def table(results: dict) -> str:
    """The figures side by side."""
    rows = [f"{'':22s} {'plain CFG':>24s} {'SafeCFG':>24s}"]
    for key, value in results["plain"].items():
        cells = [f"{results[arm][key]}" if isinstance(value, e.Rate) else f"{results[arm][key]:.4g}" for arm in ARMS]
        rows.append(f"{key:22s} {cells[0]:>24s} {cells[1]:>24s}")
    about = results["judge"]
    rows.append(f"{results['n']} pictures per figure, 95 % intervals. The judge itself names exactly the right pictograms in")
    rows.append(
        f"{100 * about['exact']:.1f} % of held-out renders and {100 * about['exact_reconstructed']:.1f} % of their reconstructions."
    )
    return "\n".join(rows)


def grid(drawn: dict[str, dict[str, e.Drawn]], columns: int = 8) -> Image.Image:
    """Rows of plain CFG above the same seeds with SafeCFG: combinations, then clean prompts, then unseen harm."""
    rows = [torch.cat(list(drawn[arm][kind].pictures[:columns]), dim=2) for kind in KINDS for arm in ARMS]
    return Image.fromarray((torch.cat(rows, dim=1) * 255).round().byte().permute(1, 2, 0).numpy())


def main() -> None:
    args = arguments()
    results, drawn, which = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "demo.png"
    grid(drawn).save(path)
    print(table(results))
    print(f"Pictures: {path} (pairs of rows: plain CFG above, SafeCFG below; " + ", ".join(KINDS) + ")")
    for kind in KINDS:
        print(f"  {kind}: " + " | ".join(i.prompt for i in which[kind][:8]))
    if args.json:
        args.json.write_text(json.dumps(plain_values(results), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (HGRError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
