"""Links of a workflow in API format: what a node depends on, and which value stands at a link's end."""

from collections.abc import Mapping
from typing import Any, TypeGuard

LARGEST_WALK = 10_000  # nodes that are looked at

Graph = dict[str, dict]


def is_link(value: object) -> TypeGuard[list]:
    """Whether an input's value is another node's output: [the node's id, the output's number]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def kind_of(graph: Graph, key: str) -> str:
    """What a message calls a node: its class and id."""
    return f"{graph[key]['class_type']} (node {key})" if key in graph else f"Node {key}"


def resolved(graph: Graph, value: Any) -> Any:
    """A widget's value behind reroutes, switches and nodes that hold one value; the last link where it is computed."""
    for _ in range(LARGEST_WALK):
        if not is_link(value) or value[0] not in graph:
            break
        inputs = graph[value[0]]["inputs"]
        if graph[value[0]]["class_type"] == "ComfySwitchNode":
            if is_link(switch := resolved(graph, inputs.get("switch"))):
                break
            value = inputs.get("on_true" if switch else "on_false")
        elif len(inputs) == 1 and ("value" in inputs or graph[value[0]]["class_type"] == "Reroute"):
            (value,) = inputs.values()
        else:
            break
    return value


def above(graph: Graph, link: Any) -> set[str]:
    """The ids of all nodes that a link depends on."""
    found: set[str] = set()
    waiting = [link]
    while waiting:
        link = waiting.pop()
        if is_link(link) and link[0] in graph and link[0] not in found:
            found.add(link[0])
            waiting += graph[link[0]]["inputs"].values()
    return found


def is_sampler(inputs: Mapping) -> bool:
    """Whether a node with these inputs samples a latent: KSampler and its like, or SamplerCustomAdvanced."""
    latent = {"latent_image", "latent"} & inputs.keys()
    return bool(latent) and (("model" in inputs and "positive" in inputs) or "guider" in inputs)


def gathered(graph: Graph, sampler: str) -> dict:
    """A sampler's inputs with those of its guider, sampler and noise nodes, the sampler's own first."""
    own = dict(graph[sampler]["inputs"])
    for name in ("guider", "sampler", "noise"):
        if is_link(own.get(name)):
            facts = {k: v for k, v in graph.get(own[name][0], {"inputs": {}})["inputs"].items() if k not in own}
            own |= facts
    return own
