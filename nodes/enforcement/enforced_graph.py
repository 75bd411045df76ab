"""Server-wide enforcement, first half: rewrites a queued prompt (API format) so that every MODEL in it goes through SafeCFG.

    loader -> LoRA -> KSampler      becomes      loader -> Enforced -> LoRA -> Enforced -> KSampler

An Enforced node comes after every output that can hold a MODEL, so it does not matter which nodes sample: whatever a node gets
went through SafeCFG last. That is not enough for nodes that make a model of their own, or sample without ComfyUI's guiders, or
add nodes while they run; nobody can tell from outside. So only ComfyUI's own nodes, and those of this pack that show nothing
which bypasses SafeCFG, may run; nodes of other packs must be allowed by whoever runs the server. Everything else is refused.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ... import hgr_models
from .leaving import add_judges, before_guards, clip_behind
from .names import GUARD, LATENT_GUARD, PICTURE_GUARD, inputs_of, is_link
from .prompt_size import check_links, check_size

NODES_PACKAGE = __package__.rpartition(".")[0]  # what the modules of our own nodes begin with

# Outputs of these types hold no MODEL, also not inside; every other output is looked into when it is made.
WITHOUT_MODEL = frozenset(
    """
    AUDIO BOOLEAN CLIP CLIP_VISION CLIP_VISION_OUTPUT COMBO CONDITIONING CONTROL_NET FLOAT HGR_MODEL HOOKS IMAGE INT LATENT MASK NOISE
    SAMPLER SIGMAS STRING STYLE_MODEL UPSCALE_MODEL VAE VIDEO
    """.split()
)
# Ours that sample nothing, or hand out scores at most. The others work on the unpatched model, write HGRs, or act after SafeCFG.
OURS = frozenset(
    """
    SafeCFG_Apply SafeCFG_CombineHGR SafeCFG_DemoModel SafeCFG_DetectHarm SafeCFG_DetectPromptHarm SafeCFG_Enforced SafeCFG_ImageGate
    SafeCFG_EnforcedLatent SafeCFG_EnforcedPicture SafeCFG_LoadHGR SafeCFG_PromptBatch SafeCFG_Protect SafeCFG_Refused
    SafeCFG_Report SafeCFG_RocReport SafeCFG_TextEncode
    """.split()
)
UNSEEN = "guides by a third prompt, in a direction that the HGR does not see"
# Nodes of ComfyUI's own that SafeCFG cannot follow. Whoever runs the server can allow them like those of other packs.
NOT_FOLLOWED = {"PerpNeg": UNSEEN, "PerpNegGuider": UNSEEN}
# Values below these draw the negative prompt, which SafeCFG does not redirect. (What a guider's cfg is, shows when it samples.)
LOWEST = {
    ("FreSca", "scale_low"): 1.0,
    ("FreSca", "scale_high"): 1.0,
    ("NAGuidance", "nag_scale"): 1.0,
    ("VideoLinearCFGGuidance", "min_cfg"): 1.0,
    ("VideoTriangleCFGGuidance", "min_cfg"): 1.0,
}


class Refusal(hgr_models.HGRError):
    """Says why a prompt does not run; `code` is for programs, and stays the same in later versions."""

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


def pack_of(cls: Any) -> str:
    """Where a node comes from: "" for ComfyUI itself, else the name of its pack (the folder in custom_nodes, or comfy_api_nodes)."""
    place = getattr(cls, "RELATIVE_PYTHON_MODULE", "")
    if not place:  # core's nodes.py, or a class that another pack slipped into its list
        return "" if cls.__module__ == "nodes" else cls.__module__
    kind, _, name = place.partition(".")
    return "" if kind == "comfy_extras" else name if kind == "custom_nodes" else kind


def check_nodes(prompt: object, classes: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Raises Refusal for a prompt that is none, and for a node that nobody has said can be trusted to sample through SafeCFG.

    `allowed`: node ids (class_type) and packs. Types that the server does not have are left to ComfyUI, which refuses them.
    """
    if not isinstance(prompt, dict):
        raise Refusal("expected a prompt in API format, an object with a node per id.", "no-prompt")
    if problem := check_size(prompt):
        raise Refusal(problem, "too-large")
    for node_id, node in prompt.items():
        if not isinstance(node, dict) or not isinstance(node.get("class_type"), str) or not isinstance(node.get("inputs"), dict):
            raise Refusal(f"expected an object with class_type and inputs as node {node_id!r}.", "no-prompt")
        if (cls := classes.get(node["class_type"])) is not None:
            _check_node(node_id, node["class_type"], cls, allowed)
        _check_no_hidden_link(node_id, node["inputs"])
    if problem := check_links(prompt):
        raise Refusal(problem, "too-large")


