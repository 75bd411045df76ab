"""Runs the demo or the tests on a machine that has only Python: `python3 run.py demo`, `python3 run.py test`.

Makes a virtual environment in `.venv` and installs requirements-demo.txt or requirements-dev.txt into it; later runs find it ready.
Only the standard library, and no syntax that an older Python could not read: it must be able to say what is missing.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))
STAMP = os.path.join(VENV, "safecfg-requirements")
REQUIREMENTS = ("requirements.txt", "requirements-demo.txt", "requirements-dev.txt")  # each includes those before it
NEEDS = {"demo": 2, "test": 3}  # how many of them
SIZE = "about 1 GB on a CPU, 6 GB with CUDA; a few minutes, once"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
COMMANDS = {
    "demo": (("-m", "demo"),),
    "test": (("-m", "ruff", "check", "."), ("-m", "ruff", "format", "--check", "."), ("-m", "pytest")),
}
USAGE = """usage: python run.py demo [options]   pictures with plain CFG and with SafeCFG (options: run.py demo --help)
       python run.py test [options]   ruff and every test (options go to pytest)"""


def steps(command, options):
    """The Python command lines of a command; the options go to the last one."""
    *first, last = COMMANDS[command]
    return [list(step) for step in first] + [list(last) + list(options)]


def missing():
    """Why this Python cannot make a virtual environment, or None."""
    if sys.version_info < (3, 10):  # noqa: UP036 (an older one must be told)
        return "Expected Python 3.10 or newer, got {}.{} ({}). Start run.py with a newer one.".format(
            *sys.version_info[:2], sys.executable
        )
    if not find_spec("venv") or not find_spec("ensurepip"):
        return "This Python cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"
    return None


def stamp(count):
    """Changes when the first `count` requirements do."""
    digest = hashlib.sha256()
    for name in REQUIREMENTS[:count]:
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def installed(count):
    """Whether the environment holds the first `count` requirements, as they are now."""
    if not os.path.exists(PYTHON) or not os.path.exists(STAMP):
        return False
    with open(STAMP, encoding="ascii") as file:
        return stamp(count) in file.read().split()


def has_cuda():
    """Whether an NVIDIA GPU is there, as far as the standard library can tell."""
    return bool(shutil.which("nvidia-smi")) or os.path.exists("/proc/driver/nvidia")


def index_options():
    """Where pip looks for torch: without a GPU Linux takes the CPU's, 0.2 GB in place of 3; whoever has set an index keeps it."""
    if sys.platform != "linux" or has_cuda():
        return []
    listed = subprocess.run([PYTHON, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True, check=False)
    return [] if "index-url" in (listed.stdout or "") else ["--extra-index-url", CPU_INDEX]


def set_up(count):
    """Makes the environment if needed, with the first `count` requirements; returns an error message or None."""
    if installed(count):
        return None
    started = time.time()
    print(f"Setting up {VENV} ({SIZE}) ...", flush=True)
    if not os.path.exists(PYTHON) and subprocess.call([sys.executable, "-m", "venv", "--clear", VENV]):
        shutil.rmtree(VENV, ignore_errors=True)
        return f"Could not make the virtual environment {VENV}; the reason is above."
    wanted = REQUIREMENTS[count - 1]
    install = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "-r", os.path.join(ROOT, wanted), *index_options()]
    if subprocess.call(install):
        return f"Could not install {wanted}, see pip's reason above. Is there a network? Deleting {VENV} starts afresh."
    with open(STAMP, "w", encoding="ascii") as file:
        file.write("\n".join(stamp(n + 1) for n in range(count)))
    print(
        f"Ready after {time.time() - started:.0f} seconds; .venv holds {size(VENV) / 1e9:.1f} GB. Deleting it undoes all.",
        flush=True,
    )
    return None


def size(folder):
    """Bytes of all files below a folder."""
    paths = (os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)
    return sum(os.lstat(path).st_size for path in paths)


def main(arguments):
    if not arguments or arguments[0] not in COMMANDS:
        print(USAGE)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    error = missing() or set_up(NEEDS[arguments[0]])
    if error:
        print(error, file=sys.stderr)
        return 1
    statuses = [subprocess.call([PYTHON, *step], cwd=ROOT) for step in steps(arguments[0], arguments[1:])]
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
