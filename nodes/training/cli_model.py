"""A checkpoint of a ComfyUI as the frozen model of `python -m hgr_models.train`, in a process without its server.

That command loads this file by its path, in every process: nothing here may need ComfyUI before `start` has found it.
"""

import atexit
import importlib.util
import math
import sys
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...hgr_models.recording import Points, Prompts
    from ...hgr_models.shards import Recording
    from .frozen_model import FrozenModel


PACK, NAME = Path(__file__).resolve().parents[2], "safecfg"


class HostModel:
    """A model that stays loaded until `close`, or the end of the process; a `losses.PredictWith`."""

    def __init__(self, frozen: "FrozenModel", shape: tuple[int, ...]):
        self.frozen = frozen
        stack = ExitStack()
        stack.enter_context(frozen.loaded(shape, checkpointing=True))
        self.close = stack.close
        atexit.register(stack.close)

    @property
    def loss_scale(self) -> float:
        """What a loss is to be multiplied with, so that no gradient is lost in the model's precision."""
        return 2.0**12 if self.frozen.half else 1.0

    def __call__(self, points: "Points", prompts: "Prompts", tokens: Tensor, pooled: Tensor | None) -> Tensor:
        return self.frozen.predict(points, prompts, tokens, pooled)


def frozen(device: torch.device, comfyui: Path, checkpoint: str, recording: "Recording", batch: int) -> HostModel:
    """The denoiser of a checkpoint, for batches of the points of a recording that was made with it.

    Raises ValueError when there is no ComfyUI or no such checkpoint, when the recording is another model's, or when the
    model carries no exact gradients.
    """
    start(comfyui, device)
    pack = load_pack()
    model, template = _load(checkpoint, pack)
    facts = recording.shards[0].about
    pack.nodes.host.families.check_family(model, pack.hgr_models.hgr.uncalibrated_info(facts))
    if facts["base"] and pack.nodes.host.families.base_of_model(model) != facts["base"]:
        raise ValueError(f"The shards were recorded with another model than {checkpoint}. Name the one that they come from.")
    training = pack.nodes.training
    frozen = training.frozen_model.FrozenModel(model, template)
    shapes = [shard.tensors["x"].shape[1:] for shard in recording.of_kind("harmful")]
    points = recording.draw("harmful", min(2, batch), torch.Generator().manual_seed(0))
    check = training.gradient.check_gradient(frozen, *points)
    if not check.passed:
        raise ValueError(f"{checkpoint}: {check.in_words()}. Take one in fp16, bf16 or fp32.")
    return HostModel(frozen, (batch, *max(shapes, key=math.prod)))


def start(comfyui: Path, device: torch.device, *options: str) -> None:
    """Makes this process a ComfyUI one: its folders and its command line, without its server and its other packs."""
    if "comfy.model_management" in sys.modules:
        return
    comfyui = Path(comfyui).resolve()
    if not (comfyui / "main.py").is_file():
        raise ValueError(f"There is no ComfyUI in {comfyui}. Give the folder that has its main.py.")
    if device.index is not None:
        torch.cuda.set_device(device)  # core takes the current one
    sys.path.insert(0, str(comfyui))  # before the working directory, whose `nodes` is another
    line, sys.argv = sys.argv, ["main.py", *options, *(["--cpu"] if device.type == "cpu" else [])]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # parses
    finally:
        sys.argv = line
    from utils.extra_config import load_extra_path_config

    if (extra := comfyui / "extra_model_paths.yaml").is_file():
        load_extra_path_config(str(extra))


def load_pack() -> ModuleType:
    """This pack as a package, as ComfyUI loads it."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
        sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    for part in (
        "hgr_models.hgr",
        "nodes.host.families",
        "nodes.training.frozen_model",
        "nodes.training.session",
        "nodes.host.encoding",
    ):
        import_module(f"{NAME}.{part}")
    return sys.modules[NAME]


def _load(checkpoint: str, pack: ModuleType) -> tuple:
    """The MODEL of a checkpoint, by name or path, and what its prompts carry beside their text."""
    import comfy.sd
    import folder_paths

    path = checkpoint if Path(checkpoint).is_file() else folder_paths.get_full_path("checkpoints", checkpoint)
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths("checkpoints"))
        raise ValueError(f"There is no checkpoint {checkpoint!r} in {folders}. Give a name that ComfyUI lists, or a path.")
    embeddings = folder_paths.get_folder_paths("embeddings")
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, embedding_directory=embeddings)
    template = {} if clip is None else pack.nodes.host.encoding.encode_batch(clip, [""])[0][1]
    return model, template
