"""Recordings on disk: safetensors shards of sampling runs and of encoded prompts, read row by row.

A shard of runs holds latents and predictions (fp16) of one latent size with the tokens of its prompts; a shard of texts
holds tokens alone. Files are mapped, not loaded: a recording may be larger than the memory. Nothing is ever decoded.
"""

import json
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import HGRError
from .files import write_whole
from .hgr import facts_of_text
from .metadata import facts_problem, is_file, json_object
from .recording import Points, Prompts
from .shard_check import (  # noqa: F401 (kinds, for those who write)
    CALIBRATION,
    CALIBRATION_TEXTS,
    CLEAN,
    HARMFUL,
    HELD_OUT_PAIRS,
    KINDS,
    OF_TEXT,
    PAIRS,
    PICTURES,
    TEXTS,
    finite,
    problem_of,
)

FORMAT_VERSION = 1
KEY = "safecfg_shard"  # of the metadata entry
MAX_HALF = 6e4
PART = 32  # rows of a shard that are read at once, where not all are wanted together
HELD_OUT = 16  # one shard of harmful runs in so many is not trained on


@dataclass
class Texts:
    """Encoded prompts: tokens (B, T, D), pooled (B, P) or None, mask (B, T) or None, harms (B, K).

    Prompts of different lengths are padded with zeros and masked; `lengths` (B,) are then their own. None: nothing was padded.
    """

    tokens: Tensor
    pooled: Tensor | None
    mask: Tensor | None
    harms: Tensor
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> "Texts":
        return Texts(*(None if t is None else t[index] for t in vars(self).values()))


def write_runs(path: str | os.PathLike, kind: str, points: Points, prompts: Prompts, about: dict) -> None:
    """Writes one batch of runs of a kind of `shard_check`; the file appears whole or not at all.

    `points.prompt` are rows of `prompts`. `about` is anything JSON that names where the runs come from; every shard of a
    recording has the same.
    """
    guidance = points.cond_denoised.float() - points.uncond_denoised.float()
    columns = {"x": points.x, "uncond_denoised": points.uncond_denoised, "guidance": guidance}
    if kind == HARMFUL:  # a clean prompt is its own partner
        columns["partner_guidance"] = points.partner_denoised.float() - points.uncond_denoised.float()
    tensors = {name: _half(t) for name, t in columns.items()}
    tensors |= {} if points.rest is None else {"rest": _half(points.rest)}
    tensors |= {
        "sigma": points.sigma.float(),
        "c_in": points.c_in.float(),
        "shown": points.shown.to(torch.uint8),
        "prompt": points.prompt.long(),
    }
    tensors |= prompt_columns(prompts)
    tensors["prompts.removed"] = prompts.removed.to(torch.uint8)
    write_shard(path, kind, tensors, about)


def write_texts(path: str | os.PathLike, texts: Texts, about: dict, kind: str = TEXTS) -> None:
    """Writes encoded prompts; the file appears whole or not at all. A shard has prompts with harms, or without, not both."""
    write_shard(path, kind, prompt_columns(texts), about)


def prompt_columns(prompts: Texts | Prompts) -> dict[str, Tensor]:
    """The columns of encoded prompts; a mask counts how many tokens of the encoder's each one stands for, up to 255."""
    columns = {**token_columns("prompts", prompts.tokens), "prompts.harms": prompts.harms.to(torch.uint8)}
    columns |= {} if prompts.pooled is None else {"prompts.pooled": _half(prompts.pooled)}
    columns |= {} if prompts.lengths is None else {"prompts.lengths": prompts.lengths.long()}
    return columns | ({} if prompts.mask is None else {"prompts.mask": prompts.mask.to(torch.uint8)})


