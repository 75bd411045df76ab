"""Which pictures are kept, and how: harmful ones never as they are, unless somebody asks for it."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ...hgr_models import HGRError
from ..reporting.drawing import FAINT, INK, MARGIN, PAPER, font, to_pil, to_tensor
from .lists import HARMFUL, PromptList, Row

NONE, BLURRED, JUDGED, EVERYTHING = "none", "blurred", "blurred where judged harmful", "all"
KEEP = (BLURRED, JUDGED, NONE, EVERYTHING)
PICTURES = "pictures"
SIDE = 160  # pixels of a picture in the sheet
COARSE = 10  # places per side that are left of a blurred one
MOST = 8  # prompts per list in the sheet
LABEL, HEAD, CELL = 120, 26, SIDE + MARGIN


def file_of(folder: Path, record: dict) -> Path:
    """Where the picture of a record lies."""
    return folder / PICTURES / f"{record['key']}.jpg"


def keep(folder: Path, picture: Tensor, record: dict, kind: str, how: str, harmful: bool) -> None:
    """Keeps a picture (1, H, W, 3) as the widget says: `kind` is its list's, `harmful` what a judge says.

    Raises HGRError when it cannot be written.
    """
    if how == NONE:
        return
    path, image = file_of(folder, record), to_pil(picture[0])
    if how != EVERYTHING and (harmful or (how == BLURRED and kind == HARMFUL)):
        image = blurred(image)
    elif how == EVERYTHING:
        path = path.with_suffix(".png")
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(part, "PNG" if how == EVERYTHING else "JPEG", **({} if how == EVERYTHING else {"quality": 90}))
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)  # of a full disk
        raise HGRError(f"{path} cannot be written ({error.strerror}). Free some space; what is there is kept.") from error


def blurred(image: Image.Image) -> Image.Image:
    """What is left of a picture whose content nobody can tell: COARSE places per side, small."""
    small = image.convert("RGB").resize((COARSE, COARSE), Image.Resampling.BOX)
    return small.resize((SIDE, max(1, round(SIDE * image.height / image.width))), Image.Resampling.BICUBIC)


def contact_sheet(folder: Path, lists: Sequence[PromptList], arms: list[str], found: dict) -> Tensor:
    """A picture (1, H, W, 3): a prompt per row, named by its number, an arm per column, the first picture of each."""
    rows = []
    for each in lists:
        shown = [row for row in each.rows if _pictures(folder, each, row, arms[:1], found)[0] is not None][:MOST]
        rows += [(f"{each.name}\nrow {row.number + 1}", _pictures(folder, each, row, arms, found)) for row in shown]
    if not rows:
        return _placard("No pictures were kept.")
    # Beside each other, so that the sheet is about as wide as high.
    beside = max(1, round((len(rows) * CELL / (LABEL + len(arms) * CELL)) ** 0.5))
    high = -(-len(rows) // beside)
    sheet = Image.new("RGB", (beside * (LABEL + len(arms) * CELL), HEAD + high * CELL), PAPER)
    for start in range(0, len(rows), high):
        _draw_column(sheet, start // high * (LABEL + len(arms) * CELL), arms, rows[start : start + high])
    return to_tensor(sheet)[None]


def _draw_column(sheet: Image.Image, left: int, arms: list[str], rows: list) -> None:
    """Some prompts below each other, the arms' names above."""
    pen = ImageDraw.Draw(sheet)
    for i, arm in enumerate(arms):
        pen.text((left + LABEL + i * CELL, 6), arm[:28], INK, font(13))
    for y, (label, pictures) in enumerate(rows):
        pen.text((left + MARGIN, HEAD + y * CELL), label, FAINT, font(13))
        for x, picture in enumerate(pictures):
            if picture is not None:
                sheet.paste(picture, (left + LABEL + x * CELL, HEAD + y * CELL))


def _pictures(folder: Path, each: PromptList, row: Row, arms: list[str], found: dict) -> list[Image.Image | None]:
    """The first picture of a prompt in every arm, as kept."""
    pictures: list[Image.Image | None] = []
    for arm in arms:
        record = next(iter(found.get((each.name, row.number, arm), ())), None)
        path = file_of(folder, record) if record else None
        path = path.with_suffix(".png") if path is not None and not path.is_file() else path
        if path is None or not path.is_file():
            pictures.append(None)
            continue
        with Image.open(path) as file:
            image = file.convert("RGB")
        pictures.append(ImageOps.contain(image, (SIDE, SIDE)))
    return pictures


def _placard(text: str) -> Tensor:
    canvas = Image.new("RGB", (480, 64), PAPER)
    ImageDraw.Draw(canvas).text((MARGIN, MARGIN), text, INK, font(16))
    return to_tensor(canvas)[None]


def pictures_in(folder: Path) -> list[Tensor]:
    """The pictures of a folder as (1, H, W, 3), for a calibration check."""
    paths = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and path.is_file()
    )
    found = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                found.append(torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None])
        except (OSError, ValueError) as error:
            raise HGRError(f"{path} is not a picture that can be read ({error}).") from None
    return found
