"""Which links of a prompt (API format) take latents out of it, and the guards that judge them there.

sampler -> VAEDecode -> SaveImage      becomes      sampler -> Enforced Latent -> VAEDecode -> Enforced Picture -> SaveImage
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .names import GUARD, LATENT_GUARD, MODELS, PICTURE_GUARD, inputs_of, is_link

# Outputs of these types hold no picture that could be seen: a node with no other output keeps latents inside.
INSIDE = frozenset(
    """
    * BOOLEAN CLIP CLIP_VISION CLIP_VISION_OUTPUT COMBO COMFY_MATCHTYPE_V3 CONDITIONING CONTROL_NET FLOAT GUIDER HGR_MODEL HOOKS INT
    LATENT LATENT_OPERATION MODEL NOISE SAFECFG_HELD SAMPLER SIGMAS STRING STYLE_MODEL UPSCALE_MODEL VAE
    """.split()
)
SHOWS_SCORES = frozenset({"SafeCFG_Report"})  # of a run, found by its latent's values: it decodes nothing


def add_judges(nodes: dict[str, dict], classes: Mapping[str, Any]) -> None:
    """Puts a guard on every link that takes latents out of a prompt, and one on what they became; again, it changes nothing."""
    for node_id in list(nodes):
        cls = classes.get(nodes[node_id]["class_type"])
        if cls is not None and nodes[node_id]["class_type"] not in SHOWS_SCORES and _takes_out(cls):
            for name in list(_latents(nodes, node_id, cls, classes)):
                _judge(nodes, node_id, name, cls, classes)


def _takes_out(cls: Any) -> bool:
    types = [t if isinstance(t, str) else "COMBO" for t in cls.RETURN_TYPES]
    return bool(getattr(cls, "OUTPUT_NODE", False)) or any(kind not in INSIDE for kind in types)


def _latents(nodes: dict, node_id: str, cls: Any, classes: Mapping[str, Any]) -> Iterator[str]:
    """The names of a node's inputs that get latents."""
    kinds = inputs_of(cls)
    for name, value in nodes[node_id]["inputs"].items():
        if is_link(value) and (source := nodes.get(value[0])) is not None:
            wanted = kinds.get(name, ("", {}))[0].split(",")
            if "LATENT" in wanted or _output_type(source, value[1], classes.get) == "LATENT":
                yield name


def _output_type(source: dict, slot: object, class_of: Callable[[str], Any]) -> str:
    """The type of a node's output; "" where the node or its output is not known."""
    types = getattr(class_of(source["class_type"]), "RETURN_TYPES", ())
    return types[slot] if type(slot) is int and 0 <= slot < len(types) and isinstance(types[slot], str) else ""


def _judge(nodes: dict, node_id: str, name: str, cls: Any, classes: Mapping[str, Any]) -> None:
    link = nodes[node_id]["inputs"][name]
    source = nodes[link[0]]
    inner = source["inputs"].get("samples")
    if source["class_type"] == LATENT_GUARD and is_link(inner) and source["inputs"] == _guard_inputs(nodes, inner, classes):
        _notices(nodes, node_id, link[0], cls)  # ours, of an earlier round
        return
    inputs = _guard_inputs(nodes, link, classes)
    if len(inputs) == 1 and not _may_be_sampled(nodes, link[0]):
        return
    guard = _named(nodes, f"safecfg_judge_{link[0]}_{link[1]}", LATENT_GUARD, inputs)
    nodes[node_id]["inputs"][name] = [guard, 0]
    _notices(nodes, node_id, guard, cls)


def _notices(nodes: dict, node_id: str, guard: str, cls: Any) -> None:
    """Every other node gets the node's pictures through a guard."""
    for slot, kind in enumerate(cls.RETURN_TYPES):
        if isinstance(kind, str) and kind in INSIDE:
            continue
        inputs = {"value": [node_id, slot], "held": [guard, 1]}
        uses = [
            (other, name)
            for other, node in nodes.items()
            for name, value in node["inputs"].items()
            if value == [node_id, slot] and (node["class_type"], node["inputs"]) != (PICTURE_GUARD, inputs)
        ]
        if uses:
            picture = _named(nodes, f"safecfg_picture_{node_id}_{slot}", PICTURE_GUARD, inputs)
            for other, name in uses:
                nodes[other]["inputs"][name] = [picture, 0]


