"""How large a prompt may be: ComfyUI's worker walks values and links by recursion, and one too deep would end it for everybody."""

from .names import is_link

DEPTH = 32  # of lists and objects in a node's inputs
VALUES = 500_000  # of all nodes together
NODES = 5_000
CHAIN = 200  # of nodes, each of which needs the one before; ComfyUI's own validation ends at about 300


def check_size(prompt: dict) -> str:
    """What is too large about a prompt; "" when nothing is. Walks without recursion."""
    if len(prompt) > NODES:
        return f"expected a prompt of at most {NODES} nodes, but got {len(prompt)}."
    count, waiting = 0, [(node, 0) for node in prompt.values()]
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > DEPTH:
            return f"expected values of at most {DEPTH} lists and objects in each other, but got more."
        if count > VALUES:
            return f"expected a prompt of at most {VALUES} values, but got more."
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(child, depth + 1) for child in children]
    return ""


def check_links(prompt: dict) -> str:
    """What is wrong with a prompt's links: a chain that is too long; "" when nothing is, or when they form a circle (ComfyUI says so)."""
    sources = {
        node_id: {value[0] for value in node["inputs"].values() if is_link(value) and value[0] in prompt}
        for node_id, node in prompt.items()
    }
    users: dict[str, list[str]] = {node_id: [] for node_id in prompt}
    for node_id, needed in sources.items():
        for source in needed:
            users[source].append(node_id)
    missing = {node_id: len(needed) for node_id, needed in sources.items()}
    length = dict.fromkeys(prompt, 1)
    ready = [node_id for node_id, count in missing.items() if not count]
    while ready:
        node_id = ready.pop()
        for user in users[node_id]:
            length[user] = max(length[user], length[node_id] + 1)
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    longest = max(length.values(), default=0)
    return f"expected chains of at most {CHAIN} nodes, but got one of {longest}." if longest > CHAIN else ""
