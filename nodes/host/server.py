"""ComfyUI's server, where there is one."""

import sys
from collections.abc import Callable
from typing import Any

from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context


def current_server() -> Any:
    """ComfyUI's server; None where ComfyUI's code runs without one (notebooks, tests)."""
    module = sys.modules.get("server")  # not imported here: the name belongs to whoever started the process
    return getattr(getattr(module, "PromptServer", None), "instance", None)


# Front ends up to the one of 0.3.64 render a node's text as HTML; later ones show it as it is. So a text may come from anybody
# (a CSV's column, a category's name), and must look the same in both: these letters cannot begin a tag or end an attribute.
HARMLESS = str.maketrans({"<": "\u2039", ">": "\u203a", '"': "\u2033", "`": "\u2019"})


def show_text(text: str, node_id: str | None, client: str | None = None) -> None:
    """Shows a text under a node, where a front end is connected: the only way by which this pack's text gets there.

    `client`: only to this one, as core's server names it; else to whoever queued the prompt.
    """
    server = current_server()
    if server is None or node_id is None or not hasattr(server, "send_progress_text"):
        return
    server.send_progress_text(text.translate(HARMLESS), node_id, *([] if client is None else [client]))


def speaker() -> Callable[[str], None]:
    """A function that shows a line of text on the node that runs now, whenever it is called; nowhere where none runs."""
    context = get_executing_context()
    return lambda text: show_text(text, None if context is None else context.node_id)


def show_result(text: str) -> ui.PreviewText:
    """Writes a result on the node that runs now, and gives it for the node's output: no front end shows a PreviewText by itself."""
    speaker()(text)
    return ui.PreviewText(text)
