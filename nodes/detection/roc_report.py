"""`SafeCFG ROC Report`: how well harmful and clean pictures or prompts are told apart, and at which threshold."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io, ui
from PIL import Image, ImageOps, UnidentifiedImageError

from ...hgr_models.calibration import upper_bound
from ...hgr_models.detection import Roc, roc, threshold_at
from ..host.schema import HGR_TYPE, make_input, make_schema
from ..loader import HGRModel
from ..reporting import drawing
from .detector import check_pictures, detect_prompts, encode, look

KINDS = ("harmful", "clean")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
BATCH = 8  # pictures of one size that are looked at together


def picture_files(folder: str) -> dict[str, list[Path]]:
    """The files of `folder`/harmful and `folder`/clean inside ComfyUI's input folder; ValueError when there are none."""
    root = Path(folder_paths.get_input_directory()).resolve()
    place = (root / folder).resolve()
    if not place.is_relative_to(root):
        raise ValueError(f"Expected a folder inside ComfyUI's input folder, but got {folder!r}.")
    found = {}
    for kind in KINDS:
        inside = sorted((place / kind).iterdir()) if (place / kind).is_dir() else []
        found[kind] = [file for file in inside if file.suffix.lower() in SUFFIXES]
        if not found[kind]:
            raise ValueError(
                f"There are no pictures in {place / kind}. Put pictures into the subfolders harmful and clean of {place}."
            )
    return found


def read_picture(file: Path) -> torch.Tensor:
    """A picture (H, W, 3) in [0, 1], turned as its camera says; transparency is ignored."""
    try:
        with Image.open(file) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.float32)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{file} is no complete picture ({error}). Remove it, or copy it again.") from error
    return torch.from_numpy(pixels / 255)


def batches(files: list[Path]) -> Iterator[torch.Tensor]:
    """Pictures of following files that have one size, (B, H, W, 3) each with B at most BATCH."""
    waiting: list[torch.Tensor] = []
    for file in files:
        picture = read_picture(file)
        if waiting and (len(waiting) == BATCH or waiting[0].shape != picture.shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(picture)
    if waiting:
        yield torch.stack(waiting)


def score_pictures(
    folder: str, hgr: HGRModel, model: ModelPatcher | None, vae: VAE | None, negative: list | None, longest_side: int
) -> dict[str, torch.Tensor]:
    """Harmfulness (N, K) of the pictures of each kind; pictures alone, without prompts."""
    missing = [name for name, value in (("model", model), ("vae", vae), ("negative", negative)) if value is None]
    if missing:
        raise ValueError(f"Looking at pictures needs {', '.join(missing)} as well: connect it, or set `source` to prompts.")
    files, found = picture_files(folder), {}
    bar = comfy.utils.ProgressBar(sum(map(len, files.values())))
    for kind, names in files.items():
        parts = []
        for pictures in batches(names):
            comfy.model_management.throw_exception_if_processing_interrupted()
            check_pictures(pictures)
            latents, _ = encode(vae, pictures, hgr.info, longest_side)
            parts.append(look(model, hgr, latents, negative).scores)
            bar.update(len(pictures))
        found[kind] = torch.cat(parts)
    return found


def score_prompts(prompts: dict[str, str], hgr: HGRModel, clip: CLIP | None) -> dict[str, torch.Tensor]:
    """Harmfulness (N, K) of the prompts of each kind, one prompt per line."""
    if clip is None:
        raise ValueError("Judging prompts needs a clip: connect the model's CLIP, or set `source` to pictures.")
    found = {}
    for kind, text in prompts.items():
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"Expected at least one {kind} prompt, but `{kind}_prompts` is empty. Write one prompt per line.")
        entries = [clip.encode_from_tokens_scheduled(clip.tokenize(line)) for line in lines]
        found[kind] = torch.cat([detect_prompts(hgr, entry).amax(dim=0, keepdim=True) for entry in entries])
    return found


def report(categories: tuple[str, ...], found: dict[str, torch.Tensor], rate: float) -> tuple[dict, Roc, dict[str, Roc]]:
    """What the scores (N, K) of each kind amount to: figures, the curve of the worst category, and one per category.

    A category's curve compares all harmful examples with all clean ones, whatever harm they show.
    """
    harmful, clean = (found[kind].amax(dim=1) for kind in KINDS)
    curve, threshold = roc(harmful, clean), threshold_at(clean, rate)
    each = {name: roc(found["harmful"][:, k], found["clean"][:, k]) for k, name in enumerate(categories)}
    alarms = int((clean.double() > threshold).sum())
    figures = {
        "auroc": curve.auroc,
        "auroc_per_category": {name: line.auroc for name, line in each.items()},
        "wanted_false_positive_rate": rate,
        "threshold": threshold,
        "false_positive_rate": alarms / len(clean),
        "false_positive_rate_upper_bound": upper_bound(alarms, len(clean)),
        "true_positive_rate": (harmful.double() > threshold).double().mean().item(),
        "harmful": len(harmful),
        "clean": len(clean),
        "curve": [[round(x, 6), round(y, 6)] for x, y in points(curve)],
    }
    return figures, curve, each


def points(curve: Roc) -> list[tuple[float, float]]:
    """The corners of a curve: those between two equal neighbours in either direction add nothing."""
    rows = list(zip(curve.false_positives, curve.true_positives, strict=True))
    runs = [list(group) for _, group in groupby(rows, key=lambda row: row[0])]
    return [(0.0, 0.0), *dict.fromkeys(row for run in runs for row in (run[0], run[-1]))]


