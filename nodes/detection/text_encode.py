"""`SafeCFG Text Encode`: CLIP Text Encode for prompts that nobody has read: what makes one harmful is left out before it is encoded."""

import logging

from comfy.sd import CLIP
from comfy_api.latest import io

from ..host.encoding import encode_text
from ..host.schema import HGR_TYPE, make_input, make_schema
from ..loader import HGRModel
from .scores import Rules, rule_inputs
from .text_reading import TextReader, about

LEAVE_OUT, NEUTRAL_WORDS = "leave out", "neutral words"

logger = logging.getLogger(__name__)


class TextEncode(io.ComfyNode):
    """Encodes a prompt, redacted where it is harmful; see `hgr_models.redaction`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_TextEncode",
            display_name="SafeCFG Text Encode",
            description="As CLIP Text Encode, but of a harmful prompt the smallest set of words that makes it harmful is left out, or replaced "
            "by neutral words, and the rest is encoded: a real prompt instead of a learnt correction. Clean prompts are encoded bit for bit "
            "as by CLIP Text Encode. Weights, embeddings and BREAK stay. Keep SafeCFG Apply behind it: it sees what words do not show.",
            search_aliases=["safe prompt", "prompt filter", "clip text encode", "redact prompt", "censor words"],
            inputs=[
                make_input(
                    io.String, "text", multiline=True, dynamic_prompts=True,
                    tooltip="The prompt. It may come from users that you do not know.",
                ),
                make_input(io.Clip, "clip", tooltip="The model's CLIP."),
                make_input(HGR_TYPE, "hgr", tooltip="From SafeCFG Load HGR; trained for the model that the CLIP belongs to."),
                make_input(
                    io.Combo, "harmful_words", options=[LEAVE_OUT, NEUTRAL_WORDS], default=LEAVE_OUT,
                    tooltip="What happens to the words that make a prompt harmful. leave out: they go. neutral words: something harmless stands in "
                    "their place, where the prompt is clean with it (only in the built-in categories).",
                ),
                *rule_inputs("prompts"),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="The encoded prompt, for the sampler."),
                io.String.Output(display_name="text", tooltip="The prompt that was encoded."),
                io.String.Output(
                    display_name="scores", tooltip="JSON: whether the prompt was changed, what was left out, scores before and after."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        text: str,
        clip: CLIP | None,
        hgr: HGRModel,
        harmful_words: str = LEAVE_OUT,
        threshold: float = 0.0,
        categories: str = "",
    ) -> io.NodeOutput:
        if clip is None:
            raise ValueError("Expected a CLIP, but got none. Connect the CLIP of a checkpoint that has one.")
        rules = Rules.of(hgr.info, hgr.info.condition_thresholds, threshold, categories)
        reader = TextReader(clip, hgr, rules)
        found = reader.redacted(text, harmful_words == NEUTRAL_WORDS)
        if not found.clean:
            logger.warning("SafeCFG Text Encode: even an empty prompt exceeds a threshold of %s. Calibrate it again.", hgr.path)
        elif found.text != text:
            logger.info("SafeCFG Text Encode: %d parts of a prompt were left out.", len(found.left_out))
        return io.NodeOutput(encode_text(clip, found.text), found.text, about(reader, text, found))
