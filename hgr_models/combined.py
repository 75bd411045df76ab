"""Several HGRs of one family that act as one: all categories side by side, every network judges its own.

    p        = [p_1, ..., p_M]                       every network judges the prompt, or the direction, as the model gave it
    w        = strength * (p > threshold)
    tokens_i = where(any w_i > 0, tokens_{i-1} + delta_i(tokens_{i-1}, w_i), tokens_{i-1})          the directions likewise

A flagged sample goes through the networks that flagged it, one after the other: each corrects what those before it left, so two
that know the same harm do not remove it twice. A sample that one network flags gets exactly that network's redirection, and one
that none flags is left alone. Cost: that of every HGR, and one more reading of the direction for each HGR but the first.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import HGRError
from .guidance import Reading
from .hgr import HGR, HGRInfo, Redirectors
from .redirection import RMS_FLOOR, noise_level
from .shapes import per_row

FAMILY = ("latent_format", "latent_channels", "latent_dimensions", "prediction", "token_width", "pooled_width")
NEVER = -1e4  # logit of a category that no network of this kind judges: its sigmoid is exactly 0
SEPARATORS = ",;=|\n"  # of lists of categories: no name may have them


class CombinedHGR(Redirectors):
    """Behaves as an HGR with the categories of all its parts, in their order; it has no file of its own."""

    def __init__(self, hgrs: Sequence[HGR], names: Sequence[str]):
        info = combined_info([hgr.info for hgr in hgrs], names)
        counts = [len(hgr.info.categories) for hgr in hgrs]
        conditions, guidances = [hgr.condition for hgr in hgrs], [hgr.guidance for hgr in hgrs]
        super().__init__(
            info,
            CombinedCondition(conditions, counts) if any(n is not None for n in conditions) else None,
            CombinedGuidance(guidances, counts) if any(n is not None for n in guidances) else None,
        )


class Parts(nn.Module):
    """Networks of one kind and the columns of a (B, K) tensor that belong to each; an HGR without one has columns all the same."""

    def __init__(self, networks: Sequence[nn.Module | None], counts: Sequence[int]):
        super().__init__()
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        columns = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        present = [(n, c) for n, c in zip(networks, columns, strict=True) if n is not None]
        self.networks = nn.ModuleList(n for n, _ in present)
        self.columns = [c for _, c in present]
        self.categories = sum(counts)

    @property
    def config(self) -> Any:
        """Only a network of one checkpoint has one."""
        raise HGRError("Combined HGRs cannot be saved as one file. Save or recalibrate each of them, and combine them again.")

    def spread(self, parts: Sequence[Tensor], empty: float) -> Tensor:
        """Tensors (B, K_i, ...) of the networks as one (B, K, ...)."""
        whole = parts[0].new_full((len(parts[0]), self.categories, *parts[0].shape[2:]), empty)
        for part, columns in zip(parts, self.columns, strict=True):
            whole[:, columns] = part
        return whole

    def weighted(self, weights: Tensor) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Every network with its category weights (B, K_i) and which samples (B,) it flagged."""
        for network, columns in zip(self.networks, self.columns, strict=True):
            yield network, weights[:, columns], (weights[:, columns] > 0).any(dim=1)


