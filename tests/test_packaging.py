"""What the registry, the Manager, ComfyUI and other systems ask of the repository."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest
from PIL import Image

from packed import release_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RAW = "https://raw.githubusercontent.com/safecfg/comfyui-safecfg/main/"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
ACCELERATORS = {"GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "NPU :: Huawei Ascend", "GPU :: Apple Metal"}
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}  # Windows devices
LONGEST = 120  # of a path; Windows takes 260, ComfyUI's own folder included


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def lines(name):
    return [line.split("#")[0].strip() for line in text(name).splitlines() if line.split("#")[0].strip()]


@pytest.fixture(scope="module")
def repository() -> list[str]:
    """Every file that git knows, and that is still there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def release() -> list[str]:
    return release_files()


def test_requirements_are_the_projects_and_leave_torch_to_comfyui():
    torch, *others = PROJECT["project"]["dependencies"]
    assert torch.startswith("torch>=") and lines("requirements.txt") == others  # installers of packs read the file alone
    assert not any(line.startswith("torch") for line in lines("requirements.txt"))


def test_registry_fields():
    """As docs.comfy.org (registry/specifications) wants them."""
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", project["name"]) and "comfy" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"]) and f"\n## {project['version']} " in text("CHANGELOG.md")
    assert (ROOT / project["license"]["file"]).is_file() and (ROOT / project["readme"]).is_file()
    assert {"Repository", "Documentation", "Issues", "Bug Tracker"} <= project["urls"].keys()
    assert all(url.startswith("https://github.com/safecfg/comfyui-safecfg") for url in project["urls"].values())
    assert set(comfy) == {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui", "includes"}
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"] == ">=0.3.64"


def test_classifiers_are_those_that_the_registry_knows():
    kinds = PROJECT["project"]["classifiers"]
    after = lambda prefix: [kind.removeprefix(prefix) for kind in kinds if kind.startswith(prefix)]  # noqa: E731
    assert after("Operating System :: ") == ["OS Independent"]
    assert after("Programming Language :: Python :: ") == list(PYTHONS)
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert after("Environment :: ") and set(after("Environment :: ")) <= ACCELERATORS


def test_icon_and_banner():
    comfy = PROJECT["tool"]["comfy"]
    assert comfy["Icon"].startswith(RAW) and comfy["Banner"].startswith(RAW)
    icon, banner = (ROOT / comfy[name].removeprefix(RAW) for name in ("Icon", "Banner"))
    width, height = Image.open(icon).size
    assert width == height <= 400
    width, height = Image.open(banner).size
    assert width * 9 == height * 21 and max(icon.stat().st_size, banner.stat().st_size) < 150_000


def test_the_release_has_all_that_runs_and_nothing_that_only_develops(repository, release):
    folders = ("nodes", "hgr_models", "demo", "web", "workflows", "subgraphs", "locales", "licenses")
    inside = lambda names, *tops: {name for name in names if name.split("/")[0] in tops}  # noqa: E731
    assert inside(repository, *folders) <= set(release)
    files = {name for name in release if "/" not in name}
    assert files == {
        "__init__.py", "pyproject.toml", "requirements.txt", "README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "NOTICE",
    }  # fmt: skip
    assert not inside(release, "tests", "benchmarks", ".github", ".ci")
    for needed in ("demo/weights/unet.safetensors", "hgr_models/weights/demo.safetensors", "hgr_models/data/clean.json"):
        assert needed in release


def test_help_pages_show_the_node():
    """All but those of the nodes that enforcement puts into a prompt, which no one sees; the front end serves what lies in web."""
    docs, shown = ROOT / "web" / "docs", set()
    for page in docs.glob("*.md"):
        found = re.findall(r"!\[[^\]]+\]\((images/[\w.]+)\)", page.read_text(encoding="utf-8"))
        assert bool(found) == (not page.stem.startswith(("SafeCFG_Enforced", "SafeCFG_Refused"))), page
        shown |= {docs / name for name in found}
    assert shown == set((docs / "images").iterdir())
    assert all(picture.stat().st_size < 60_000 and Image.open(picture).format == "JPEG" for picture in shown)


def test_help_pages_name_inputs_as_the_node_shows_them():
    """Ids and names differ where a name says more: a reader looks for what is on the node. Every input has its place in a table."""
    shown = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))  # what the schemas say
    for page in (ROOT / "web" / "docs").glob("*.md"):
        if page.stem.startswith(("SafeCFG_Enforced", "SafeCFG_Refused")):
            continue  # nodes that no one sees
        inputs = shown[page.stem].get("inputs", {})
        names = {entry["name"] for entry in inputs.values()}
        cells = re.findall(r"^\|([^|]+)\|", page.read_text(encoding="utf-8"), re.MULTILINE)
        told = set(re.findall(r"\w+", " ".join(cells)))
        assert not (told & inputs.keys()) - names, f"{page.name} names what no node shows"
        assert not names - told, f"{page.name} leaves inputs out"


