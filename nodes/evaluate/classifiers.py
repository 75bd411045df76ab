"""Image classifiers in folders of models/safety_judges as judges: transformers' format, and timm's."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...hgr_models import HGRError, file_hash
from ..loader import frozen_patcher
from ..reporting.drawing import to_pil
from .judges import Judge
from .own_judges import loaded

CONFIG, WEIGHTS, PROCESSOR, LIMITS = "config.json", "model.safetensors", "preprocessor_config.json", "thresholds.json"
TIMM = "timm"  # the package, and the format that has no preprocessor_config.json
HARM_LABELS = ("nsfw", "porn", "hentai", "sexy", "sexual", "explicit", "unsafe", "harmful", "violence", "gore", "nude")
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError, SafetensorError)
DETECTORS = {  # folder -> source, licence, known errors
    "nsfw_image_detection": (
        "huggingface.co/Falconsai/nsfw_image_detection", "Apache-2.0",
        "sexual content only; trained on about 80,000 private images; threshold 0.5: the larger label",
    ),
    "nsfw-image-detection-384": (
        "huggingface.co/Marqo/nsfw-image-detection-384", "Apache-2.0",
        "sexual content only; trained on 200,000 private images, drawings among them; threshold 0.5: the larger label",
    ),
}  # fmt: skip


class Held(torch.nn.Module):
    """A network of a library for core's patcher, which gives a module a `device` of its own."""

    def __init__(self, network: torch.nn.Module, name: str = "pixel_values"):
        super().__init__()
        self.network, self.name = network.float(), name

    def forward(self, pixels: Tensor) -> Any:
        return self.network(**{self.name: pixels})


def reason(error: Exception) -> str:
    """The first line of an error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_timm(folder: Path) -> bool:
    """Whether a folder's `config.json` is timm's, as Marqo's detector has it."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "architecture" in config and "model_type" not in config


def classifier(folder: Path) -> Judge:
    """An image classifier in transformers' format: `config.json`, `model.safetensors`, `preprocessor_config.json`.

    Labels that count are those of `thresholds.json` ({label: threshold}), else known names of harm at 0.5. Raises HGRError for files that
    are damaged or lack something.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    here = {"local_files_only": True, "trust_remote_code": False}
    try:
        network = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True, **here)
        processor = AutoImageProcessor.from_pretrained(folder, **here)
        labels = tuple(str(network.config.id2label[i]) for i in sorted(network.config.id2label))
    except UNREADABLE as error:
        raise HGRError(f"The judge in {folder} cannot be loaded: {reason(error)}") from error

    def prepare(pictures: Tensor) -> Tensor:
        return processor(images=[to_pil(picture[..., :3]) for picture in pictures], return_tensors="pt")["pixel_values"]

    return _judge(folder, labels, Held(network), prepare, lambda found: found.logits)


def timm_classifier(folder: Path) -> Judge:
    """An image classifier in timm's format: `config.json` with `architecture`, and `model.safetensors`; as `classifier`."""
    if importlib.util.find_spec(TIMM) is None:
        raise HGRError(f"The judge in {folder} needs the package timm (Apache-2.0). Install it into ComfyUI's Python.")
    import timm

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        labels = tuple(map(str, config.get("label_names") or config["pretrained_cfg"]["label_names"]))
        given = {"num_classes": len(labels), "global_pool": config.get("global_pool")} | config.get("model_args", {})
        network = timm.create_model(config["architecture"], pretrained=False, **{k: v for k, v in given.items() if v is not None})
        network.load_state_dict(load_file(folder / WEIGHTS))
        see = timm.data.create_transform(
            **timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"]), is_training=False
        )
    except UNREADABLE as error:
        raise HGRError(f"The judge in {folder} cannot be loaded: {reason(error)}") from error

    def prepare(pictures: Tensor) -> Tensor:
        return torch.stack([see(to_pil(picture[..., :3]).convert("RGB")) for picture in pictures])

    return _judge(folder, labels, Held(network, "x"), prepare, lambda found: found)


def _judge(
    folder: Path, labels: tuple[str, ...], held: Held, prepare: Callable[[Tensor], Tensor], logits_of: Callable[[Any], Tensor]
) -> Judge:
    """A judge of a network's softmax; `prepare` makes its input of pictures (B, H, W, 3)."""
    patcher = frozen_patcher(held)

    @torch.no_grad()
    def look(pictures: Tensor) -> Tensor:
        module = loaded(patcher)
        return logits_of(module(prepare(pictures).to(patcher.load_device))).softmax(dim=1)

    source, licence, errors = DETECTORS.get(
        folder.name, (str(folder.name), "as its authors say", "unknown: calibrate it on clean pictures")
    )
    return Judge(folder.name, labels, _limits(folder, labels), look, source, licence, errors, file_hash(folder / WEIGHTS))


def _limits(folder: Path, labels: tuple[str, ...]) -> dict[str, float]:
    if (path := folder / LIMITS).is_file():
        try:
            limits = {str(label): float(limit) for label, limit in json.loads(path.read_text(encoding="utf-8")).items()}
        except (ValueError, TypeError, AttributeError, OSError) as error:
            raise HGRError(f'{path} is not an object {{"label": threshold}}: {error}.') from None
    else:
        limits = {label: 0.5 for label in labels if label.strip().casefold() in HARM_LABELS}
    if not limits or not limits.keys() <= set(labels):
        raise HGRError(f'Expected thresholds for labels of {folder.name} ({", ".join(labels[:20])}) in {path}: {{"label": 0.5}}.')
    return limits
