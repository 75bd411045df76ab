"""`SafeCFG Train HGR`: an HGR for exactly this model, from prompts alone."""

from collections.abc import Collection
from pathlib import Path

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io, ui

from ... import hgr_models
from ...hgr_models.pairs import PromptSet
from ...hgr_models.training_state import begin_again
from ..host.schema import HGR_TYPE, PROMPTS_TYPE, defaults_of, make_input, make_schema
from ..loader import FOLDER, check_name, load_hgr_model
from ..reporting.drawing import to_tensor
from . import cards
from .curves import summary
from .inputs import count_inputs, end_inputs, latent_input, number, run_inputs, train_plan
from .launch import open_session
from .plan import NETWORKS, PRESETS, PROMPTS, WIDTHS, make_folder_for_hgr


def output_path(name: str) -> Path:
    """Where the HGR appears: in the first folder of models/hgr."""
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{name}.safetensors"


def check_output(path: Path, digests: Collection[str]) -> None:
    """Raises HGRError when an HGR of another training than these, one of the pack's, or no HGR at all has that name.

    Also where the folder cannot be written, or its disk is full.
    """
    check_name(path)
    make_folder_for_hgr(path.parent)
    if path.exists() and hgr_models.load_hgr(path).info.training.get("digest") not in digests:
        raise hgr_models.HGRError(f"{path} exists and comes from another training. Choose another name, or delete it.")


class TrainHGR(io.ComfyNode):
    """Records, trains and calibrates; see `training.session`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_TrainHGR",
            display_name="SafeCFG Train HGR",
            description="Trains a Harmful Guidance Redirector from pairs of prompts: no pictures are needed, and none is ever shown. From prompts "
            "alone it needs only the text encoder, and serves every model that reads it. The result appears in models/hgr. It can be cancelled "
            "at any time and goes on where it stopped.",
            search_aliases=["train safety", "hgr training", "safe model"],
            is_output_node=True,
            is_experimental=True,
            inputs=[
                *_sources(),
                *_training_inputs(),
                *count_inputs(),
                *run_inputs(),
                *end_inputs("training"),
                latent_input(),
                *_preset_inputs(),
            ],
            outputs=[
                HGR_TYPE.Output(display_name="hgr", tooltip="The trained HGR, for SafeCFG Apply."),
                io.Custom("LOSS_MAP").Output(
                    display_name="loss_map", tooltip="The loss of every tenth step, for core's Plot Loss Graph."
                ),
                io.Image.Output(
                    display_name="curves", tooltip="Loss, distance to the partner's direction and accuracy of both networks."
                ),
                io.String.Output(display_name="summary", tooltip="What was trained and what its calibration proves."),
            ],
        )

    @classmethod
    def execute(
        cls,
        name: str = "my_hgr",
        train: str = PROMPTS,
        resume: bool = True,
        model: ModelPatcher | None = None,
        clip: CLIP | None = None,
        prompts: PromptSet | None = None,
        **widgets,
    ) -> io.NodeOutput:
        plan = train_plan(name, train, {**defaults_of(cls), **widgets}, model)
        session = open_session(plan, model, clip, prompts)
        path = output_path(name)
        digests = session.identify(anew=not resume), session.trainer.more["of_text"]  # prompts alone, which this goes on from
        if not resume:
            check_output(path, digests)  # before anything is deleted
            begin_again(session.folder, keep_shards=clip is None)
        session.prepare()
        check_output(path, digests)
        hgr = session.train(session.make_recording())
        hgr_models.save_hgr(path, hgr.cpu())
        cards.refresh(path)
        drawn = to_tensor(session.draw())[None]
        losses = {"loss": [entry["loss"] for entry in session.history]}
        text = summary(session, hgr, path)
        return io.NodeOutput(load_hgr_model(str(path)), losses, drawn, text, ui=ui.PreviewImage(drawn, cls=cls))


def _sources() -> list:
    return [
        make_input(
            io.Model, "model", optional=True,
            tooltip="The model to train for. It is not changed. Without a model, the guidance redirector is trained from the recording `name`.",
        ),
        make_input(io.Clip, "clip", optional=True, tooltip="The CLIP that belongs to the model."),
        make_input(PROMPTS_TYPE, "prompts", optional=True, tooltip="From SafeCFG Prompt Pairs."),
        make_input(
            io.String, "name", default="my_hgr",
            tooltip="Name of the file in models/hgr, and of the recording's folder below output/safecfg/recordings.",
        ),
    ]  # fmt: skip


def _training_inputs() -> list:
    return [
        make_input(
            io.Combo, "train", options=list(NETWORKS), default=PROMPTS,
            tooltip="prompts: the network that rewrites prompts, from the text encoder alone, in minutes; also for quantised and offloaded models. "
            "prompts + guidance: also the network that sees what prompts hide; it records runs of the model. thorough: the first is polished "
            "through the model, where that carries gradients, then the second. both, condition, guidance: without the first of these, as before.",
        ),
        number(
            io.Int, "condition_steps", 0, 0, 1_000_000,
            "Steps through the model, forward and backward on `batch` samples each: thorough, both and condition. 0: the preset's.",
            advanced=True,
        ),
        number(
            io.Int, "guidance_steps", 0, 0, 1_000_000,
            "Steps of the guidance redirector; the model is not needed for them. 0: the preset's.", advanced=True,
        ),
        number(
            io.Float, "learning_rate", 1e-3, 1e-6, 1e-1,
            "Peak learning rate of the condition redirector; the guidance redirector learns at 1.5 times this.",
            step=1e-5, advanced=True, round=False,
        ),
        make_input(
            io.Combo, "size", display_name="network_size", options=list(WIDTHS), default="normal", advanced=True,
            tooltip="Size of both networks. normal fits most models; large helps with many categories and costs more per step.",
        ),
        number(
            io.Float, "false_positive_rate", 0.01, 0.0001, 0.5,
            "The share of clean pictures that may be redirected, both networks and all categories together. The thresholds follow from it.",
            step=0.001, advanced=True,
        ),
    ]  # fmt: skip


def _preset_inputs() -> list:
    return [
        make_input(
            io.Combo, "preset", options=list(PRESETS), default="normal", optional=True,
            tooltip="How long it learns, where steps are 0: quick for a first try, normal, thorough for a result to keep. It can be raised later: "
            "the training goes on from where it is.",
        ),
        number(
            io.Int, "prompt_steps", 0, 0, 1_000_000,
            "Steps from prompts alone: 48 pairs and some 150 prompts to read each. 0: the preset's.", optional=True, advanced=True,
        ),
    ]  # fmt: skip