class CombinedCondition(Parts):
    """Condition redirectors, one after the other; see `ConditionRedirector` for the shapes."""

    def harmfulness(self, tokens: Tensor, pooled: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Harmfulness (B, K) float32 in [0, 1]; 0 for categories of an HGR without a condition redirector."""
        return self.spread([network.harmfulness(tokens, pooled, mask) for network in self.networks], 0.0)

    def delta(
        self, tokens: Tensor, pooled: Tensor | None, weights: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The sum of all deltas: (B, T, D) of the tokens and (B, P) of the pooled vector, float32."""
        changes: list = [torch.zeros_like(t, dtype=torch.float32) if t is not None else None for t in (tokens, pooled)]
        for network, own, flagged in self.weighted(weights):
            now = [t if t is None else t + change.to(t.dtype) for t, change in zip((tokens, pooled), changes, strict=True)]
            found = network.delta(*now, own, mask)
            changes = [
                change if more is None else torch.where(per_row(flagged, more), change + more, change)
                for change, more in zip(changes, found, strict=True)
            ]
        return changes[0], changes[1]


@dataclass
class CombinedReading(Reading):
    """What every network read in one direction; `first` and `inputs` are for `correct`."""

    first: Reading
    inputs: tuple[Tensor, ...]  # of `read`


class CombinedGuidance(Parts):
    """Guidance redirectors, one after the other; see `GuidanceRedirector` for the shapes."""

    def read(
        self, direction: Tensor, x_in: Tensor, uncond_denoised: Tensor, log_snr: Tensor, log_norm: Tensor
    ) -> CombinedReading:
        """Reads a direction of unit rms with every network."""
        inputs = (direction, x_in, uncond_denoised, log_snr, log_norm)
        found = [network.read(*inputs) for network in self.networks]
        columns = zip(*((r.direction_logits, r.picture_logits, r.places, r.picture_places) for r in found), strict=True)
        first = found[0]
        b, q, places, picture_places = (self.spread(list(column), NEVER) for column in columns)
        own = first.features, first.embedding, first.size, first.frames
        return CombinedReading(b, q, places, picture_places, *own, first, inputs)

    def correct(self, reading: CombinedReading, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Attenuation (B, 1, *spatial) and residual (B, C, *spatial), float32, of all flagged networks together."""
        direction, x_in, uncond_denoised, log_snr, log_norm = reading.inputs
        a, r = torch.zeros_like(direction[:, :1]), torch.zeros_like(direction)
        done = torch.zeros(len(direction), dtype=torch.bool, device=direction.device)
        for index, (network, own, flagged) in enumerate(self.weighted(weights)):
            left, size = direction + (r - a * direction), torch.ones_like(log_norm)
            if index == 0:
                found = reading.first
            else:
                size = torch.where(done, left.flatten(1).square().mean(dim=1).sqrt().clamp(min=RMS_FLOOR), size)
                left = torch.where(per_row(done, left), left / per_row(size, left), direction)
                found = network.read(left, x_in, uncond_denoised, log_snr, log_norm + size.log())
            own_a, own_r = network.correct(found, own)
            alone, again = flagged & ~done, flagged & done
            after = per_row(size, r) * (left + own_r - own_a * left)
            r = torch.where(per_row(again, r), after - direction, torch.where(per_row(alone, r), own_r, r))
            a = torch.where(per_row(again, a), 0.0, torch.where(per_row(alone, a), own_a, a))
            done = done | flagged
        return a, r


def combined_info(infos: Sequence[HGRInfo], names: Sequence[str]) -> HGRInfo:
    """What several HGRs of one family are for, together; `names` tell apart categories that several of them have.

    Raises HGRError for fewer than two, or for HGRs of different families.
    """
    if len(infos) < 2:
        raise HGRError(f"Expected at least two HGRs to combine, but got {len(infos)}.")
    family = {what: vars(infos[0])[what] for what in FAMILY}
    for info, name in zip(infos, names, strict=True):
        for what, expected in family.items():
            if (got := vars(info)[what]) != expected:
                raise HGRError(
                    f"Expected HGRs of one family, but {names[0]} has {what} {expected} and {name} has {got}. "
                    "Combine HGRs that were trained for the same family of models."
                )
    renamed = _category_names(infos, names)
    levels = sorted({level for info in infos for level in info.guidance_levels})
    rows = tuple(tuple(t for info in infos for t in _thresholds_below(info, end)) for end in (*levels, float("inf")))
    pictures = [info.picture_thresholds for info in infos]
    bases = dict.fromkeys(info.base for info in infos if info.base)
    weakest = next((info.training["forward_check"] for info in infos if info.weak), None)
    return HGRInfo(
        categories=tuple(name for some in renamed for name in some),
        condition_thresholds=tuple(t for info in infos for t in info.condition_thresholds),
        guidance_levels=tuple(levels),
        guidance_thresholds=rows,
        **family,
        base=" + ".join(bases),  # of several bases: no model is all of them, so every model warns
        concept_prompts={
            new: info.concept_prompts[old]
            for info, some in zip(infos, renamed, strict=True)
            for old, new in zip(info.categories, some, strict=True)
            if old in info.concept_prompts
        },
        training={"combined": list(names), **({"forward_check": weakest} if weakest is not None else {})},
        picture_thresholds=tuple(t for row in pictures for t in row) if all(pictures) else (),
    )


def _category_names(infos: Sequence[HGRInfo], names: Sequence[str]) -> list[list[str]]:
    """The categories of every HGR; one that several have gets the HGR's name before it."""
    counts = Counter(category for info in infos for category in info.categories)
    prefixes: list[str] = []
    seen: Counter[str] = Counter()
    for name in names:
        name = "".join("_" if c in SEPARATORS else c for c in name).strip() or "hgr"
        seen[name] += 1
        prefixes.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return [
        [category if counts[category] == 1 else f"{prefix}/{category}" for category in info.categories]
        for info, prefix in zip(infos, prefixes, strict=True)
    ]


def _thresholds_below(info: HGRInfo, end: float) -> tuple[float, ...]:
    """The guidance thresholds (K,) of the noise levels that end at -2 ln sigma = `end`."""
    exact = {"dtype": torch.float64}  # as in the file
    return info.guidance_thresholds[noise_level(torch.tensor(end, **exact), torch.tensor(info.guidance_levels, **exact))]
