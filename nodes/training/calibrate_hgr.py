"""`SafeCFG Calibrate HGR`: how many of the user's own prompts would be flagged, and thresholds that fit them. Seconds, no sampling."""

import json

from comfy.sd import CLIP
from comfy_api.latest import io

from ... import hgr_models
from ...hgr_models.calibration import calibrated, proof_in_words
from ..host.schema import HGR_TYPE, MY_PROMPTS_TYPE, make_input, make_schema
from ..host.server import show_result
from ..loader import HGRModel, load_hgr_model
from . import cards
from .check_hgr import copy_of, save_path
from .inputs import number
from .own_readings import read_own


class CalibrateHGR(io.ComfyNode):
    """Measures and recalibrates the thresholds of prompts on the user's own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_CalibrateHGR",
            display_name="SafeCFG Calibrate HGR",
            description="Shows how many of your own prompts an HGR would flag, and which, in seconds and without sampling. With a name in "
            "save_as it saves the same networks with thresholds at which no more of them are flagged than you allow. What should be flagged "
            "does not belong among the prompts: leave it out in SafeCFG My Prompts.",
            search_aliases=["false alarms", "recalibrate", "thresholds", "my prompts"],
            is_output_node=True,
            inputs=[
                make_input(io.Clip, "clip", tooltip="The CLIP of the model that you use."),
                make_input(HGR_TYPE, "hgr", tooltip="From SafeCFG Load HGR; trained for the model that the CLIP belongs to."),
                make_input(MY_PROMPTS_TYPE, "my_prompts", tooltip="From SafeCFG My Prompts: prompts that are to stay untouched."),
                number(
                    io.Float, "false_positive_rate", 0.01, 0.0001, 0.5,
                    "The share of such pictures that may be redirected, by both networks together; half of it is for prompts where the HGR has both. "
                    "Used when thresholds are saved.",
                    step=0.001,
                ),
                make_input(
                    io.String, "save_as", default="",
                    tooltip="A new name in models/hgr: saves the same networks with thresholds that fit your prompts. Empty: only measure.",
                ),
            ],
            outputs=[
                HGR_TYPE.Output(display_name="hgr", tooltip="The HGR; with the new thresholds when they were saved."),
                io.String.Output(display_name="report", tooltip="How many of your prompts are flagged, and which."),
                io.String.Output(display_name="json", tooltip="The same as JSON: shares from 0 to 1, and thresholds."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, clip: CLIP, hgr: HGRModel, my_prompts: tuple[str, ...], false_positive_rate: float = 0.01, save_as: str = ""
    ) -> io.NodeOutput:
        path = save_path(save_as) if save_as else None
        network = copy_of(hgr) if save_as else None  # first: what cannot be saved is refused before anything is read
        own = read_own(clip, hgr, my_prompts)
        text, numbers = own.in_words(hgr.info), own.numbers(hgr.info)
        if path is not None:
            network.calibrate(calibrated(network, own.scores, None, false_positive_rate))
            hgr_models.save_hgr(path, network)
            cards.refresh(path)
            hgr = load_hgr_model(str(path))
            numbers["recalibrated"] = own.numbers(hgr.info)
            proof = proof_in_words(hgr.info.training["calibration"])[0]
            text += f"\nwith the new thresholds of {path}:\n{own.in_words(hgr.info)}\n{proof}"
        return io.NodeOutput(hgr, text, json.dumps(numbers), ui=show_result(text))
