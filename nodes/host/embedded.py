"""Prompts of a model that embeds their token ids itself (Anima): ids cannot be changed smoothly, what it makes of them can."""

from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor

from .more_tokens import TOKENS

IDS, WEIGHTS = "t5xxl_ids", "t5xxl_weights"


def embeds_ids(model: ModelPatcher) -> bool:
    """Whether a MODEL joins token ids to its prompts' tokens."""
    network = getattr(model.model, "diffusion_model", None)
    return hasattr(network, "llm_adapter") and hasattr(network, "preprocess_text_embeds")


@torch.no_grad()
def embedded(model: ModelPatcher | None, condition: dict) -> dict:
    """A condition with the tokens that a loaded MODEL reads in place of its ids; as it is where it has none."""
    if condition.get(IDS) is None or condition.get(TOKENS) is None or model is None or not embeds_ids(model):
        return condition
    device, dtype = model.load_device, model.model.get_dtype_inference()
    tokens = condition[TOKENS].to(device, dtype)
    weights = condition.get(WEIGHTS)
    weights = None if weights is None else weights[None, :, None].to(device, dtype)
    each = [
        model.model.diffusion_model.preprocess_text_embeds(row, condition[IDS][None].to(device), weights)
        for row in tokens.split(1)
    ]
    rest = {key: value for key, value in condition.items() if key not in (IDS, WEIGHTS)}
    return {**rest, TOKENS: torch.cat(each).to(condition[TOKENS])}


class EmbeddedClip:
    """A CLIP whose prompts are what its MODEL makes of them; it goes wherever a CLIP goes."""

    def __init__(self, model: ModelPatcher, clip: CLIP) -> None:
        self.model, self.clip = model, clip

    def __getattr__(self, name: str) -> Any:
        return getattr(self.clip, name)

    def encode_from_tokens_scheduled(self, tokens: dict, *args, **kwargs) -> list:
        """As core's."""
        entries = self.clip.encode_from_tokens_scheduled(tokens, *args, **kwargs)
        comfy.model_management.load_models_gpu([self.model])
        return [self._embedded(*entry) for entry in entries]

    def _embedded(self, tokens: Tensor, extras: dict) -> list:
        condition = embedded(self.model, {**extras, TOKENS: tokens})
        return [condition.pop(TOKENS), condition]


def clip_for(model: ModelPatcher, clip: CLIP | None) -> CLIP | EmbeddedClip | None:
    """The CLIP to learn a MODEL's prompts with."""
    return EmbeddedClip(model, clip) if clip is not None and embeds_ids(model) else clip
