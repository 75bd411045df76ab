"""Everything that knows ComfyUI: nodes, hooks, model management."""

from comfy_api.latest import ComfyExtension

from . import enforce
from .apply import Apply
from .check_hgr import CheckHGR
from .combine_hgr import CombineHGR
from .concept_guidance import ConceptGuidance
from .demo_model import DemoModel
from .detect_harm import DetectHarm
from .detect_prompt import DetectPromptHarm
from .fine_tune import FineTuneSafeLora
from .image_gate import ImageGate
from .loader import LoadHGR, register_folder
from .prompt_batch import PromptBatch
from .prompt_pairs import PromptPairs
from .record_guidance import RecordGuidance
from .report import Report
from .roc_report import RocReport
from .train_hgr import TrainHGR

NODES = [
    LoadHGR, CombineHGR, Apply, DemoModel, PromptBatch, ConceptGuidance, DetectPromptHarm, DetectHarm, ImageGate, RocReport, Report,
    PromptPairs, RecordGuidance, TrainHGR, CheckHGR, FineTuneSafeLora,
]  # fmt: skip


class SafeCFGExtension(ComfyExtension):
    """The pack's nodes, for ComfyUI's V3 loader."""

    async def on_load(self) -> None:
        enforce.register()
        register_folder()

    async def get_node_list(self):
        enforce.register()  # not every host calls on_load
        return NODES + enforce.extra_nodes()