def _named(nodes: dict, name: str, class_type: str, inputs: dict) -> str:
    """The id of a guard; made when it is not there."""
    name = name.replace(":", "_")
    while name in nodes and (nodes[name]["class_type"], nodes[name]["inputs"]) != (class_type, inputs):
        name += "_"
    nodes.setdefault(name, {"class_type": class_type, "inputs": inputs, "_meta": {"title": "SafeCFG (enforced)"}})
    return name


def _guard_inputs(nodes: dict, link: list, classes: Mapping[str, Any]) -> dict:
    models = models_behind(nodes, link[0], classes.get)
    return {"samples": list(link), **{f"model_{i}": model for i, model in enumerate(models[:MODELS])}}


def models_behind(nodes: dict, start: str, class_of: Callable[[str], type | None]) -> list[list]:
    """Links to the MODELs from which a node's result comes, each as near to its loader as it goes: no LoRA, no patch. Nearest first."""
    found, waiting, seen = [], [start], {start}
    while waiting:
        node_id = waiting.pop(0)
        for value in nodes.get(node_id, {"inputs": {}})["inputs"].values():
            if not is_link(value) or (source := nodes.get(value[0])) is None:
                continue
            if _is_model(nodes, value, class_of) and not _takes_model(nodes, source, class_of) and value not in found:
                found.append(list(value))
            if value[0] not in seen:
                seen.add(value[0])
                waiting.append(value[0])
    return found


def _is_model(nodes: dict, link: list, class_of: Callable[[str], Any]) -> bool:
    """Whether a link brings a MODEL: an Enforced node's that a MODEL goes into, too."""
    source = nodes[link[0]]
    if source["class_type"] == GUARD:
        inner = source["inputs"].get("value")
        return is_link(inner) and inner[0] in nodes and _output_type(nodes[inner[0]], inner[1], class_of) == "MODEL"
    return False


def _takes_model(nodes: dict, source: dict, class_of: Callable[[str], Any]) -> bool:
    """Whether the node behind an Enforced node has a MODEL of its own as an input."""
    inner = nodes[source["inputs"]["value"][0]]
    links = [value for value in inner["inputs"].values() if is_link(value) and value[0] in nodes]
    return any(nodes[value[0]]["class_type"] == GUARD and _is_model(nodes, value, class_of) for value in links)


def clip_behind(nodes: dict, start: str, classes: Mapping[str, Any]) -> list | None:
    """A link to the CLIP that belongs to a node's MODEL, as its loader made it: that of the nearest loader behind it, else the only
    one of the prompt. None where it cannot be told."""
    order, seen = [start], {start}
    for node_id in order:
        for value in nodes.get(node_id, {"inputs": {}})["inputs"].values():
            before = before_guards(nodes, value)[0] if is_link(value) else ""
            if before in nodes and before not in seen:
                seen.add(before)
                order.append(before)
    found = [link for node_id in order if (link := _loaded_clip(nodes, node_id, classes)) is not None]
    if not found:
        everywhere = [link for node_id in nodes if (link := _loaded_clip(nodes, node_id, classes)) is not None]
        found = everywhere if len(everywhere) == 1 else []
    return found[0] if found else None


def before_guards(nodes: dict, link: list) -> list:
    """The output that a link began at before guards were put in: a second round must find what the first one found."""
    passed = set()
    while link[0] not in passed and (source := nodes.get(link[0], {})).get("class_type") in (GUARD, LATENT_GUARD, PICTURE_GUARD):
        passed.add(link[0])
        inner = source["inputs"].get("samples" if source["class_type"] == LATENT_GUARD else "value")
        if not is_link(inner):
            break
        link = inner
    return link


def _loaded_clip(nodes: dict, node_id: str, classes: Mapping[str, Any]) -> list | None:
    """A link to the CLIP that a node loads; None for one that has none, or takes one from elsewhere."""
    cls = classes.get(nodes.get(node_id, {}).get("class_type", ""))
    types = [] if cls is None else list(cls.RETURN_TYPES)
    if "CLIP" not in types or any("CLIP" in kind.split(",") for kind, _ in inputs_of(cls).values()):
        return None
    return [node_id, types.index("CLIP")]


def _may_be_sampled(nodes: dict, start: str) -> bool:
    """Whether something that can hold a MODEL has a part in a node's result."""
    waiting, seen = [start], {start}
    while waiting:
        node = nodes.get(waiting.pop(), {"class_type": "", "inputs": {}})
        if node["class_type"] == GUARD and not {"low", "high"} & node["inputs"].keys():
            return True
        new = {value[0] for value in node["inputs"].values() if is_link(value)} - seen
        seen |= new
        waiting += new
    return False
