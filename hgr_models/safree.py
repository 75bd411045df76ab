"""SAFREE (arXiv 2410.12761): a prompt's tokens without what lies in the subspace of unwanted concepts, in as many steps as it takes.

Vectors are of whole texts (a pooled vector); the columns of C are those of the concepts, of I those of the prompt with one word masked each.

    P_C = C (C^T C)^+ C^T, P_I likewise                     the projections onto their subspaces
    d_i = |(1 - P_C) p_i|                                   how far the prompt without word i is from the concepts
    word i triggers where d_i >= (1 + alpha) mean of the other d: without it the prompt is farther away
    e_i <- (1 - P_C) P_I e_i                                of the tokens of words that trigger; the others stay
    b   = 1 - mean over present tokens of cos(e, (1 - P_C) P_I e)
    t'  = round(gamma / (1 + exp(-5 (10 b - 5.333))))       of 50 steps: the last one with the changed tokens

Left out: latent re-attention, which changes features inside of a UNet (the authors' SDXL version has none either), and the authors'
negative prompt, which the user can write.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RANK = 1e-5  # of singular values, relative: what is smaller spans nothing
PUBLISHED_STEPS = 50
STEP_ROUNDING = 1e-6


@dataclass(frozen=True)
class Filtered:
    """A prompt's tokens (T, D) as SAFREE changes them, which of its words (n,) trigger, and b, how far all of it moved."""

    tokens: Tensor
    triggers: Tensor
    distance: float


def subspace(vectors: Tensor) -> Tensor:
    """An orthonormal basis (D, r), float64, of what vectors (N, D) span: P x = basis basis^T x."""
    _, values, rows = torch.linalg.svd(vectors.double(), full_matrices=False)
    kept = values > RANK * values.max().clamp(min=1e-30) if len(values) else values > 0
    return rows[kept].T


def project(vectors: Tensor, basis: Tensor) -> Tensor:
    """The part of vectors (..., D) that lies in a subspace, float64."""
    return vectors.double() @ basis @ basis.T


def triggers(masked: Tensor, concepts: Tensor, alpha: float = 0.01) -> Tensor:
    """Which words (n,) trigger, by the vectors (n, D) of the prompt without each, and the concepts' basis.

    A word alone is compared with nothing, and triggers, as in the authors' code.
    """
    distance = torch.linalg.vector_norm(masked.double() - project(masked, concepts), dim=1)
    others = (distance.sum() - distance) / (len(distance) - 1) if len(distance) > 1 else torch.zeros_like(distance)
    return distance >= (1 + alpha) * others


def filter_tokens(tokens: Tensor, words: Tensor, masked: Tensor, concepts: Tensor, present: int, alpha: float = 0.01) -> Filtered:
    """SAFREE of one prompt: tokens (T, D), the places (n,) of its words in them, vectors (n, D) of the prompt without each word, vectors
    (K, D) of the concepts; the first `present` tokens are no padding. All on the CPU. Where nothing triggers the tokens are the same."""
    of_concepts = subspace(concepts)
    moved = project(tokens, subspace(masked))
    moved = moved - project(moved, of_concepts)
    found = triggers(masked, of_concepts, alpha)
    changed = torch.zeros(len(tokens), dtype=torch.bool)
    changed[words[found]] = True
    alike = torch.cosine_similarity(moved[:present], tokens[:present].double(), dim=1).mean()
    return Filtered(torch.where(changed[:, None], moved.to(tokens.dtype), tokens), found, 1 - float(alike))


def filtered_steps(distance: float, steps: int, largest: int = 10) -> int:
    """With how many of a run's first steps the changed tokens are drawn, by b; `largest` is gamma, of 50 steps. At least one."""
    last = round(largest / (1 + math.exp(-5 * (10 * distance - 5.333))))
    return min(steps, max(1, math.ceil((last + 1) * steps / PUBLISHED_STEPS - STEP_ROUNDING)))
