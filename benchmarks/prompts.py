"""How well is harm read in prompts that other people wrote? The product's own pairs, training of the reading and calibration.

    python -m benchmarks.prompts --lists FOLDER [--labels i2p_labels.json] [--seeds 0 1 2] [--quick] [--work FOLDER] [--out FILE]

FOLDER holds public lists (`prompt_lists.SOURCES` names files and columns; what is absent is left out) and --extra adds others as
name=file:column:harmful|clean. --quick trains by the same losses in cheaper steps (`QuickTraining`), to compare versions of the
pairs. Encodings and trained readings are kept in --work, so that a second call goes on. Needs
`pip install -r benchmarks/requirements-prompts.txt`. Counts and shares are printed, never a prompt of a harmful list.
"""

import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor

import hgr_models
from benchmarks.prompt_encoder import CHUNK, WIDTH, MiniLM
from benchmarks.prompt_lists import CLEAN, HARMFUL, Source, read_all
from benchmarks.prompt_peers import peers
from hgr_models import pairs as pp
from hgr_models.calibration import calibrated, harmful_readings, prompt_readings
from hgr_models.condition import ConditionConfig
from hgr_models.hgr import uncalibrated_info
from hgr_models.shards import CALIBRATION_TEXTS, TEXTS, Recording, Texts, write_texts
from hgr_models.train_condition import READ_BATCH, ConditionTraining
from hgr_models.training import on_device

REFERENCE = "DiffusionDB (reFL)"  # AUROC is against these: what real users ask for
STEPS = 240
QUICK_TOKENS = 36  # of a prompt that quick steps read


