"""Workflows as the front end saves them, turned into prompts as the server runs them."""

WIDGETS = {"COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"}
NOTES = {"Note", "MarkdownNote"}  # the front end's own


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """The API prompt of a workflow, as the front end's `graphToPrompt` makes it; every node must exist on the server."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    nodes = [node for node in workflow["nodes"] if node["type"] not in NOTES]
    return {
        str(node["id"]): {"class_type": node["type"], "inputs": _widgets(node, object_info[node["type"]]) | _links(node, sources)}
        for node in nodes
    }


def _links(node: dict, sources: dict) -> dict:
    return {i["name"]: sources[i["link"]] for i in node["inputs"] if i["link"] is not None}


def _widgets(node: dict, info: dict) -> dict:
    """Widget values are stored by position, in the order of the node's inputs."""
    values, found = iter(node.get("widgets_values", [])), {}
    for kind in ("required", "optional"):
        for name, spec in info["input"].get(kind, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            if (isinstance(spec[0], list) or spec[0] in WIDGETS) and not options.get("forceInput"):
                found[name] = next(values)
                if options.get("control_after_generate"):
                    next(values)  # the front end's own widget: fixed, randomize, ...
    left = list(values)
    assert not left, f"{node['type']} has no widgets for the values {left}"
    return found
