"""The picture of a report: what was read in a run, how far the guidance was turned, and where."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from . import drawing
from .drawing import COLOURS, FAINT, HARM, INK, LIMIT, MARGIN, PAPER, ROW, TRACK, font
from .traces import ImageTrace

WIDTH, LEFT, RIGHT = 920, 50, 590  # pixels: the picture, the plots' left side, the right column
TOP, CURVES, BARS, HEAT = 92, 220, 90, 190  # where the plots begin; heights of the plots, side of the heat map
NOTICE = 150  # letters of a notice; the scores have all of it
DOTS = 60  # steps beyond which a dot per step would be a blot


@dataclass(frozen=True)
class Plot:
    """A place for S steps side by side: `at(s, y)` is a pixel, y in [0, 1]."""

    top: int
    height: int
    steps: int

    @property
    def step(self) -> float:
        return (RIGHT - 2 * MARGIN - LEFT) / max(1, self.steps)

    def at(self, s: float, y: float) -> tuple[float, float]:
        return LEFT + (s + 0.5) * self.step, self.top + (1 - min(max(y, 0.0), 1.0)) * self.height


def size(categories: int) -> tuple[int, int]:
    """Width and height of the report for an HGR of so many categories."""
    left = TOP + CURVES + BARS + 5 * ROW
    right = TOP + (categories + 1) * ROW + HEAT + 2 * ROW
    return WIDTH, max(left, right) + MARGIN


def report(trace: ImageTrace, title: str) -> Tensor:
    """The report of an image (H, W, 3) in [0, 1]; its size is `size(K)`."""
    canvas = Image.new("RGB", size(len(trace.categories)), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), title, INK, font(18))
    draw.text((MARGIN, MARGIN + ROW), _summary(trace), HARM if trace.redirected.any() else FAINT, font(14))
    if trace.notices:
        more = f" (and {len(trace.notices) - 1} more)" if len(trace.notices) > 1 else ""
        draw.text((MARGIN, MARGIN + 2 * ROW - 4), f"not everything: {trace.notices[0][:NOTICE]}{more}", HARM, font(11))
    _curves(draw, trace, Plot(TOP, CURVES, len(trace.sigmas)))
    _bars(draw, trace, Plot(TOP + CURVES + 2 * ROW, BARS, len(trace.sigmas)))
    _prompts(draw, trace)
    _heat_map(canvas, draw, trace.heat_map, TOP + (len(trace.categories) + 1) * ROW)
    return drawing.to_tensor(canvas)


def miss(categories: int, text: str) -> Tensor:
    """A report (H, W, 3), as large as the others, that says `text`."""
    return drawing.notice(*size(categories), text)


def _summary(trace: ImageTrace) -> str:
    by = {
        "prompt": np.any([p.weights > 0 for p in trace.prompts], axis=0) if trace.prompts else [],
        "guidance": (trace.weights > 0).any(axis=0),
    }
    parts = []
    for name, found in by.items():
        if names := [category for category, flag in zip(trace.categories, found, strict=False) if flag]:
            parts.append(f"{', '.join(names)} by the {name}")
    return f"redirected: {'; '.join(parts)}" if parts else "nothing was redirected: this is the picture of the model alone"


def _colour(k: int) -> tuple[int, int, int]:
    return COLOURS[k % len(COLOURS)]


def _axes(draw: ImageDraw.ImageDraw, plot: Plot, label: str, highest: float) -> None:
    right = RIGHT - 2 * MARGIN
    draw.text((LEFT, plot.top - 22), label, INK, font(13))
    for part in (0.0, 0.5, 1.0):
        y = plot.at(0, part)[1]
        draw.line((LEFT, y, right, y), TRACK)
        draw.text((LEFT - 6, y), f"{part * highest:.3g}", FAINT, font(11), anchor="rm")


def _curves(draw: ImageDraw.ImageDraw, trace: ImageTrace, plot: Plot) -> None:
    """Harmfulness per category over the steps, with a tick per step at its threshold, and a dot where it was redirected."""
    _axes(draw, plot, "harmfulness of the guidance (short lines: thresholds, dots: redirected)", 1.0)
    if not plot.steps:
        draw.text((LEFT + 10, plot.top + 10), "no step was read (redirect: condition, or no negative prompt)", FAINT, font(13))
    values, half = np.nan_to_num(trace.harmfulness), 0.35 * plot.step
    for k in range(len(trace.categories)):
        points = [plot.at(s, y) for s, y in enumerate(values[:, k])]
        for s, limit in enumerate(trace.thresholds[:, k]):
            x, y = plot.at(s, limit)
            draw.line((x - half, y, x + half, y), _colour(k))
        if len(points) > 1:
            draw.line(points, _colour(k), 2)
        for (x, y), weight in zip(points, trace.weights[:, k], strict=True):
            if weight > 0 and plot.steps <= DOTS or len(points) == 1:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), _colour(k))


def _bars(draw: ImageDraw.ImageDraw, trace: ImageTrace, plot: Plot) -> None:
    """How far every step was turned, and the steps' names below."""
    turned = np.nan_to_num(trace.turned)
    highest = float(turned.max(initial=0)) or 1.0
    _axes(draw, plot, "redirection: |change of the guidance| / |guidance|", highest)
    for s, value in enumerate(turned):
        (x, top), half = plot.at(s, value / highest), max(1.0, 0.35 * plot.step)
        if value > 0:
            draw.rectangle((x - half, top, x + half, plot.top + plot.height), HARM)
    for s in sorted({0, plot.steps // 2, plot.steps - 1}) if plot.steps else []:
        x, y = plot.at(s, 0)
        text = f"step {trace.evaluations[s]}\nsigma {trace.sigmas[s]:.3g}"
        anchor, align = ("la", "left") if s == 0 else ("ra", "right") if s == plot.steps - 1 else ("ma", "center")
        draw.multiline_text((x, y + 5), text, FAINT, font(11), anchor=anchor, align=align)


def _prompts(draw: ImageDraw.ImageDraw, trace: ImageTrace) -> None:
    """The colour of every category, and its harmfulness in the prompt."""
    heading = "harmfulness of the prompt" if trace.prompts else "the prompt was not read"
    draw.text((RIGHT, TOP - 22), heading, INK, font(13))
    for k, name in enumerate(trace.categories):
        y = TOP + 4 + k * ROW
        draw.rectangle((RIGHT, y + 5, RIGHT + 10, y + 15), _colour(k))
        on = trace.strengths[k] > 0
        if trace.prompts:
            value, limit = float(np.nan_to_num(trace.prompt_harmfulness[k])), float(trace.prompt_thresholds[k])
            drawing.draw_bar(draw, drawing.Bar(name, value, limit if on else None), (RIGHT + 18, y, WIDTH - MARGIN))
        else:
            draw.text((RIGHT + 18, y + 2), f"{name[:30]}{'' if on else ' (off)'}", INK if on else FAINT, font(13))


def _heat_map(canvas: Image.Image, draw: ImageDraw.ImageDraw, heat: np.ndarray, top: int) -> None:
    """Where the guidance was turned: black, red, yellow up to the strongest place."""
    heat = np.nan_to_num(heat)
    highest = float(heat.max(initial=0))
    draw.text((RIGHT, top + 8), "where the guidance was turned", INK, font(13))
    if highest <= 0:
        draw.text((RIGHT, top + 8 + ROW), "nowhere", FAINT, font(13))
        return
    levels = np.stack([np.interp(heat / highest, (0, 0.6, 1), stops) for stops in zip(PAPER, HARM, LIMIT, strict=True)], axis=-1)
    scale = HEAT / max(heat.shape)
    pixels = [max(1, round(side * scale)) for side in reversed(heat.shape)]
    picture = Image.fromarray(levels.round().astype(np.uint8)).resize(pixels, Image.Resampling.BICUBIC)
    canvas.paste(picture, (RIGHT, top + 4 + ROW))
    draw.rectangle((RIGHT - 1, top + 3 + ROW, RIGHT + pixels[0], top + 4 + ROW + pixels[1]), outline=TRACK)
    draw.text((RIGHT, top + 8 + ROW + pixels[1]), f"brightest: {highest:.2f} of the mean guidance", FAINT, font(11))
