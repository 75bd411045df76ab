"""What happened in a sampling run, per image: host data in a bounded store, found again by the latent that the run returned.

ComfyUI may serve a sampler from its cache while other nodes run again, so a trace belongs to a latent's values, not to a node.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

ENTRIES, BYTES = 2048, 64 * 2**20  # of the store below; a trace of 25 steps and 7 categories takes about 7 KB


@dataclass(frozen=True, eq=False)
class PromptReading:
    """What the condition redirector found in one prompt: harmfulness (K,) and category weights (K,), above 0 where redirected.

    `role` is the guider's name for the prompt: positive, middle, ...
    """

    role: str
    harmfulness: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, eq=False)
class ImageTrace:
    """What happened to one image in one run: S steps (evaluations whose guidance was read), K categories; numpy, float32.

    Harmfulness, thresholds and weights lie in [0, 1]; a weight above 0 says that the category was redirected.
    """

    categories: tuple[str, ...]
    strengths: tuple[float, ...]  # (K,), as SafeCFG Apply was asked for; 0: switched off
    prompts: tuple[PromptReading, ...]  # empty: no prompt was read (redirect = guidance, or prompts without text)
    prompt_thresholds: np.ndarray  # (K,)
    evaluations: np.ndarray  # (S,) int: the number of the evaluation in the run, from 1
    sigmas: np.ndarray  # (S,)
    harmfulness: np.ndarray  # (S, K), of the guidance direction
    thresholds: np.ndarray  # (S, K)
    weights: np.ndarray  # (S, K)
    turned: np.ndarray  # (S,): |change of the guidance| / |guidance|, 0 where nothing was redirected
    heat_map: np.ndarray  # (h, w): the same ratio per place, mean over the steps; (0, 0) without steps
    index: int = 0  # of the image in its batch
    seed: int | None = None
    hgr_hash: str = ""
    notices: tuple[str, ...] = ()  # what could not be redirected in its run, as the log says it

    @property
    def prompt_harmfulness(self) -> np.ndarray:
        """(K,): the most harmful prompt; 0 where none was read."""
        return self._highest([p.harmfulness for p in self.prompts])

    @property
    def guidance_harmfulness(self) -> np.ndarray:
        """(K,): the most harmful step; 0 where none was read."""
        return self._highest(self.harmfulness)

    @property
    def highest(self) -> np.ndarray:
        """(K,): the higher of both."""
        return np.maximum(self.prompt_harmfulness, self.guidance_harmfulness)

    @property
    def flagged(self) -> np.ndarray:
        """(K,) bool: above its threshold in a prompt or a step, whatever the category's strength."""
        steps = self._highest(~(self.harmfulness <= self.thresholds))  # NaN (of a broken model) counts as harmful
        return (self.prompt_harmfulness > self.prompt_thresholds) | steps.astype(bool)

    @property
    def redirected(self) -> np.ndarray:
        """(K,) bool: redirected in a prompt or a step. None: the image is the one that plain CFG gives."""
        return (self._highest([p.weights for p in self.prompts]) > 0) | (self._highest(self.weights) > 0)

    @property
    def size(self) -> int:
        """Bytes of its arrays."""
        arrays = [value for value in vars(self).values() if isinstance(value, np.ndarray)]
        arrays += [array for p in self.prompts for array in (p.harmfulness, p.weights)]
        return sum(array.nbytes for array in arrays)

    def summary(self) -> dict:
        """The image in short, for JSON: its scores per category (`nodes/detection/scores.py` reads them), and which were redirected.

        Categories that are switched off do not count in `harmfulness` and `flagged`.
        """
        on = np.array(self.strengths) > 0
        return {
            "harmfulness": number((self.highest * on).max()),
            "flagged": bool((self.flagged & on).any()),
            "redirected": [name for name, found in zip(self.categories, self.redirected, strict=True) if found],
            "scores": self._named(self.highest),
            "prompt": self._named(self.prompt_harmfulness) if self.prompts else None,
            "guidance": self._named(self.guidance_harmfulness) if len(self.harmfulness) else None,
            "not_redirected": list(self.notices),
        }

    def details(self) -> dict:
        """What `summary` leaves out, for JSON: every prompt and every step."""
        columns = zip(self.evaluations, self.sigmas, self.turned, self.harmfulness, self.thresholds, self.weights, strict=True)
        return {
            "seed": self.seed,
            "hgr": self.hgr_hash,
            "prompts": [
                {"role": p.role, "harmfulness": self._named(p.harmfulness), "weights": self._named(p.weights)}
                for p in self.prompts
            ],
            "steps": [
                {
                    "evaluation": int(evaluation),
                    "sigma": number(sigma),
                    "turned": number(turned),
                    "harmfulness": self._named(harmfulness),
                    "thresholds": self._named(thresholds),
                    "weights": self._named(weights),
                }
                for evaluation, sigma, turned, harmfulness, thresholds, weights in columns
            ],
        }

    def _named(self, values: np.ndarray) -> dict[str, float | None]:
        return {name: number(value) for name, value in zip(self.categories, values, strict=True)}

    def _highest(self, rows: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        values = np.asarray(rows, dtype=np.float32)
        return values.max(axis=0) if len(rows) else np.zeros(len(self.categories), np.float32)


@dataclass(frozen=True, eq=False)
class Trace:
    """The traces of a LATENT's images, in the order of its batch; None for an image that no known run returned."""

    images: tuple[ImageTrace | None, ...]


@dataclass(eq=False)
class TraceStore:
    """The newest traces, by image and by what SafeCFG was asked for: the same image can come from two runs that flag nothing."""

    entries: int = ENTRIES
    bytes: int = BYTES
    _traces: OrderedDict[tuple[str, Hashable], ImageTrace] = field(default_factory=OrderedDict)
    _bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, digest: str, identity: Hashable, trace: ImageTrace) -> None:
        """Keeps a trace as the newest; the oldest go."""
        key = (digest, identity)
        with self._lock:
            if (old := self._traces.pop(key, None)) is not None:
                self._bytes -= old.size
            self._traces[key] = trace
            self._bytes += trace.size
            while len(self._traces) > self.entries or self._bytes > self.bytes:
                self._bytes -= self._traces.popitem(last=False)[1].size

    def get(self, digest: str, identity: Hashable = None) -> ImageTrace | None:
        """The trace of an image; the newest one where `identity` is None."""
        with self._lock:
            if identity is not None:
                return self._traces.get((digest, identity))
            return next((trace for key, trace in reversed(self._traces.items()) if key[0] == digest), None)

    def __len__(self) -> int:
        return len(self._traces)


