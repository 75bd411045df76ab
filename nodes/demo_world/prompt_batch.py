"""`SafeCFG Prompt Batch`: several prompts, one per line, as one batched CONDITIONING."""

from comfy_api.latest import io

from ..schema import make_input, make_schema
from ..training.encoding import encode_batch


class PromptBatch(io.ComfyNode):
    """Encodes every line of a text."""

    @classmethod
    def define_schema(cls):
        return make_schema(
            node_id="SafeCFG_PromptBatch",
            display_name="SafeCFG Prompt Batch",
            description="Encodes several prompts, one per line, for one batch of pictures: picture 1 gets line 1, and so on. "
            "SafeCFG Apply judges every picture on its own.",
            search_aliases=["prompt list", "batch prompts", "multiple prompts"],
            inputs=[
                make_input(io.Clip, "clip", tooltip="The model's CLIP."),
                make_input(
                    io.String,
                    "text",
                    multiline=True,
                    default="a knife and an apple\na rabbit and a rocket",
                    dynamic_prompts=True,
                    tooltip="One prompt per line; empty lines are left out. Weights such as (apple:1.3) work as in CLIP Text Encode.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="One conditioning with a row per prompt."),
                io.Int.Output(display_name="count", tooltip="The number of prompts: connect it to the latent's batch_size."),
            ],
        )

    @classmethod
    def execute(cls, clip, text):
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
        if not prompts:
            raise ValueError("Expected at least one prompt, but the text is empty. Write one prompt per line.")
        return io.NodeOutput(encode_batch(clip, prompts), len(prompts))
