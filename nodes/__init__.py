"""Everything that knows ComfyUI: nodes, hooks, model management."""

from comfy_api.latest import ComfyExtension

from .apply import Apply
from .demo_model import DemoModel
from .loader import LoadHGR, register_folder
from .prompt_batch import PromptBatch

NODES = [LoadHGR, Apply, DemoModel, PromptBatch]


class SafeCFGExtension(ComfyExtension):
    """The pack's nodes, for ComfyUI's V3 loader."""

    async def on_load(self) -> None:
        register_folder()

    async def get_node_list(self):
        return NODES
