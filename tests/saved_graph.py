"""Any workflow as the front end saves it, turned into the links of a prompt: subgraphs, muted and bypassed nodes, reroutes, primitives.

What is typed into widgets is left out: `workflow_format.to_prompt` has the values, for workflows that are written by hand.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

NOTES = frozenset({"Note", "MarkdownNote"})
MUTED, BYPASSED = 2, 4
INPUT, OUTPUT = -10, -20  # the ids of a subgraph's own two ends


@dataclass
class Level:
    """A graph: the outermost one, or one placement of a subgraph. `path` begins the ids of its nodes, as in the front end: "12:"."""

    graph: dict
    path: str = ""
    above: "Level | None" = None
    placed: dict | None = None  # the node that stands for it in the graph above
    links: dict = field(default_factory=dict)
    nodes: dict = field(default_factory=dict)

    def __post_init__(self):
        self.nodes = {node["id"]: node for node in self.graph["nodes"]}
        for link in self.graph["links"]:
            if isinstance(link, dict):
                link = [link["id"], link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"], link["type"]]
            if link is not None:
                self.links[link[0]] = link


def links_of(workflow: dict) -> dict[str, dict]:
    """The prompt (API format) of a saved workflow, with links alone as inputs."""
    graphs = {graph["id"]: graph for graph in workflow.get("definitions", {}).get("subgraphs", [])}
    return dict(_walk(Level(workflow), graphs))


def _walk(level: Level, graphs: dict) -> Iterator[tuple[str, dict]]:
    for node in level.nodes.values():
        if node.get("mode", 0) in (MUTED, BYPASSED) or node["type"] in NOTES | {"Reroute", "PrimitiveNode"}:
            continue
        if node["type"] in graphs:
            yield from _walk(inside(level, node, graphs), graphs)
            continue
        sources = {i["name"]: source(level, i.get("link"), graphs) for i in node.get("inputs") or []}
        inputs = {name: link for name, link in sources.items() if link is not None}
        yield f"{level.path}{node['id']}", {"class_type": node["type"], "inputs": inputs}


def inside(level: Level, node: dict, graphs: dict) -> Level:
    """The level that a node which stands for a subgraph opens."""
    return Level(graphs[node["type"]], f"{level.path}{node['id']}:", level, node)


def source(level: Level, link_id, graphs: dict) -> list | None:
    """What a link begins at, past everything that is the front end's alone: [node id, output]; None for nothing."""
    if link_id is None or link_id not in level.links:
        return None
    _, origin, slot, _, _, kind = level.links[link_id]
    if origin == INPUT:
        name = level.graph["inputs"][slot]["name"]
        return source(level.above, _link_of(level.placed, name), graphs)
    node = level.nodes.get(origin)
    if node is None or node.get("mode", 0) == MUTED or node["type"] == "PrimitiveNode":
        return None
    if node["type"] == "Reroute":
        return source(level, node["inputs"][0].get("link"), graphs)
    if node.get("mode", 0) == BYPASSED:
        return source(level, _passed(node, slot, kind), graphs)
    if node["type"] in graphs:
        inner = inside(level, node, graphs)
        ends = [link for link in inner.links.values() if link[3] == OUTPUT and link[4] == slot]
        return source(inner, ends[0][0], graphs) if ends else None
    return [f"{level.path}{origin}", slot]


def _link_of(node: dict, name: str):
    return next((i.get("link") for i in node.get("inputs") or [] if i["name"] == name), None)


def _passed(node: dict, slot: int, kind):
    """The link that a bypassed node hands on: that of the input at the output's place, else of the first of its type."""
    inputs = node.get("inputs") or []
    kind = node["outputs"][slot]["type"] if slot < len(node.get("outputs") or []) else kind
    same = [i for i in inputs if i["type"] == kind]
    if slot < len(inputs) and inputs[slot]["type"] == kind:
        return inputs[slot].get("link")
    return same[0].get("link") if same else None
