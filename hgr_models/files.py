"""Writing files that appear whole or not at all: safetensors and texts."""

import os
import stat
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from re import compile as pattern

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import HGRError

PART = ".part"  # the end of a file that is being written
OURS = pattern(r"(?s)\..+\.[0-9a-f]+-[0-9a-f]{12}\.part")  # names of parts: others' downloads end alike
STALE = 3600.0  # seconds after which nobody writes a part any more


def write_whole(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a file and its folder; an older file of that name stays until the new one is complete.

    Several may write one name at once: each has a part of its own, and the last one that is done wins. Raises HGRError when the
    disk is full or the folder cannot be written; then nothing is left of the new file.
    """
    _write(Path(path), lambda part: save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, part, metadata))


def write_text(path: str | os.PathLike, text: str) -> None:
    """The same of a text, in UTF-8 with line feeds on every system."""
    _write(Path(path), lambda part: part.write_bytes(text.encode()))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid():x}-{uuid.uuid4().hex[:12]}{PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_parts(path.parent)
        remove_stale(path.with_name(path.name + PART))
        part.touch()
        rights = part.stat().st_mode  # as all of the user's files; safetensors lets nobody else read what it writes
        write(part)
        part.chmod(stat.S_IMODE(rights))
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise HGRError(
            f"{path} cannot be written ({error}). Free some disk space, or change who may write there, and start again: "
            "what was complete before is kept."
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def remove_stale_parts(folder: Path) -> None:
    """Removes what writers of any file in a folder left that were killed."""
    with suppress(OSError):
        for part in folder.glob(f".*{PART}"):
            if OURS.fullmatch(part.name):
                remove_stale(part)


def remove_stale(part: Path) -> None:
    """Removes a part that nobody writes any more."""
    with suppress(OSError):
        if part.is_file() and time.time() - part.stat().st_mtime > STALE:
            part.unlink()
