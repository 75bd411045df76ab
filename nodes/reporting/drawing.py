"""Pictures of scores: bars per category, heat maps over pictures, curves and notices. Pillow only: ComfyUI ships it."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK, FAINT, TRACK = (24, 26, 30), (232, 234, 238), (120, 126, 136), (52, 56, 64)
HARM, CLEAN, LIMIT = (226, 76, 62), (88, 166, 120), (250, 200, 80)
COLOURS = ((96, 160, 240), (236, 148, 60), (120, 200, 120), (214, 110, 190), (90, 200, 210), (220, 200, 90), (170, 130, 230))
STRONG = 4.0  # log odds that a word adds: it is drawn in full red
MARGIN, ROW, PANEL, NAME = 12, 24, 320, 110  # pixels: border, a line of text or a bar, longest side of a picture, category names


@dataclass(frozen=True)
class Bar:
    """A category: harmfulness in [0, 1] and its threshold; None: switched off."""

    name: str
    value: float
    threshold: float | None

    @property
    def flagged(self) -> bool:
        return self.threshold is not None and self.value > self.threshold


@dataclass(frozen=True)
class Curve:
    """A line through points (x, y) in [0, 1]."""

    name: str
    points: Sequence[tuple[float, float]]


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: Latin letters."""
    return ImageFont.load_default(size)


