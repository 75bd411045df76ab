"""The figures of `python -m benchmarks.enforcement`: paired rounds, every kind in each place, and no table of changed pictures."""

import pytest
import torch

from benchmarks import enforcement

ROUNDS = 3


def test_every_kind_is_drawn_in_every_place_and_warmed_up():
    drawn = []

    def drawer(kind: str):
        return lambda number: drawn.append((kind, number)) or torch.full((1,), float(number))

    seconds = enforcement.measure({kind: drawer(kind) for kind in enforcement.KINDS}, ROUNDS)
    assert {kind: len(found) for kind, found in seconds.items()} == dict.fromkeys(enforcement.KINDS, ROUNDS)
    rounds = [drawn[i : i + 3] for i in range(0, len(drawn), 3)]
    assert [{number for _, number in some} for some in rounds] == [{0}, {0}, {1}, {2}]  # the first is the warm-up
    assert {some[0][0] for some in rounds[1:]} == set(enforcement.KINDS)


def test_other_latents_are_an_error():
    draw = {"plain": lambda n: torch.zeros(1), "enforced": lambda n: torch.full((1,), float(n == 1))}
    with pytest.raises(ValueError, match="changed with: enforced"):
        enforcement.measure(draw, 2)


def test_the_table_compares_round_by_round():
    rows = enforcement.table({"plain": [1.0, 2.0, 9.0], "enforced": [1.5, 3.0, 9.25]}).splitlines()
    assert rows[2:] == ["| plain | 2.00 (1.00 to 9.00) | +0.00 |", "| enforced | 3.00 (1.50 to 9.25) | +0.50 |"]


@pytest.mark.parametrize("line", (["--rounds", "0"], ["--comfyui", "nowhere"]))
def test_arguments(line, capsys, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    with pytest.raises(SystemExit) as ended:
        enforcement.arguments(line)
    assert ended.value.code == 2 and "expected" in capsys.readouterr().err
