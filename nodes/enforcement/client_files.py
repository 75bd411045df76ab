"""Folders that a client can write into hold no models: ComfyUI lists those of its output folder among the loaders' choices.

Its upload route takes `type=output` with any subfolder, so a file in output/loras may be a stranger's.
"""

import os
from collections.abc import Collection

import folder_paths

ALLOW = "files:"  # in SAFECFG_ENFORCE_ALLOW: `files:loras` lets that kind be loaded from there
NO_MODELS = frozenset({"custom_nodes", "configs"})  # kinds whose files no prompt names as a model


def _client_folders() -> list[str]:
    asks = ("get_output_directory", "get_input_directory", "get_temp_directory", "get_user_directory")
    return [os.path.realpath(getattr(folder_paths, ask)()) for ask in asks if hasattr(folder_paths, ask)]


def _inside(path: str, folders: list[str]) -> bool:
    real = os.path.realpath(path)
    return any(real == folder or real.startswith(folder + os.sep) for folder in folders)


def leave_out_client_folders(allowed: Collection[str]) -> list[str]:
    """Takes these folders out of ComfyUI's lists of models; the kinds that lost one. ComfyUI itself then refuses their files."""
    folders, changed = _client_folders(), []
    for kind, (paths, *rest) in list(folder_paths.folder_names_and_paths.items()):
        if kind in NO_MODELS or f"{ALLOW}{kind}" in allowed or f"{ALLOW}*" in allowed:
            continue
        kept = [path for path in paths if not _inside(path, folders)]
        if len(kept) < len(paths):
            folder_paths.folder_names_and_paths[kind] = (kept, *rest)
            folder_paths.filename_list_cache.pop(kind, None)
            changed.append(kind)
    return changed