STORE = TraceStore()


def digests(samples: Tensor) -> list[str]:
    """A hash of every image's values in a latent (B, C, *spatial), of any floating dtype and on any device.

    Nested latents (audio and video) hash as core packs them for sampling, (B, 1, N): only the values count.
    """
    parts = samples.unbind() if getattr(samples, "is_nested", False) else [samples]
    rows = torch.cat([part.detach().flatten(1).to("cpu", torch.float32) for part in parts], dim=1)  # exact: only wider dtypes
    return [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in rows.contiguous().numpy()]


def remember(traces: list[ImageTrace], identity: Hashable, latents: Iterable[Tensor]) -> None:
    """Stores a run's traces under every latent (B, C, *spatial) that a sampler node may return for it."""
    for latent in latents:
        if len(latent) == len(traces):
            for digest, trace in zip(digests(latent), traces, strict=True):
                STORE.put(digest, identity, trace)


def trace_of(latent: dict, identity: Hashable = None) -> Trace | None:
    """The trace of a LATENT as a sampler returned it, or of some of its images; None when no image is known.

    `identity` (`ApplySettings.identity`) restricts it to runs of one SafeCFG Apply's settings. A latent that was changed after
    sampling (upscaled, blended) is unknown, and so is one whose trace was dropped for newer ones.
    """
    images = tuple(STORE.get(digest, identity) for digest in digests(latent["samples"]))
    return Trace(images) if any(image is not None for image in images) else None


def number(value: float) -> float | None:
    """A float for JSON, which knows no NaN."""
    return round(float(value), 6) if np.isfinite(value) else None
