"""The picture of a training: loss, distance to the partner's direction, and accuracy per category, of both networks; and a summary in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageDraw

from ... import hgr_models
from ...hgr_models.calibration import proof_in_words
from ...hgr_models.training import Training
from ..reporting.drawing import COLOURS, FAINT, INK, MARGIN, PAPER, ROW, TRACK, font

DISTANCES = {"before": "before", "error": "after", "held_out": "after on runs that were not trained on"}  # of a step report

WIDTH, HEIGHT, LEFT = 460, 180, 46  # of a plot, and of the space for its numbers, in pixels
BLOCK = HEIGHT + 3 * ROW  # a plot with its title, its legend and a gap
PARTS = {"prompts": "condition redirector from prompts", "condition": "condition redirector", "guidance": "guidance redirector"}
COLUMNS = 2  # of the picture: the first two parts that there are
SMOOTH = 0.9
LATEST = 20  # step reports that say how it stands
NOTHING_YET = 0.95  # of the distance: what is left of it when a network does nothing yet
MEANINGS = (
    "loss: what every step lowers; only that it falls says something",
    "distance: 0 is the safe prompt's own direction, 1 about what is left without redirection",
    "accuracy: the share of prompts or pictures in which a category is read rightly",
)


@dataclass(frozen=True)
class Line:
    """Values over the steps, smoothed."""

    name: str
    values: Sequence[float]

    def smooth(self) -> list[float]:
        out, mean = [], self.values[0] if self.values else 0.0
        for value in self.values:
            mean = SMOOTH * mean + (1 - SMOOTH) * value
            out.append(mean)
        return out


def draw(
    history: list[dict],
    categories: tuple[str, ...],
    name: str,
    notes: Sequence[str],
    phases: Sequence[str] = (),
    planned: Sequence[str] = tuple(PARTS),
) -> Image.Image:
    """The curves of a history of step reports, empty plots before a part begins; below them what the numbers mean, whether what
    was trained works, the `phases` with their times, and notes. `planned`: which of PARTS are trained; one alone takes both columns.
    """
    width = 2 * (LEFT + WIDTH + 2 * MARGIN)
    names = _rows_of(categories, width - 2 * MARGIN)
    texts = [*((text, FAINT) for text in MEANINGS), *((text, INK) for text in (*phases, *verdicts(history), *notes))]
    shown = _shown(history, planned)
    rows = 3 if len(shown) > 1 else 2
    canvas = Image.new("RGB", (width, rows * BLOCK + (len(names) + len(texts) + 3) * ROW), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN), f"Training of {name}", INK, font(18))
    for column, part in enumerate(shown):
        entries = [entry for entry in history if entry["part"] == part]
        last = f"step {entries[-1]['step']}" if entries else "not begun"
        for i, (title, lines) in enumerate(_plots(entries, categories)):
            row, at = (i, column) if len(shown) > 1 else divmod(i, COLUMNS)
            place = MARGIN + LEFT + at * (LEFT + WIDTH + 2 * MARGIN), 4 * ROW + row * BLOCK
            legend = title != "accuracy"  # the categories' is below all
            plot(pen, place, f"{PARTS[part]}: {title} ({last})", lines, legend)
    top = rows * BLOCK + 2 * ROW
    for named in names:
        for x, text, colour in named:
            pen.text((MARGIN + x, top), text, colour, font(14))
        top += ROW
    for i, (text, colour) in enumerate(texts):
        pen.text((MARGIN, top + i * ROW), text, colour, font(14))
    return canvas


def _rows_of(names: Sequence[str], width: int) -> list[list[tuple[int, str, tuple]]]:
    """Names in their colours in as many rows as they need: (x, name, colour) each."""
    rows: list[list[tuple[int, str, tuple]]] = [[]]
    x = 0
    for i, name in enumerate(names):
        length = round(font(14).getlength(name)) + ROW
        if rows[-1] and x + length > width:
            rows.append([])
            x = 0
        rows[-1].append((x, name, COLOURS[i % len(COLOURS)]))
        x += length
    return rows


def verdicts(history: list[dict]) -> list[str]:
    """Whether what was trained works, a line for every part that has begun."""
    lines = []
    for part in PARTS:
        last = [entry for entry in history if entry["part"] == part][-LATEST:]
        if not last:
            continue
        held_out = [(e["held_out"], e["before"]) for e in last if e.get("held_out") is not None]
        pairs = held_out or [(entry["error"], entry["before"]) for entry in last]
        left = sum(error for error, _ in pairs) / max(sum(before for _, before in pairs), 1e-9)
        where = ", where it was not trained" if held_out else ""
        if left > NOTHING_YET:
            lines.append(f"the {PARTS[part]} does nothing yet{where}: it needs more steps")
        else:
            lines.append(f"the {PARTS[part]} takes {100 * (1 - left):.0f} % of the distance away{where}")
    return lines


def _shown(history: list[dict], planned: Sequence[str]) -> list[str]:
    """The last parts that have begun, and then those that will come: at most as many as there are columns."""
    begun = [part for part in PARTS if any(entry["part"] == part for entry in history)]
    return [*begun[-COLUMNS:], *(part for part in PARTS if part in planned and part not in begun)][:COLUMNS]


def _plots(entries: list[dict], categories: tuple[str, ...]) -> list[tuple[str, list[Line]]]:
    column = lambda key: [entry[key] for entry in entries]  # noqa: E731
    accuracy = [Line(c, [entry["accuracy"][k] for entry in entries]) for k, c in enumerate(categories)]
    held_out = [value for entry in entries if (value := entry.get("held_out")) is not None]
    distance = [
        Line("after", column("error")),
        Line("before", column("before")),
        Line("after, where it was not trained", held_out),
    ]
    return [("loss", [Line("loss", column("loss"))]), ("distance", distance), ("accuracy", accuracy)]


def plot(pen: ImageDraw.ImageDraw, place: tuple[int, int], title: str, lines: list[Line], legend: bool = True) -> None:
    """Draws lines with their scale at a place (left, top) in pixels, the title and, if asked for, a legend above."""
    left, top = place
    pen.text((left, top - 42), title, INK, font(13))
    x = left
    for i, line in enumerate(lines if legend else ()):
        pen.text((x, top - 22), line.name, COLOURS[i % len(COLOURS)], font(12))
        x += round(font(12).getlength(line.name)) + ROW
    smooth = [line.smooth() for line in lines]
    values = [v for curve in smooth for v in curve]
    low, high = (0.0, max(1e-6, *values)) if values else (0.0, 1.0)
    if "accuracy" in title and values:
        low, high = min(0.5, *values), 1.0
    for part in (0.0, 0.5, 1.0):
        y = top + (1 - part) * HEIGHT
        pen.line((left, y, left + WIDTH, y), TRACK)
        pen.text((left - 6, y), f"{low + part * (high - low):.3g}", FAINT, font(11), anchor="rm")
    for i, curve in enumerate(smooth):
        if len(curve) > 1:
            at = [
                (left + n * WIDTH / (len(curve) - 1), top + (1 - (v - low) / (high - low)) * HEIGHT) for n, v in enumerate(curve)
            ]
            pen.line(at, COLOURS[i % len(COLOURS)], 2)


class Trained(Protocol):
    """What a summary asks a session for."""

    notes: list[str]

    @property
    def history(self) -> list[dict]: ...
    @property
    def trainings(self) -> dict[str, Training]: ...


def summary(session: Trained, hgr: hgr_models.HGR, path: Path) -> str:
    """What was trained, in words."""
    proof = hgr.info.training["calibration"]
    lines = [f"{path}: {', '.join(hgr.info.categories)}", *session.notes]
    for part, training in session.trainings.items():
        last = [entry for entry in session.history if entry["part"] == part][-20:]
        goal = "the safe prompt, read at random" if part == "prompts" else "the safe direction"
        text = f"{PARTS[part]}: {training.step} steps, distance to {goal}"
        for key, what in DISTANCES.items():
            values = [entry[key] for entry in last if entry.get(key) is not None]
            text += f", {sum(values) / len(values):.2f} {what}" if values else ""
        lines.append(text)
    lines += verdicts(session.history)
    lines.append(f"false alarms (asked for: {100 * proof['rate']:.2g} % of pictures):")
    lines += [f"  {line}" for line in proof_in_words(proof)]
    return "\n".join(lines)
