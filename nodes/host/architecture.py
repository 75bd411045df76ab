"""Models by the names that people give them, and those that draw nothing from a prompt."""

from comfy.model_patcher import ModelPatcher

from ... import hgr_models
from ...hgr_models.architectures import NAMES as DRAWING
from ...hgr_models.architectures import WAN

# Core's classes that SafeCFG has nothing to redirect in, by what people call them.
REFUSED = {
    "ACEStep15": "ACE-Step 1.5", "StableAudio": "Stable Audio", "StableAudio3": "Stable Audio 3", "MiniMaxMusic3": "MiniMax Music 3",
    "Hunyuan3Dv2": "Hunyuan3D 2", "Hunyuan3Dv2mini": "Hunyuan3D 2 mini", "Hunyuan3Dv2_1": "Hunyuan3D 2.1", "WAN21_FlowRVS": "Wan FlowRVS",
}  # fmt: skip
NAMES = {**DRAWING, **REFUSED}
SHAPES = frozenset({"Hunyuan3Dv2", "Hunyuan3Dv2mini", "Hunyuan3Dv2_1", "TripoSplat", "Trellis2"})
NO_PROMPT = frozenset({"SeedVR2"})
SOUND_DIMENSIONS = 1


def class_of(model: ModelPatcher) -> str:
    """The name of core's class for a MODEL; "" where it has none."""
    config = getattr(model.model, "model_config", None)
    return "" if config is None else type(config).__name__


def architecture_of(model: ModelPatcher) -> str:
    """What people call a MODEL's architecture, such as "Flux.1"."""
    name = class_of(model)
    wan = name.startswith(("WAN21_", "WAN22_")) and name not in NAMES
    return NAMES.get(name, WAN if wan else name)


def refuse_unprompted(model: ModelPatcher) -> None:
    """Raises HGRError for a MODEL that draws neither pictures nor videos from a prompt."""
    name, latent = architecture_of(model), model.get_model_object("latent_format")
    what = ""
    if class_of(model) in SHAPES:
        what = "makes 3-D shapes from pictures"
    elif class_of(model) in NO_PROMPT:
        what = "restores videos and has no prompt"
    elif getattr(latent, "latent_dimensions", 2) == SOUND_DIMENSIONS:
        what = "makes sound"
    if what:
        raise hgr_models.HGRError(
            f"Expected a model that draws pictures or videos from a prompt, but {name} {what}. SafeCFG has nothing to redirect there, and "
            "nothing was recorded or changed."
        )
