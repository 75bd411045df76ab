"""`SafeCFG Detect Prompt Harm`: how harmful is a prompt, before a single step is sampled?"""

from comfy_api.latest import io

from ..schema import HGR_TYPE, make_input, make_schema
from . import scores as texts
from .looking import detect_prompts


class DetectPromptHarm(io.ComfyNode):
    """Scores prompts; see `looking.detect_prompts`."""

    @classmethod
    def define_schema(cls):
        return make_schema(
            node_id="SafeCFG_DetectPromptHarm",
            display_name="SafeCFG Detect Prompt Harm",
            description="Tells how harmful a prompt is, per category, before a single step is sampled. It reads the encoded prompt and takes "
            "about a millisecond. A prompt can hide what it asks for: SafeCFG Detect Harm looks at the picture.",
            search_aliases=["nsfw prompt", "prompt safety", "moderation", "safety checker"],
            inputs=[
                make_input(
                    io.Conditioning,
                    "conditioning",
                    tooltip="The prompt, from CLIP Text Encode or SafeCFG Prompt Batch. Every prompt of a batch or of a combined conditioning "
                    "is judged on its own.",
                ),
                make_input(HGR_TYPE, "hgr", tooltip="From SafeCFG Load HGR; trained for the model that the CLIP belongs to."),
                make_input(
                    io.Float,
                    "threshold",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 to 1. 0: the thresholds stored in the HGR, calibrated on clean prompts. Above 0: this one for every category.",
                ),
                make_input(
                    io.String,
                    "categories",
                    default="",
                    multiline=True,
                    placeholder="violence = off",
                    tooltip="Categories that do not count: `violence = off`. Those not named count. Empty: all of them.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="harmfulness", tooltip="0 to 1: the worst prompt in its worst category."),
                io.String.Output(
                    display_name="scores", tooltip="JSON: thresholds, and for every prompt its scores per category."
                ),
                io.Boolean.Output(display_name="harmful", tooltip="True when any prompt exceeds a threshold."),
                io.Boolean.Output(display_name="flagged", is_output_list=True, tooltip="The same for every prompt, as a list."),
            ],
        )

    @classmethod
    def execute(cls, conditioning, hgr, threshold, categories):
        rules = texts.Rules.of(hgr.info, hgr.info.condition_thresholds, threshold, categories)
        found = detect_prompts(hgr, conditioning)
        flagged = rules.flags(found)
        return io.NodeOutput(max(rules.harmfulness(found)), texts.write(rules, "prompts", found), any(flagged), flagged)
