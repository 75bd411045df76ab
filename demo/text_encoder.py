"""The demo's text encoder: frozen word vectors, one transformer layer, tokens (B, T, 128)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .words import CONTEXT, FIRST_WORD

WIDTH, HEADS = 128, 4


class TextEncoder(nn.Module):
    """Token ids (B, CONTEXT) -> tokens (B, CONTEXT, WIDTH); `ops` gives the layer classes."""

    def __init__(self, words: int, vector_width: int = 384, ops=nn):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(words, vector_width))  # frozen
        self.special = nn.Parameter(torch.randn(FIRST_WORD, WIDTH))
        self.position = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.1)
        self.proj = ops.Linear(vector_width, WIDTH)
        self.norm1, self.qkv, self.attn_out = ops.LayerNorm(WIDTH), ops.Linear(WIDTH, 3 * WIDTH), ops.Linear(WIDTH, WIDTH)
        self.norm2, self.up, self.down = ops.LayerNorm(WIDTH), ops.Linear(WIDTH, 2 * WIDTH), ops.Linear(2 * WIDTH, WIDTH)
        self.final_norm = ops.LayerNorm(WIDTH)

    vectors: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        words = self.proj(self.vectors[(ids - FIRST_WORD).clamp(min=0)].to(self.special.dtype))
        x = torch.where((ids < FIRST_WORD)[..., None], self.special[ids.clamp(max=FIRST_WORD - 1)], words)
        x = x + self.position
        split = lambda y: y.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # noqa: E731  (B, heads, T, d)
        q, k, v = (split(y) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.attn_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.final_norm(x)
