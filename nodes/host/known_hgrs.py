"""Which HGRs fit a model or an encoder: files in models/hgr, and those that its index names but nobody has copied yet."""

import logging
from collections.abc import Callable
from pathlib import Path

import folder_paths

from ... import hgr_models
from ...hgr_models.encoders import EncoderPrint
from ...hgr_models.hgr_index import NAME, KnownHGR, fitting, read_index

FOLDER = "hgr"
MOST = 3  # that a message names

logger = logging.getLogger(__name__)


def index_entries() -> list[KnownHGR]:
    """The entries of every index in the folders of models/hgr; one that is damaged is left out, with a warning."""
    found = []
    for folder in folder_paths.get_folder_paths(FOLDER) if FOLDER in folder_paths.folder_names_and_paths else []:
        try:
            found += read_index(Path(folder) / NAME)
        except hgr_models.HGRError as error:
            logger.warning("SafeCFG: %s", error)
    return found


def names() -> list[str]:
    """Names of all files in models/hgr, as core lists them; [] before it is registered."""
    if FOLDER not in folder_paths.folder_names_and_paths:
        return []
    try:
        return folder_paths.get_filename_list(FOLDER)
    except FileNotFoundError:  # a folder that core has listed before is gone
        folder_paths.filename_list_cache.pop(FOLDER, None)
        return folder_paths.get_filename_list(FOLDER)


def files_that(fits: Callable[[hgr_models.HGRInfo], bool]) -> list[str]:
    """Names of the HGRs in models/hgr of which `fits` says so."""
    found = []
    for name in names():
        path = folder_paths.get_full_path(FOLDER, name)
        try:
            if path is not None and fits(hgr_models.read_info(path)[0]):
                found.append(name)
        except hgr_models.HGRError:  # damaged: it says so when it is loaded
            continue
    return found


def in_words(
    fits: Callable[[hgr_models.HGRInfo], bool], architecture: str = "", base: str = "", encoder: EncoderPrint | None = None
) -> str:
    """Sentences on what is known for a model or an encoder, for a message; "" where nothing is. `fits`: as for `files_that`."""
    here = files_that(fits)
    known = [entry for entry in fitting(index_entries(), architecture, base, encoder) if entry.file not in here]
    parts = [f"In models/hgr there is for it: {', '.join(here[:MOST])}."] if here else []
    if known:
        parts.append(f"models/hgr/{NAME} knows for it: {'; '.join(entry.in_words() for entry in known[:MOST])}.")
    return " ".join(parts)
