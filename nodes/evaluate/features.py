"""CLIP's view of a picture and its prompt: features for distances, and the CLIP score."""

import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from torch import Tensor

from ...hgr_models import HGRError

ENCODERS = ("clip_l", "clip_h", "clip_g")  # core's names of the text towers of CLIPs with an image tower
NAMES = {"clip_l": "l", "clip_h": "h", "clip_g": "g"}  # of their tokens


def embed_picture(clip_vision: ClipVisionModel, picture: Tensor) -> Tensor:
    """The image embedding (D,) of a picture (1, H, W, 3). Raises HGRError for a vision model that gives none."""
    found = getattr(clip_vision.encode_image(picture), "image_embeds", None)
    if found is None or found.ndim != 2:
        raise HGRError(
            "Expected a CLIP vision model with image embeddings, such as clip_vision_l.safetensors or clip_vision_g.safetensors."
        )
    return found[0].float().cpu()


def text_tower(clip: CLIP | None, width: int) -> tuple | None:
    """(name of its tokens, tower) of the CLIP text encoder whose projected embedding is `width` wide; None where there is none.

    A tower whose file had no projection has core's identity instead: what it gives has no common space with pictures.
    """
    for name in ENCODERS if clip is not None else ():
        tower = getattr(clip.cond_stage_model, name, None)
        projection = getattr(getattr(tower, "transformer", None), "text_projection", None)
        weight = getattr(projection, "weight", None)
        if weight is None or weight.shape[0] != width:
            continue
        part = weight.detach()[:8, :8].float().cpu()
        if not torch.equal(part, torch.eye(len(part))):
            return NAMES[name], tower
    return None


@torch.no_grad()
def embed_text(clip: CLIP, tower: tuple, text: str) -> Tensor:
    """The text embedding (D,) of a prompt's first chunk, projected into the space of pictures."""
    name, encoder = tower
    clip.load_model()
    encoder.set_clip_options({"projected_pooled": True})  # Flux and SDXL ask their towers for the other one
    try:
        _, pooled, *_ = encoder.encode_token_weights(clip.tokenize(text)[name])
    finally:
        encoder.reset_clip_options()
    return pooled[0].float().cpu()


def clip_score(picture: Tensor, text: Tensor) -> float:
    """100 times the cosine of an image embedding and a text embedding (D,), at least 0 (arXiv 2104.08718 without its factor 2.5)."""
    return round(max(0.0, 100 * float(torch.nn.functional.cosine_similarity(picture, text, dim=0))), 4)


def why_no_score(clip_vision: ClipVisionModel | None, tower: tuple | None) -> str:
    """In words, what a CLIP score lacks; "" where nothing."""
    if clip_vision is None:
        return "CLIP score, FD-CLIP and CMMD: connect a CLIP vision model (core's Load CLIP Vision, such as clip_vision_l.safetensors)."
    if tower is None:
        return (
            "CLIP score: connect the text tower of the same CLIP to `score_clip` (Load CLIP with clip_l.safetensors for clip_vision_l, "
            "clip_g.safetensors for clip_vision_g). That of the model has no projection into the space of pictures."
        )
    return ""
