"""The state of a training on disk: one safetensors file that is replaced whole, so that a killed process loses little."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import HGRError
from .files import write_whole
from .shards import read_shard
from .training import Training

KEY = "safecfg_training"  # of the metadata entry
NAME = "training.state"  # beside the shards, but not one of them


def save_state(folder: Path, trainings: dict[str, Training], about: dict) -> None:
    """Writes the trainings and `about` (JSON); the old file stays until the new one is complete."""
    tensors, facts = {}, {}
    for name, training in trainings.items():
        values, facts[name] = training.state()
        tensors |= {f"{name}.{key}": value for key, value in values.items()}
    write_whole(folder / NAME, tensors, {KEY: json.dumps({"trainings": facts, **about})})


def read_about(folder: Path) -> dict | None:
    """What the last `save_state` said; None when there is nothing to take up.

    Raises HGRError when the file is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})[KEY])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise HGRError(f"{path} is damaged ({error}). Delete it: the recorded shards can still be used.") from error


def load_state(folder: Path, name: str, training: Training, about: dict) -> None:
    """Takes up one training as `save_state` left it; nothing when it had not begun."""
    if (facts := about["trainings"].get(name)) is None:
        return
    with safe_open(folder / NAME, "pt") as file:
        prefix = f"{name}."
        tensors = {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
    training.load_state(tensors, facts)


def begin_again(folder: Path, keep_shards: bool) -> None:
    """Deletes the state of a training, and its shards unless they are all there is to train from."""
    (folder / NAME).unlink(missing_ok=True)
    if not keep_shards and folder.exists():
        for path in folder.glob("*.safetensors"):
            read_shard(path)  # an error, and nothing deleted, when the folder holds something else
        for path in folder.glob("*.safetensors"):
            path.unlink()
