"""docs/: the names that they give exist, and the example runs."""

import ast
import re
import runpy
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import pytest

import hgr_models
from helpers import small_hgr

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FILES = {".py", ".json", ".jsonl", ".yaml", ".md", ".safetensors"}


def text(name):
    return (DOCS / name).read_text(encoding="utf-8")


def test_the_api_page_names_everything_that_is_public():
    named = set(re.findall(r"`(\w+)`", text("API.md")))
    assert not set(hgr_models.__all__) - named


@pytest.mark.parametrize("line", [line for line in text("API.md").splitlines() if line.startswith("|") and "`safecfg." in line])
def test_the_api_page_names_what_there_is(line):
    where, *names = re.findall(r"`([\w.]+)`", line)
    if where == "safecfg.diffusers":
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    module = import_module(where.replace("safecfg", "hgr_models"))
    assert all(hasattr(module, name) for name in names)


def test_the_example_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", text("API.md"), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    hgr_models.save_hgr("my_hgr.safetensors", small_hgr())
    Path("example.py").write_text(code.replace("safecfg", "hgr_models"), encoding="utf-8")
    assert runpy.run_path("example.py")["step"].cond_denoised.shape == (2, 4, 16, 16)


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md")))
def test_paths_and_links_exist(name):
    page = text(name)
    for path in re.findall(r"`((?:nodes|hgr_models|demo|benchmarks|tests)/[\w/.]*)`", page):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page):
        assert (DOCS / unquote(link)).exists(), link


def defined(tree: ast.AST) -> set[str]:
    """The names that a module makes or uses."""
    names = set()
    for node in ast.walk(tree):
        for field in ("name", "id", "attr", "arg"):
            if isinstance(value := getattr(node, field, None), str):
                names.add(value)
    return names


def test_docstrings_name_what_there_is():
    """`module.name` in a docstring: a module that was renamed would send its reader nowhere."""
    files = [path for folder in ("hgr_models", "demo", "nodes", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    known = {path.stem for path in files} | {path.parent.name for path in files} | set().union(*map(defined, trees.values()))
    unknown = []
    for path, tree in trees.items():
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        for name in re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", "\n".join(ast.get_docstring(n) or "" for n in nodes)):
            if Path(name).suffix not in FILES and set(name.split(".")) - known:
                unknown.append(f"{path.relative_to(ROOT)}: {name}")
    assert not unknown
