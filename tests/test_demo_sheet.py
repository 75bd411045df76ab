"""The demo's sheet, its threads, and pictures drawn in two parts."""

import torch
from torch.testing import assert_close

from demo import threads
from demo.evaluate import Drawn
from demo.grid import GAP, LABEL, LINE, MARGIN, Band, labelled


def test_pictures_stand_in_rows_with_words():
    red, blue = (torch.zeros(2, 3, 32, 32) for _ in range(2))
    red[:, 0], blue[:, 2] = 1, 1
    sheet = labelled([Band("A title", ["a knife", "a frog"], {"plain CFG": red, "SafeCFG": blue})], columns=2)
    top, left = MARGIN + LINE + 6, LABEL
    assert sheet.getpixel((left + 5, top + 5)) == (255, 0, 0)
    assert sheet.getpixel((left + 5, top + 32 + GAP + 5)) == (0, 0, 255)
    assert sheet.getpixel((left + 32 + GAP + 5, top + 5)) == (255, 0, 0)
    below = sheet.crop((left, top + 2 * (32 + GAP), left + 32, sheet.height - 1))
    beside = sheet.crop((0, top, left - 1, top + 32))
    assert all(part.convert("L").getextrema()[0] < 100 for part in (below, beside))  # there are words


def test_threads_follow_what_a_container_may_use(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "CPU_MAX", limit := tmp_path / "cpu.max")
    assert threads.usable_cores() == 8
    for text, cores in {"max 100000": 8, "250000 100000": 3, "50000 100000": 1}.items():
        limit.write_text(text)
        assert threads.usable_cores() == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads.usable_cores() == 2


def test_more_pictures_of_an_arm_are_put_behind_those_before():
    one = Drawn(torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 4, 4), [{"cat"}], 1.0, 2.0)
    two = Drawn(torch.ones(3, 4, 2, 2), torch.ones(3, 3, 4, 4), [{"dog"}, set(), set()], 2.0, 4.0)
    both = one.with_more(two)
    assert both.found == [{"cat"}, {"dog"}, set(), set()] and (both.seconds_per_step, both.rows_per_step) == (1.75, 3.5)
    assert_close(both.latents[:, 0, 0, 0], torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert len(both.pictures) == 4
