"""A node for tests: a shrunk model of core's own networks with its text encoder and an empty latent (tests/host/zoo_models.py)."""

import dataclasses
import sys
from pathlib import Path

HOST_TESTS = Path(__file__).resolve().parents[2] / "host"


def _zoo() -> tuple:
    """The zoo's modules; they know the pack as `safecfg`."""
    loaded = [m for name, m in list(sys.modules.items()) if name.endswith("safecfg") and "comfy_entrypoint" in vars(m)]
    sys.modules.setdefault("safecfg", loaded[0])
    if str(HOST_TESTS) not in sys.path:
        sys.path.append(str(HOST_TESTS))
    import zoo_models
    import zoo_pictures
    import zoo_videos

    return zoo_models, (*zoo_pictures.PICTURES, *zoo_videos.VIDEOS)


class ZooModel:
    """MODEL, CLIP and LATENT of a variant."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "LATENT"), "make", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        optional = {"width": ("INT", {"default": 0})}
        return {"required": {"name": ("STRING", {"default": "Flux"})}, "optional": optional}

    def make(self, name, width=0):
        """`width`: of the CLIP's tokens, where another model's is wanted."""
        zoo, variants = _zoo()
        variant = next(v for v in variants if v.name == name)
        clip = zoo.Encoder(dataclasses.replace(variant, width=width or variant.width))
        return zoo.build(variant), clip, {"samples": zoo.latents(variant, 1, 0.0)}


NODE_CLASS_MAPPINGS = {"ZooModel": ZooModel}
