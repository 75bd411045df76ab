"""`SafeCFG Train HGR`: an HGR for exactly this model, from prompts alone."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ... import hgr_models
from ...hgr_models.training_state import begin_again
from ..loader import FOLDER, load_hgr_model
from ..reporting.drawing import to_tensor
from ..schema import HGR_TYPE, PROMPTS_TYPE, make_input, make_schema
from .launch import open_session
from .plan import WIDTHS, make_folder
from .summary import summary
from .widgets import count_inputs, end_inputs, latent_input, number, run_inputs, train_plan


def output_path(name: str) -> Path:
    """Where the HGR appears: in the first folder of models/hgr."""
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{name}.safetensors"


def check_output(path: Path, digest: str) -> None:
    """Raises HGRError when another training's HGR, or no HGR at all, has that name, or the folder cannot be written."""
    make_folder(path.parent)
    if path.exists() and hgr_models.load_hgr(path).info.training.get("digest") != digest:
        raise hgr_models.HGRError(f"{path} exists and comes from another training. Choose another name, or delete it.")


class TrainHGR(io.ComfyNode):
    """Records, trains and calibrates; see `training.session`."""

    @classmethod
    def define_schema(cls):
        return make_schema(
            node_id="SafeCFG_TrainHGR",
            display_name="SafeCFG Train HGR",
            description="Trains a Harmful Guidance Redirector for the connected model, from prompts alone: no pictures are needed, and "
            "none is ever shown. The result appears in models/hgr. It can be cancelled at any time and goes on where it stopped.",
            search_aliases=["train safety", "hgr training", "safe model"],
            is_output_node=True,
            is_experimental=True,
            inputs=[*_sources(), *_training_inputs(), *count_inputs(), *run_inputs(), *end_inputs("training"), latent_input()],
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
    def execute(cls, name, train, resume, model=None, clip=None, prompts=None, **widgets):
        plan = train_plan(name, train, widgets)
        session = open_session(plan, model, clip, prompts)
        path = output_path(name)
        digest = session.identify()
        if not resume:
            check_output(path, digest)  # before anything is deleted
            begin_again(session.folder, keep_shards=model is None)
        session.prepare()
        check_output(path, digest)
        hgr = session.train(session.record())
        hgr_models.save_hgr(path, hgr.cpu())
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
            io.Combo, "train", options=["both", "condition", "guidance"], default="both",
            tooltip="condition: rewrites prompts; the better of the two, in minutes for the demo model. guidance: sees what prompts hide; it needs "
            "clean runs too. both: the safest. Before it starts, the node says how long your model takes.",
        ),
        number(
            io.Int, "condition_steps", 1400, 1, 1_000_000,
            "Steps of the condition redirector. Each runs the model forward and backward on `batch` samples.",
        ),
        number(io.Int, "guidance_steps", 4200, 1, 1_000_000, "Steps of the guidance redirector; the model is not needed for them."),
        number(
            io.Float, "learning_rate", 1e-3, 1e-6, 1e-1,
            "Peak learning rate of the condition redirector; the guidance redirector learns at 1.5 times this.",
            step=1e-5, advanced=True, round=False,
        ),
        make_input(
            io.Combo, "size", options=list(WIDTHS), default="normal", advanced=True,
            tooltip="Size of both networks. normal fits most models; large helps with many categories and costs more per step.",
        ),
        number(
            io.Float, "false_positive_rate", 0.01, 0.0001, 0.5,
            "The share of clean pictures that may be redirected, both networks and all categories together. The thresholds follow from it.",
            step=0.001,
        ),
    ]  # fmt: skip
