"""One case of the coverage matrix, checked; and the tally of all cases, which conftest.py prints at the end."""

import dataclasses
from collections import Counter
from collections.abc import Callable

import torch

from matrix import Prompts, Scene, is_blind, sample, with_safecfg
from matrix_ideal import Known, ideal, safe_prompt

TALLY = Counter()
CATEGORY_OFF, STRENGTH_0 = (0.0, 1.0), (0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph and what is known of it.

    rows: the harmful pictures of the batch. coupled: the graph mixes a batch's pictures. windows: how many context windows it
    makes of a latent, where each is redirected by itself.
    """

    way: str
    prompts: Prompts
    scene: Scene
    patch: Callable = lambda model: model
    rows: frozenset[int] = frozenset({1})
    coupled: bool = False
    windows: int = 1

    @property
    def blind(self) -> bool:
        return is_blind(self.way, self.scene.cfg)

    def sample(self, model, prompts: Prompts | None = None) -> torch.Tensor:
        return sample(self.way, model, prompts or self.prompts, self.scene)


def check(monkeypatch, caplog, model, case: Case) -> None:
    """Redirected exactly once, as the ideal model would draw it; everything else as it was, to the last bit."""
    known, patch, strict = Known(monkeypatch, case.rows), case.patch, not case.blind
    plain = case.sample(patch(model))
    with ideal(monkeypatch, case.rows, case.blind) as wanted:
        expected = case.sample(wanted.watch(patch(model)), case.prompts.changed(safe_prompt))
    assert case.blind or wanted.count > 0
    orders = {"before": lambda: patch(with_safecfg(model, strict)), "after": lambda: with_safecfg(patch(model), strict)}
    for order, make in orders.items():
        safe_model = make()
        known.start()
        safe = case.sample(safe_model)
        count = known.guidance.count
        assert count == wanted.count * case.windows, f"SafeCFG {order}: {count} redirections, not {wanted.count * case.windows}"
        _compare(case, f"SafeCFG {order}", safe, expected, plain)
        TALLY["redirections, each exactly once"] += count
    known.start(on=False)
    assert torch.equal(case.sample(safe_model), plain), "a clean run after a harmful one changed"
    known.start()
    for what, strengths in {"a category switched off": CATEGORY_OFF, "strength 0": STRENGTH_0}.items():
        assert torch.equal(case.sample(patch(with_safecfg(model, strict, strengths))), plain), f"{what}: not bit-identical"
    alarms = [r for r in caplog.records if r.name.startswith("safecfg") and "SafeCFG" in r.message]
    assert len(alarms) == (4 if case.blind else 0), f"{len(alarms)} alarms: {alarms}"  # in every run but that with strength 0
    TALLY["cases"] += 1
    TALLY["bit-identical runs (clean, category off, strength 0)"] += 3
    TALLY["alarms of guiders that cannot be redirected"] += len(alarms)


def _compare(case: Case, what: str, safe: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor) -> None:
    size = float(expected.abs().max())
    torch.testing.assert_close(safe, expected, atol=1e-4 * size, rtol=0, msg=lambda text: f"{what}: {text}")
    change = (safe - plain).abs().flatten(1).amax(dim=1)
    harmful = torch.tensor([i in case.rows for i in range(len(safe))])
    assert case.scene.cfg == 0 or (change[harmful] > 1e-3 * size).all(), f"{what}: nothing was redirected"
    assert case.coupled or torch.equal(safe[~harmful], plain[~harmful]), f"{what}: a clean picture changed"


def table() -> list[str]:
    """The tally, a line per count."""
    return [f"matrix | {name} | {count} |" for name, count in TALLY.items()]