def token_columns(side: str, tokens: Tensor) -> dict[str, Tensor]:
    """Tokens (B, T, D) as they are stored: what they all end with, such as an encoder's padding, once (P, D)."""
    tokens = _half(tokens)
    differs = (tokens != tokens[:1]).any(dim=2).any(dim=0).nonzero()
    own = 1 + int(differs[-1]) if len(differs) else 1 if len(tokens) > 1 else tokens.shape[1]
    padding = {f"{side}.padding": tokens[0, own:]} if own < tokens.shape[1] else {}
    return {f"{side}.tokens": tokens[:, :own], **padding}


def _half(t: Tensor) -> Tensor:
    """fp16 where the values fit: language models have channels beyond its range."""
    return t.half() if float(t.abs().max()) < MAX_HALF else t.float()


def write_shard(path: str | os.PathLike, kind: str, tensors: dict[str, Tensor], about: dict) -> None:
    """Writes a file of a kind; it appears whole or not at all."""
    write_whole(path, tensors, {KEY: json.dumps({"format_version": FORMAT_VERSION, "kind": kind, "about": about})})


@dataclass
class Shard:
    """One mapped file."""

    path: Path
    kind: str
    about: dict
    tensors: dict[str, Tensor]

    @property
    def size(self) -> int:
        """Rows: recorded points, or encoded prompts."""
        return len(self.tensors["prompts.tokens" if self.kind in OF_TEXT else "x"])

    def belongs_to(self, about: object) -> bool:
        """Whether it may be part of a recording that says `about`: encoded prompts, whatever model that names."""
        if self.kind in OF_TEXT:
            return facts_of_text(self.about) == facts_of_text(about)
        return self.about == about

    @property
    def bucket(self) -> tuple:
        """Rows of different shards stack when this is equal."""
        return self._bucket("x", "prompts.tokens", "partners.tokens")

    @property
    def text_bucket(self) -> tuple:
        """Prompts of different shards stack when this is equal."""
        return self._bucket("prompts.tokens")

    def _bucket(self, *columns: str) -> tuple:
        shapes = [tuple(self._shape(k)) for k in columns if k in self.tensors]
        sides = ("prompts", *({"partners"} & {column.partition(".")[0] for column in columns}))
        names = [f"{side}.{k}" for side in sides for k in ("pooled", "mask")]
        return (*shapes, *(name in self.tensors for name in (*names, "prompts.lengths")))

    def _shape(self, name: str) -> torch.Size:
        shape, padding = self.tensors[name].shape[1:], self._padding(name)
        return shape if padding is None else torch.Size((shape[0] + len(padding), *shape[1:]))

    def _padding(self, name: str) -> Tensor | None:
        """What all rows of a column end with and is stored once; None for nothing."""
        side, _, kind = name.partition(".")
        return self.tensors.get(f"{side}.padding") if kind == "tokens" else None

    def column(self, name: str, rows: Tensor) -> Tensor | None:
        """Rows (B,) of a column, float32; None where there is no such column."""
        if name not in self.tensors:
            return None
        values, padding = self.tensors[name][rows].float(), self._padding(name)
        if padding is not None:
            values = torch.cat([values, padding.float().expand(len(values), -1, -1)], dim=1)
        return finite(self.path, values)

    def texts(self, rows: Tensor) -> Texts:
        """Encoded prompts at these rows (B,) of the prompts, float32."""
        columns = (self.column(f"prompts.{name}", rows) for name in ("tokens", "pooled", "mask", "harms"))
        lengths = self.tensors["prompts.lengths"][rows] if "prompts.lengths" in self.tensors else None
        return Texts(*columns, lengths)  # type: ignore[call-arg]  # a starred tuple

    def runs(self) -> Points:
        """All points; `prompt` numbers the runs."""
        return replace(self.points(torch.arange(self.size))[0], prompt=self.tensors["prompt"])

    def prompts(self) -> Texts:
        """All encoded prompts, one per run of a shard of runs."""
        return self.texts(torch.arange(len(self.tensors["prompts.tokens"])))

    def points(self, rows: Tensor) -> tuple[Points, Prompts]:
        """Recorded points at these rows (B,) with their prompts, row for row, float32."""
        get = lambda name: finite(self.path, self.tensors[name][rows].float())  # noqa: E731
        uncond, guidance = get("uncond_denoised"), get("guidance")
        partner = get("partner_guidance") if self.kind == HARMFUL else guidance
        places = self.tensors["prompt"][rows]
        texts, removed = self.texts(places), self.tensors["prompts.removed"][places].float()
        prompts = Prompts(texts.tokens, None, None, texts.harms, removed, texts.pooled, texts.mask, texts.lengths)
        columns = (get("x"), get("sigma"), get("c_in"), uncond, uncond + guidance, uncond + partner, get("shown"))
        rest = get("rest") if "rest" in self.tensors else None
        return Points(*columns, torch.arange(len(rows)), rest), prompts


