"""The demo's vocabulary: frozen word vectors of a real sentence encoder (all-MiniLM-L6-v2, Apache-2.0), and the tokenizer.

Words that neither the denoiser nor the HGR was trained with still mean something, as in CLIP.
"""

import logging
import re
from dataclasses import dataclass

from torch import Tensor

from .files import WEIGHTS, load_weights

PAD, START, FIRST_WORD = 0, 1, 2  # token ids; PAD also ends a prompt
CONTEXT = 16  # tokens per chunk: the start token and 15 words

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """`words[i]` has token id `i + FIRST_WORD` and the vector `vectors[i]`, (N, 384) float32 of rms about 1."""

    words: tuple[str, ...]
    vectors: Tensor

    @classmethod
    def load(cls) -> "Vocabulary":
        tensors, about = load_weights(WEIGHTS / "words.safetensors")
        return cls(tuple(about["words"].split()), tensors["vectors"])

    def ids(self) -> dict[str, int]:
        return {word: i + FIRST_WORD for i, word in enumerate(self.words)}


def words_of(text: str) -> list[str]:
    """Lower-case words of a text; punctuation separates."""
    return re.findall(r"[a-z]+", text.lower())


def tokenize(text: str, ids: dict[str, int]) -> list[int]:
    """Token ids of the known words of a text; unknown words are left out, with a warning that names them."""
    words = words_of(text)
    if unknown := [w for w in words if w not in ids]:
        logger.warning("The demo model does not know the words %s; they are left out.", ", ".join(unknown))
    return [ids[w] for w in words if w in ids]


def chunks(ids: list[int]) -> list[list[int]]:
    """Chunks of CONTEXT ids, each with a start token and padding; one chunk of padding for an empty prompt."""
    size = CONTEXT - 1
    parts = [ids[i : i + size] for i in range(0, len(ids), size)] or [[]]
    return [[START, *part, *[PAD] * (size - len(part))] for part in parts]
