"""Writing safetensors files that appear whole or not at all."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import HGRError


def write_whole(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a file and its folder; an older file of that name stays until the new one is complete.

    Raises HGRError when the disk is full or the folder cannot be written; then nothing is left of the new file.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: t.detach().contiguous().cpu() for key, t in tensors.items()}, part, metadata)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise HGRError(
            f"{path} cannot be written ({error}). Free some disk space, or change who may write there, and start again: "
            "what was complete before is kept."
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
