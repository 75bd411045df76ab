"""`SafeCFG Load HGR`: a checkpoint file becomes networks that ComfyUI's model management owns."""

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import folder_paths
import torch
from comfy.sd import CLIP
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from torch import nn

from .. import hgr_models
from ..hgr_models.model_card import measured_of, short_card
from .host import known_hgrs
from .host.encoder_print import encoder_of
from .host.families import known_for
from .host.schema import HGR_TYPE, make_input, make_schema
from .host.server import show_text

FOLDER = "hgr"
NONE_YET = "(none yet)"
WITHOUT = (
    "SafeCFG Protect makes one by itself, from prompts alone (Templates, SafeCFG, '02 Protect any checkpoint'); '03 Make an HGR for your "
    "checkpoint' makes a better one, whose file SafeCFG Load HGR then offers; SafeCFG Concept Guidance needs none ('07 Guard by words alone')."
)
SHIPPED = Path(hgr_models.__file__).parent / "weights"

logger = logging.getLogger(__name__)


@dataclass(eq=False)  # identity: the cache below holds it weakly
class HGRModel:
    """What an `HGR_MODEL` socket carries: `patcher.model` is the `hgr_models.HGR`."""

    patcher: comfy.model_patcher.ModelPatcher
    info: hgr_models.HGRInfo
    path: str
    hash: str
    elsewhere: dict = field(default_factory=dict)  # the same on other devices, by device

    def on(self, device: torch.device) -> "HGRModel":
        """This HGR for a model on `device`: itself, or a copy there, which all models of that device share.

        Core computes a model on its own device (Select Model Device), and waits for that device alone.
        """
        if device == self.patcher.load_device:
            return self
        if device not in self.elsewhere:
            load, arguments = self.patcher.cached_patcher_init
            self.elsewhere[device] = replace(self, patcher=load(*arguments, device=device), elsewhere={})
        return self.elsewhere[device]


class NoHGRError(hgr_models.HGRError, AttributeError):
    """Also an AttributeError: core asks every output for attributes that few have (`hasattr(output, "get_ram_usage")`)."""


class NoHGR:
    """What an `HGR_MODEL` socket carries while nobody has an HGR: whoever uses it says on its own node what to do."""

    def __getattr__(self, name: str) -> Any:
        raise NoHGRError(f"There is no HGR for this model yet. {WITHOUT}")


def check_there(hgr: HGRModel | NoHGR, model: comfy.model_patcher.ModelPatcher, clip: CLIP | None = None) -> None:
    """Raises HGRError, which names the HGRs that are known for this MODEL and CLIP, where nobody has one yet."""
    if isinstance(hgr, NoHGR):
        known = known_for(model, None if clip is None else encoder_of(clip))
        raise NoHGRError(" ".join(filter(None, ("There is no HGR for this model yet.", known, WITHOUT))))


_loaded: WeakValueDictionary[str, HGRModel] = WeakValueDictionary()  # by file hash; alive as long as a graph uses it


def register_folder() -> None:
    """Registers `models/hgr` (and the shipped checkpoints) with ComfyUI: safetensors only, never pickle."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER), is_default=True)
    folder_paths.add_model_folder_path(FOLDER, str(SHIPPED))
    folder_paths.folder_names_and_paths[FOLDER] = (folder_paths.get_folder_paths(FOLDER), {".safetensors"})


def is_shipped(name: str | os.PathLike) -> bool:
    """Whether a file of that name (with or without a folder) ships with the pack."""
    return (SHIPPED / os.path.basename(name)).is_file() and os.path.basename(name) != ""


def hgr_file(name: str) -> str:
    """The file of an HGR by its name in the lists of ComfyUI. One that ships with the pack is never another one of that name.

    Raises HGRError where there is none.
    """
    if is_shipped(name) and name == os.path.basename(name):
        shipped = SHIPPED / name
        other = folder_paths.get_full_path(FOLDER, name)
        if other is not None and not os.path.samefile(other, shipped):
            logger.warning("SafeCFG: %s is the one that ships with the pack. Give %s another name to load it.", name, other)
        return str(shipped)
    if (found := folder_paths.get_full_path(FOLDER, name)) is None:
        raise hgr_models.HGRError(f"There is no HGR {name!r}. Put the .safetensors file into models/hgr.")
    return found


def check_name(path: str | os.PathLike) -> None:
    """Raises HGRError for the name of an HGR that ships with the pack: nobody could tell the two apart."""
    if is_shipped(path):
        name = os.path.basename(path)
        raise hgr_models.HGRError(f"{name} is the name of an HGR that ships with SafeCFG. Choose another name.")


def core_patcher(module: nn.Module, disable_dynamic: bool = False, **devices) -> comfy.model_patcher.ModelPatcher:
    """Core's own patcher for a module; looked up at every call, because a host with dynamic VRAM replaces it at its start."""
    plain = comfy.model_patcher.ModelPatcher
    patcher = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    return patcher(module, **devices)


