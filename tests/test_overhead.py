"""What the overhead benchmark counts and times, against numbers by hand; no test looks at a real clock."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import overhead
from benchmarks import overhead_counting as counting
from benchmarks import overhead_families as families

ROOT = Path(__file__).parents[1]


def test_counts_by_hand():
    x, layer = torch.zeros(3, 4), torch.nn.Linear(4, 5, bias=False).requires_grad_(False)

    def run():
        y = layer(x)  # 2 * 3 * 4 * 5 FLOPs, 60 bytes
        y = y.view(5, 3)[1:] + 1  # views are no work; 48 bytes, while the 60 are alive
        return y.relu_()  # in place: work, but no bytes

    assert counting.count(run) == {"flops": 120, "operations": 3, "peak_bytes": 108}


def test_memory_that_was_freed_does_not_count():
    def run():
        y = torch.zeros(100)
        for _ in range(3):
            y = y + 1

    assert counting.count(run)["peak_bytes"] == 800


def test_attention_on_a_cpu_counts():
    """PyTorch's own counter says 0."""
    query, key = torch.zeros(2, 4, 64, 16), torch.zeros(2, 4, 32, 16)
    run = lambda: torch.nn.functional.scaled_dot_product_attention(query, key, key)  # noqa: E731
    assert counting.count(run)["flops"] == 2 * (2 * 2 * 4 * 64 * 32 * 16)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to; waiting for the GPU does nothing."""
    now = [0.0]
    monkeypatch.setattr(counting.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@pytest.mark.parametrize("gpu", [False, True])
def test_pairs_a_step_with_what_comes_after_it(clock, gpu):
    steps, calls = [], []

    def step():
        steps.append(len(steps))
        clock(10)

    def extra(name, cost):
        calls.append(name)
        clock(cost)

    found = counting.beside(step, {"a": lambda: extra("a", 1), "b": lambda: extra("b", 2)}, 3, gpu, block=4)
    assert {name: [pytest.approx(pair) for pair in pairs] for name, pairs in found.items()} == {
        "a": [(10, 1)] * 3,
        "b": [(10, 2)] * 3,
    }
    assert calls.count("a") == (13 if gpu else 4)
    assert len(steps) == (1 + 3 * 3 * 4 if gpu else 4)


def test_describes_pairs():
    found = counting.describe([(10, 1), (10, 3), (20, 4)])
    assert found == {"seconds": 3, "time_ratio": 0.2, "time_ratio_range": [0.1, 0.3]}


def test_the_power_of_growth():
    assert overhead.exponent([(n, 3 * n**2) for n in (10, 20, 50)]) == pytest.approx(2)


def test_random_weights_share_a_pool(monkeypatch):
    monkeypatch.setattr(families, "POOL", 50)
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6))
        model[1].register_buffer("places", torch.zeros(7, dtype=torch.long))
    families.fill(model, torch.device("cpu"))
    assert model(torch.ones(2, 6)).isfinite().all()
    assert model[0].weight.shape == (8, 6) and model[1].places.shape == (7,) and model[1].places.dtype == torch.long
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == 1 and model[0].weight.untyped_storage().nbytes() == 200


def test_sd15_and_growth_without_a_host(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(overhead, "SIZES", (32, 64))
    file = tmp_path / "figures.json"
    monkeypatch.setattr("sys.argv", ["overhead", "--device", "cpu", "--no-time", "--json", str(file)])
    overhead.main()
    found = json.loads(file.read_text())
    assert found["host"] is None and found["sd15"]["step"]["parameters"] == 859_520_964
    assert 0 < found["sd15"]["clean"]["flops_ratio"] < found["sd15"]["flops_ratio"] < 0.01
    assert found["growth"]["flops_exponent"] == pytest.approx(1, abs=0.02)
    assert {"sdxl", "sd3"}.isdisjoint(found)
    said = capsys.readouterr().out
    assert "neither SDXL nor SD3" in said and "64x64" in said and "of FLOPs" in said


def test_times_are_in_the_tables(monkeypatch, clock, capsys):
    """A family with a denoiser of one layer; every call takes a second on the stopped clock."""

    class Denoiser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4, device="meta")

        def forward(self, x, timesteps, context):
            clock(50)
            return self.layer(x[:, :, 0])

    monkeypatch.setattr(overhead, "make_denoiser", lambda *args: Denoiser())
    monkeypatch.setattr(overhead, "redirect_guidance", lambda *args: clock(0.2))
    monkeypatch.setattr(overhead, "redirect_condition", lambda *args: clock(0.1))
    monkeypatch.setitem(overhead.FAMILIES, "sd15", families.Family("Tiny", 4, 4, 7, 16, 0, 0, "SD15", "EPS", {}))
    monkeypatch.setattr(overhead, "find_host", lambda path: None)
    found = overhead.run(overhead.arguments(["--device", "cpu", "--families", "sd15"]))["sd15"]
    assert found["time_ratio"] == pytest.approx(0.2 / 50)
    assert found["condition"]["time_ratio"] == pytest.approx(0.1 / 25)
    assert "0.400% of time [0.400%, 0.400%]" in capsys.readouterr().out


def test_what_needs_a_host(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    with pytest.raises(families.HostError, match="SDXL needs ComfyUI's own classes"):
        families.make_denoiser("sdxl", None, torch.float32)
    with pytest.raises(families.HostError, match="no main.py in"):
        families.find_host(str(tmp_path))
    (tmp_path / "main.py").touch()
    with pytest.raises(families.HostError, match="cannot be imported .* the Python that runs ComfyUI"):
        families.find_host(str(tmp_path))


def test_in_the_hosts_own_classes(host, tmp_path):
    """The published sizes, and the shares that the pack promises."""
    command = [host.python, "-m", "benchmarks.overhead", "--device", "cpu", "--families", "sdxl", "sd3", "--no-time"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "COMFYUI_PATH": str(host.path)}
    run = subprocess.run(
        [*command, "--json", tmp_path / "figures.json"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["host"] == host.name.replace("-", " ")
    for name, parameters in (("sdxl", 2_567_463_684), ("sd3", 2_028_328_000)):
        assert found[name]["step"]["parameters"] == pytest.approx(parameters, rel=1e-6)
        assert 0 < found[name]["flops_ratio"] < 0.005 and found[name]["guidance"]["peak_bytes"] < 50e6
