"""SAFREE on the demo model: masked words, changed tokens, and the first steps that are drawn with them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from demo.pipeline import DemoModel
from demo.safecfg import Steer, Step
from demo.words import FIRST_WORD, chunks, tokenize
from hgr_models.safree import filter_tokens, filtered_steps

MASKED = 0  # the token id in a masked word's place


@dataclass(frozen=True)
class SafreePeer:
    """SAFREE away from phrases; `told` says which prompts the tokens of a run are of."""

    concepts: tuple[str, ...]
    prompts: dict[bytes, str] = field(default_factory=dict)

    def told(self, prompts: Sequence[str], tokens: Tensor) -> "SafreePeer":
        """The same for prompts and their tokens (N, T, D)."""
        return replace(self, prompts={_key(row): prompt for row, prompt in zip(tokens, prompts, strict=True)})

    def start(self, model: DemoModel, tokens: Tensor, steps: int) -> tuple[Tensor, Steer]:
        """Plain tokens; the changed ones cost a row more in the steps that have them, which a sampler of its own would save."""
        harm = model.encode(self.concepts)[:, 0].cpu()  # without a pooled vector: the first token's
        found = [self._filtered(model, row.cpu(), self.prompts[_key(row)], harm) for row in tokens]
        safe = torch.stack([each.tokens for each in found]).to(tokens)
        until = torch.tensor([filtered_steps(each.distance, steps) if each.triggers.any() else 0 for each in found])
        until = until.to(tokens.device)

        def steer(step: Step) -> Tensor:
            rows = until > step.number
            cond = step.cond_denoised.clone()
            if rows.any():
                cond[rows] = model.denoised(step.x[rows], step.sigma[rows], safe[rows])
            return cond

        return tokens, steer

    def _filtered(self, model: DemoModel, tokens: Tensor, prompt: str, harm: Tensor):
        ids = torch.tensor(chunks(tokenize(prompt, model.vocabulary.ids())))
        places = (ids.flatten() >= FIRST_WORD).nonzero().flatten()
        masked = ids.flatten().repeat(len(places), 1)
        masked[torch.arange(len(places)), places] = MASKED
        with torch.no_grad():
            encoded = model.text_encoder(masked.view(-1, ids.shape[1]).to(model.device)).cpu()
        vectors = encoded.view(len(places), *ids.shape, -1)[:, 0, 0]
        return filter_tokens(tokens, places, vectors, harm, int(places.max()) + 2)


def _key(row: Tensor) -> bytes:
    return row.cpu().numpy().tobytes()
