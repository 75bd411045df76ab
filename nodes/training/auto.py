"""What widgets on `auto` stand for: sizes, scheduler and cfg as a MODEL's family is used."""

from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher
from comfy.supported_models_base import BASE

from ..host.families import prediction_of

AUTO = "auto"
SIDES = {"SD15": 512, "SD15_instructpix2pix": 512, "SD20": 768, "LotusD": 768}  # pixels, by core's class of the family
SIDE = 1024  # of all others
ASPECT = 9 / 8  # of the sizes that are not square
STEP = 64  # sizes are multiples of it; of 32 for small pictures


@dataclass(frozen=True)
class AutoRuns:
    """Sizes in pixels, scheduler, lowest and highest cfg."""

    sizes: tuple[tuple[int, int], ...]
    scheduler: str
    cfg: tuple[float, float]


def auto_runs(model: ModelPatcher | None) -> AutoRuns:
    """For a MODEL; without one, as for Stable Diffusion 1.5."""
    if model is None:
        return AutoRuns(sizes_of(512), "normal", (3.0, 8.0))
    config = model.model.model_config
    flow = prediction_of(model.get_model_object("model_sampling")) == "FLOW"
    distilled = bool(config.unet_config.get("guidance_embed"))  # Flux and its like: the scale is an input of the model
    cfg = (1.0, 1.0) if distilled else (2.5, 6.0) if flow else (3.0, 8.0)
    return AutoRuns(sizes_of(side_of(config)), "simple" if flow else "normal", cfg)


def side_of(config: BASE) -> int:
    """The side of a square picture that a family draws best; a model of our own says it by itself."""
    own = getattr(type(config), "native_side", None)  # of the class: core's instances warn of what they lack
    return own or SIDES.get(type(config).__name__, SIDE)


def sizes_of(side: int) -> tuple[tuple[int, int], ...]:
    """A square, and a wide and a tall picture of about as many pixels; small pictures are square only."""
    if side < 4 * STEP:
        return ((side, side),)
    wide, tall = (round(side * factor / STEP) * STEP for factor in (ASPECT, 1 / ASPECT))
    return ((side, side), (tall, wide), (wide, tall))
