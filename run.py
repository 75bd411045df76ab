"""Runs the demo or the tests on a machine that has only Python: `python3 run.py demo`, `python3 run.py test`.

Makes a virtual environment in `.venv` and installs requirements-dev.txt into it; later runs find it ready.
Only the standard library, and no syntax that an older Python could not read: it must be able to say what is missing.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))
STAMP = os.path.join(VENV, "safecfg-requirements")
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")
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


def stamp():
    """Changes when the requirements do."""
    digest = hashlib.sha256()
    for name in REQUIREMENTS:
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def installed():
    if not os.path.exists(PYTHON) or not os.path.exists(STAMP):
        return False
    with open(STAMP, encoding="ascii") as file:
        return file.read() == stamp()


def set_up():
    """Makes the environment if needed; returns an error message or None."""
    if installed():
        return None
    print(f"Setting up {VENV} ...", flush=True)
    if not os.path.exists(PYTHON) and subprocess.call([sys.executable, "-m", "venv", "--clear", VENV]):
        shutil.rmtree(VENV, ignore_errors=True)
        return f"Could not make the virtual environment {VENV}; the reason is above."
    install = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "-r", os.path.join(ROOT, REQUIREMENTS[-1])]
    if subprocess.call(install):
        return (
            f"Could not install requirements-dev.txt, see pip's reason above. Is there a network? Deleting {VENV} starts afresh."
        )
    with open(STAMP, "w", encoding="ascii") as file:
        file.write(stamp())
    return None


def main(arguments):
    if not arguments or arguments[0] not in COMMANDS:
        print(USAGE)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    error = missing() or set_up()
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
