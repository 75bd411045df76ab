"""V3 schemas that every supported host accepts: attributes that an older host does not know are left out.

One unknown attribute makes ComfyUI 0.3.64 refuse the whole pack.
"""

import dataclasses
import inspect
from typing import Any

from comfy_api.latest import io

HGR_TYPE = io.Custom("HGR_MODEL")
PROMPTS_TYPE = io.Custom("PROMPT_PAIRS")
MY_PROMPTS_TYPE = io.Custom("MY_PROMPTS")
CATEGORY = "SafeCFG"
TASKS = {  # what a node is for: its place in the menu
    "use": ("Apply", "CombineHGR", "ConceptGuidance", "DemoModel", "LoadHGR", "PromptBatch", "Protect", "TextEncode"),
    "detect": ("DetectHarm", "DetectPromptHarm", "ImageGate", "RocReport"),
    "train": ("CalibrateHGR", "CheckHGR", "FineTuneSafeLoRA", "OwnPrompts", "PromptPairs", "RecordGuidance", "TrainHGR"),
    "report": ("Evaluate", "Report"),
}
TASK_OF = {f"SafeCFG_{name}": task for task, names in TASKS.items() for name in names}
SEARCHED = {  # words that people look for, beside a node's own
    "use": ("safety", "guard", "filter", "nsfw", "moderation"),
    "detect": ("safety", "guard", "filter", "nsfw", "moderation"),
}
HELPERS = ("SafeCFG_DemoModel", "SafeCFG_PromptBatch")  # they make nothing safe


def make_schema(**attributes) -> io.Schema:
    """`io.Schema` of the attributes that this host knows, in the menu of its task, found by the words of its task."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    name, own = attributes.get("node_id"), attributes.get("search_aliases", ())
    task = TASK_OF.get(name)
    words = () if name in HELPERS else SEARCHED.get(task, ())
    ours = {"category": f"{CATEGORY}/{task}" if task else CATEGORY, "search_aliases": [*(w for w in words if w not in own), *own]}
    return io.Schema(**{k: v for k, v in {**ours, **attributes, "search_aliases": ours["search_aliases"]}.items() if k in known})


def defaults_of(node: type[io.ComfyNode]) -> dict:
    """The defaults of a node's widgets by name, for what a prompt of the API leaves out."""
    return {each.id: each.default for each in node.define_schema().inputs if getattr(each, "default", None) is not None}


def make_input(kind: Any, name: str, **attributes) -> Any:
    """`kind.Input(name, ...)` of the attributes that this host knows. What has a default is optional: prompts of the API may leave it out."""
    attributes = {"optional": "default" in attributes, **attributes}
    known = inspect.signature(kind.Input.__init__).parameters
    return kind.Input(name, **{k: v for k, v in attributes.items() if k in known})