def to_pil(picture: Tensor) -> Image.Image:
    """A picture (H, W, 3) in [0, 1] as Pillow's."""
    return Image.fromarray((picture.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """A Pillow picture as (H, W, 3) float32 in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)


def overlay(picture: Tensor, heat: Tensor) -> Tensor:
    """A picture (H, W, 3) in grey under a heat map (H, W) in [0, 1] in red."""
    grey = picture[..., :3].mean(dim=2, keepdim=True).clamp(0, 1) * 0.8
    red = torch.tensor(HARM, dtype=picture.dtype, device=picture.device) / 255
    return grey + 0.85 * heat.to(picture)[..., None] * (red - grey)


def detection(picture: Tensor, heat: Tensor, bars: Sequence[Bar], title: str) -> Tensor:
    """A picture (H, W, 3), its heat map (H, W) over it, and a bar per category: (H', W', 3); equal sizes give equal sizes."""
    panels = [_fit(to_pil(p)) for p in (picture, overlay(picture, heat))]
    width, height = panels[0].size
    canvas = Image.new("RGB", (max(2 * width + 3 * MARGIN, 2 * PANEL), height + 3 * MARGIN + ROW * (1 + len(bars))), PAPER)
    for i, panel in enumerate(panels):
        canvas.paste(panel, (MARGIN + i * (width + MARGIN), MARGIN))
    draw = ImageDraw.Draw(canvas)
    top = height + 2 * MARGIN
    draw.text((MARGIN, top), title, INK, font(15))
    for i, bar in enumerate(bars, start=1):
        draw_bar(draw, bar, (MARGIN, top + i * ROW, canvas.width - MARGIN))
    return to_tensor(canvas)


def _fit(image: Image.Image) -> Image.Image:
    scale = PANEL / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def draw_bar(draw: ImageDraw.ImageDraw, bar: Bar, place: tuple[int, int, int]) -> None:
    """A category's bar at (left, top, right): name, value, and the threshold as a tick."""
    left, top, right = place
    start, end = left + NAME, right - 50
    at = lambda value: start + round((end - start) * min(max(value, 0.0), 1.0))  # noqa: E731
    off = bar.threshold is None
    draw.text((left, top + 2), bar.name[:16], FAINT if off else INK, font(13))
    draw.rectangle((start, top + 4, end, top + ROW - 8), TRACK)
    draw.rectangle((start, top + 4, at(bar.value), top + ROW - 8), FAINT if off else HARM if bar.flagged else CLEAN)
    if not off:
        draw.line((at(bar.threshold), top + 1, at(bar.threshold), top + ROW - 5), LIMIT, 2)
    draw.text((end + 6, top + 2), "off" if off else f"{bar.value:.2f}", FAINT if off else INK, font(13))


def curves(lines: Sequence[Curve], mark: tuple[float, float], labels: tuple[str, str], notes: Sequence[str]) -> Tensor:
    """Curves in the unit square with a marked point, the axes' labels (x, y) and lines of text below: (H, W, 3)."""
    side, left = 420, 60
    legend = [*((line.name, COLOURS[i % len(COLOURS)]) for i, line in enumerate(lines)), *((note, INK) for note in notes)]
    canvas = Image.new("RGB", (left + side + 2 * MARGIN, side + 6 * MARGIN + ROW * len(legend)), PAPER)
    draw = ImageDraw.Draw(canvas)
    at = lambda x, y: (left + round(x * side), MARGIN + round((1 - y) * side))  # noqa: E731
    for tick in (0, 0.25, 0.5, 0.75, 1):
        draw.line((*at(tick, 0), *at(tick, 1)), TRACK)
        draw.line((*at(0, tick), *at(1, tick)), TRACK)
        draw.text((at(tick, 0)[0], at(tick, 0)[1] + 4), f"{tick:g}", FAINT, font(12), anchor="mt")
        draw.text((left - 6, at(0, tick)[1]), f"{tick:g}", FAINT, font(12), anchor="rm")
    draw.line((*at(0, 0), *at(1, 1)), FAINT)
    for i, line in reversed(list(enumerate(lines))):  # the first on top
        draw.line([at(x, y) for x, y in line.points], COLOURS[i % len(COLOURS)], 3 if i == 0 else 2)
    x, y = at(*mark)
    draw.ellipse((x - 6, y - 6, x + 6, y + 6), LIMIT, PAPER)
    draw.text((left + side // 2, side + 2 * MARGIN + 10), labels[0], INK, font(13), anchor="mt")
    draw.text((MARGIN // 2, MARGIN + ROW), labels[1].replace(" ", "\n", 1), INK, font(11))
    for i, (text, colour) in enumerate(legend):
        draw.text((MARGIN, side + 5 * MARGIN + i * ROW), text, colour, font(14))
    return to_tensor(canvas)


def prompt(bars: Sequence[Bar], pieces: Sequence[tuple[str, float]]) -> Tensor:
    """A prompt's scores as bars, and below them its text in pieces, each on a ground the redder the more it adds: (H, W, 3)."""
    width, size = 2 * PANEL, 15
    placed, x, y = [], float(MARGIN), ROW * len(bars) + 2 * MARGIN
    for piece, value in pieces:
        for part in re.findall(r"\s+|\S+", piece):
            length = font(size).getlength(" " if part.isspace() else part)
            if "\n" in part or (x + length > width - MARGIN and x > MARGIN):
                x, y = MARGIN, y + ROW
            if not part.isspace() or x > MARGIN:
                placed.append((x, y, length, part, value))
                x += length
    canvas = Image.new("RGB", (width, y + (ROW + MARGIN if placed else 0)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, bar in enumerate(bars):
        draw_bar(draw, bar, (MARGIN, MARGIN + i * ROW, width - MARGIN))
    for x, y, length, part, value in placed:
        if part.isspace():
            continue
        share = min(max(value, 0.0) / STRONG, 1.0)
        ground = tuple(round(p + share * (h - p)) for p, h in zip(PAPER, HARM, strict=True))
        draw.rectangle((x - 1, y, x + length + 1, y + ROW - 4), ground)
        draw.text((x, y + 1), part, INK, font(size))
    return to_tensor(canvas)


def notice(width: int, height: int, text: str) -> Tensor:
    """A picture (height, width, 3) that says `text` instead of showing anything; the letters shrink until the text fits."""
    canvas = Image.new("RGB", (width, height), TRACK)
    draw = ImageDraw.Draw(canvas)
    for size in (64, 48, 36, 28, 22, 18, 14, 11, 8):
        letters = max(4, int(0.85 * width / (0.55 * size)))
        wrapped = "\n".join(textwrap.wrap(text, letters)) or " "
        left, top, right, bottom = draw.multiline_textbbox((0, 0), wrapped, font(size), align="center")
        if right - left <= 0.9 * width and bottom - top <= 0.8 * height:
            break
    draw.multiline_text((width / 2, height / 2), wrapped, INK, font(size), anchor="mm", align="center")
    return to_tensor(canvas)
