"""Newer hosts capture a network's blocks as CUDA graphs: what runs inside must be the same at every replay.

SafeCFG branches on what it reads, and reads it back. A stand-in for capturing (it needs no GPU): while the network runs, nothing of
this pack does; all of its work lies between the evaluations.
"""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from matrix import WAYS, Prompts, Scene, sample, with_safecfg

PACK = Path(__file__).parents[2]
OURS = tuple(str(PACK / folder) for folder in ("nodes", "hgr_models"))


@contextmanager
def spied(found: set[str]):
    """Collects the functions of this pack that are called inside."""

    def see(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            found.add(f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize("way", ["KSampler", "BasicGuider", *(way for way in WAYS if way.startswith("Dual"))])
def test_nothing_of_ours_runs_inside_the_network(monkeypatch, tiny_model, way):
    network, inside, outside, evaluations = tiny_model.model.diffusion_model, set(), set(), []
    forward = network.forward

    def captured(*args, **kwargs):
        evaluations.append(way)
        with spied(inside):
            return forward(*args, **kwargs)

    monkeypatch.setattr(network, "forward", captured)
    safe = with_safecfg(tiny_model, strict=False)
    with spied(outside):
        sample(way, safe, Prompts.make(), Scene.make(steps=2))
    assert len(evaluations) >= 2 and any(name.startswith("sampling_hooks.py") for name in outside)
    assert not inside, f"runs while core may capture: {sorted(inside)}"
