"""ComfyUI-Manager's `cm-cli` in a base directory of its own, with another registry: `python manager_cli.py BASE REGISTRY COMMAND...`.

COMFYUI_PATH names the ComfyUI. Only the registry's address is replaced; everything else is the Manager's own code.
"""

import os
import runpy
import sys

base, registry, *command = sys.argv[1:]
sys.path.insert(0, os.environ["COMFYUI_PATH"])
sys.argv = ["cm-cli", "--cpu", "--base-directory", base]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.cli_args  # noqa: E402 (reads the command line when it is imported)
from comfyui_manager.common import cnr_utils  # noqa: E402

cnr_utils.base_url = registry
sys.argv = ["cm-cli", *command]
runpy.run_module("cm_cli.__main__", run_name="__main__")
