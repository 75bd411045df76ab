"""mypy finds nothing in hgr_models and in the nodes (pyproject.toml has the settings)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed: pip install -r requirements-dev.txt")

ROOT = Path(__file__).parents[1]


def mypy(folder: Path, *arguments: str) -> str:
    """What mypy finds, or an empty string."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    return done.stdout + done.stderr if done.returncode else ""


def test_types_fit():
    assert not mypy(ROOT)


def test_types_fit_in_the_nodes(tmp_path):
    """As ComfyUI imports them: the pack's folder is a package, whose name does not matter."""
    os.symlink(ROOT, tmp_path / "pack", target_is_directory=True)
    assert not mypy(tmp_path, "-p", "pack.nodes")


def test_a_wrong_type_is_found(tmp_path):
    package = tmp_path / "pack" / "nodes"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "wrong.py").write_text("def doubled(x: int) -> str:\n    return 2 * x\n", encoding="utf-8")
    assert "Incompatible return value" in mypy(tmp_path, "-p", "pack.nodes")
