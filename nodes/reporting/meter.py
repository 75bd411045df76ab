"""The live meter: messages to the front end that queued the prompt, drawn on SafeCFG Apply by `web/js/meter.js`.

Without a connected front end nothing is read. With one, a step's readings are sent when they have arrived on the host, in a
later step; only the message at the end of a run waits for nothing more than the run itself.
"""

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from comfy_execution.utils import get_executing_context

from ..host.server import current_server
from .run_log import Lagged, Readings, Rows
from .traces import ImageTrace, number

EVENT = "safecfg.meter"
SECONDS = 0.1  # between two messages of a run


class Meter:
    """Tells one run's front end what happens on the node `node_id`."""

    def __init__(self, node_id: str | None, readings: Readings):
        self.node_id, self.readings = node_id, readings
        self.steps = 1  # evaluations that the run is expected to make
        self.name = uuid.uuid4().hex  # tells the front end where one run ends and the next begins
        self._lagged, self._lagged_step = Lagged(), 0
        self._next = 0.0

    def _server(self) -> Any:
        """The server, when the client that queued this prompt listens to it; else None."""
        server = current_server() if self.node_id is not None else None
        return server if server is not None and server.client_id in server.sockets else None

    def show_prompts(self) -> None:
        """The prompts have been read."""
        if (server := self._server()) is not None:
            self._send(server, {"series": []})

    def show_step(self, step: int, rows: Rows) -> None:
        """A step's readings, a row per image; they are shown in a later step."""
        if (server := self._server()) is None:
            return
        if self._lagged.ready and time.monotonic() >= self._next:
            shown = Rows(self._lagged.take().numpy())
            reading = _reading(self._lagged_step, shown.harmfulness, self.readings.thresholds_at(shown.sigmas), shown.weights)
            self._send(server, {"images": len(shown.values), "series": [reading]})
            self._next = time.monotonic() + SECONDS
        on_its_way = self._lagged.waiting and not self._lagged.ready
        # Other devices have no copy that the host need not wait for: they show the end only.
        if rows.values.device.type in ("cpu", "cuda") and not on_its_way:
            self._lagged.put(rows.values)
            self._lagged_step = step

    def show_end(self, traces: list[ImageTrace], notices: Sequence[str] = ()) -> None:
        """The run is over: every step that was read, and what could not be redirected."""
        if (server := self._server()) is None:
            return
        columns = zip(*((trace.harmfulness, trace.thresholds, trace.weights) for trace in traces), strict=True)
        harmfulness, thresholds, weights = (np.stack(column, axis=1) for column in columns)  # (S, B, K)
        series = [
            _reading(int(step), *rows)
            for step, *rows in zip(traces[0].evaluations, harmfulness, thresholds, weights, strict=True)
        ]
        redirected = sum(bool(trace.redirected.any()) for trace in traces)
        about = {"images": len(traces), "redirected_images": redirected, "notices": list(notices)}
        self._send(server, {**about, "series": series, "done": True})

    def show_stopped(self, reason: str) -> None:
        """The run was stopped."""
        if (server := self._server()) is not None:
            self._send(server, {"series": [], "done": True, "stopped": reason})

    def _send(self, server: Any, message: dict) -> None:
        context = get_executing_context()
        message |= {
            "node": self.node_id,
            "run": self.name,
            "sampler": context.node_id if context is not None else None,
            "prompt_id": context.prompt_id if context is not None else None,
            "steps": self.steps,
            "categories": list(self.readings.info.categories),
            "prompt_thresholds": _numbers(self.readings.prompt_thresholds()),
        }
        if prompts := self.readings.prompts:
            message["prompt"] = _numbers(np.concatenate([harmfulness for _, harmfulness, _ in prompts]).max(axis=0))
            weights = np.concatenate([weights for _, _, weights in prompts])
            message["prompt_redirected"] = [bool(found) for found in (weights > 0).any(axis=0)]
        server.send_sync(EVENT, message, server.client_id)

    def clear(self) -> None:
        self._lagged = Lagged()


def _reading(step: int, harmfulness: np.ndarray, thresholds: np.ndarray, weights: np.ndarray) -> dict:
    """One step of a batch, arrays (B, K): the most harmful image counts."""
    return {
        "step": step,
        "guidance": _numbers(harmfulness.max(axis=0)),
        "thresholds": _numbers(thresholds.min(axis=0)),
        "redirected": [bool(found) for found in (weights > 0).any(axis=0)],
    }


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [number(value) for value in values]
