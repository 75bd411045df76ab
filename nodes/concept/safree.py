"""SAFREE for a CLIP: reads a prompt with each of its words masked, and what it makes of the prompt's tokens."""

from dataclasses import dataclass

import torch
from comfy.sd import CLIP
from torch import Tensor

from ... import hgr_models
from ...hgr_models.safree import Filtered, filter_tokens

MASKED = 0  # the token id in a masked word's place, as in the authors' code


@dataclass(frozen=True, eq=False)
class SafreePrompt:
    """A prompt as its CLIP encodes it, tokens (1, T, D), and SAFREE's version of it, (1, T, D), both on the CPU."""

    plain: Tensor
    safe: Tensor
    found: Filtered

    @property
    def acts(self) -> bool:
        return bool(self.found.triggers.any())


def read_prompt(clip: CLIP | None, prompt: str, concepts: list[str]) -> SafreePrompt:
    """What SAFREE makes of a prompt, away from concepts: words or phrases, separated by commas.

    Raises HGRError for a CLIP of several encoders, or one whose vectors of texts and tokens have different widths, for which the method
    is not defined, and for an empty prompt.
    """
    if clip is None:
        raise hgr_models.HGRError("Expected a CLIP, but this checkpoint has none. Connect the CLIP that belongs to the model.")
    if not prompt.strip():
        raise hgr_models.HGRError(
            "SAFREE changes the prompt itself, but `prompt` is empty. Connect the text of the positive prompt to it, or choose SLD, CASG or CRG."
        )
    tokens, name = clip.tokenize(prompt), _only_encoder(clip)
    words = _words(tokens[name], _special(clip, name))
    plain, _ = _encode(clip, tokens)
    if not words:
        nothing = torch.zeros(0, dtype=torch.bool)
        return SafreePrompt(plain, plain, Filtered(plain[0], nothing, 0.0))
    masked = torch.stack([_vector(clip, {name: _without(tokens[name], place)}) for place in words])
    phrases = [phrase.strip() for text in concepts for phrase in text.split(",") if phrase.strip()]
    harm = torch.stack([_vector(clip, clip.tokenize(phrase)) for phrase in phrases])
    length = len(tokens[name][0])
    places = torch.tensor([chunk * length + i for chunk, i in words])
    present = min(int(places.max()) + 2, plain.shape[1])  # with the token that ends it
    found = filter_tokens(plain[0], places, masked, harm, present)
    return SafreePrompt(plain, found.tokens[None], found)


def _only_encoder(clip: CLIP) -> str:
    """The name of a CLIP's one encoder."""
    tokens = clip.tokenize("")
    if not isinstance(tokens, dict) or len(tokens) != 1:
        names = " + ".join(tokens) if isinstance(tokens, dict) else type(tokens).__name__
        raise hgr_models.HGRError(
            f"SAFREE is defined for one text encoder, as of Stable Diffusion 1 and 2, but this CLIP has {names}. Choose SLD, CASG or CRG."
        )
    return next(iter(tokens))


def _special(clip: CLIP, name: str) -> set:
    """Ids that an empty prompt has: they begin, end and pad."""
    return {entry[0] for chunk in clip.tokenize("")[name] for entry in chunk if isinstance(entry[0], int)}


def _words(chunks: list, special: set) -> list[tuple[int, int]]:
    """Chunk and place of every token of a prompt's text; those of embeddings, too."""
    return [
        (c, i)
        for c, chunk in enumerate(chunks)
        for i, entry in enumerate(chunk)
        if not isinstance(entry[0], int) or entry[0] not in special
    ]


def _without(chunks: list, place: tuple[int, int]) -> list:
    chunk, i = place
    masked = [list(entries) for entries in chunks]
    masked[chunk][i] = (MASKED, *masked[chunk][i][1:])
    return masked


def _encode(clip: CLIP, tokens: dict) -> tuple[Tensor, Tensor | None]:
    encoded, pooled = clip.encode_from_tokens(tokens, return_pooled=True)[:2]
    return encoded.cpu(), None if pooled is None else pooled.cpu()


def _vector(clip: CLIP, tokens: dict) -> Tensor:
    """The vector (D,) of a text: the pooled one; of encoders without, the first token's, as the authors do for T5."""
    encoded, pooled = _encode(clip, tokens)
    if pooled is None:
        return encoded[0, 0]
    if pooled.shape[-1] != encoded.shape[-1]:
        raise hgr_models.HGRError(
            f"SAFREE compares vectors of texts with tokens, but this CLIP has {pooled.shape[-1]} and {encoded.shape[-1]} values in them. "
            "Choose SLD, CASG or CRG."
        )
    return pooled[0]
