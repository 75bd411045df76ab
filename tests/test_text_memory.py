"""What a step in text space holds at once, counted: a text encoder as wide as T5's or Qwen's must fit beside everything else."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hgr_models import HGR, HGRInfo, train_condition
from hgr_models.condition import ConditionConfig, robust_units
from hgr_models.pair_shards import draw_pairs, write_pairs
from hgr_models.shards import CALIBRATION_TEXTS, Recording, Texts, write_texts
from hgr_models.textspace import PairTexts
from hgr_models.train_text import PAIR_BATCH, TextTraining, most_pairs
from hgr_models.trainer import calibrate

GIB = 2**30
HARMS = 7


class Counted(TorchDispatchMode):
    """Bytes of all tensors that operations made and somebody still holds: `live` now, and at most so far (`peak`)."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _drop(self, name: int, size: int) -> None:
        self.known.discard(name)
        self.live -= size


def recording(folder, length, width, count=8):
    tokens = lambda seed: torch.randn(count, length, width, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    harms = torch.eye(HARMS)[torch.arange(count) % HARMS]
    write_pairs(folder / "a.safetensors", PairTexts(tokens(0), None, None, tokens(1), None, None, harms, harms), {})
    write_texts(folder / "b.safetensors", Texts(tokens(2), None, None, torch.zeros(count, HARMS)), {})
    return Recording.open(folder)


def make_hgr(width):
    return HGR(
        HGRInfo(tuple("abcdefg"), (0.5,) * HARMS, (), ((0.5,) * HARMS,), "", 0, 2, "", width, 0),
        ConditionConfig(width, HARMS),
        None,
    )


def make_training(width):
    return TextTraining(make_hgr(width), 10, seed=0)


def test_counting_sees_what_is_held_and_what_was():
    with Counted() as counted:
        held = torch.zeros(1000)
        (held + 1).sum()
    assert counted.live >= 4000 and 8000 <= counted.peak < 9000


@pytest.mark.parametrize("length", [256, 512])
def test_a_step_on_tokens_of_4096_channels_holds_less_than_a_gibibyte(tmp_path, length, monkeypatch):
    rows, training, longest = recording(tmp_path, length, 4096), make_training(4096), []
    monkeypatch.setattr(
        train_condition, "chunked", lambda *a, _made=train_condition.chunked: longest.append(_made(*a)) or longest[-1]
    )
    with Counted() as counted:
        training.measure(rows)
        measured, counted.peak = counted.peak, counted.live
        training.train_step(rows)
    assert measured < GIB and counted.peak < GIB
    assert longest[0][0].tokens.shape[1] >= 2 * length  # joined prompts, the longest there are, took part


def test_calibrating_on_tokens_of_4096_channels_holds_less_than_a_gibibyte(tmp_path):
    """512 harmful prompts are read, of whatever the recording has: they were 8 GB at once."""
    recording(tmp_path, 256, 4096)
    texts = Texts(torch.randn(2, 256, 4096), None, None, torch.zeros(2, HARMS))
    write_texts(tmp_path / "c.safetensors", texts, {}, CALIBRATION_TEXTS)
    with Counted() as counted:
        calibrate(make_hgr(4096), Recording.open(tmp_path), 0.01, torch.device("cpu"))
    assert counted.peak < GIB


def test_what_is_computed_again_changes_no_bit_of_the_gradient(tmp_path, monkeypatch):
    rows, found = recording(tmp_path, 6, 24), {}
    for limit in (10**9, 1):
        monkeypatch.setattr(train_condition, "RECOMPUTED", limit)
        torch.manual_seed(0)
        training = make_training(24)
        training.measure(rows)
        training.train_step(rows)
        found[limit] = [p.detach().clone() for p in training.network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))


def test_pairs_that_do_not_fit_are_not_read(tmp_path):
    rows = recording(tmp_path, 6, 24)
    every, few = (draw_pairs(rows, PAIR_BATCH, torch.Generator().manual_seed(3), most=most) for most in (None, lambda *_: 5))
    assert len(few) == 5 and all(
        a is None or torch.equal(a[:5], b) for a, b in zip(vars(every).values(), vars(few).values(), strict=True)
    )
    asked = []
    draw_pairs(rows, PAIR_BATCH, torch.Generator(), most=lambda *about: asked.append(about) or 1)
    assert asked == [(12, 24)] and most_pairs(2 * 256, 4096) < PAIR_BATCH == most_pairs(2 * 77, 768)


def test_units_are_the_same_in_parts():
    values = torch.randn(50, 1300, generator=torch.Generator().manual_seed(1)) * 3 + 1
    center, scale = robust_units(values)
    assert torch.equal(center, values.median(dim=0).values)
    torch.testing.assert_close(scale, 1.4826 * (values - center).abs().median(dim=0).values, rtol=0, atol=0)
