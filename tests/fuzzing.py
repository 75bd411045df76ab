"""Hostile input for tests: seeded cases, each of which must give a usable result or a clear HGRError, quickly and in little memory.

A case that fails names itself: the seed and the number in its message make it again.
"""

import json
import os
import random
import signal
import struct
import time
from contextlib import contextmanager

import pytest

from hgr_models import HGRError

# How many cases each test tries; the seed is the place.
CASES = {
    "damaged checkpoint": 1500, "metadata": 1000, "tensors": 800, "sizes": 600, "damaged shard": 1200, "columns": 1200, "texts": 4000,
    "prompt files": 1500, "facts": 900, "states": 500, "LoRAs": 900, "samples": 600, "indexes": 800, "cards": 800,
}  # fmt: skip
TIMES = float(os.environ.get("FUZZ_TIMES", "1"))  # `FUZZ_TIMES=2` tries twice as many
CASES = {kind: round(TIMES * count) for kind, count in CASES.items()}
SECONDS = 5  # for one case
MEGABYTES = 256  # that all cases of a test may add to the process
ODD = [
    None, True, False, 0, 1, -1, 2**31, 10**400, 0.5, 1e308, -1e-9, float("nan"), float("inf"), "", "x", "0.5", "\0", "\ud800", [], [[]],
    {}, [None], ["a", "a"], {"a": None}, [0.5] * 9, "é" * 300, "../../etc/passwd",
]  # fmt: skip
PIECES = ["weapons", "drugs", "=", "=>", ",", ";", "\n", "|", ":", " ", "\t", "on", "off", "0.5", "-1", "2", "nan", "inf", "1e400", "#",
          '"', "'", "\\", "\0", "\r", "\ufeff", "\u202e", "\ud800", "é", "١", "x" * 5000, "harmful", "safe", "{", "}", "[", "]"]  # fmt: skip


def peak_megabytes() -> float:
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def limited(name: str):
    """Stops a case that hangs."""

    def stop(*_):
        raise TimeoutError(f"{name} took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(name: str, use) -> bool:
    """Whether a case was accepted; anything but a result or a clear HGRError fails the test."""
    try:
        with limited(name):
            use()
    except HGRError as error:
        text = str(error)
        assert len(text) > 15, f"{name}: {text!r} says too little"
        return False
    except Exception as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    return True


def fuzz(kind: str, make) -> int:
    """Runs `make(rng)`, which makes an input and returns what uses it, for every case of a kind; how many were accepted."""
    before, accepted, seed, slowest = peak_megabytes(), 0, list(CASES).index(kind) + 1, 0.0
    for case in range(CASES[kind]):
        use, start = make(random.Random(f"{seed} {case}")), time.monotonic()
        accepted += attempt(f"seed {seed}, case {case}", use)
        slowest = max(slowest, time.monotonic() - start)
    added = peak_megabytes() - before
    if TIMES > 1:
        print(f"{kind}: {CASES[kind]} tried, {accepted} usable, slowest {slowest:.2f} s, {added:.0f} MiB more at the peak")
    assert added < MEGABYTES
    return accepted


def odd_text(rng: random.Random, pieces=PIECES) -> str:
    return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 12)))


def damaged(rng: random.Random, content: bytes, header: int) -> bytes:
    """A file with some bytes changed, cut, added or doubled, mostly in its first `header` bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        end = min(header, len(content)) if rng.random() < 0.8 else len(content)
        place = rng.randrange(max(1, end))
        kind = rng.randrange(5)
        if kind == 0:
            content[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del content[place : place + rng.randint(1, 64)]
        elif kind == 2:
            content[place:place] = rng.randbytes(rng.randint(1, 16))
        elif kind == 3:
            del content[place:]
        else:
            content[place:place] = content[place : place + rng.randint(1, 200)]
    return bytes(content)


def mutated(rng: random.Random, value, chance: float = 0.08):
    """A JSON value with some of its parts replaced, removed or doubled."""
    if rng.random() < chance:
        return rng.choice(ODD)
    if isinstance(value, dict):
        kept = {key: mutated(rng, child, chance) for key, child in value.items() if rng.random() > chance / 4}
        return {**kept, rng.choice(list(value)): rng.choice(ODD)} if value and rng.random() < chance else kept
    if isinstance(value, list):
        kept = [mutated(rng, child, chance) for child in value if rng.random() > chance / 4]
        return kept * 2 if rng.random() < chance / 4 else kept
    return value


def as_json(value) -> str:
    """JSON of any of ODD; json refuses numbers of thousands of digits when it reads them, not when it writes them."""
    return json.dumps(value).replace("1" + "0" * 400, "1" + "0" * 5000)


def safetensors_bytes(header: dict, data: bytes) -> bytes:
    text = as_json(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def header_of(content: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]
