"""The demo's tokenizer and text encoder as core's CLIP class wants them: weights such as (apple:1.3), chunks, prompts of any length."""

import comfy.ops
import torch
from comfy import sd1_clip

from ...demo import files
from ...demo.text_encoder import TextEncoder
from ...demo.words import CONTEXT, PAD, START, Vocabulary, tokenize

NAME = "l"  # of the prompt's part, as in core's SD1 classes: other packs look for it


class DemoTokenizer:
    """Prompts to chunks of (token id, weight) pairs."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict | None = None) -> None:
        self.ids = Vocabulary.load().ids()
        self.words = {i: word for word, i in self.ids.items()}

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options) -> dict:
        """{"l": chunks of CONTEXT (id, weight) or (id, weight, word number) tuples}; `(word:1.3)` and `\\(` as in core."""
        parts = sd1_clip.token_weights(sd1_clip.escape_important(text), 1.0)
        tokens = [(token, weight) for part, weight in parts for token in tokenize(sd1_clip.unescape_important(part), self.ids)]
        numbered = [(token, weight, number) for number, (token, weight) in enumerate(tokens, start=1)]
        size = CONTEXT - 1
        chunks = []
        for i in range(0, max(1, len(numbered)), size):
            words = numbered[i : i + size]
            chunks.append([(START, 1.0, 0), *words, *[(PAD, 1.0, 0)] * (size - len(words))])
        return {NAME: chunks if return_word_ids else [[token[:2] for token in chunk] for chunk in chunks]}

    def untokenize(self, tokens: list) -> list:
        """[(token, word)] of a chunk's tokens, as core's tokenizers answer."""
        return [(token, self._text_of(token[0])) for token in tokens]

    def decode(self, token_ids: list, skip_special_tokens: bool = True) -> str:
        """The words of token ids, separated by spaces."""
        special = (START, PAD) if skip_special_tokens else ()
        return " ".join(self._text_of(i) for i in token_ids if i not in special)

    def state_dict(self) -> dict:
        return {}

    def _text_of(self, token: int) -> str:
        return self.words.get(token, {START: "<start>", PAD: "<pad>"}.get(token, "<unknown>"))


class DemoTextModel(torch.nn.Module, sd1_clip.ClipTokenWeightEncoder):
    """The demo's text encoder behind the interface of core's text models; it has no pooled vector."""

    disable_offload = True  # a few MB with parameters of their own: core's dynamic loader is not for those

    def __init__(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, model_options: dict | None = None
    ) -> None:
        super().__init__()
        self.transformer = TextEncoder(len(Vocabulary.load().words), ops=comfy.ops.manual_cast)  # fp32: small, and exact
        self.transformer.to(device).train(False).requires_grad_(False)
        self.dtypes = {torch.float32}

    def load_demo_weights(self) -> None:
        """The shipped weights; raises FileNotFoundError when they are missing."""
        files.load_module(self.transformer, "text_encoder")
        self.transformer.vectors.copy_(Vocabulary.load().vectors)

    def encode_token_weights(self, token_weight_pairs: dict) -> tuple[torch.Tensor, None]:
        return super().encode_token_weights(token_weight_pairs[NAME])

    def gen_empty_tokens(self, special_tokens: dict, length: int) -> list[int]:
        """The chunk that weights are measured from."""
        return [START, *[PAD] * (length - 1)]

    special_tokens = {"start": START, "pad": PAD}

    def encode(self, tokens: list[list[int]]) -> tuple:
        """Chunks of token ids -> tokens (chunks, CONTEXT, D) float32, and no pooled vector."""
        device = self.transformer.special.device
        return self.transformer(torch.tensor(tokens, dtype=torch.long, device=device)).float(), None

    def set_clip_options(self, options: dict) -> None:
        """Accepted and ignored: one layer, so `CLIP Set Last Layer` changes nothing."""

    def reset_clip_options(self) -> None:
        pass

    def load_sd(self, state_dict: dict) -> tuple[list[str], list[str]]:
        return self.transformer.load_state_dict(state_dict, strict=False)
