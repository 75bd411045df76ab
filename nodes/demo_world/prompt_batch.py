"""`SafeCFG Prompt Batch`: several prompts, one per line, as one CONDITIONING for a batch of pictures."""

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..host.encoding import encode_groups, reads_clip_alone, takes_no_rows
from ..host.schema import make_input, make_schema

EXAMPLE = "a knife and an apple\na rabbit and a rocket"


def batch(clip: CLIP, prompts: list[str], model: ModelPatcher | None = None) -> list:
    """A CONDITIONING that gives picture i of a batch the prompt i, as if each were sampled alone.

    Prompts that are alike share an entry. Of prompts of different lengths, every entry gets a mask that leaves out the other
    prompts' pictures: padding would change what many models draw. Raises ValueError where that needs a MODEL.
    """
    groups = encode_groups(clip, prompts)
    if len(groups) == 1:
        return groups[0][1]
    if model is None and not reads_clip_alone(clip):
        lengths = sorted({conditioning[0][0].shape[1] for _, conditioning in groups})
        raise ValueError(
            f"This CLIP encodes the prompts to different lengths ({', '.join(map(str, lengths))} tokens). Connect `model` too: every "
            "picture then gets its own prompt, and no prompt is padded, which would change the picture."
        )
    dimensions = 2 if model is None else getattr(model.get_model_object("latent_format"), "latent_dimensions", 2)
    return [_only_for(rows, conditioning[0], len(prompts), dimensions) for rows, conditioning in groups]


def _only_for(rows: list[int], entry: list, count: int, dimensions: int) -> list:
    """An entry with a row per picture of the batch, masked out in the pictures that have another prompt."""
    places = [0] if takes_no_rows(entry[1]) else [rows.index(i) if i in rows else 0 for i in range(count)]
    spread = lambda value: value[places] if _per_prompt(value, len(rows)) else value  # noqa: E731
    mask = torch.zeros(count, *[1] * dimensions)
    mask[rows] = 1.0
    return [spread(entry[0]), {**{key: spread(value) for key, value in entry[1].items()}, "mask": mask, "mask_strength": 1.0}]


def _per_prompt(value: object, count: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == count


class PromptBatch(io.ComfyNode):
    """Encodes every line of a text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
                    default=EXAMPLE,
                    dynamic_prompts=True,
                    tooltip="One prompt per line; empty lines are left out. Weights such as (apple:1.3) work as in CLIP Text Encode.",
                ),
                make_input(
                    io.Model,
                    "model",
                    optional=True,
                    tooltip="Needed where prompts have different lengths in tokens: for models with a language model as text encoder, such as "
                    "Qwen-Image and Z-Image. Every length costs one more evaluation of the model per step.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="A conditioning that gives every picture of the batch its own prompt."),
                io.Int.Output(display_name="count", tooltip="The number of prompts: connect it to the latent's batch_size."),
            ],
        )

    @classmethod
    def execute(cls, clip: CLIP, text: str = EXAMPLE, model: ModelPatcher | None = None) -> io.NodeOutput:
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
        if not prompts:
            raise ValueError("Expected at least one prompt, but the text is empty. Write one prompt per line.")
        return io.NodeOutput(batch(clip, prompts, model), len(prompts))
