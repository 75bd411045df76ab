"""Collects the readings of a run on the device, and turns them into traces when the run has ended: no step waits for them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ... import hgr_models
from ...hgr_models.redirection import RMS_FLOOR, log_snr_of
from .traces import ImageTrace, PromptReading

GRID = 32  # the heat map's longer side, at most

Prompts = tuple[str, np.ndarray, np.ndarray]  # role, harmfulness (N, K), weights (N, K); N rows are repeated over the batch


class Lagged:
    """A small tensor of the GPU, read a step later, so that the host does not wait for the step that computes it."""

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def put(self, value: Tensor) -> None:
        self._value, self._event = value, None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            torch.cuda.current_stream(value.device).record_event(self._event)

    @property
    def waiting(self) -> bool:
        """Whether there is a value to take."""
        return self._value is not None

    @property
    def ready(self) -> bool:
        """Whether there is a value that `take` can give without waiting."""
        return self._value is not None and (self._event is None or self._event.query())

    def take(self) -> Tensor | None:
        """The tensor last put (a CUDA one: its copy on the host), and forgets it; None: none was put."""
        value, self._value = self._value, None
        if value is not None and self._event is not None:
            self._event.synchronize()
        return value


@dataclass(frozen=True, eq=False)
class Rows:
    """Readings of K categories in one tensor or array (..., 2 K + 3), so that they come to the host in one piece."""

    values: Any

    @classmethod
    def join(cls, sigmas: Tensor, turned: Tensor, harmfulness: Tensor, weights: Tensor, length: Tensor) -> "Rows":
        """Of sigmas, turned and length (B,), harmfulness and weights (B, K)."""
        columns = [sigmas[:, None], turned[:, None], harmfulness, weights, length[:, None]]
        return cls(torch.cat([column.float() for column in columns], dim=1))

    @property
    def categories(self) -> int:
        return (self.values.shape[-1] - 3) // 2

    @property
    def sigmas(self) -> Any:
        """Noise levels (...,)."""
        return self.values[..., 0]

    @property
    def turned(self) -> Any:
        """How far the guidance was turned (...,), in its own length."""
        return self.values[..., 1]

    @property
    def harmfulness(self) -> Any:
        """(..., K) in [0, 1]."""
        return self.values[..., 2 : 2 + self.categories]

    @property
    def weights(self) -> Any:
        """Category weights (..., K) in [0, 1]."""
        return self.values[..., 2 + self.categories : -1]

    @property
    def length(self) -> Any:
        """The guidance's length (...,)."""
        return self.values[..., -1]


