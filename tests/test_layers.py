"""Imports run one way: between packages as the tables say, between files without a cycle. The release imports whole, and is small."""

import ast
import subprocess
import sys
import zipfile
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

from comfy_hosts import TALLY
from packed import release_files, unpack_release

ROOT = Path(__file__).parents[1]
# From the lowest. A package imports those before it; packages of one layer do not import each other.
PACKAGES = (("hgr_models",), ("demo",), ("nodes",), ("benchmarks",))
PARTS = (  # inside nodes
    ("nodes.host",),
    ("nodes.loader", "nodes.reporting"),
    ("nodes.concept", "nodes.demo_world", "nodes.detection", "nodes.redirect"),
    ("nodes.training",),
    ("nodes.evaluate", "nodes.protect", "nodes.safe_lora"),
    ("nodes.enforcement",),
    ("nodes",),
)
LARGEST = 46e6  # bytes of the registry's archive, which everybody downloads: 38 of them are the demo's weights in fp16
NEEDS = {
    "hgr_models.fused_kernels": "triton",
    "hgr_models.diffusers": "diffusers",
}  # packages and modules that only some can import

IMPORT_ALL = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def files() -> dict[str, Path]:
    """Modules of the packages, by dotted name."""
    paths = [path for layer in PACKAGES for package in layer for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(module: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Which of our modules a file imports, anywhere in it: an import inside a function hides a cycle, and does not break it."""
    package, found = path.relative_to(ROOT).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if package[0] != "nodes"}  # in there, `import nodes` is ComfyUI's
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            names = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
            found |= (names & modules.keys()) or {base}
    return (found & modules.keys()) - {module}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    modules = files()
    return {module: imported(module, path, modules) for module, path in modules.items()}


def layer_of(module: str, layers) -> tuple[int, str]:
    """The layer of a module and its package: of nested ones, the innermost."""
    places = [(i, name) for i, layer in enumerate(layers) for name in layer if module == name or module.startswith(f"{name}.")]
    return max(places, key=lambda place: len(place[1]))


def wrong(graph: dict[str, set[str]], layers) -> list[str]:
    """Imports that do not go down the layers."""
    known = [m for m in graph if any(m == name or m.startswith(f"{name}.") for layer in layers for name in layer)]
    found = []
    for module in known:
        level, package = layer_of(module, layers)
        for other in graph[module] & set(known):
            below, its = layer_of(other, layers)
            if its != package and below >= level:
                found.append(f"{module} imports {other}")
    return found


@pytest.mark.parametrize("layers", [PACKAGES, PARTS], ids=["packages", "nodes"])
def test_imports_go_down(graph, layers):
    assert not wrong(graph, layers)
    named = {name for layer in layers for name in layer}
    folders = ROOT.joinpath(*(() if layers is PACKAGES else ("nodes",)))
    missing = {p.parent.name for p in folders.glob("*/__init__.py")} - {name.split(".")[-1] for name in named} - {"tests"}
    assert not missing, "a new package belongs into the table"


def test_a_wrong_import_is_found(graph):
    for module, other in (
        ("hgr_models.redirection", "demo.safecfg"),
        ("nodes.host.hooks", "nodes.loader"),
        ("nodes.reporting.meter", "nodes.redirect.runs"),
        ("nodes.concept.concept_hooks", "nodes.redirect.runs"),
    ):
        changed = {**graph, module: graph[module] | {other}}
        assert wrong(changed, PACKAGES) + wrong(changed, PARTS) == [f"{module} imports {other}"]
    assert {"nodes.host.families", "hgr_models.hgr"} <= {other for others in graph.values() for other in others}


def test_no_cycle_of_files(graph):
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"files import each other: {' -> '.join(reversed(error.args[1]))}")


def test_every_module_of_the_release_imports_alone(tmp_path):
    """Without the repository around it. Those of `nodes` need ComfyUI: tests/host/test_pack.py imports them."""
    unpack_release(tmp_path)
    paths = [path.relative_to(tmp_path) for package in ("hgr_models", "demo") for path in (tmp_path / package).rglob("*.py")]
    names = sorted(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths)
    missing = tuple(module for module, needed in NEEDS.items() if not find_spec(needed))
    names = [name for name in names if not name.startswith(missing)]
    assert {"hgr_models.train", "demo.training.hardened", "demo.__main__"} <= set(names)
    command = [sys.executable, "-I", "-c", IMPORT_ALL, str(tmp_path), *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_the_archive_is_small(tmp_path, request):
    with zipfile.ZipFile(tmp_path / "node.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in release_files():
            archive.write(ROOT / name, name)
    size = (tmp_path / "node.zip").stat().st_size
    request.config.stash[TALLY].append(f"the registry's archive: {size / 1e6:.1f} MB")
    assert size < LARGEST
