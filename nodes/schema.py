"""V3 schemas that every supported host accepts: attributes that an older host does not know are left out.

One unknown attribute makes ComfyUI 0.3.64 refuse the whole pack.
"""

import dataclasses
import inspect

from comfy_api.latest import io

HGR_TYPE = io.Custom("HGR_MODEL")
PROMPTS_TYPE = io.Custom("PROMPT_PAIRS")
CATEGORY = "SafeCFG"


def make_schema(**attributes) -> io.Schema:
    """`io.Schema` of the attributes that this host knows; the category is the pack's."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(**{k: v for k, v in {"category": CATEGORY, **attributes}.items() if k in known})


def make_input(kind: type, name: str, **attributes):
    """`kind.Input(name, ...)` of the attributes that this host knows."""
    known = inspect.signature(kind.Input.__init__).parameters
    return kind.Input(name, **{k: v for k, v in attributes.items() if k in known})
