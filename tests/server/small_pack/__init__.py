"""For tests: core's text encoders have the few layers of `small_files.SIZES`, and FewPrompts makes learning short.

Files of such encoders then go through core's own loaders, from the widget's list of files to the CLIP.
"""

import sys
from pathlib import Path

import comfy.sd

sys.path.append(str(Path(__file__).resolve().parents[2]))
from small_files import SIZES

_make = comfy.sd.CLIP.__init__


def _small(self, *args, model_options=None, **more):
    options = dict(model_options or {})  # core's loaders, too, say a part's sizes there
    _make(self, *args, model_options={**options, **{key: {**options.get(key, {}), **SIZES[key]} for key in SIZES}}, **more)


comfy.sd.CLIP.__init__ = _small


class FewPrompts:
    """Runs with nothing but its side effect: the next SafeCFG Protect learns from few prompts, in few steps."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "tests", True

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")  # always runs: what it sets may have been set otherwise since

    @classmethod
    def INPUT_TYPES(cls):
        count = ("INT", {"default": 2})
        required = {"pairs": count, "clean": ("INT", {"default": 30}), "steps": ("INT", {"default": 3})}
        return {"required": required, "optional": {"checked": count}}

    def run(self, pairs, clean, steps, checked=2):
        """`pairs` of every category, what `library.PRESET` calls quick, and steps of the check by the model."""
        nodes = _nodes_of_safecfg()
        nodes.protect.library.PAIRS, nodes.protect.library.CLEAN, nodes.protect.library.CALIBRATION = pairs, clean, clean
        plan = nodes.training.plan
        plan.PRESETS[nodes.protect.library.PRESET] = plan.Preset(steps, 1, 1, 1)
        nodes.protect.library.CHECKED = nodes.training.forward_check.Extent(pairs=1, steps=checked)
        return {}


def _nodes_of_safecfg():
    (pack,) = [m for name, m in list(sys.modules.items()) if name.endswith("safecfg") and "comfy_entrypoint" in vars(m)]
    return pack.nodes


NODE_CLASS_MAPPINGS = {"FewPrompts": FewPrompts}