def test_the_release_runs_no_other_program_and_no_text(release):
    """The registry permits neither; ruff looks for eval and exec in every other form (S102, S307)."""
    banned = re.compile(r"\bsubprocess\b|\bos\.(system|popen|exec\w*|spawn\w*)\b|\b(eval|exec)\(|\b__import__\b")
    for name in release:
        if name.endswith(".py"):
            found = [hit.group() for hit in banned.finditer(re.sub(r"\.eval\(\)", "", text(name)))]
            assert not found, (name, found)


def test_file_names_work_on_windows(repository):
    """The Manager, too, reads them in the system's own encoding, so they are ASCII."""
    for name in repository:
        assert len(name) < LONGEST and not re.search(r'[^ -~]|[<>:"\\|?*]', name), name
        for part in name.split("/"):
            assert part[-1] not in " ." and part.split(".")[0].lower() not in RESERVED, name
    folders = {str(folder) for name in repository for folder in PurePosixPath(name).parents}
    clashes = [name for name, count in Counter(name.lower() for name in {*repository, *folders}).items() if count > 1]
    assert not clashes


def test_no_symbolic_links(repository):
    assert not [name for name in repository if (ROOT / name).is_symlink()]


def test_syntax_of_the_oldest_python(repository):
    for name in repository:
        if name.endswith(".py"):
            ast.parse(text(name), name, feature_version=(3, 10))


def test_every_python_here_compiles_everything(repository):
    """This Python always; of the others those that are installed. Warnings (a bad escape, say) are errors."""
    sources = "\n".join(name for name in repository if name.endswith(".py"))
    code = "import sys\nfor name in sys.stdin.read().split():\n with open(name, encoding='utf-8') as f: compile(f.read(), name, 'exec')"
    compiled = set()
    for version in PYTHONS:
        environment = {**os.environ, "PYENV_VERSION": version}  # pyenv's commands need to be told
        python = shutil.which(f"python{version}") or sys.executable
        ask = subprocess.run([python, "--version"], env=environment, capture_output=True, text=True)
        if ask.stdout.startswith(f"Python {version}."):
            command = [python, "-W", "error", "-c", code]
            done = subprocess.run(command, cwd=ROOT, env=environment, input=sources, capture_output=True, text=True)
            assert done.returncode == 0, f"Python {version}: {done.stderr}"
            compiled.add(version)
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in compiled


def test_github_runs_the_same_command_and_every_python():
    workflow = text(".github/workflows/test.yml")
    assert set(re.findall(r"run: (.*\.ci.*)", workflow)) == {"bash .ci/run", "bash .ci/oldest_torch"}
    assert set(re.findall(r'"(3\.\d+)"', workflow)) == set(PYTHONS)
    oldest = PROJECT["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    hosts = re.search(r"comfyui: \[(.*)\]", workflow).group(1).split(", ")
    assert hosts[0] == f"v{oldest}" and len(hosts) == 3
    assert f"torch=={PROJECT['project']['dependencies'][0].removeprefix('torch>=')}." in text(".ci/oldest_torch")
    assert f"--branch {hosts[-1]} " in text("CONTRIBUTING.md")
    assert "uses: ./.github/workflows/test.yml" in text(".github/workflows/publish.yml")


def test_pack_imports_without_comfyui():
    """Only the entry point may need it; a stray top-level import would break `python -m demo` and every tool."""
    code = "import importlib.util, sys; s = importlib.util.spec_from_file_location('safecfg', '__init__.py'); "
    code += "m = importlib.util.module_from_spec(s); s.loader.exec_module(m); "
    code += (
        "assert m.WEB_DIRECTORY and m.comfy_entrypoint and 'torch' not in sys.modules and not hasattr(m, 'NODE_CLASS_MAPPINGS')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    """A first screen, not a manual: what is longer belongs into docs/."""
    readme = text("README.md")
    assert len(readme.splitlines()) <= 120 and len(readme.split()) <= 1200
    for page in ("README.md", "docs/GUIDE.md", "docs/DIFFUSERS.md"):
        for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text(page)):
            if "://" not in link:
                assert ((ROOT / page).parent / urllib.parse.unquote(link)).exists(), f"{page}: {link}"
    templates = {path.stem[:2] for path in (ROOT / "workflows").glob("*.json")}
    named = set(re.findall(r"\b\d\d\b", readme.partition("## I want to")[2].partition("## Nodes")[0]))
    assert named and named <= templates | {"15"}, "templates that the README names"


SCANNED = (
    "eval(", "ord(", "exec(", "compile(", "importlib.import_module", "__import__(", "os.system", "pickle.load", "marshal.load",
    "b64decode(", "decodebytes(", "unhexlify(", "fromhex(", "zlib.decompress", "globals()[", "locals()[", "lambda _:", "lambda x:",
)  # fmt: skip


def test_scanners_of_packs_find_no_code_execution(release):
    """Programs such as nodesafe look for the letters alone: hence `train(False)` of a network, and no name that ends in "ord"."""
    found = [(name, word) for name in release if name.endswith(".py") for word in SCANNED if word in text(name)]
    assert not found
