"""What a training shows: its parts with their own times, whether what it trained works, and curves whose words do not collide."""

import pytest
from safecfg.nodes.reporting.drawing import font
from safecfg.nodes.training import curves, progress

NINE = tuple(f"category {i}" for i in range(9))


def entry(part: str, step: int, error: float, held_out: float | None = None) -> dict:
    return {"part": part, "step": step, "loss": error, "error": error, "before": 1.0, "accuracy": [0.9] * 9, "held_out": held_out}


@pytest.fixture
def bar(monkeypatch):
    """A training of three parts, its clock, and what it said."""
    now, said = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Progress({"encoding": 10.0, "prompts": 100.0, "guidance": 200.0}, lambda: None, lambda: None, said.append)
    monkeypatch.setattr(bar.bar, "update_absolute", lambda *args: None)
    return bar, now, said


def test_every_part_has_its_own_time(bar):
    bar, now, said = bar
    assert bar.lines() == ["encoding prompts: to come, about 10 s", "learning from prompts: to come, about 2 min",
                           "guidance redirector: to come, about 3 min"]  # fmt: skip
    now[0] = 12.0
    bar.update("encoding", 1.0, "encoding prompts")
    now[0] = 42.0
    bar.update("prompts", 0.5, "step 5 of 10")
    assert bar.lines()[:2] == ["encoding prompts: done, 12 s", "learning from prompts: 50 % in 30 s, about 50 s left"]
    assert said == ["about 5 min left: encoding prompts", "about 4 min left, 50 s of this: step 5 of 10"]


def test_what_an_earlier_run_did_is_done(bar):
    bar, _, _ = bar
    bar.finish("encoding")
    bar.finish("a part that this training does not have")
    assert bar.lines()[0] == "encoding prompts: done" and bar.left == 300.0


def test_it_says_whether_what_was_trained_works():
    steps = [entry("prompts", i, 0.4, 0.5) for i in range(30)] + [entry("guidance", i, 0.99) for i in range(30)]
    assert curves.verdicts(steps) == [
        "the condition redirector from prompts takes 50 % of the distance away, where it was not trained",
        "the guidance redirector does nothing yet: it needs more steps",
    ]
    assert curves.verdicts([]) == []
    turned = [entry("guidance", 1, 0.99)] * 40 + [entry("guidance", 2, 0.2)] * 20
    assert curves.verdicts(turned) == ["the guidance redirector takes 80 % of the distance away"]  # the latest count


def test_titles_and_legends_fit_their_plots():
    history = [entry(part, 10_000, 0.5, 0.5) for part in curves.PARTS]
    for part in curves.PARTS:
        for title, lines in curves._plots([e for e in history if e["part"] == part], NINE):
            text = f"{curves.PARTS[part]}: {title} (step 10000)"
            assert font(13).getlength(text) <= curves.WIDTH
            if title != "accuracy":
                assert sum(font(12).getlength(line.name) + curves.ROW for line in lines) <= curves.WIDTH + curves.ROW


def test_names_of_categories_wrap():
    rows = curves._rows_of(NINE, 400)
    assert [name for row in rows for _, name, _ in row] == list(NINE) and len(rows) > 1
    for row in rows:
        assert all(x + font(14).getlength(name) <= 400 for x, name, _ in row)
        assert all(a[0] + font(14).getlength(a[1]) < b[0] for a, b in zip(row, row[1:], strict=False))


def test_the_picture_grows_with_what_it_says():
    history = [entry("prompts", i, 0.5) for i in range(3)]
    short, long = (curves.draw(history, NINE, "x", notes, phases) for notes, phases in (([], []), (["a note"], ["a phase"] * 4)))
    assert long.height == short.height + 5 * curves.ROW and long.width == short.width


def test_it_draws_what_is_trained_and_no_more():
    """SafeCFG Protect trains from prompts alone: no empty plots of networks that never begin."""
    assert curves._shown([], ["prompts"]) == ["prompts"]
    assert curves._shown([], ["prompts", "guidance"]) == ["prompts", "guidance"]
    assert curves._shown([entry("prompts", 1, 0.5)], ["prompts", "condition", "guidance"]) == ["prompts", "condition"]
    begun = [entry(part, 1, 0.5) for part in curves.PARTS]
    assert curves._shown(begun, list(curves.PARTS)) == ["condition", "guidance"]
    one, two = (
        curves.draw([entry("prompts", 1, 0.5)], NINE, "x", [], [], planned) for planned in (["prompts"], ["prompts", "guidance"])
    )
    assert one.height == two.height - curves.BLOCK and one.width == two.width