def _check_node(node_id: str, name: str, cls: Any, allowed: Collection[str]) -> None:
    pack = pack_of(cls)
    if name in allowed or (pack and pack in allowed):
        return
    if cls.__module__.startswith(f"{NODES_PACKAGE}."):
        reason = "" if name in OURS else "is not for a server that enforces SafeCFG"
    elif pack:
        reason = f"of {pack} may sample without SafeCFG"
    elif getattr(getattr(cls, "SCHEMA", None), "enable_expand", False):
        reason = "adds nodes while it runs"
    else:
        reason = NOT_FOLLOWED.get(name, "")
    if reason:
        raise Refusal(
            f"node {node_id} ({name}) {reason}. Remove it, or ask whoever runs this server to allow it in SAFECFG_ENFORCE_ALLOW.",
            "node-not-allowed",
        )


def _check_no_hidden_link(node_id: str, value: object) -> None:
    """ComfyUI unwraps {"__value__": x} while it validates a prompt: a link inside would appear after the rewriting."""
    if isinstance(value, dict):
        if "__value__" in value and is_link(value["__value__"]):
            raise Refusal(f"node {node_id} hides a link in a wrapped value. Link the nodes directly.", "hidden-link")
        children = list(value.values())
    else:
        children = value if isinstance(value, list) else []
    for child in children:
        _check_no_hidden_link(node_id, child)


def rewrite(prompt: dict, classes: Mapping[str, Any], judge: bool = True, by_clip: bool = False) -> dict:
    """A copy of a prompt that passed `check_nodes`, in which every output that can hold a MODEL is used through an Enforced node,
    every linked number through one that holds it to its widget's limits, and, with `judge`, latents leave through a judge. With
    `by_clip`, an Enforced node also gets the CLIP of the MODEL's loader, by which the HGR is chosen.

    Rewriting it again changes nothing. Raises Refusal for links to outputs that do not exist, and for values in LOWEST.
    """
    graph = _Graph({node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in prompt.items()}, classes, by_clip)
    for node_id, node in prompt.items():
        kind = node["class_type"]
        for name, value in node["inputs"].items() if kind != GUARD else ():
            if is_link(value) and kind == PICTURE_GUARD:
                graph.types_of(node_id, value)  # what it hands on is guarded behind it
            elif is_link(value):
                graph.nodes[node_id]["inputs"][name] = graph.through(node_id, value, graph.limits(kind, name))
            elif (kind, name) in LOWEST:
                _check_number(node_id, name, value, LOWEST[kind, name])
    if judge:
        add_judges(graph.nodes, classes)
    return graph.nodes


def _check_number(node_id: str, name: str, value: object, low: float) -> None:
    value = value.get("__value__") if isinstance(value, dict) else value
    try:
        enough = float(value) >= low  # False for NaN
    except (TypeError, ValueError):
        enough = False
    if not enough:
        raise Refusal(
            f"expected {name} of node {node_id} to be at least {low:g}, but got {value!r}: less draws the negative prompt.",
            "draws-the-negative",
        )


