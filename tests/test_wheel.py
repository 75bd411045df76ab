"""`pip install .` gives the package `safecfg`: hgr_models without ComfyUI, with torch, safetensors and numpy alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from packed import unpack_release

pytest.importorskip("setuptools", reason="setuptools is not installed: pip install -r requirements-dev.txt")

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
USE = """
import sys
sys.modules |= dict.fromkeys(("tqdm", "PIL", "diffusers", "transformers", "comfy", "demo", "nodes"))  # None: cannot be imported
sys.path.insert(0, sys.argv[1])
import safecfg, safecfg.edges, safecfg.pairs
print(*safecfg.load_hgr(sys.argv[2]).info.categories, len(safecfg.pairs.CATEGORIES), "hgr_models" in sys.modules)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    unpack_release(source)
    done = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("safecfg-*.whl")))


def test_the_wheel_has_the_whole_package_and_no_weights(wheel):
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    folder = ROOT / "hgr_models"
    wanted = {path.relative_to(folder) for kind in ("*.py", "py.typed", "data/**/*.json") for path in folder.rglob(kind)}
    assert found == {f"safecfg/{path.as_posix()}" for path in wanted}
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    needs = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert [need.split(">")[0] for need in needs] == ["torch", "safetensors", "numpy"]


def test_it_loads_an_hgr_in_a_place_of_its_own(wheel, tmp_path):
    wheel.extractall(tmp_path)
    hgr = ROOT / "hgr_models" / "weights" / "demo.safetensors"
    command = [sys.executable, "-I", "-c", USE, str(tmp_path), str(hgr)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.stdout == "weapons drugs death 7 False\n", done.stderr
