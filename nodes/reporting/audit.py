"""The audit log, off by default: one JSON line per image under the output folder, written by every run and process alike."""

import json
import os
import threading
from collections import deque
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import folder_paths
from comfy_execution.utils import ExecutionContext, get_executing_context

from ..host.server import current_server
from .traces import ImageTrace

LEVELS = OFF, SCORES, SCORES_AND_PROMPT = ("off", "scores", "scores and prompt")
FILE = "safecfg_audit.jsonl"

# Inputs of core's nodes that lead from a sampler to its positive prompts, and those that hold their text.
TOWARDS_PROMPTS = frozenset("positive guider cond cond1 cond2 conditioning conditioning_1 conditioning_2".split()) | frozenset(
    "conditioning_from conditioning_to".split()
)
TEXTS = frozenset("text text_g text_l clip_l clip_g t5xxl llama bert mt5xl qwen25_7b prompt user_prompt tags lyrics".split())

_lock = threading.Lock()  # where the system does not append in one piece (Windows), threads at least do not mix


_place: Path | None = None  # where the operator wants it


def path() -> Path:
    """The log's file."""
    return _place or Path(folder_paths.get_output_directory()) / FILE


def keep_at(place: Path) -> None:
    """Keeps the log in a file of its own from now on: clients can read what is in the output folder."""
    global _place
    _place = place


def event(**facts) -> str:
    """A line about something else than an image of a run: what was refused, or held back."""
    context = get_executing_context()
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "prompt_id": context.prompt_id if context is not None else None, **facts}, ensure_ascii=False)


def append(lines: list[str]) -> None:
    """Appends whole lines in one write, so that runs and processes do not mix; no lines: only tries to open the file.

    Raises OSError where the file cannot be written.
    """
    data = "".join(f"{line}\n" for line in lines).encode()
    path().parent.mkdir(parents=True, exist_ok=True)  # core makes it with its first picture
    with _lock:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        file = os.open(path(), flags, 0o600)  # what people asked for is nobody else's business
        try:
            if (written := os.write(file, data)) != len(data):
                raise OSError(f"only {written} of {len(data)} bytes were written")
        finally:
            os.close(file)


def records(traces: list[ImageTrace], level: str) -> list[str]:
    """A line for every image of a run; the prompt is null where the graph does not tell it."""
    context, now = get_executing_context(), datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    prompt = {"prompt_text": _current_prompt(context)} if level == SCORES_AND_PROMPT else {}
    return [
        json.dumps(
            {
                "time": now,
                "prompt_id": context.prompt_id if context is not None else None,
                "image": trace.index,
                "seed": trace.seed,
                "hgr": trace.hgr_hash,
                **trace.summary(),
                **prompt,
            },
            ensure_ascii=False,
            allow_nan=False,
        )
        for trace in traces
    ]


def _current_prompt(context: ExecutionContext | None) -> list[str] | None:
    """The texts of the running sampler's positive prompts, from the graph that the server is running."""
    server = current_server()
    if context is None or server is None:
        return None
    running, _ = server.prompt_queue.get_current_queue_volatile()
    graph = next((item[2] for item in running if item[1] == context.prompt_id), None)
    return prompt_texts(graph, context.node_id) if graph is not None else None


def prompt_texts(graph: dict, sampler: str) -> list[str] | None:
    """The texts of a sampler's positive prompts in an API graph, each once; None when one of them cannot be told."""
    texts, waiting, seen = [], deque([(sampler, 0)]), set()
    while waiting:
        link = waiting.popleft()
        if link in seen:
            continue
        seen.add(link)
        inputs = graph.get(link[0], {}).get("inputs", {})
        if found := [inputs[name] for name in inputs if name in TEXTS]:
            texts += [_text(graph, value) for value in found]
        elif not (further := _towards_prompts(inputs, link[1])):
            return None
        else:
            waiting.extend(further)
    return list(dict.fromkeys(texts)) if texts and None not in texts else None


def _towards_prompts(inputs: dict, slot: int) -> list[tuple[str, int]]:
    """The links to follow from an output of a node. Core's nodes give a positive and a negative out as outputs 0 and 1."""
    names = {"negative"} if slot == 1 and {"positive", "negative"} <= inputs.keys() else TOWARDS_PROMPTS
    return [(str(value[0]), value[1]) for name, value in inputs.items() if name in names and _is_link(value)]


def _text(graph: dict, value: Any) -> str | None:
    """A text that stands in a node, or in the one it comes from when that holds nothing else."""
    if _is_link(value):
        strings = [v for v in graph.get(str(value[0]), {}).get("inputs", {}).values() if isinstance(v, str)]
        value = strings[0] if len(strings) == 1 else None
    return value if isinstance(value, str) else None


def _is_link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2
