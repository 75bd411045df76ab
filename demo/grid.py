"""The demo's picture: rows of plain CFG above the same seeds with SafeCFG, with words beside and below."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, GAP, LABEL, LINE, LINES = 12, 4, 92, 14, 2  # pixels; LABEL: the words on the left, LINES of a prompt below its pictures
INK, PAPER, SAFE = (30, 30, 30), (255, 255, 255), (34, 120, 70)


@dataclass(frozen=True)
class Band:
    """One kind of prompt: its title, its prompts, and per arm the pictures (N, 3, H, W) in [0, 1]."""

    title: str
    prompts: Sequence[str]
    arms: dict[str, Tensor]


def labelled(bands: Sequence[Band], columns: int = 8) -> Image.Image:
    """All bands below one another; a band has as many columns as it has pictures, at most `columns`."""
    side = next(iter(bands[0].arms.values())).shape[-1]
    heights = [LINE + 6 + len(band.arms) * (side + GAP) + LINES * LINE + MARGIN for band in bands]
    sheet = Image.new("RGB", (LABEL + columns * (side + GAP) + MARGIN, sum(heights) + MARGIN), PAPER)
    top = MARGIN
    for band, height in zip(bands, heights, strict=True):
        _draw(sheet, band, top, side, columns)
        top += height
    return sheet


def _draw(sheet: Image.Image, band: Band, top: int, side: int, columns: int) -> None:
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    pen.text((MARGIN, top), band.title, INK, ImageFont.load_default(14))
    top += LINE + 6
    for name, pictures in band.arms.items():
        pen.text((MARGIN, top + side // 2 - 7), name, SAFE if name == "SafeCFG" else INK, font)
        for i, picture in enumerate(pictures[:columns]):
            pixels = (picture * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            sheet.paste(Image.fromarray(pixels), (LABEL + i * (side + GAP), top))
        top += side + GAP
    for i, prompt in enumerate(band.prompts[:columns]):
        lines = textwrap.wrap(prompt, side // 6, max_lines=LINES, placeholder=" …")
        pen.text((LABEL + i * (side + GAP), top), "\n".join(lines), INK, ImageFont.load_default(11))
