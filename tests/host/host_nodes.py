"""ComfyUI's own nodes, found in the host's source: where they are, which hooks they set, and how to call them."""

import ast
import importlib
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from comfy_api.latest import io

HOST = Path(os.environ["COMFYUI_PATH"])
# Methods with which a node changes what a MODEL, or a part of it, gives.
HOOKS = re.compile(
    r"set_model_\w+|set_\w*_wrapper|add_wrapper\w*|create_\w+_wrapper|add_object_patch|add_callback\w*|set_injections"
    r"|disable_model_cfg1_optimization"
)
SAMPLES = "samples"  # kind of nodes that sample, or make what samples
SAMPLER = "makes a sampler"
OPTIONS = "writes model_options"


@dataclass(frozen=True)
class Found:
    """A node: module and class, and what it uses (names of hooking methods, and the kinds above)."""

    module: str
    cls: str
    kinds: frozenset[str]


@cache
def scan() -> dict[str, Found]:
    """Every node of ComfyUI's own, by id."""
    files = [HOST / "nodes.py", *sorted((HOST / "comfy_extras").glob("nodes_*.py"))]
    return {name: found for file in files for name, found in _scan_file(file)}


def _scan_file(file: Path):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    module = file.stem if file.parent == HOST else f"comfy_extras.{file.stem}"
    tops = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    mapped = {name: cls for node in tree.body if isinstance(node, ast.Assign) for name, cls in _mapping(node)}
    for cls in (top for top in tops.values() if isinstance(top, ast.ClassDef)):
        for name in [n for n, c in mapped.items() if c == cls.name] or _own_ids(cls):
            yield name, Found(module, cls.name, frozenset(_kinds(cls, tops, set())))


def _mapping(node: ast.Assign):
    """Ids and class names of a NODE_CLASS_MAPPINGS."""
    if getattr(node.targets[0], "id", "") == "NODE_CLASS_MAPPINGS" and isinstance(node.value, ast.Dict):
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Name):
                yield key.value, value.id


def _own_ids(cls: ast.ClassDef) -> list[str]:
    """The id that a class gives itself: node_id="X", schema.node_id = "X", or NodeId = "X"."""
    for node in ast.walk(cls):
        if isinstance(node, ast.keyword) and node.arg == "node_id" and isinstance(node.value, ast.Constant):
            return [node.value.value]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            target = node.targets[0]
            if getattr(target, "attr", "") == "node_id" or getattr(target, "id", "") == "NodeId":
                return [node.value.value]
    return []


def _kinds(top: ast.AST, tops: dict[str, ast.AST], seen: set[str]) -> set[str]:
    """What a class or function uses, with what it uses of its own file."""
    seen.add(top.name)
    kinds = set()
    for node in ast.walk(top):
        if isinstance(node, ast.Call):
            kinds |= _kind_of_call(ast.unparse(node.func))
        elif isinstance(node, ast.Assign) and any(".model_options[" in ast.unparse(t) for t in node.targets):
            kinds.add(OPTIONS)
        elif isinstance(node, ast.ClassDef) and any("samplers.CFGGuider" in ast.unparse(base) for base in node.bases):
            kinds.add(SAMPLES)
        elif isinstance(node, ast.Constant) and node.value == "SAMPLER":
            kinds.add(SAMPLER)
        elif isinstance(node, ast.Name) and node.id in tops and node.id not in seen:
            kinds |= _kinds(tops[node.id], tops, seen)
    return kinds


def _kind_of_call(called: str) -> set[str]:
    name = called.rpartition(".")[2]
    if called.endswith("Sampler.Output"):
        return {SAMPLER}
    if name in ("common_ksampler", "sample_custom", "CFGGuider") or called in ("comfy.sample.sample", "guider.sample"):
        return {SAMPLES}
    return {name} if HOOKS.fullmatch(name) or name.startswith("set_model_options_") else set()


def call(name: str, **inputs) -> tuple:
    """A node's outputs, with its own defaults for the widgets that are not named; KeyError when the host has no such node."""
    found = scan()[name]
    importlib.import_module("comfy_extras.nodes_post_processing")  # before nodes_latent, as in ComfyUI: each imports the other
    cls = getattr(importlib.import_module(found.module), found.cls)
    inputs = {**_defaults(cls), **inputs}
    out = cls.execute(**inputs) if issubclass(cls, io.ComfyNode) else getattr(cls(), cls.FUNCTION)(**inputs)
    return out.result if hasattr(out, "result") else out


def _defaults(cls: type) -> dict:
    kinds = cls.INPUT_TYPES()
    specs = {**kinds.get("required", {}), **kinds.get("optional", {})}
    found = {}
    for name, (kind, *rest) in specs.items():
        options = rest[0] if rest else {}
        choices = kind if isinstance(kind, list) else options.get("options")
        if "default" in options or choices:
            found[name] = options.get("default", choices[0] if choices else None)
    return found