@dataclass
class _Graph:
    """A prompt that is being rewritten."""

    nodes: dict[str, dict]
    classes: Mapping[str, Any]
    by_clip: bool = False
    inputs: dict[str, dict[str, tuple]] = field(default_factory=dict)  # per class: what its inputs are

    def types_of(self, node_id: str, link: list) -> Sequence | None:
        """The types of the outputs behind a link of a node; None where there is no such node. Raises Refusal for no such output."""
        source_id, slot = link
        source = self.nodes.get(source_id)
        cls = self.classes.get(source["class_type"]) if source else None
        if source is not None and cls is not None and (type(slot) is not int or not 0 <= slot < len(cls.RETURN_TYPES)):
            raise Refusal(  # a negative one would count from the end, and True is 1
                f"node {node_id} uses output {slot!r} of node {source_id} ({source['class_type']}), which does not exist.",
                "hidden-link",
            )
        return None if cls is None else cls.RETURN_TYPES

    def through(self, node_id: str, link: list, limits: dict[str, float]) -> list:
        """The link to use instead of `link`."""
        source_id, slot = link
        types = self.types_of(node_id, link)
        if types is None:
            return link  # ComfyUI refuses the prompt
        source = self.nodes[source_id]
        if source["class_type"] == LATENT_GUARD:
            return link  # what goes into it went through SafeCFG
        if source["class_type"] == PICTURE_GUARD and not limits and not self._may_hold_model(source["inputs"].get("value")):
            return link
        if (
            source["class_type"] == GUARD
            and self._is_ours(source)
            and all(source["inputs"].get(k) == v for k, v in limits.items())
        ):
            return link
        choice = isinstance(types[slot], list)  # of a widget's values
        if not limits and (choice or types[slot] in WITHOUT_MODEL):
            return link
        return [self._guard(source_id, slot, limits), 0]

    def _may_hold_model(self, link: object) -> bool:
        """Whether a picture's guard may hand on a MODEL, for all that the output tells which it was put on."""
        link = before_guards(self.nodes, link) if is_link(link) else ["", 0]
        source = self.nodes.get(link[0])
        cls = self.classes.get(source["class_type"]) if source else None
        if cls is None or type(link[1]) is not int or not 0 <= link[1] < len(cls.RETURN_TYPES):
            return True
        kind = cls.RETURN_TYPES[link[1]]
        return isinstance(kind, str) and kind not in WITHOUT_MODEL

    def _guard(self, source_id: str, slot: int, limits: dict[str, float]) -> str:
        """The id of the Enforced node after an output; made when it is not there."""
        inputs = self._guard_inputs([source_id, slot], limits)
        name = "_".join(["safecfg", source_id.replace(":", "_"), str(slot), *(f"{v:g}" for v in limits.values())])
        while name in self.nodes and (self.nodes[name]["class_type"], self.nodes[name]["inputs"]) != (GUARD, inputs):
            name += "_"  # the workflow has a node of that name
        self.nodes.setdefault(name, {"class_type": GUARD, "inputs": inputs, "_meta": {"title": "SafeCFG (enforced)"}})
        return name

    def _guard_inputs(self, link: list, limits: dict[str, float]) -> dict:
        clip = None if limits or not self.by_clip else clip_behind(self.nodes, link[0], self.classes)
        return {"value": list(link), **limits, **({} if clip is None else {"clip": clip})}

    def _is_ours(self, guard: dict) -> bool:
        """Whether an Enforced node is as this rewriting makes it: a workflow's own may name another CLIP."""
        inner = guard["inputs"].get("value")
        limits = {key: guard["inputs"][key] for key in ("low", "high") if key in guard["inputs"]}
        return not is_link(inner) or guard["inputs"] == self._guard_inputs(inner, limits)

    def limits(self, class_type: str, name: str) -> dict[str, float]:
        """What a number that arrives by a link is held to: the limits of the widget.

        ComfyUI holds only typed values to them; a negative scale would guide towards the negative prompt.
        """
        cls = self.classes.get(class_type)
        if cls is None:
            return {}
        if class_type not in self.inputs:
            self.inputs[class_type] = inputs_of(cls)
        kind, options = self.inputs[class_type].get(name, ("", {}))
        if kind not in ("FLOAT", "INT"):
            return {}
        found = {
            key: options[what] for key, what in (("low", "min"), ("high", "max")) if isinstance(options.get(what), (int, float))
        }
        if (class_type, name) in LOWEST:
            found["low"] = LOWEST[class_type, name]
        return {key: float(limit) for key, limit in found.items()}
