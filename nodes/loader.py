"""`SafeCFG Load HGR`: a checkpoint file becomes networks that ComfyUI's model management owns."""

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from weakref import WeakValueDictionary

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import folder_paths
from comfy_api.latest import io

from .. import hgr_models
from .schema import HGR_TYPE, make_input, make_schema

FOLDER = "hgr"
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

    def on(self, device) -> "HGRModel":
        """This HGR for a model on `device`: itself, or a copy there, which all models of that device share.

        Core computes a model on its own device (Select Model Device), and waits for that device alone.
        """
        if device == self.patcher.load_device:
            return self
        if device not in self.elsewhere:
            load, arguments = self.patcher.cached_patcher_init
            self.elsewhere[device] = replace(self, patcher=load(*arguments, device=device), elsewhere={})
        return self.elsewhere[device]


_loaded: WeakValueDictionary[str, HGRModel] = WeakValueDictionary()  # by file hash; alive as long as a graph uses it


def register_folder() -> None:
    """Registers `models/hgr` (and the shipped checkpoints) with ComfyUI: safetensors only, never pickle."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER), is_default=True)
    folder_paths.add_model_folder_path(FOLDER, str(SHIPPED))
    folder_paths.folder_names_and_paths[FOLDER] = (folder_paths.get_folder_paths(FOLDER), {".safetensors"})


def core_patcher(module, disable_dynamic: bool = False, **devices) -> comfy.model_patcher.ModelPatcher:
    """Core's own patcher for a module; looked up at every call, because a host with dynamic VRAM replaces it at its start."""
    plain = comfy.model_patcher.ModelPatcher
    patcher = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    return patcher(module, **devices)


def frozen_patcher(networks, device, again: tuple) -> comfy.model_patcher.ModelPatcher:
    """A patcher for networks in which nothing learns, on `device` (None: where core computes).

    Never one of dynamic VRAM: that brings the weights of every layer with every call, which pays off for models of gigabytes,
    and the kernels of `hgr_models.fused` need these few megabytes in one place. `again`: what core calls, and with what, for a
    copy on another GPU.
    """
    networks.eval().requires_grad_(False)
    patcher = core_patcher(
        networks,
        disable_dynamic=True,
        load_device=comfy.model_management.get_torch_device() if device is None else device,
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.cached_patcher_init = again
    return patcher


def load_patcher(path: str, disable_dynamic: bool = False, device=None) -> comfy.model_patcher.ModelPatcher:
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
        logger.info("SafeCFG: loaded %s (%s)", os.path.basename(path), ", ".join(found.info.categories))
    return found


class LoadHGR(io.ComfyNode):
    """Reads a checkpoint from `models/hgr` or from those shipped with the pack."""

    @classmethod
    def define_schema(cls):
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
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A .safetensors file in models/hgr. It fits one family of models: SafeCFG Apply refuses any other. "
                    "demo.safetensors belongs to SafeCFG Demo Model.",
                )
            ],
            outputs=[HGR_TYPE.Output(display_name="hgr", tooltip="The loaded redirector, for SafeCFG Apply.")],
        )

    @classmethod
    def validate_inputs(cls, hgr_name):
        """Not every host looks a V3 node's choice up in its list."""
        names = folder_paths.get_filename_list(FOLDER)
        if hgr_name is None or hgr_name in names:  # None: another node's output
            return True
        return f"There is no HGR {hgr_name!r}; there is {', '.join(names) or 'none'}. Put the .safetensors file into models/hgr."

    @classmethod
    def fingerprint_inputs(cls, hgr_name):
        return hgr_models.file_hash(folder_paths.get_full_path_or_raise(FOLDER, hgr_name))

    @classmethod
    def execute(cls, hgr_name):
        return io.NodeOutput(load_hgr_model(folder_paths.get_full_path_or_raise(FOLDER, hgr_name)))
