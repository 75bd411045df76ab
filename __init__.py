"""SafeCFG for ComfyUI. Importable without ComfyUI: everything that needs it is imported inside the entry point."""

import os
import sys

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    try:
        from .nodes import SafeCFGExtension
    except Exception:
        _let_nothing_run()
        raise
    return SafeCFGExtension()


def _let_nothing_run() -> None:
    """A server that is to enforce SafeCFG (SECURITY.md) and cannot even load it must not go on without it."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if "SAFECFG_ENFORCE" in os.environ and server is not None:
        server.add_on_prompt_handler(lambda request: {"prompt": {}})  # ComfyUI refuses it: no outputs
