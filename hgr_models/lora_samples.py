"""What a safe LoRA learns from: unlabelled noisy latents, what an HGR finds in them, and batches of both."""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import HGRError
from .files import write_whole
from .shapes import per_row

FORMAT = {"safecfg_samples": "1"}  # metadata of a file
MAX_HALF = 6e4


@dataclass
class Samples:
    """Noisy latents on the way to one batch of unlabelled pictures: S noise levels of P prompts, in the order of sampling.

    Rows of x, sigma, c_in, uncond_denoised: level 0 of every prompt, then level 1, and so on, (S * P, ...). `tokens`, `pooled`,
    `mask` and `lengths` have a row per prompt and, last, one for the empty prompt. Any floating dtype.
    """

    x: Tensor
    sigma: Tensor
    c_in: Tensor  # the model's input scaling, as in `recording.Points`
    uncond_denoised: Tensor
    tokens: Tensor  # (P + 1, T, D)
    pooled: Tensor | None = None
    mask: Tensor | None = None
    lengths: Tensor | None = None  # (P + 1,) tokens of each prompt, where shorter ones were padded

    @property
    def prompts(self) -> int:
        """P."""
        return len(self.tokens) - 1

    @property
    def bucket(self) -> tuple:
        """Rows of different samples stack when this is equal."""
        return tuple(self.x.shape[1:]), tuple(self.tokens.shape[1:]), self.pooled is None, self.mask is None, self.lengths is None

    def tensors(self) -> dict[str, Tensor]:
        """The columns that there are, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def write_samples(path: str | os.PathLike, samples: Samples) -> None:
    """Writes samples; the file appears whole or not at all. Latents stay float32: guidance is a small difference of them."""
    tensors = samples.tensors()
    for name in ("tokens", "pooled"):
        if name in tensors and float(tensors[name].abs().max()) < MAX_HALF:
            tensors[name] = tensors[name].half()
    write_whole(path, tensors, FORMAT)


def read_samples(path: str | os.PathLike) -> Samples:
    """Maps samples without loading them. Raises HGRError, naming the file, when it is damaged or something else."""
    try:
        with safe_open(path, "pt") as file:
            if file.metadata() != FORMAT:
                raise HGRError(f"Expected recorded samples of a safe LoRA in {path}, but it is some other file. Move it away.")
            samples = Samples(**{key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, TypeError) as error:
        raise HGRError(f"{path} is not complete ({error}). Delete it: it is recorded again.") from error
    if problem := _problem_of(samples):
        raise HGRError(f"{path} is damaged: {problem}. Delete it: it is recorded again.")
    return samples


def _problem_of(samples: Samples) -> str:
    """What is wrong with the columns' shapes and types; "" when nothing is."""
    texts = {"tokens": 3, "pooled": 2, "mask": 2, "lengths": 1}
    for name, tensor in samples.tensors().items():
        if name in texts and (tensor.ndim != texts[name] or len(tensor) != len(samples.tokens)):
            return f"its column {name} has the shape {tuple(tensor.shape)}"
        if name not in ("mask", "lengths") and not (tensor.is_floating_point() and torch.isfinite(tensor).all()):
            return f"its column {name} does not hold finite numbers"
    rows = len(samples.x)
    if samples.x.ndim not in (4, 5) or samples.uncond_denoised.shape != samples.x.shape or samples.prompts < 1 or not rows:
        return f"its latents have the shape {tuple(samples.x.shape)}"
    if rows % samples.prompts or samples.sigma.shape != (rows,) or len(samples.c_in.flatten()) != rows:
        return f"it has {rows} latents of {samples.prompts} prompts"
    return ""