def frozen_patcher(
    networks: nn.Module, device: torch.device | None = None, again: tuple | None = None
) -> comfy.model_patcher.ModelPatcher:
    """A patcher for networks in which nothing learns, on `device` (None: where core computes).

    Never one of dynamic VRAM: that brings the weights of every layer with every call, which pays off for models of gigabytes,
    and the kernels of `hgr_models.fused` need these few megabytes in one place. `again`: what core calls, and with what, for a
    copy on another GPU; None for networks that no MODEL carries there.
    """
    networks.train(False).requires_grad_(False)
    patcher = core_patcher(
        networks,
        disable_dynamic=True,
        load_device=comfy.model_management.get_torch_device() if device is None else device,
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.cached_patcher_init = again
    return patcher


def load_patcher(
    path: str, disable_dynamic: bool = False, device: torch.device | None = None
) -> comfy.model_patcher.ModelPatcher:
    """The networks of a file in a patcher of their own, which is never dynamic, whatever core asks for."""
    hgr = hgr_models.load_hgr(path, ops=comfy.ops.manual_cast)
    return frozen_patcher(hgr, device, (load_patcher, (path,)))


def load_hgr_model(path: str) -> HGRModel:
    """The HGR of a file; two loads of the same bytes share their weights.

    Raises `hgr_models.HGRError` for a file that is missing, damaged, or not a checkpoint of this version.
    """
    digest = hgr_models.file_hash(path)
    if (found := _loaded.get(digest)) is None:
        patcher = load_patcher(path)
        found = _loaded[digest] = HGRModel(patcher, patcher.model.info, path, digest)
        logger.info("SafeCFG: loaded %s (%s)", path, ", ".join(found.info.categories))
    return found


def show_card(hgr: HGRModel) -> None:
    """Shows what an HGR is for, what its calibration proves and what was measured with it on the node that runs."""
    networks = hgr.patcher.model.redirectors
    try:
        measured = measured_of(hgr.path)
    except (hgr_models.HGRError, OSError) as error:
        logger.warning("SafeCFG: %s", error)
        measured = {}
    context = get_executing_context()
    show_text(short_card(hgr.info, networks, measured), None if context is None else context.node_id)


class LoadHGR(io.ComfyNode):
    """Reads a checkpoint from `models/hgr` or from those shipped with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        register_folder()  # the list below needs it, and not every host calls on_load first
        return make_schema(
            node_id="SafeCFG_LoadHGR",
            display_name="SafeCFG Load HGR",
            description="Loads a Harmful Guidance Redirector (HGR): two small networks that recognise harmful guidance and turn it "
            "into the safe version of the same prompt. Files come from models/hgr; the demo's HGR ships with the pack.",
            search_aliases=["safety", "nsfw filter", "safe guidance", "redirector"],
            inputs=[
                make_input(
                    io.Combo,
                    "hgr_name",
                    options=[*known_hgrs.names(), NONE_YET],
                    tooltip="A .safetensors file in models/hgr. It fits one family of models: SafeCFG Apply refuses any other. "
                    "demo.safetensors belongs to SafeCFG Demo Model. (none yet): SafeCFG Apply says how to get one.",
                )
            ],
            outputs=[HGR_TYPE.Output(display_name="hgr", tooltip="The loaded redirector, for SafeCFG Apply.")],
        )

    @classmethod
    def validate_inputs(cls, hgr_name: str | None) -> str | bool:
        """Not every host looks a V3 node's choice up in its list."""
        names = known_hgrs.names()
        if hgr_name in (None, NONE_YET) or hgr_name in names:  # None: another node's output
            return True
        return f"There is no HGR {hgr_name!r} in models/hgr; there is {', '.join(names) or 'none'}. {WITHOUT}"

    @classmethod
    def fingerprint_inputs(cls, hgr_name: str) -> str | float:
        return NONE_YET if hgr_name == NONE_YET else hgr_models.file_hash(hgr_file(hgr_name))

    @classmethod
    def execute(cls, hgr_name: str) -> io.NodeOutput:
        if hgr_name == NONE_YET:
            return io.NodeOutput(NoHGR())
        hgr = load_hgr_model(hgr_file(hgr_name))
        show_card(hgr)
        return io.NodeOutput(hgr)
