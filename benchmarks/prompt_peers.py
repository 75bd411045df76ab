"""What else could read prompts, from the same pairs: keywords, cosine to concept phrases, logistic regression on the mean token."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hgr_models.pairs import PromptSet
from hgr_models.pairs.build import words_of

# Texts -> a score (N,) each, the higher the more harmful.
Score = Callable[[Sequence[str]], Tensor]


def peers(prompts: PromptSet, means: Callable[[Sequence[str]], Tensor]) -> dict[str, Score]:
    """Readers by name; `means` gives the mean token (N, D) of texts."""
    harmful = [pair.harmful for pair in prompts.pairs]
    harmless = [*(pair.safe for pair in prompts.pairs if pair.removed == pair.harms), *prompts.clean]
    return {
        "keywords from the pairs": keywords(harmful, harmless),
        "cosine to concept phrases": cosine(means, list(prompts.concept_prompts.values())),
        "logistic regression, mean token": regression(means, harmful, harmless),
    }


def keywords(harmful: Sequence[str], harmless: Sequence[str]) -> Score:
    """The largest log odds of a word between harmful and harmless prompts."""
    counts = [Counter(word for text in texts for word in words_of(text)) for texts in (harmful, harmless)]
    odds = {
        word: math.log((counts[0][word] + 0.5) / (len(harmful) + 1)) - math.log((counts[1][word] + 0.5) / (len(harmless) + 1))
        for word in counts[0].keys() | counts[1].keys()
    }
    return lambda texts: torch.tensor([max((odds.get(word, 0.0) for word in words_of(text)), default=0.0) for text in texts])


def cosine(means: Callable[[Sequence[str]], Tensor], concepts: Sequence[str]) -> Score:
    """The largest cosine between a prompt's and a concept phrase's mean token."""
    directions = F.normalize(means(concepts), dim=1)
    return lambda texts: (F.normalize(means(texts), dim=1) @ directions.T).amax(dim=1)


def regression(means: Callable[[Sequence[str]], Tensor], harmful: Sequence[str], harmless: Sequence[str]) -> Score:
    """Logistic regression on standardised channels with a small penalty on the weights."""
    x = torch.cat([means(harmful), means(harmless)])
    y = torch.cat([torch.ones(len(harmful)), torch.zeros(len(harmless))])
    center, scale = x.mean(dim=0), x.std(dim=0).clamp(min=1e-3)
    layer = torch.nn.Linear(x.shape[1], 1)
    torch.nn.init.zeros_(layer.weight)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    logits = lambda m: layer((m - center) / scale)[:, 0]  # noqa: E731
    for _ in range(400):
        optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logits(x), y) + 1e-3 * layer.weight.square().sum()
        loss.backward()
        optimiser.step()
    return lambda texts: logits(means(texts)).detach()
