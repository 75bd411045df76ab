"""What a release consists of: the files that comfy-cli's `comfy node pack` puts into the registry's archive."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
IGNORED = ROOT / ".comfyignore"


def release_files() -> list[str]:
    """The files of the archive, relative to the repository: tracked by git (or about to be), and not in `.comfyignore`.

    Raises RuntimeError where git cannot tell, as in a copy without `.git`.
    """
    known = _git("ls-files", "--cached", "--others", "--exclude-standard")
    left_out = _git("ls-files", "--cached", "--others", "--ignored", f"--exclude-from={IGNORED}")
    return sorted(name for name in known - left_out if (ROOT / name).is_file())


def unpack_release(folder: Path) -> None:
    """Copies the release into a new folder, as an installer unpacks the archive."""
    for name in release_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)


def _git(*arguments: str) -> set[str]:
    answer = subprocess.run(["git", "-C", ROOT, *arguments, "-z"], capture_output=True, encoding="utf-8")
    if answer.returncode:
        raise RuntimeError(f"Expected a git checkout in {ROOT}: {answer.stderr.strip()}")
    return set(filter(None, answer.stdout.split("\0")))
