"""What the rewriting of prompts and the nodes that it adds both know: ids, links, and a class's inputs."""

from collections.abc import Iterator, Sequence
from typing import Any

GUARD, REFUSED = "SafeCFG_Enforced", "SafeCFG_Refused"
LATENT_GUARD, PICTURE_GUARD = "SafeCFG_EnforcedLatent", "SafeCFG_EnforcedPicture"
MODELS = 4  # that a latent's guard is given; the first that an HGR is for judges


def is_link(value: object) -> bool:
    """What ComfyUI takes for a link: [node id, number of the output]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], (int, float))


def inputs_of(cls: Any) -> dict[str, tuple[str, dict]]:
    """A node's inputs with their type ("" where it is a list of choices) and options; those inside of dynamic inputs by their
    last name, where it has no other."""
    found: dict[str, tuple[str, dict]] = {}
    for kind, specs in cls.INPUT_TYPES().items():
        if kind != "hidden":
            for name, spec in specs.items():
                for path, inner in _flat(name, spec):
                    found.setdefault(path, inner)
    return found


def _flat(name: str, spec: Sequence, depth: int = 8) -> Iterator[tuple[str, tuple[str, dict]]]:
    options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
    yield name, (spec[0] if isinstance(spec[0], str) else "", options)
    for choice in options.get("options", []) if depth and isinstance(options.get("options"), (list, tuple)) else []:
        if isinstance(choice, dict) and isinstance(choice.get("inputs"), dict):
            for specs in choice["inputs"].values():
                for inner, its_spec in specs.items() if isinstance(specs, dict) else ():
                    if isinstance(its_spec, (list, tuple)) and its_spec:
                        yield from _flat(f"{name}.{inner}", its_spec, depth - 1)
