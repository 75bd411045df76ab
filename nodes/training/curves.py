"""The picture of a training: loss, distance to the partner's direction, and accuracy per category, of both networks."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ..reporting.drawing import COLOURS, FAINT, INK, MARGIN, PAPER, ROW, TRACK, font

WIDTH, HEIGHT, LEFT = 460, 180, 46  # of a plot, and of the space for its numbers, in pixels
PARTS = ("condition", "guidance")
SMOOTH = 0.9


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


def draw(history: list[dict], categories: tuple[str, ...], name: str, notes: Sequence[str]) -> Image.Image:
    """The curves of a history of step reports; empty plots before a part begins."""
    rows = len(categories) + len(notes) + 2
    canvas = Image.new("RGB", (2 * (LEFT + WIDTH + 2 * MARGIN), 3 * (HEIGHT + 3 * ROW) + (rows + 1) * ROW), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN), f"SafeCFG Train HGR: {name}", INK, font(18))
    for column, part in enumerate(PARTS):
        entries = [entry for entry in history if entry["part"] == part]
        left = MARGIN + LEFT + column * (LEFT + WIDTH + 2 * MARGIN)
        last = f"step {entries[-1]['step']}" if entries else "not begun"
        for row, (title, lines) in enumerate(_plots(entries, categories)):
            top = 3 * ROW + row * (HEIGHT + 3 * ROW)
            plot(pen, (left, top), f"{part} redirector, {title} ({last})", lines)
    top = 3 * (HEIGHT + 3 * ROW) + ROW
    for i, text in enumerate((*categories, *notes)):
        pen.text((MARGIN, top + i * ROW), text, COLOURS[i % len(COLOURS)] if i < len(categories) else INK, font(14))
    return canvas


def _plots(entries: list[dict], categories: tuple[str, ...]) -> list[tuple[str, list[Line]]]:
    column = lambda key: [entry[key] for entry in entries]  # noqa: E731
    accuracy = [Line(c, [entry["accuracy"][k] for entry in entries]) for k, c in enumerate(categories)]
    held_out = [value for entry in entries if (value := entry.get("held_out")) is not None]
    distance = [Line("after", column("error")), Line("before", column("before")), Line("after, on runs not trained on", held_out)]
    return [
        ("loss", [Line("loss", column("loss"))]),
        ("distance to the partner's direction: after, before; on held-out runs", distance),
        ("accuracy per category", accuracy),
    ]


def plot(pen: ImageDraw.ImageDraw, place: tuple[int, int], title: str, lines: list[Line]) -> None:
    """Draws lines with their scale at a place (left, top) in pixels."""
    left, top = place
    pen.text((left, top - 20), title, INK, font(13))
    smooth = [line.smooth() for line in lines]
    values = [v for line in smooth for v in line]
    low, high = (0.0, max(1e-6, *values)) if values else (0.0, 1.0)
    if "accuracy" in title and values:
        low, high = min(0.5, *values), 1.0
    for part in (0.0, 0.5, 1.0):
        y = top + (1 - part) * HEIGHT
        pen.line((left, y, left + WIDTH, y), TRACK)
        pen.text((left - 6, y), f"{low + part * (high - low):.3g}", FAINT, font(11), anchor="rm")
    for i, line in enumerate(smooth):
        if len(line) > 1:
            at = [(left + x * WIDTH / (len(line) - 1), top + (1 - (y - low) / (high - low)) * HEIGHT) for x, y in enumerate(line)]
            pen.line(at, COLOURS[i % len(COLOURS)], 2)
