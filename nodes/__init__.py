"""Everything that knows ComfyUI: nodes, hooks, model management."""

from comfy_api.latest import ComfyExtension

from .concept.concept_guidance import ConceptGuidance
from .demo_world.demo_model import DemoModel
from .demo_world.prompt_batch import PromptBatch
from .detection.detect_harm import DetectHarm
from .detection.detect_prompt import DetectPromptHarm
from .detection.image_gate import ImageGate
from .detection.roc_report import RocReport
from .detection.text_encode import TextEncode
from .enforcement import enforce
from .evaluate.evaluate import Evaluate
from .loader import LoadHGR, register_folder
from .protect.protect import Protect
from .redirect.apply import Apply
from .redirect.combine_hgr import CombineHGR
from .reporting.report import Report
from .safe_lora.fine_tune import FineTuneSafeLora
from .training.calibrate_hgr import CalibrateHGR
from .training.check_hgr import CheckHGR
from .training.own_prompts import OwnPrompts
from .training.prompt_pairs import PromptPairs
from .training.record_guidance import RecordGuidance
from .training.train_hgr import TrainHGR

NODES = [
    LoadHGR, CombineHGR, Protect, Apply, DemoModel, PromptBatch, ConceptGuidance, DetectPromptHarm, TextEncode, DetectHarm, ImageGate,
    RocReport, Report, PromptPairs, RecordGuidance, TrainHGR, CheckHGR, OwnPrompts, CalibrateHGR, FineTuneSafeLora, Evaluate,
]  # fmt: skip


class SafeCFGExtension(ComfyExtension):
    """The pack's nodes, for ComfyUI's V3 loader."""

    async def on_load(self) -> None:
        enforce.register()
        register_folder()

    async def get_node_list(self):
        enforce.register()  # not every host calls on_load
        return NODES + enforce.extra_nodes()
