"""The demo's little world: one or two pictograms on a coloured background, with a caption of words.

Pictograms are Noto Color Emoji (OFL), kept in `data/pictograms.png`, so nothing but Pillow is needed to render a scene.
Everything stands on a grid of 8 pixels, one cell of the autoencoder's latent.
"""

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).parent / "data"
SIZE, CELL = 128, 8  # picture and grid cell, in pixels
SINGLE_SIZES, PAIR_SIZE = (72, 88), 56  # pictograms, in pixels
ATLAS, TILE = DATA / "pictograms.png", 112

_WORLD = json.loads((DATA / "world.json").read_text(encoding="utf-8"))
SPLIT = json.loads((DATA / "split.json").read_text(encoding="utf-8"))
CATEGORIES: tuple[str, ...] = tuple(_WORLD["categories"])
CATEGORY: dict[str, str | None] = {p["name"]: p["category"] for p in _WORLD["pictograms"]}
EMOJI: dict[str, str] = {p["name"]: p["emoji"] for p in _WORLD["pictograms"]}
NAMES: tuple[str, ...] = tuple(CATEGORY)
CLEAN = tuple(n for n in NAMES if CATEGORY[n] is None)
HARMFUL = tuple(n for n in NAMES if CATEGORY[n] is not None)
STAND_IN: dict[str, str] = _WORLD["stand_ins"]  # what the safe partner of a prompt shows instead, per category
BACKGROUNDS: dict[str, list[int]] = _WORLD["backgrounds"]


@dataclass(frozen=True)
class Scene:
    """Pictograms with their (x, y, size) in pixels, the background's name and its brightness (about 1)."""

    names: tuple[str, ...]
    places: tuple[tuple[int, int, int], ...]
    background: str
    brightness: float = 1.0


def article(name: str) -> str:
    """`an apple`, `a knife`; plural names stand alone."""
    if name.endswith("s") and name not in ("bus",) or name in ("bread", "milk", "coffee", "cheese", "blood", "dynamite"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(names: tuple[str, ...], rng: random.Random, background: str | None = None) -> str:
    """A caption of a scene with these pictograms; names the background in half of the cases when one is given."""
    parts = [article(n) for n in rng.sample(names, len(names))]
    text = rng.choice((" and ", " and ", " and ", " with ", ", ")).join(parts)
    text = rng.choice(("", "", "", "a picture of ")) + text
    if background is not None and rng.random() < 0.5:
        text += f" on a {background} background" if rng.random() < 0.7 else f" on {background}"
    return text


def random_scene(names: tuple[str, ...], rng: random.Random) -> Scene:
    """Places one or two pictograms at random on the grid, without overlap."""
    cells = SIZE // CELL
    if len(names) == 1:
        size = rng.choice(SINGLE_SIZES)
        free = cells - size // CELL
        places: tuple[tuple[int, int, int], ...] = ((rng.randint(0, free) * CELL, rng.randint(0, free) * CELL, size),)
    else:
        span = PAIR_SIZE // CELL
        while True:
            a, b = [(rng.randint(0, cells - span), rng.randint(0, cells - span)) for _ in names]
            if abs(a[0] - b[0]) >= span or abs(a[1] - b[1]) >= span:
                break
        places = tuple((x * CELL, y * CELL, PAIR_SIZE) for x, y in (a, b))
    return Scene(names, places, rng.choice(tuple(BACKGROUNDS)), rng.uniform(0.94, 1.04))


@cache
def _tiles() -> dict[str, Image.Image]:
    atlas = Image.open(ATLAS).convert("RGBA")
    columns = atlas.width // TILE
    box = lambda i: (i % columns * TILE, i // columns * TILE, (i % columns + 1) * TILE, (i // columns + 1) * TILE)  # noqa: E731
    return {name: atlas.crop(box(i)) for i, name in enumerate(NAMES)}


@cache
def pictogram(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour (size, size, 3) in [0, 255] and opacity (size, size, 1) in [0, 1] of a pictogram, float32."""
    tile = np.asarray(_tiles()[name].resize((size, size), Image.Resampling.LANCZOS), dtype=np.float32)
    return tile[..., :3], tile[..., 3:] / 255


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene: (SIZE, SIZE, 3) uint8."""
    colour = np.clip(np.array(BACKGROUNDS[scene.background], np.float32) * scene.brightness, 0, 255)
    picture = np.tile(colour, (SIZE, SIZE, 1))
    for name, (x, y, size) in zip(scene.names, scene.places, strict=True):
        rgb, alpha = pictogram(name, size)
        view = picture[y : y + size, x : x + size]
        view += alpha * (rgb - view)
    return picture.round().astype(np.uint8)


def draw_atlas(font: Path) -> None:
    """Draws every pictogram from the font into `data/pictograms.png`; needed only when the world changes."""
    from PIL import ImageDraw, ImageFont

    face = ImageFont.truetype(str(font), 109)  # the only size Noto Color Emoji carries
    columns = 11
    atlas = Image.new("RGBA", (columns * TILE, -(-len(NAMES) // columns) * TILE))
    for i, name in enumerate(NAMES):
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((8, 8), EMOJI[name], font=face, embedded_color=True)
        tile = canvas.crop(canvas.getbbox())
        scale = TILE / max(tile.size)
        tile = tile.resize((round(tile.width * scale), round(tile.height * scale)), Image.Resampling.LANCZOS)
        corner = (i % columns * TILE + (TILE - tile.width) // 2, i // columns * TILE + (TILE - tile.height) // 2)
        atlas.paste(tile, corner)
    atlas.save(ATLAS, optimize=True)


def random_names(rng: random.Random) -> tuple[str, ...]:
    """One pictogram (35 %) or two different ones, all equally likely."""
    return tuple(rng.sample(NAMES, 1 if rng.random() < 0.35 else 2))
