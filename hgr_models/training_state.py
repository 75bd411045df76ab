"""The state of a training on disk: one safetensors file that is replaced whole, so that a killed process loses little."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import HGRError
from .files import write_whole
from .metadata import check_like, check_state, is_file, json_object
from .shards import read_shard
from .training import Training

KEY = "safecfg_training"  # of the metadata entry
OPTIMISER = "optimiser."  # the tensors of `Training.state` that belong to it
NAME = "training.state"  # beside the shards, but not one of them


@dataclass(frozen=True)
class Part:
    """The state of one training as it is stored: `Training.state`."""

    tensors: dict[str, Tensor]
    facts: dict

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """As `Training.state` gives it."""
        return self.tensors, self.facts


def save_state(folder: Path, trainings: Mapping[str, Training | Part], about: dict) -> None:
    """Writes the trainings and `about` (JSON); the old file stays until the new one is complete."""
    tensors: dict = {}
    facts: dict = {}
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
    if not is_file(path):
        raise HGRError(f"Expected the state of a training in {path}, but it is no file. Move it away.")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {})[KEY]
    except (SafetensorError, OSError, KeyError) as error:
        raise HGRError(f"{path} is damaged ({error}). Delete it: the recorded shards can still be used.") from error
    about = json_object(text, path, "a training's state")
    check_state(about, path)
    return about


def load_state(folder: Path, name: str, training: Training, about: dict) -> None:
    """Takes up one training as `save_state` left it; nothing when it had not begun."""
    if (facts := about["trainings"].get(name)) is None:
        return
    put_state(Part(read_tensors(folder, name), facts), training, folder)


def put_state(part: Part, training: Training, folder: Path) -> None:
    """Gives a training a stored state. Raises HGRError, naming the folder's file, for one of another training."""
    check_like(part.tensors, _expected(training, part.tensors), folder / NAME)
    # Copies: a host may have read them in inference mode, and what is made there cannot be trained.
    training.load_state({name: tensor.clone() for name, tensor in part.tensors.items()}, part.facts)


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one training as `save_state` left them. Raises HGRError when the file is damaged."""
    path, prefix = folder / NAME, f"{name}."
    try:
        with safe_open(path, "pt") as file:
            return {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise HGRError(f"{path} is damaged ({error}). Delete it: the recorded shards can still be used.") from error


def _expected(training: Training, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a training's state holds; of the optimiser, which remembers only parameters that were stepped, what there is of it."""
    expected = {key: value for key, value in training.state()[0].items() if not key.startswith(OPTIMISER)}
    parameters = [p for group in training.optimiser.param_groups for p in group["params"]]
    moments = {f"{OPTIMISER}{i}.{name}": p for i, p in enumerate(parameters) for name in ("exp_avg", "exp_avg_sq")}
    moments |= {f"{OPTIMISER}{i}.step": torch.zeros(()) for i in range(len(parameters))}
    there = {key.split(".")[1] for key in tensors if key in moments}  # all of a parameter's, or none
    return expected | {key: value for key, value in moments.items() if key.split(".")[1] in there}


def begin_again(folder: Path, keep_shards: bool) -> None:
    """Deletes the state of a training, and its shards unless they are all there is to train from."""
    (folder / NAME).unlink(missing_ok=True)
    if not keep_shards and folder.exists():
        for path in folder.glob("*.safetensors"):
            read_shard(path)  # an error, and nothing deleted, when the folder holds something else
        for path in folder.glob("*.safetensors"):
            path.unlink()
