"""SafeCFG for ComfyUI. Importable without ComfyUI: everything that needs it is imported inside the entry point."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import SafeCFGExtension

    return SafeCFGExtension()
