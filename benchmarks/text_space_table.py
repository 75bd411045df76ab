"""What SafeCFG Train HGR makes of the demo world with nothing tuned by hand, beside the HGR that ships, in one table:

    COMFYUI_PATH=PATH python -m benchmarks.text_space_table --seeds 0 1 2 --images 200 --folder FOLDER

in the Python of that ComfyUI. Trains with the settings of the template "Train an HGR on the demo" once per seed and way to
train, judges by `benchmarks.main_job`'s parts, and prints Markdown. What lies in FOLDER is neither trained nor judged again.
Seconds are CPU seconds of the whole node: encoding, training, the check by the model, calibration.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from demo import evaluate as e
from demo.__main__ import HGR_FILE
from hgr_models import CategorySettings, redirect_condition
from hgr_models.train import cli_model

from .main_job import PARTS as JOBS
from .main_job import Bench

PLAIN, SHIPPED = "plain", "shipped"
CLEAN_PROMPTS = 2000  # that are only read
COUNTS = (800, 4000, 2000)  # of the template: pairs per category, clean prompts, and how many of seven categories are held out
HELD_OUT = 0.1
RUNS = {
    "harmful_runs": 1440, "clean_runs": 480, "calibration_runs": 400, "run_steps": 8, "batch": 24, "sizes": "128x128", "samplers": "euler",
    "scheduler": "normal", "cfg_min": 3.0, "cfg_max": 7.0, "negatives": "(empty)\n(empty)\n(empty)\na blurry picture\ngun, knife, drug\nan apple",
}  # fmt: skip
REST = {
    "resume": True, "condition_steps": 0, "guidance_steps": 0, "learning_rate": 1e-3, "size": "normal", "false_positive_rate": 0.01,
    "checkpointing": False, "preset": "normal", "prompt_steps": 0,
}  # fmt: skip
PARTS = ("combination", "single", "two_harms", "unseen_harmful")
ROWS = {  # of the table: figures of main_job, and what they mean
    "combination/{}/harm_present": "harmful + clean: harm present",
    "combination/{}/rest_kept": "harmful + clean: rest kept",
    "combination/{}/neither": "harmful + clean: nothing recognisable",
    "single/{}/harm_present": "a harm alone: harm present",
    "single/{}/neither": "a harm alone: nothing recognisable",
    "two_harms/{}/harm_present": "two harms: harm present",
    "two_harms/one_off/weapons_present": "two harms, *weapons* off: weapons stay",
    "two_harms/one_off/others_present": "two harms, *weapons* off: the others present",
    "unseen_harmful/{}/harm_present": "harm never seen: harm present",
    "unseen_harmful/{}/neither": "harm never seen: nothing recognisable",
    "flagged/clean": "clean prompts flagged (all others: bit-identical)",
    "flagged/unseen_clean": "clean prompts of pictograms never seen, flagged",
}


def start(folder: Path) -> None:
    """Makes this process a ComfyUI on the CPU, with this pack as `safecfg`."""
    tool = cli_model()
    tool.start(Path(os.environ["COMFYUI_PATH"]), torch.device("cpu"), "--base-directory", str(folder / "comfy"))
    tool.load_pack()


def train(way: str, seed: int, folder: Path) -> Path:
    """Trains by the node, unless it is done; the HGR's path."""
    path = folder / f"{way.replace(' ', '')}-{seed}.safetensors"
    if path.exists():
        return path
    start(folder)
    from safecfg import hgr_models
    from safecfg.hgr_models import pairs as pp
    from safecfg.nodes.demo_world.demo_model import DemoModel
    from safecfg.nodes.loader import register_folder
    from safecfg.nodes.training.prompt_pairs import DEMO, make_prompts
    from safecfg.nodes.training.train_hgr import TrainHGR

    register_folder()
    prompts = make_prompts(DEMO, "", COUNTS, pp.Material(), HELD_OUT, seed).prompts
    began, name = time.process_time(), path.stem
    with torch.inference_mode():  # as ComfyUI runs nodes
        model, clip, _ = DemoModel.execute().result
        given = {"name": name, "train": way, "model": model, "clip": clip, "prompts": prompts, "seed": seed}
        hgr, _, _, text = TrainHGR.execute(**given, **RUNS, **REST).result
    seconds = time.process_time() - began
    hgr_models.save_hgr(path, hgr.patcher.model)
    path.with_suffix(".txt").write_text(f"{seconds:.0f} CPU seconds\n{text}\n", encoding="utf-8")
    print(path.with_suffix(".txt").read_text(encoding="utf-8"), flush=True)
    return path


def judge(name: str, path: Path | None, images: int, folder: Path) -> dict[str, dict]:
    """The figures of `main_job` for an HGR (None: plain CFG), unless they are there."""
    kept = folder / f"{name}-{images}.json"
    if not kept.exists():
        bench = Bench(images, 1, 25, 5.0, "cpu", path or HGR_FILE, ("both", "one_off"))
        bench.arms = {"plain": None} if path is None else {arm: bench.arms[arm] for arm in ("both", "one_off")}
        for part in PARTS:
            JOBS[part](bench)
        figures = {name: {"value": r.value, "interval": r.interval, "n": r.n} for name, r in bench.results.items()}
        if path is not None:
            figures |= {f"flagged/{kind}": flagged(bench, kind) for kind in ("clean", "unseen_clean")}
        kept.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def flagged(bench: Bench, kind: str) -> dict:
    """The share of clean prompts that are rewritten; the pictures of all others are those of plain CFG, bit for bit."""
    tokens = bench.model.encode([item.prompt for item in e.items(kind, CLEAN_PROMPTS, bench.seed)])
    on = CategorySettings((1.0,) * len(bench.hgr.info.categories))
    weights = torch.cat([redirect_condition(bench.hgr, rows, None, on).weights for rows in tokens.split(200)])
    rate = e.rate((weights > 0).any(dim=1).tolist())
    return {"value": rate.value, "interval": rate.interval, "n": rate.n}


def table(columns: dict[str, dict[str, dict]]) -> str:
    """Markdown: a row per figure, a column per HGR and one for plain CFG."""
    cell = lambda f: f"{100 * f['value']:.1f} [{100 * f['interval'][0]:.1f}, {100 * f['interval'][1]:.1f}]" if f else "–"  # noqa: E731
    lines = ["| % | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, words in ROWS.items():
        plain = name.format(PLAIN).replace("one_off", PLAIN)
        cells = [found.get(plain if column == PLAIN else name.format("both")) for column, found in columns.items()]
        lines.append(f"| {words} | " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S")
    parser.add_argument("--images", type=int, default=200, metavar="N")
    parser.add_argument("--folder", type=Path, required=True, metavar="FOLDER", help="for HGRs, figures and recordings")
    parser.add_argument("--thorough", action="store_true", help="also `train` = thorough with the first seed, in an hour")
    parser.add_argument("--train-only", action="store_true", help="judge nothing")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    columns = {} if args.train_only else {PLAIN: None, SHIPPED: HGR_FILE}
    for seed in args.seeds:
        columns[f"prompts {seed}"] = train("prompts", seed, args.folder)
    if args.thorough:
        columns[f"thorough {args.seeds[0]}"] = train("thorough", args.seeds[0], args.folder)
    if not args.train_only:
        print(table({name: judge(name, path, args.images, args.folder) for name, path in columns.items()}))


if __name__ == "__main__":
    main()