@dataclass
class Judgement:
    """What an HGR finds in `Samples`: category weights of its prompts (P, K) and, remembered along each run, rows (S * P, K)."""

    by_prompt: Tensor
    by_guidance: Tensor
    direction: Tensor  # (S * P, C, *spatial) float16: the target less `uncond_denoised`, small beside both
    size: Tensor  # (S * P,) mean square of the direction, floored: the unit of a row's error

    @property
    def weights(self) -> Tensor:
        """Of both redirectors together, (S * P, K)."""
        return torch.maximum(self.by_prompt.repeat(len(self.by_guidance) // len(self.by_prompt), 1), self.by_guidance)

    @cached_property  # every training step asks
    def flagged(self) -> Tensor:
        """(S * P,) bool."""
        return (self.weights > 0).any(dim=1)

    @property
    def runs(self) -> Tensor:
        """Category weights per prompt over its whole run, (P, K)."""
        return self.weights.unflatten(0, (-1, len(self.by_prompt))).amax(dim=0)


@dataclass
class Batch:
    """Rows to train on: noisy latents with the tokens of every row, and what the HGR made of them."""

    x: Tensor
    sigma: Tensor
    tokens: Tensor  # (B, T, D)
    pooled: Tensor | None
    mask: Tensor | None
    target: Tensor  # (B, C, *spatial) x0 prediction to reach; of a row with the empty prompt, unknown
    size: Tensor  # (B,)
    flagged: Tensor  # (B,) bool: the HGR turns this row
    empty: Tensor  # (B,) bool: the row has the empty prompt
    lengths: Tensor | None = None  # (B,)

    def to(self, device: torch.device) -> "Batch":
        """The same rows on a device."""
        return Batch(*(None if t is None else t.to(device) for t in vars(self).values()))

    def given(self, rows: Tensor | slice = slice(None)) -> tuple[Tensor | None, ...]:
        """What a denoiser is given for all rows, or for some (B,) bool: x, sigma, tokens, pooled, mask, and lengths where there are."""
        lengths = () if self.lengths is None else (self.lengths,)
        return tuple(None if t is None else t[rows] for t in (self.x, self.sigma, self.tokens, self.pooled, self.mask, *lengths))

    def kinds(self) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) bool: flagged, left alone by the HGR, and with the empty prompt; every row is one of them."""
        return self.flagged & ~self.empty, ~self.flagged & ~self.empty, self.empty


class Pool:
    """Samples with their judgements, from which batches are drawn."""

    def __init__(self) -> None:
        self.samples: list[Samples] = []
        self.judgements: list[Judgement] = []

    def add(self, samples: Samples, judgement: Judgement) -> None:
        """Takes in samples with what the HGR says of each of them."""
        self.samples.append(samples)
        self.judgements.append(judgement)

    @property
    def harmful(self) -> bool:
        """Whether the HGR flags anything: without it there is nothing to learn."""
        return any(bool(judgement.flagged.any()) for judgement in self.judgements)

    def counts(self, categories: tuple[str, ...]) -> dict:
        """How many runs were judged, and how many of them are harmful, by category and at all."""
        runs = torch.cat([judgement.runs for judgement in self.judgements]) > 0
        by_category = dict(zip(categories, runs.sum(dim=0).tolist(), strict=True))
        return {"runs": len(runs), "harmful": int(runs.any(dim=1).sum()), "categories": by_category}

    def draw(self, count: int, generator: torch.Generator, empty_share: float) -> Batch:
        """Random rows that stack, on the CPU; half of them are flagged where there are flagged and unflagged ones.

        `empty_share` of them get the empty prompt.
        """
        buckets = defaultdict(list)
        for samples, judgement in zip(self.samples, self.judgements, strict=True):
            buckets[samples.bucket].append((samples, judgement))
        groups = list(buckets.values())
        sizes = torch.tensor([float(sum(len(s.x) for s, _ in group)) for group in groups])
        group = groups[int(torch.multinomial(sizes, 1, generator=generator))]
        flagged = torch.cat([judgement.flagged for _, judgement in group])
        kinds = [rows for rows in (flagged.nonzero()[:, 0], (~flagged).nonzero()[:, 0]) if len(rows)]
        counts = [count] if len(kinds) == 1 else [count // 2, count - count // 2]
        pick = lambda rows, n: rows[torch.randint(len(rows), (n,), generator=generator)]  # noqa: E731
        chosen = torch.cat([pick(rows, n) for rows, n in zip(kinds, counts, strict=True)]).sort().values
        empty = torch.rand(count, generator=generator) < empty_share
        return _emptied(_stack([_rows(*part) for part in _parts(group, chosen)]), empty, group[0][0])


def texts_of(samples: Samples, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tokens, pooled and mask of rows (B,), float32."""
    some = lambda t: None if t is None else t[rows % samples.prompts].float()  # noqa: E731
    return samples.tokens[rows % samples.prompts].float(), some(samples.pooled), some(samples.mask)


def lengths_of(samples: Samples, rows: Tensor) -> Tensor | None:
    """Lengths of the prompts of rows (B,); None where nothing was padded."""
    return None if samples.lengths is None else samples.lengths[rows % samples.prompts]


def _rows(samples: Samples, judgement: Judgement, rows: Tensor) -> Batch:
    """Rows (B,) of samples and their judgement, float32."""
    x, sigma, uncond_denoised = (each[rows].float() for each in (samples.x, samples.sigma, samples.uncond_denoised))
    target, empty = uncond_denoised + judgement.direction[rows].float(), torch.zeros(len(rows), dtype=torch.bool)
    about = target, judgement.size[rows], judgement.flagged[rows], empty
    return Batch(x, sigma, *texts_of(samples, rows), *about, lengths_of(samples, rows))


def _parts(group: list[tuple[Samples, Judgement]], chosen: Tensor) -> Iterator[tuple[Samples, Judgement, Tensor]]:
    """Rows of a group, numbered through all of it in ascending order, samples by samples."""
    ends = torch.tensor([len(s.x) for s, _ in group]).cumsum(0)
    which = torch.bucketize(chosen, ends, right=True)
    for i in which.unique().tolist():
        samples, judgement = group[i]
        yield samples, judgement, chosen[which == i] - (ends[i] - len(samples.x))


def _stack(parts: list[Batch]) -> Batch:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Batch(*(None if column[0] is None else torch.cat(column) for column in columns))


def _emptied(batch: Batch, empty: Tensor, samples: Samples) -> Batch:
    """The batch with the empty prompt of `samples` in some rows."""
    for name in ("tokens", "pooled", "mask", "lengths"):
        if (value := vars(batch)[name]) is not None:
            nothing = vars(samples)[name][-1].to(value)
            setattr(batch, name, torch.where(per_row(empty, value), nothing, value))
    batch.empty = empty
    return batch
