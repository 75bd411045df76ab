"""The coverage matrix (matrix.py): applied exactly once per guidance direction, in every graph of core's own nodes."""

import re
from collections import Counter

import comfy.samplers
import comfy.utils
import pytest
import torch
from safecfg.hgr_models import HGRError
from safecfg.nodes.redirect import conditions, guidance_hooks, sampling_hooks
from safecfg.nodes.redirect.runs import SafeCFGError

from host_nodes import HOOKS, OPTIONS, SAMPLER, SAMPLES, call, scan
from matrix import WAYS, Known, Prompts, Scene, ideal, is_blind, safe_prompt, sample, with_safecfg
from patches import ELSEWHERE, PATCHES, REFUSED, Patch
from tiny import make_tiny_model

TALLY = Counter()


@pytest.fixture(scope="module", autouse=True)
def tally(request):
    """Counts, shown when the file is done."""
    comfy.utils.set_progress_bar_enabled(False)
    yield TALLY
    comfy.utils.set_progress_bar_enabled(True)
    report = request.config.pluginmanager.get_plugin("terminalreporter")
    report.write_line("")
    for name, count in TALLY.items():
        report.write_line(f"matrix | {name} | {count}")


@pytest.fixture(scope="module")
def model():
    """One for all cases: none may leave anything behind."""
    return make_tiny_model()


def check(monkeypatch, way, model, prompts, scene, patch=lambda model: model, batch=2, coupled=False, windows=1):
    """One case of the matrix: redirected as the ideal model would draw it, everything else as it was, to the last bit."""
    known, blind = Known(monkeypatch, batch), is_blind(way, scene.cfg)
    plain = sample(way, patch(model), prompts, scene)
    with ideal(monkeypatch, known.rows, blind) as wanted:
        expected = sample(way, wanted.watch(patch(model)), prompts.changed(safe_prompt), scene)
    assert blind or wanted.count > 0
    orders = {"before": lambda: patch(with_safecfg(model, not blind)), "after": lambda: with_safecfg(patch(model), not blind)}
    for order, make in orders.items():
        safe_model = make()
        known.start()
        safe = sample(way, safe_model, prompts, scene)
        assert known.guidance.count == wanted.count * windows, f"SafeCFG {order}: {known.guidance.count} redirections"
        size = float(expected.abs().max())
        torch.testing.assert_close(safe, expected, atol=1e-4 * size, rtol=0, msg=lambda text, o=order: f"SafeCFG {o}: {text}")
        assert scene.cfg == 0 or (safe[-1] - plain[-1]).abs().max() > 1e-3 * size, f"SafeCFG {order}: nothing was redirected"
        if not coupled:
            assert torch.equal(safe[:-1], plain[:-1]), f"SafeCFG {order}: a clean picture changed"
        TALLY["redirections, each exactly once"] += known.guidance.count
    known.start(on=False)
    assert torch.equal(sample(way, safe_model, prompts, scene), plain), "a clean run after a harmful one changed"
    TALLY["cases"] += 1


def test_the_matrix_has_every_node():
    """Of core's own; one that is new fails with its name."""
    nodes = {name: found.kinds for name, found in scan().items()}
    hooks = {name for name, kinds in nodes.items() if SAMPLER not in kinds and any(HOOKS.fullmatch(k) or k == OPTIONS for k in kinds)}
    ways = {name.split()[0] for name in WAYS} | {"SamplerCustomAdvanced"}
    known = PATCHES.keys() | REFUSED.keys() | ELSEWHERE.keys() | ways
    sampling = {name for name, kinds in nodes.items() if SAMPLES in kinds}
    assert not (new := (hooks | sampling) - known), f"not in the matrix: {', '.join(sorted(new))}"
    guidance = re.compile(r"set_model_(sampler|unet|denoise)\w+|add_wrapper\w*|create_\w+_wrapper|" + OPTIONS)
    covered = {kind for name in PATCHES for kind in nodes.get(name, ())}
    for name in ELSEWHERE.keys() & nodes.keys():
        assert not (kinds := {k for k in nodes[name] if guidance.fullmatch(k)} - covered), f"{name} hooks in by {kinds}"


CASES = [(way, name) for way in WAYS for name in ["none", *PATCHES] if name == "none" or name in scan()]


@pytest.mark.parametrize(("way", "name"), CASES)
def test_case(monkeypatch, caplog, model, way, name):
    spec = PATCHES.get(name, Patch())
    if way in spec.impossible:
        with pytest.raises(Exception):  # noqa: B017 (core's own, whatever it is)
            sample(way, spec.apply(model), Prompts.make(spec.batch), spec.scene())
        return
    windows = spec.windows if way.startswith("Dual") else 1
    check(monkeypatch, way, model, Prompts.make(spec.batch), spec.scene(), spec.apply, spec.batch, spec.coupled, windows)
    alarms = [r for r in caplog.records if r.name.startswith("safecfg") and "SafeCFG" in r.message]
    TALLY["alarms"] += len(alarms)
    assert len(alarms) == (3 if is_blind(way, 5.0) else 0)