class Readings:
    """What was read in one run, by an HGR with K categories."""

    def __init__(self, info: hgr_models.HGRInfo, settings: hgr_models.CategorySettings):
        self.info, self.settings = info, settings
        self.prompts: list[Prompts] = []
        self._rows: list[tuple[int, Tensor]] = []  # (evaluation, the values of its `Rows`), on the device
        self._host: tuple[list[np.ndarray], np.ndarray] | None = None  # those, and the heat map, fetched
        self._heat: Tensor | None = None
        self._heat_readings = 0

    @torch.no_grad()
    def add(
        self, evaluation: int, sigmas: Tensor, cond_denoised: Tensor, uncond_denoised: Tensor, result: hgr_models.GuidanceResult
    ) -> Rows:
        """Takes down a `GuidanceResult`. Returns this step's readings, a row per image.

        cond_denoised, uncond_denoised (B, C, *spatial) as they were before; sigmas (B,).
        """
        guidance = cond_denoised.float() - uncond_denoised.float()  # fp32: a small difference of two large tensors
        change = result.cond_denoised.float() - cond_denoised.float()  # exactly 0 where nothing was redirected
        dims = tuple(range(1, change.ndim))
        floor = RMS_FLOOR * change[0].numel() ** 0.5
        length = torch.linalg.vector_norm(guidance, dim=dims).clamp(min=floor)
        turned = torch.linalg.vector_norm(change, dim=dims) / length
        self._add_heat(change, length)
        rows = Rows.join(sigmas, turned, result.harmfulness, result.weights, length)
        self._rows.append((evaluation, rows.values))
        self._host = None
        return rows

    def _add_heat(self, change: Tensor, length: Tensor) -> None:
        """Adds the change per place, in units of the guidance's mean length per place."""
        places = torch.linalg.vector_norm(change, dim=1)  # (B, *spatial)
        mean = length / places[0].numel() ** 0.5
        places = places.flatten(1, -3).mean(dim=1) if places.ndim > 3 else places  # (B, H, W): over a video's frames
        cell = math.ceil(max(places.shape[-2:]) / GRID)
        heat = F.avg_pool2d(places[:, None], cell, ceil_mode=True)[:, 0] / mean[:, None, None]
        if self._heat is None or self._heat.shape != heat.shape:  # a sampler that changes the latent's size: the last size counts
            self._heat, self._heat_readings = torch.zeros_like(heat), 0
        self._heat, self._heat_readings = self._heat + heat, self._heat_readings + 1

    def finish(self, count: int, seed: int | None = None, hgr_hash: str = "", notices: tuple[str, ...] = ()) -> list[ImageTrace]:
        """The traces of a run's `count` images. Waits for the device once. `notices`: what could not be redirected.

        Two directions of one evaluation (DualCFGGuider) count as one step, with the higher of each reading.
        """
        evaluations, rows, heat = self._fetch(count)
        steps = np.unique(evaluations)
        rows = np.stack([rows[evaluations == step].max(axis=0) for step in steps]) if len(steps) else rows  # (S, B, 2 K + 3)
        return [
            ImageTrace(
                categories=self.info.categories,
                strengths=self.settings.strengths,
                prompts=tuple(PromptReading(role, p[i % len(p)], w[i % len(w)]) for role, p, w in self.prompts),
                prompt_thresholds=self.prompt_thresholds(),
                evaluations=steps,
                **self._columns(Rows(rows[:, i].copy())),  # copies: a trace must not keep the whole batch, nor a tensor behind it
                heat_map=heat[i].copy(),
                index=i,
                seed=seed,
                hgr_hash=hgr_hash,
                notices=notices,
            )
            for i in range(count)
        ]

    def _columns(self, rows: Rows) -> dict[str, np.ndarray]:
        found = {"sigmas": rows.sigmas, "turned": rows.turned, "harmfulness": rows.harmfulness, "weights": rows.weights}
        return {**found, "thresholds": self.thresholds_at(rows.sigmas)}

    def _fetch(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Evaluations (R,), rows (R, B, 2 K + 3) and the mean heat map (B, h, w) on the host, of the rows that fit the batch."""
        rows, heat = self._on_host()
        found = [(evaluation, row) for (evaluation, _), row in zip(self._rows, rows, strict=True) if len(row) == count]
        columns = 3 + 2 * len(self.info.categories)
        if not found or len(heat) != count:
            return np.zeros(0, int), np.zeros((0, count, columns), np.float32), np.zeros((count, 0, 0), np.float32)
        return np.array([evaluation for evaluation, _ in found]), np.stack([row for _, row in found]), heat

    def _on_host(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Every row and the mean heat map, brought over in one piece."""
        if self._host is None:
            tensors = [row for _, row in self._rows]
            tensors.append(self._heat / self._heat_readings if tensors else torch.zeros(0, 0, 0))
            values = torch.cat([t.flatten() for t in tensors]).cpu().numpy()
            parts = np.split(values, np.cumsum([t.numel() for t in tensors])[:-1])
            *rows, heat = (part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True))
            self._host = rows, heat
        return self._host

    def first_not_finite(self) -> str | None:
        """Whose values were not finite in the first evaluation that read such: `model` (its own output), `harmfulness` or
        `redirection`; None: all are finite. Together with `unread` and `finish` it waits for the device once.
        """
        for row in self._on_host()[0]:
            bad = Rows(row[~np.isfinite(row).all(axis=1)])
            if len(bad.values):
                if not np.isfinite(bad.length).all():
                    return "model"
                return "redirection" if np.isfinite(bad.harmfulness).all() else "harmfulness"
        return None

    def unread(self, count: int) -> np.ndarray:
        """Which of `count` images (B,) bool had values that are not finite; in an evaluation of another batch size, any may have."""
        found = np.zeros(count, bool)
        for row in self._on_host()[0]:
            bad = ~np.isfinite(row).all(axis=1)
            found |= bad if len(bad) == count else bad.any()
        return found

    def prompt_thresholds(self) -> np.ndarray:
        """(K,), as `redirect_condition` applies them."""
        return self.info.limits(offset=self.settings.threshold_offset).numpy().copy()

    def thresholds_at(self, sigmas: np.ndarray) -> np.ndarray:
        """(S, K) at noise levels (S,), as `redirect_guidance` applies them."""
        log_snr = log_snr_of(torch.as_tensor(sigmas))
        return self.info.limits(log_snr, self.settings.threshold_offset).numpy().copy()

    def clear(self) -> None:
        """Lets go of the run's tensors."""
        self.prompts, self._rows, self._heat, self._host = [], [], None, None
