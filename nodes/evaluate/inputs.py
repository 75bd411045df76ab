"""The inputs of SafeCFG Evaluate, in the order that saved workflows know: new ones go to the end."""

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..host.schema import HGR_TYPE, make_input
from ..training.auto import AUTO
from . import protocol
from .keeping import BLURRED, KEEP

MOST_IMAGES = 100


def evaluate_inputs() -> list:
    """All of them."""
    return [*_sockets(), *_list_inputs(), *_draw_inputs(), *_judge_inputs(), *_workflow_sockets()]


def _number(kind: Any, name: str, default: float, low: float, high: float, text: str, **more) -> io.Input:
    return make_input(kind, name, default=default, min=low, max=high, tooltip=text, **more)


def _optional(kind: Any, name: str, text: str) -> io.Input:
    return make_input(kind, name, optional=True, tooltip=text)


def _sockets() -> list:
    return [
        make_input(
            io.Model, "model",
            tooltip="The model to measure. One that went through SafeCFG Apply or SafeCFG Protect is measured with those settings; the "
            "plain arm draws without.",
        ),
        make_input(io.Clip, "clip", tooltip="The CLIP that belongs to the model."),
        make_input(io.Vae, "vae", tooltip="The model's VAE: judges look at pictures."),
        _optional(
            HGR_TYPE, "hgr",
            "From SafeCFG Load HGR, for a model without SafeCFG Apply. Its concept prompts serve the other arms, too.",
        ),
        _optional(
            io.ClipVision, "clip_vision",
            "From core's Load CLIP Vision, such as clip_vision_l: for CLIP scores, FD-CLIP and CMMD of clean prompts, and for "
            "the judge q16.",
        ),
        _optional(
            io.Clip, "score_clip",
            "The text half of the same CLIP, for CLIP scores: core's Load CLIP with clip_l for clip_vision_l. Unused where the "
            "model's own CLIP has it.",
        ),
        _optional(
            io.Latent, "latent",
            "An empty latent whose shape is drawn instead of `size`, for video models; judges see the middle frame.",
        ),
    ]  # fmt: skip


def _list_inputs() -> list:
    return [
        make_input(
            io.String, "name", default="my_checkpoint",
            tooltip="Of the folder below output/safecfg/evaluations, where every picture is noted as soon as it is judged.",
        ),
        make_input(
            io.Combo, "protocol", options=protocol.names(), default=protocol.OWN,
            tooltip="A published protocol: it looks for its lists in the input folder, takes their settings, and sets published figures "
            "beside yours. own lists: only those below. No list ships with SafeCFG; the error names where each one comes from.",
        ),
        make_input(
            io.String, "lists", default="", multiline=True,
            placeholder="i2p.csv\ncoco.csv = clean\nmma.csv = harmful, column adv_prompt",
            tooltip="Files in ComfyUI's input folder, one per line: .txt (a prompt per line), .csv, .tsv, .json or .jsonl. Behind = "
            "stands whether the prompts are harmful (as without it) or clean, and the column, where it is not found by name.",
        ),
        _number(
            io.Int, "prompts_per_list", 0, 0, 1_000_000,
            "At most so many prompts of each list, evenly spread, always the same ones. 0: all.",
        ),
        _number(
            io.Int, "images_per_prompt", 0, 0, MOST_IMAGES,
            "Pictures per prompt and arm, each with the next seed. 0: as the protocol says, else 1.",
            advanced=True,
        ),
        _number(
            io.Int, "seed", 0, 0, 2**53 - 1,
            "For lists without seeds of their own: a prompt's seed is this one plus its number. 0: as the protocol says.",
            control_after_generate=False,
            advanced=True,
        ),
    ]  # fmt: skip


def _draw_inputs() -> list:
    return [
        _number(io.Int, "steps", 0, 0, 1000, "Sampling steps. 0: as the protocol says, else 25."),
        _number(
            io.Float, "cfg", 0.0, 0.0, 100.0,
            "0: as the protocol or the list says, else the middle of what the model is used with.", step=0.5,
        ),
        make_input(
            io.String, "size", default=AUTO,
            tooltip="Width x height in pixels, such as `1024x1024`. auto: as the model draws best.",
        ),
        make_input(
            io.Combo, "sampler", options=list(comfy.samplers.KSampler.SAMPLERS), default="euler", advanced=True,
            tooltip="The sampler of every picture.",
        ),
        make_input(
            io.Combo, "scheduler", options=[AUTO, *comfy.samplers.KSampler.SCHEDULERS], default=AUTO, advanced=True,
            tooltip="The scheduler of every picture. auto: simple for flow models, normal for others.",
        ),
        make_input(
            io.String, "negative", display_name="negative_prompt", default="", multiline=True, advanced=True,
            tooltip="The negative prompt of every arm.",
        ),
    ]  # fmt: skip


def _judge_inputs() -> list:
    return [
        make_input(
            io.String, "arms", default="SafeCFG",
            tooltip="What is drawn beside the plain model, separated by commas: SafeCFG, negative prompt, LoRA FILE (a safe LoRA in "
            "models/loras), and methods with presets of SafeCFG Concept Guidance, such as SLD Strong. Arms can be added later.",
        ),
        make_input(
            io.String, "judges", default=AUTO,
            tooltip="Who says what a picture shows, separated by commas; `NAME = 0.7` sets a threshold. auto: every independent judge "
            "that is there. A wrong name gives an error that lists them all, with the files that each one needs.",
        ),
        make_input(
            io.Combo, "keep_pictures", options=list(KEEP), default=BLURRED,
            tooltip="blurred: pictures of harmful lists, and whatever a judge calls harmful, are kept as a few coloured spots. blurred "
            "where judged harmful: the judges alone decide. none: no picture is kept. all: every picture as it is.",
        ),
        make_input(
            io.String, "clean_pictures", default="", advanced=True,
            tooltip="A folder in ComfyUI's input folder with clean pictures of your own: the judges' false alarms on them are counted "
            "first. Empty: none.",
        ),
        make_input(
            io.Boolean, "resume", default=True,
            tooltip="Go on with the evaluation of this name. Off: begin again, and forget what was drawn under this name.",
        ),
    ]  # fmt: skip


def _workflow_sockets() -> list:
    """For a workflow that does more with its prompts than CLIP Text Encode; `python -m hgr_models.evaluate --workflow` links them."""
    return [
        _optional(
            io.Conditioning, "positive_conditioning",
            "A prompt of your workflow as it enters the sampler: every prompt of the lists gets what it holds besides its text, "
            "such as FluxGuidance, a ControlNet, SDXL's sizes or reference pictures. Its text is not drawn.",
        ),
        _optional(
            io.Conditioning, "negative_conditioning",
            "The negative prompt of your workflow as it enters the sampler, such as one zeroed out; instead of negative_prompt.",
        ),
        _optional(
            io.Sigmas, "sigmas",
            "Noise levels from a scheduler node, such as Flux2Scheduler, instead of steps and scheduler.",
        ),
    ]  # fmt: skip
