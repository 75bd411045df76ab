"""Steps that a GPU replays do what they do when they are called."""

import pytest
import torch

from demo.replay import Replayed

DEVICES = (
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA: nothing is replayed")),
)


@pytest.mark.parametrize("device", DEVICES)
def test_every_call_acts_once_on_what_it_is_given(device):
    """A small training: what it changes in place, and what it returns."""
    weight = torch.zeros(4, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=torch.tensor(0.1, device=device), capturable=device == "cuda")
    calls = []

    def step(wanted):
        calls.append(1)
        loss = (weight - wanted).square()
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
        return loss.detach()

    ordinary = torch.zeros(4, requires_grad=True)
    other = torch.optim.Adam([ordinary], lr=0.1)
    replayed = Replayed(step, torch.device(device))
    for number in range(5):
        wanted = torch.full((4,), float(number + 1))
        loss = replayed(wanted)
        expected = (ordinary - wanted).square()
        assert torch.allclose(loss.cpu(), expected.detach(), rtol=1e-4)
        other.zero_grad()
        expected.sum().backward()
        other.step()
        assert torch.allclose(weight.detach().cpu(), ordinary.detach(), rtol=1e-4)
    assert len(calls) == (2 if device == "cuda" else 5)  # once as it is, and once to record it