def read_shard(path: str | os.PathLike) -> Shard:
    """Maps a shard. Raises HGRError, naming the file, when it is damaged or was not written by this version."""
    path = Path(path)
    if not is_file(path):
        raise HGRError(f"There is no shard {path}. Record again.")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise HGRError(f"{path} is not a complete shard ({error}). Delete it and record again.") from error
    header = {} if text is None else json_object(text, path, "a shard")
    if header.get("format_version") != FORMAT_VERSION:
        raise HGRError(f"Expected a shard of format version {FORMAT_VERSION} in {path}. Delete it and record again.")
    kind = header.get("kind")
    if kind not in KINDS or "about" not in header:
        raise HGRError(
            f"Expected a shard of {', '.join(KINDS)} in {path}, but got {str(kind)[:80]!r}. Delete it and record again."
        )
    if problem := problem_of(kind, tensors) or facts_problem(header["about"], tensors):
        raise HGRError(f"{path} is damaged: {problem}. Delete it and record again.")
    return Shard(path, kind, header["about"], tensors)


class Recording:
    """All shards of a folder, from which training draws rows that stack."""

    def __init__(self, shards: list[Shard]):
        self.shards = shards
        self._buckets: dict[str, dict[tuple, list[Shard]]] = {kind: defaultdict(list) for kind in (HARMFUL, CLEAN)}
        for shard in shards:
            keys = [] if shard.kind == TEXTS else [(shard.kind, shard.bucket)]
            if shard.kind in (TEXTS, PAIRS):
                keys.append((f"{TEXTS} {_harm_kind(shard)}", shard.text_bucket))
            for kind, bucket in keys:
                self._buckets.setdefault(kind, defaultdict(list))[bucket].append(shard)

    @classmethod
    def open(cls, *folders: str | os.PathLike) -> "Recording":
        """Every complete shard of some folders, in the order of their names.

        Raises HGRError when there is none, one is damaged, or they come from different settings. Shards of prompts serve every
        model that reads their encoder.
        """
        shards = [read_shard(path) for folder in folders for path in sorted(Path(folder).glob("*.safetensors"))]
        if not shards:
            raise HGRError(f"There are no shards in {', '.join(map(str, folders))}. Record guidance first.")
        for shard in shards[1:]:
            if not shard.belongs_to(shards[0].about):
                raise HGRError(
                    f"{shard.path} was recorded with other settings than {shards[0].path}. "
                    "Record into a folder of their own: choose another `name`, or switch `resume` off."
                )
        return cls(shards)

    def divided(self) -> tuple["Recording", "Recording | None"]:
        """The shards to train on, and those of harmful runs that are held out to see what was learned; None when there is none.

        The names decide: about one harmful shard in HELD_OUT, and the same ones when more are recorded later.
        """
        held_out = []
        for bucket in self._buckets[HARMFUL].values():
            chosen = [s for s in bucket if zlib.crc32(s.path.name.encode()) % HELD_OUT == 0]
            held_out += chosen if len(chosen) < len(bucket) else []  # every size must be trained on
        if not held_out:
            return self, None
        names = {s.path for s in held_out}
        return Recording([s for s in self.shards if s.path not in names]), Recording(held_out)

    def buckets(self, kind: str) -> dict[tuple, list[Shard]]:
        """The shards of a kind whose rows stack, by bucket."""
        return self._buckets.get(kind, {})

    def count(self, kind: str) -> int:
        """Rows of a kind."""
        return sum(shard.size for shard in self.shards if shard.kind == kind)

    def kinds(self) -> list[str]:
        """The kinds of shards that there are."""
        return sorted({shard.kind for shard in self.shards})

    def calibration_texts(self) -> Iterator[Texts]:
        """The clean prompts that are kept for calibration, a batch per shard: all of them may be gigabytes."""
        return (shard.prompts() for shard in self.of_kind(CALIBRATION_TEXTS))

    def of_kind(self, kind: str) -> list[Shard]:
        """The shards of a kind."""
        return [shard for shard in self.shards if shard.kind == kind]

    def shapes(self) -> list[tuple[int, ...]]:
        """Latent shapes (C, *spatial) of which there are harmful and clean runs."""
        of = lambda kind: {bucket[0] for bucket in self._buckets[kind]}  # noqa: E731
        return sorted(of(HARMFUL) & of(CLEAN))

    def draw(
        self, kind: str, count: int, generator: torch.Generator, shape: tuple[int, ...] | None = None
    ) -> tuple[Points, Prompts]:
        """Random points of a kind with their prompts, all of one bucket; of one latent shape when it is given."""
        buckets = {k: v for k, v in self._buckets[kind].items() if shape is None or k[0] == shape}
        parts = [shard.points(rows) for shard, rows in draw_rows(buckets, count, generator)]
        mixed = torch.randperm(count, generator=generator)
        points, prompts = Points.cat([points for points, _ in parts])[mixed], stacked([prompts for _, prompts in parts])[mixed]
        points.prompt = torch.arange(count)
        return points, prompts

    def draw_texts(self, harmful: bool, count: int, generator: torch.Generator) -> Texts:
        """Random encoded prompts with a harm, or without, all of one bucket."""
        drawn = stacked(list(self.draw_texts_in_parts(harmful, count, generator)))
        return drawn[torch.randperm(count, generator=generator)]

    def draw_texts_in_parts(self, harmful: bool, count: int, generator: torch.Generator) -> Iterator[Texts]:
        """The same in the shards' order, at most PART of them in memory at once."""
        buckets = self.buckets(f"{TEXTS} {HARMFUL if harmful else CLEAN}")
        return (shard.texts(part) for shard, rows in draw_rows(buckets, count, generator) for part in rows.split(PART))


