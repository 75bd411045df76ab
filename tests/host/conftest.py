"""Makes this process a ComfyUI one (CPU, with COMFYUI_GPU=1 a GPU; a temporary base directory), with the pack loaded as `safecfg`."""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

PACK = Path(__file__).parents[2]
HOST = Path(os.environ.get("COMFYUI_PATH", ""))
if not (HOST / "main.py").is_file():
    pytest.exit("tests/host runs inside ComfyUI: run tests/test_hosts.py, or set COMFYUI_PATH.", returncode=2)


def _start_comfy() -> None:
    """ComfyUI reads its command line when it is imported: give it one, then import it."""
    base = tempfile.mkdtemp(prefix="safecfg-base-")
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    sys.path.insert(0, str(HOST))
    device = [] if os.environ.get("COMFYUI_GPU") == "1" else ["--cpu"]
    arguments, sys.argv = sys.argv, ["main.py", *device, "--base-directory", base]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # parses
    finally:
        sys.argv = arguments


def _load_pack() -> None:
    """Loads the pack as ComfyUI does: from its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location("safecfg", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    sys.modules["safecfg"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_start_comfy()
_load_pack()

import comfy.utils  # noqa: E402
import torch  # noqa: E402

from evaluating import demo, place  # noqa: E402, F401 (fixtures of test_evaluate*.py)
from tiny import make_tiny_model, tiny_conditioning  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def tiny_model():
    """A MODEL: a random UNet in core's own classes, whose guidance is neither tiny nor huge (tiny.py)."""
    return make_tiny_model()


@pytest.fixture
def tiny_cond():
    """`tiny_cond(seed, tokens=7, batch=1)`: a CONDITIONING for `tiny_model`."""
    return tiny_conditioning


@pytest.fixture(scope="module")
def matrix_model():
    """One MODEL for all cases of the coverage matrix: none may leave anything behind."""
    comfy.utils.set_progress_bar_enabled(False)
    yield make_tiny_model()
    comfy.utils.set_progress_bar_enabled(True)


def pytest_terminal_summary(terminalreporter):
    """The tallies of the coverage matrix and of the zoo, where they ran."""
    lines = sys.modules["matrix_check"].table() if "matrix_check" in sys.modules else []
    zoo = sys.modules.get("zoo_models"), sys.modules.get("zoo_videos")
    lines = [*lines, *(zoo[0].counts(zoo[1].REFUSED) if all(zoo) else [])]
    for line in lines:
        terminalreporter.write_line(line)
