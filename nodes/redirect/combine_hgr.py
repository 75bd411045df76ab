"""`SafeCFG Combine HGR`: several HGRs of one family for one `SafeCFG Apply`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ... import hgr_models
from ...hgr_models.combined import CombinedHGR
from ..host.schema import HGR_TYPE, make_input, make_schema
from ..loader import HGRModel, frozen_patcher


@dataclass(eq=False)  # identity, as HGRModel
class CombinedHGRModel(HGRModel):
    """An `HGR_MODEL` made of several files."""

    files: tuple[str, ...] = ()


_combined: WeakValueDictionary[str, CombinedHGRModel] = WeakValueDictionary()  # by hash; alive as long as a graph uses it


def load_combined_patcher(
    files: tuple[str, ...], disable_dynamic: bool = False, device: torch.device | None = None
) -> ModelPatcher:
    """The networks of several files in one patcher; core calls it again for a copy on another GPU.

    The files are read again: networks that a single HGR's patcher moves between devices cannot have a second owner.
    """
    hgrs = [hgr_models.load_hgr(file, ops=comfy.ops.manual_cast) for file in files]
    hgr = CombinedHGR(hgrs, [Path(file).stem for file in files])
    return frozen_patcher(hgr, device, (load_combined_patcher, (files,)))


def combine(hgrs: Sequence[HGRModel]) -> CombinedHGRModel:
    """One HGR of several, in their order; those that are combined already are taken apart.

    Raises HGRError for fewer than two, for the same one twice, for different families, and for a file that has changed since.
    """
    files = tuple(file for hgr in hgrs for file in _files(hgr))
    digests = [hgr_models.file_hash(file) for file in files]
    if len(set(digests)) < len(digests):
        twice = next(file for file, digest in zip(files, digests, strict=True) if digests.count(digest) > 1)
        raise hgr_models.HGRError(f"Expected different HGRs, but {twice} is there twice. Connect each HGR once.")
    digest = _joined(digests)
    if (found := _combined.get(digest)) is None:
        patcher = load_combined_patcher(files)
        names = " + ".join(files)
        found = _combined[digest] = CombinedHGRModel(patcher, patcher.model.info, names, digest, files=files)
    return found


def _files(hgr: HGRModel) -> tuple[str, ...]:
    """The files of an HGR, which must still be those that it was read from."""
    files = getattr(hgr, "files", None) or (hgr.path,)
    if missing := [file for file in files if not Path(file).is_file()]:
        raise hgr_models.HGRError(f"Expected the HGR's file {missing[0]}, but it is gone. Put it back, or load another HGR.")
    digests = [hgr_models.file_hash(file) for file in files]
    if hgr.hash != (digests[0] if len(files) == 1 else _joined(digests)):
        raise hgr_models.HGRError(
            f"{hgr.path} has changed since it was loaded. Queue the workflow again to load it as it is now."
        )
    return files


def _joined(digests: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


class CombineHGR(io.ComfyNode):
    """Makes one HGR of several; see `combine`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_CombineHGR",
            display_name="SafeCFG Combine HGR",
            description="Makes one HGR of several that were trained for the same family of models, for one SafeCFG Apply: it has all "
            "their categories, and each HGR judges its own. Two SafeCFG Apply nodes in a row would not do it: the last one counts.",
            search_aliases=["merge hgr", "several hgr", "join redirectors"],
            inputs=[_hgr_input(1), _hgr_input(2), _hgr_input(3, optional=True), _hgr_input(4, optional=True)],
            outputs=[
                HGR_TYPE.Output(display_name="hgr", tooltip="All of them as one, for SafeCFG Apply or another Combine HGR.")
            ],
        )

    @classmethod
    def execute(
        cls, hgr_1: HGRModel, hgr_2: HGRModel, hgr_3: HGRModel | None = None, hgr_4: HGRModel | None = None
    ) -> io.NodeOutput:
        return io.NodeOutput(combine([hgr for hgr in (hgr_1, hgr_2, hgr_3, hgr_4) if hgr is not None]))


def _hgr_input(number: int, optional: bool = False) -> io.Input:
    order = "It acts first on what several flag." if number == 1 else "It acts on what the ones before it left."
    return make_input(
        HGR_TYPE,
        f"hgr_{number}",
        optional=optional,
        tooltip=f"{'Optional. ' if optional else ''}From SafeCFG Load HGR, of the same family as the others. {order}",
    )
