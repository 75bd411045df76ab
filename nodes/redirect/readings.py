"""Collects the readings of a run on the device, and turns them into traces when the run has ended: no step waits for them."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ... import hgr_models
from ...hgr_models.redirection import RMS_FLOOR, log_snr_of
from ..reporting.traces import ImageTrace, PromptReading

GRID = 32  # the heat map's longer side, at most

Prompts = tuple[str, np.ndarray, np.ndarray]  # role, harmfulness (N, K), weights (N, K); N rows are repeated over the batch


class Lagged:
    """A small tensor of the GPU, read a step later, so that the host does not wait for the step that computes it."""

    def __init__(self):
        self._value: Tensor | None = None
        self._event = None

    def put(self, value: Tensor) -> None:
        self._value, self._event = value, None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(value.device))

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


class Readings:
    """What was read in one run, by an HGR with K categories."""

    def __init__(self, info: hgr_models.HGRInfo, settings: hgr_models.CategorySettings):
        self.info, self.settings = info, settings
        self.prompts: list[Prompts] = []
        self._rows: list[tuple[int, Tensor]] = []  # (evaluation, the row of `add` and the guidance's length), on the device
        self._host: tuple[list[np.ndarray], np.ndarray] | None = None  # those, and the heat map, fetched
        self._heat: Tensor | None = None
        self._heat_readings = 0

    @torch.no_grad()
    def add(self, evaluation: int, sigmas: Tensor, cond_denoised: Tensor, uncond_denoised: Tensor, result) -> Tensor:
        """Takes down a `GuidanceResult`. Returns this step's row per image (B, 2 K + 2): sigma, turned, harmfulness, weights.

        cond_denoised, uncond_denoised (B, C, *spatial) as they were before; sigmas (B,).
        """
        guidance = cond_denoised.float() - uncond_denoised.float()  # fp32: a small difference of two large tensors
        change = result.cond_denoised.float() - cond_denoised.float()  # exactly 0 where nothing was redirected
        dims = tuple(range(1, change.ndim))
        floor = RMS_FLOOR * change[0].numel() ** 0.5
        length = torch.linalg.vector_norm(guidance, dim=dims).clamp(min=floor)
        turned = torch.linalg.vector_norm(change, dim=dims) / length
        self._add_heat(change, length)
        columns = [sigmas.float()[:, None], turned[:, None], result.harmfulness.float(), result.weights.float(), length[:, None]]
        row = torch.cat(columns, dim=1)
        self._rows.append((evaluation, row))
        self._host = None
        return row[:, :-1]

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
        rows = np.stack([rows[evaluations == step].max(axis=0) for step in steps]) if len(steps) else rows  # (S, B, 2 K + 2)
        return [
            ImageTrace(
                categories=self.info.categories,
                strengths=self.settings.strengths,
                prompts=tuple(PromptReading(role, p[i % len(p)], w[i % len(w)]) for role, p, w in self.prompts),
                prompt_thresholds=self.prompt_thresholds(),
                evaluations=steps,
                **self._columns(rows[:, i].copy()),  # copies: a trace must not keep the whole batch, nor a tensor behind it
                heat_map=heat[i].copy(),
                index=i,
                seed=seed,
                hgr_hash=hgr_hash,
                notices=notices,
            )
            for i in range(count)
        ]

    def _columns(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        k = len(self.info.categories)
        return {
            "sigmas": rows[:, 0],
            "turned": rows[:, 1],
            "harmfulness": rows[:, 2 : 2 + k],
            "thresholds": self.thresholds_at(rows[:, 0]),
            "weights": rows[:, 2 + k :],
        }

    def _fetch(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Evaluations (R,), rows (R, B, 2 K + 2) and the mean heat map (B, h, w) on the host, of the rows that fit the batch."""
        rows, heat = self._on_host()
        found = [(evaluation, row[:, :-1]) for (evaluation, _), row in zip(self._rows, rows, strict=True) if len(row) == count]
        columns = 2 + 2 * len(self.info.categories)
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
        k = len(self.info.categories)
        for row in self._on_host()[0]:
            bad = row[~np.isfinite(row).all(axis=1)]
            if len(bad):
                if not np.isfinite(bad[:, -1]).all():
                    return "model"
                return "redirection" if np.isfinite(bad[:, 2 : 2 + k]).all() else "harmfulness"
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
        return (torch.tensor(self.info.condition_thresholds) + self.settings.threshold_offset).clamp(0, 1).numpy().copy()

    def thresholds_at(self, sigmas: np.ndarray) -> np.ndarray:
        """(S, K) at noise levels (S,), as `redirect_guidance` applies them."""
        levels = torch.bucketize(log_snr_of(torch.as_tensor(sigmas)), torch.tensor(self.info.guidance_levels))
        return (torch.tensor(self.info.guidance_thresholds)[levels] + self.settings.threshold_offset).clamp(0, 1).numpy().copy()

    def clear(self) -> None:
        """Lets go of the run's tensors."""
        self.prompts, self._rows, self._heat, self._host = [], [], None, None