def draw(figures: dict, curve: Roc, each: dict[str, Roc]) -> torch.Tensor:
    """The curves as a picture (H, W, 3), the chosen threshold marked."""
    lines = [drawing.Curve(f"worst category: AUROC {curve.auroc:.3f}", points(curve))]
    lines += [drawing.Curve(f"{name}: {line.auroc:.3f}", points(line)) for name, line in each.items()]
    notes = [
        f"threshold {figures['threshold']:.4f} for at most {figures['wanted_false_positive_rate']:.1%} false positives",
        f"finds {figures['true_positive_rate']:.1%} of {figures['harmful']} harmful, flags "
        f"{figures['false_positive_rate']:.1%} of {figures['clean']} clean (at most {figures['false_positive_rate_upper_bound']:.1%}, 95 %)",
    ]
    mark = (figures["false_positive_rate"], figures["true_positive_rate"])
    return drawing.curves(lines, mark, ("clean ones flagged", "harmful found"), notes)


class RocReport(io.ComfyNode):
    """Scores examples of both kinds; see `report`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_RocReport",
            display_name="SafeCFG ROC Report",
            description="Measures how well an HGR tells your own harmful and clean pictures (or prompts) apart, and which threshold gives the "
            "false-positive rate that you can live with. Use that threshold in the detecting nodes or in SafeCFG Image Gate.",
            search_aliases=["auroc", "calibrate threshold", "false positive rate", "detector benchmark"],
            is_output_node=True,
            inputs=[*_what_inputs(), *_model_inputs()],
            outputs=[
                io.Image.Output(display_name="curve", tooltip="The ROC curves: worst category first, then each category."),
                io.Float.Output(
                    display_name="threshold", tooltip="The lowest threshold with at most the wanted false-positive rate."
                ),
                io.Float.Output(
                    display_name="auroc", tooltip="0 to 1: the chance that a harmful example scores above a clean one."
                ),
                io.String.Output(
                    display_name="report", tooltip="JSON: all figures, with a bound of the rate, and the curve's points."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> str | float:
        """Files may change behind the same folder name; values that come from other nodes are not known here."""
        if inputs.get("source", "pictures") != "pictures":
            return ""
        try:
            files = picture_files(inputs.get("folder", "roc") or "")
        except ValueError as error:  # `execute` will say it
            return str(error)
        return str([(file.name, file.stat().st_mtime_ns, file.stat().st_size) for kind in KINDS for file in files[kind]])

    @classmethod
    def execute(
        cls, hgr: HGRModel, source: str = "pictures", false_positive_rate: float = 0.01, folder: str = "roc", longest_side: int = 0,
        harmful_prompts: str = "a knife", clean_prompts: str = "an apple", model: ModelPatcher | None = None, vae: VAE | None = None,
        negative: list | None = None, clip: CLIP | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if source == "pictures":
            found = score_pictures(folder, hgr, model, vae, negative, longest_side)
        else:
            found = score_prompts({"harmful": harmful_prompts, "clean": clean_prompts}, hgr, clip)
        figures, curve, each = report(hgr.info.categories, found, false_positive_rate)
        picture = draw(figures, curve, each)[None]
        text = json.dumps({"source": source, "hgr": hgr.hash, **figures})
        return io.NodeOutput(picture, figures["threshold"], curve.auroc, text, ui=ui.PreviewImage(picture, cls=cls))


def _what_inputs() -> list:
    return [
        make_input(HGR_TYPE, "hgr", tooltip="From SafeCFG Load HGR."),
        make_input(
            io.Combo,
            "source",
            options=["pictures", "prompts"],
            default="pictures",
            tooltip="pictures: of a folder, judged alone; needs model, vae and negative. prompts: of the two lists; needs clip.",
        ),
        make_input(
            io.Float,
            "false_positive_rate",
            default=0.01,
            min=0.0,
            max=0.5,
            step=0.001,
            round=0.0001,
            tooltip="0 to 0.5. The share of clean examples that may be flagged. A rate of 1 % needs some hundred clean examples.",
        ),
        make_input(
            io.String,
            "folder",
            default="roc",
            tooltip="A folder inside ComfyUI's input folder, with subfolders `harmful` and `clean`.",
        ),
        make_input(
            io.Int,
            "longest_side",
            default=0,
            min=0,
            max=8192,
            step=8,
            tooltip="In pixels. Larger pictures are scaled down to it first, as in SafeCFG Detect Harm. 0: as they are.",
        ),
        make_input(io.String, "harmful_prompts", default="a knife", multiline=True, tooltip="Harmful prompts, one per line."),
        make_input(io.String, "clean_prompts", default="an apple", multiline=True, tooltip="Clean prompts, one per line."),
    ]


def _model_inputs() -> list:
    return [
        make_input(io.Model, "model", optional=True, tooltip="The model to look at pictures with; of the HGR's family."),
        make_input(io.Vae, "vae", optional=True, tooltip="The model's VAE, for pictures."),
        make_input(io.Conditioning, "negative", optional=True, tooltip="The empty prompt, for pictures."),
        make_input(io.Clip, "clip", optional=True, tooltip="The model's CLIP, for prompts."),
    ]
