"""What the registry, the Manager and ComfyUI read from the repository."""

import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def lines(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line.split("#")[0].strip() for line in text.splitlines() if line.split("#")[0].strip()]


def test_requirements_are_the_projects_and_leave_torch_to_comfyui():
    assert lines("requirements.txt") == PROJECT["project"]["dependencies"]
    assert not any(line.startswith("torch") for line in lines("requirements.txt"))


def test_registry_fields():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert len(project["version"].split(".")) == 3 and project["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert project["urls"]["Repository"] and comfy["PublisherId"] and comfy["requires-comfyui"] == ">=0.3.64"
    icon = comfy["Icon"].partition("/main/")[2]
    from PIL import Image

    width, height = Image.open(ROOT / icon).size
    assert width <= 800 and height <= 400


def test_pack_imports_without_comfyui():
    """Only the entry point may need it; a stray top-level import would break `python -m demo` and every tool."""
    code = "import importlib.util, sys; s = importlib.util.spec_from_file_location('safecfg', '__init__.py'); "
    code += "m = importlib.util.module_from_spec(s); s.loader.exec_module(m); "
    code += (
        "assert m.WEB_DIRECTORY and m.comfy_entrypoint and 'torch' not in sys.modules and not hasattr(m, 'NODE_CLASS_MAPPINGS')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