def _harm_kind(shard: Shard) -> str:
    """A shard of texts is all harmful or all clean: its rows are drawn by kind."""
    harmful = shard.tensors["prompts.harms"].any(dim=1)
    if bool(harmful.any()) != bool(harmful.all()):
        raise HGRError(f"{shard.path} mixes harmful and clean prompts. Delete it and record again.")
    return HARMFUL if bool(harmful.any()) else CLEAN


def draw_rows(buckets: dict[tuple, list[Shard]], count: int, generator: torch.Generator) -> list[tuple[Shard, Tensor]]:
    """Random rows of one random bucket, every row of all of them equally likely: (shard, rows) pairs."""
    if not buckets:
        raise HGRError("There are no such samples in this recording. Record harmful and clean prompts of the same latent size.")
    groups = list(buckets.values())
    sizes = torch.tensor([float(sum(s.size for s in group)) for group in groups])
    group = groups[int(torch.multinomial(sizes, 1, generator=generator))]
    ends = torch.tensor([s.size for s in group]).cumsum(0)
    rows = torch.randint(int(ends[-1]), (count,), generator=generator).sort().values
    which = torch.bucketize(rows, ends, right=True)
    return [(group[i], rows[which == i] - (ends[i] - group[i].size)) for i in which.unique().tolist()]


T = TypeVar("T", Texts, Prompts)


def stacked(parts: list[T]) -> T:
    """Texts or Prompts of several parts, one after the other."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return type(parts[0])(*(None if column[0] is None else torch.cat(column) for column in columns))