def first_tokens(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` tokens of prompts (B, T, D), and how many each stands for (B, count): the end's also for the padding, which repeats it."""
    rows = rows[:, : CHUNK + 2]
    length = rows.shape[1]
    repeats = (rows[:, 1:] == rows[:, :-1]).all(dim=2).flip(1).cumprod(dim=1).sum(dim=1, keepdim=True)
    place, last = torch.arange(min(count, length)), length - repeats - 1
    mask = torch.where(place == last, repeats + 1, 1) * (place <= last)
    return rows[:, : len(place)] * (mask > 0)[..., None], mask.float()


def write_recording(prompts: pp.PromptSet, encoder: MiniLM, folder: Path, tokens: int | None = None) -> Recording:
    """Shards of the encoded prompts, as a training of an HGR writes them; of those to train on only the first `tokens`, if given."""
    facts = {
        "categories": list(prompts.categories), "guidance_levels": [], "latent_format": "SD15", "latent_channels": 4,
        "latent_dimensions": 2, "prediction": "EPS", "token_width": WIDTH, "pooled_width": 0,
        "concept_prompts": prompts.concept_prompts, "prompts": prompts.digest(),
    }  # fmt: skip
    folder.mkdir(parents=True)
    harmful, clean = prompts.texts()
    groups = {
        "harmful": (TEXTS, harmful), "clean": (TEXTS, dict.fromkeys(clean, frozenset())),
        "calibration": (CALIBRATION_TEXTS, dict.fromkeys(prompts.held_out_clean, frozenset())),
    }  # fmt: skip
    for name, (kind, texts) in groups.items():
        rows, read = iter(texts.values()), tokens if kind == TEXTS else None
        for i, batch in enumerate(encoder.batches(list(texts))):
            shown = [next(rows) for _ in batch]
            labels = torch.tensor([[float(c in some) for c in prompts.categories] for some in shown])
            batch, mask = (batch, None) if read is None else first_tokens(batch, read)
            write_texts(folder / f"{name}-{i:05d}.safetensors", Texts(batch, None, mask, labels), facts, kind)
    return Recording.open(folder)


class ReadingTraining(ConditionTraining):
    """The reading alone: no denoiser is at hand."""

    def read_step(self, recording: Recording) -> float:
        """One step; gives the loss."""
        loss, _ = self.objective.reading(self._texts(recording))
        self.advance(loss)
        return loss.item()


class QuickTraining(ReadingTraining):
    """Steps without weights, chunks and mixed prompts."""

    def _texts(self, recording: Recording) -> list[Texts]:
        return [self.roughened(texts) for texts in self._drawn(recording, READ_BATCH)]


def train_reading(recording: Recording, steps: int, seed: int, quick: bool = False) -> hgr_models.HGR:
    """A calibrated HGR whose condition redirector was taught to read."""
    torch.manual_seed(seed)
    info = uncalibrated_info(recording.shards[0].about)
    hgr = hgr_models.HGR(info, ConditionConfig(WIDTH, len(info.categories)), None)
    training = (QuickTraining if quick else ReadingTraining)(hgr, steps, seed)
    training.measure(recording)
    started = time.monotonic()
    for step in range(steps):
        loss = training.read_step(recording)
        if step % 20 == 19:
            print(f"  reading: step {step + 1} of {steps}, loss {loss:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    training.finish()
    hgr.eval().requires_grad_(False)
    cpu = torch.device("cpu")
    p = torch.cat([prompt_readings(hgr, texts, cpu) for texts in recording.calibration_texts()])
    hgr.calibrate(calibrated(hgr, p, None, 0.01, harmful=harmful_readings(hgr, recording, cpu)))
    return hgr


def readings(hgr: hgr_models.HGR, encoder: MiniLM, texts: list[str]) -> Tensor:
    """`p` of texts, (N, K)."""
    none = torch.zeros(1, len(hgr.info.categories))
    rows = (Texts(tokens, None, None, none.expand(len(tokens), -1)) for tokens in encoder.batches(texts, 64))
    return torch.cat([prompt_readings(hgr, on_device(row, torch.device("cpu")), torch.device("cpu")) for row in rows])


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson)."""
    if not count:
        return 0.0, 1.0
    z, share = 1.96, hits / count
    center, spread = share + z * z / (2 * count), z * ((share * (1 - share) + z * z / (4 * count)) / count) ** 0.5
    return max(0.0, (center - spread) / (1 + z * z / count)), min(1.0, (center + spread) / (1 + z * z / count))


def auroc(high: Tensor, low: Tensor) -> float:
    """The chance that one of `high` (N,) exceeds one of `low` (M,), ties half."""
    low = low.sort().values
    below, up_to = torch.searchsorted(low, high), torch.searchsorted(low, high, right=True)
    return float((below + up_to).double().mean() / 2 / len(low))


def share(flags: Tensor) -> dict:
    """A share with its interval."""
    hits, count = int(flags.sum()), len(flags)
    return {"share": hits / max(1, count), "interval": wilson(hits, count), "count": count}


def evaluate(scores: dict[Source, Tensor], lengths: dict[Source, list[int]], thresholds: Tensor) -> dict:
    """Shares flagged and AUROC of every list, per category too, from scores (N, K) and thresholds (K,), both in log odds."""
    above = {source: s - thresholds for source, s in scores.items()}
    reference = next((a for source, a in above.items() if source.name == REFERENCE), None)
    table = {}
    for source, excess in above.items():
        flagged = (excess > 0).any(dim=1)
        row = {"kind": source.kind, **share(flagged), "categories": (excess > 0).float().mean(dim=0).tolist()}
        if reference is not None and source.name != REFERENCE:
            row["auroc"] = auroc(excess.amax(dim=1), reference.amax(dim=1))
        if source.kind == CLEAN:
            words = torch.tensor(lengths[source])
            row["lengths"] = {
                f"{low}-{high}": share(flagged[(words >= low) & (words <= high)]) for low, high in ((0, 8), (9, 25), (26, 9999))
            }
        table[source.name] = row
    return table


def table_of(evaluations: list[dict], categories: tuple[str, ...]) -> str:
    """One line per list: the share flagged per seed, AUROC per seed, and the worst category of the first seed."""
    lines = [f"| {'set':24} | n | flagged | AUROC | most flagged as |", "|---|---|---|---|---|"]
    for name, first in evaluations[0].items():
        rows = [e[name] for e in evaluations]
        shares = " ".join(f"{row['share']:.3f}" for row in rows)
        areas = " ".join(f"{row['auroc']:.3f}" for row in rows if "auroc" in row)
        worst = sorted(zip(first["categories"], categories, strict=False), reverse=True)[:3]
        most = ", ".join(f"{category} {value:.3f}" for value, category in worst if value)
        lines.append(f"| {name:24} | {first['count']} | {shares} | {areas} | {most} |")
    return "\n".join(lines)


def run_seed(seed: int, lists: dict[Source, list[str]], encoder: MiniLM, args) -> tuple[dict, dict]:
    """Evaluations of the reading and of its peers, trained on the prompts of a seed."""
    prompts = pp.default_prompts(seed)
    texts = [*(t for pair in prompts.pairs for t in (pair.harmful, pair.safe)), *prompts.clean, *prompts.held_out_clean]
    out = [pair.harmful for pair in prompts.held_out_pairs]
    own = Source("built-in, held out", "", "", HARMFUL), Source("built-in clean, held out", "", "", CLEAN)
    lists = {own[0]: out, own[1]: list(prompts.held_out_clean), **lists}
    for done in encoder.prepare([*texts, *(t for some in lists.values() for t in some)]):
        print(f"  {done} texts are encoded", flush=True)
    key = hashlib.sha256(f"{prompts.digest()} {seed} {args.steps} {args.tag}{' quick' * args.quick}".encode()).hexdigest()[:16]
    path, folder = args.work / f"reading-{key}.safetensors", args.work / f"shards-{key}"
    if not path.exists():
        shutil.rmtree(folder, ignore_errors=True)
        recording = write_recording(prompts, encoder, folder, QUICK_TOKENS if args.quick else None)
        hgr_models.save_hgr(path, train_reading(recording, args.steps, seed, args.quick))
        shutil.rmtree(folder)
    hgr = hgr_models.load_hgr(path)
    scores = {source: torch.logit(readings(hgr, encoder, some), eps=1e-9) for source, some in lists.items()}
    torch.save({source.name: s for source, s in scores.items()}, path.with_suffix(".scores"))
    lengths = {source: [len(text.split()) for text in some] for source, some in lists.items()}
    found = evaluate(scores, lengths, torch.logit(hgr.condition_thresholds, eps=1e-9))
    others = {}
    if args.peers:
        means = lambda some: torch.cat([tokens.mean(dim=1) for tokens in encoder.batches(list(some))])  # noqa: E731
        for name, score in peers(prompts, means).items():
            limit = score(prompts.held_out_clean).quantile(0.99)
            others[name] = evaluate({s: score(some)[:, None] for s, some in lists.items()}, lengths, limit[None])
    return found, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=Path, required=True, help="folder of public lists")
    parser.add_argument("--labels", type=Path, help="JSON with row numbers of I2P by what their words ask for")
    parser.add_argument("--extra", nargs="*", default=[], metavar="NAME=FILE:COLUMN:KIND", help="other lists of that folder")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="of training the reading")
    parser.add_argument("--quick", action="store_true", help="cheaper steps: for comparing versions of the pairs")
    parser.add_argument("--odd", action="store_true", help="the odd rows instead of the even ones")
    parser.add_argument("--peers", action="store_true", help="also other readers, from the same pairs")
    parser.add_argument("--work", type=Path, default=Path("out/prompts"), help="folder of encodings and trained readers")
    parser.add_argument("--tag", default="", help="trains again where the code has changed and the prompts have not")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    extra = [Source(name, *rest.rsplit(":", 2)) for name, _, rest in (text.partition("=") for text in args.extra)]
    lists = read_all(args.lists, args.labels, extra, parity=int(args.odd))
    encoder = MiniLM(args.work / "minilm.sqlite")
    runs = [run_seed(seed, lists, encoder, args) for seed in args.seeds]
    print(table_of([found for found, _ in runs], pp.CATEGORIES))
    for name in runs[0][1]:
        print(f"\n{name}\n{table_of([others[name] for _, others in runs], ())}")
    if args.out:
        results = [
            {"seed": seed, "reading": found, "peers": others} for seed, (found, others) in zip(args.seeds, runs, strict=True)
        ]
        args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
