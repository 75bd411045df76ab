"""`SafeCFG Fine-tune Safe LoRA`: an ordinary LoRA that makes a model safe wherever it is loaded, from unlabelled prompts."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io, ui

from ... import hgr_models
from ...hgr_models import training_state as state
from ...hgr_models.lora import LAYERS, LoraSettings, load_lora, save_lora
from ...hgr_models.lora_samples import read_samples
from ..host.schema import HGR_TYPE, PROMPTS_TYPE, defaults_of, make_input, make_schema
from ..host.server import speaker
from ..loader import HGRModel
from ..training.inputs import end_inputs, latent_input, number, run_inputs, run_settings
from ..training.plan import make_folder, recording_folder
from .inputs import gather_pictures, gather_prompts
from .report import preview, report
from .session import LoraPlan, LoraSession

LISTS = ("images", "latents", "captions")  # inputs of which every element is used; of the others, the first
PREVIEWED = 4  # prompts


def session_folder(name: str) -> Path:
    """Where samples and the state of a fine-tuning lie. Raises HGRError for a name that is no plain file name."""
    return recording_folder(name).parents[1] / "safe_loras" / name


def begin_again(folder: Path) -> None:
    """Deletes what a fine-tuning left. Raises HGRError, and deletes nothing, when the folder holds something else."""
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        read_samples(path)
    for path in (*paths, folder / state.NAME):
        path.unlink(missing_ok=True)


def output_path(name: str, digest: str) -> Path:
    """Where the LoRA appears: in the first folder of models/loras.

    Raises HGRError when another file has that name, or the folder cannot be written.
    """
    path = Path(folder_paths.get_folder_paths("loras")[0]) / f"{name}.safetensors"
    make_folder(path.parent)
    if path.exists() and load_lora(path)[1].get("digest") != digest:
        raise hgr_models.HGRError(f"{path} exists and comes from another fine-tuning. Choose another name, or delete it.")
    return path


def make_plan(name: str, hgr: HGRModel, values: dict, model: ModelPatcher | None = None) -> LoraPlan:
    """The plan of the widgets' values; raises HGRError for what cannot be read."""
    strengths = hgr_models.parse_categories(values["categories"], hgr.info.categories)
    return LoraPlan(
        name, run_settings({"negatives": "", **values}, model), values["runs"], values["steps"], values["learning_rate"],
        LoraSettings(values["rank"], values["alpha"], values["layers"]), hgr_models.CategorySettings(strengths), values["checkpointing"],
    )  # fmt: skip


class FineTuneSafeLora(io.ComfyNode):
    """Records, lets the HGR judge, trains; see `training.safe_lora`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_FineTuneSafeLoRA",
            display_name="SafeCFG Fine-tune Safe LoRA",
            description="Teaches a model to do by itself what it does under SafeCFG, from prompts that nobody labelled: the HGR alone judges. "
            "The result is an ordinary LoRA in models/loras that needs no SafeCFG. It can be cancelled and goes on where it stopped.",
            search_aliases=["safe model", "unsupervised fine-tuning", "concept erasure", "train lora"],
            is_input_list=True,
            is_output_node=True,
            is_experimental=True,
            inputs=[*_sources(), *_prompt_inputs(), *_lora_inputs(), *_run_inputs(), *end_inputs("fine-tuning")],
            outputs=[
                io.Custom("LORA_MODEL").Output(display_name="lora", tooltip="The LoRA, for core's Load LoRA Model."),
                io.Custom("LOSS_MAP").Output(
                    display_name="loss_map", tooltip="The loss of every tenth step, for core's Plot Loss Graph."
                ),
                io.Image.Output(
                    display_name="preview", tooltip="Clean prompts without the LoRA (above) and with it (below), same seeds."
                ),
                io.String.Output(
                    display_name="report", tooltip="What the HGR judged harmful, per category, and what the LoRA changes."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: Sequence[str] = ("",), **_) -> str | float:
        """Runs again when the file of prompts has changed."""
        path = Path(folder_paths.get_input_directory()) / str(file[0] or "")
        return path.stat().st_mtime_ns if file[0] and path.is_file() else 0

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        lists = {key: list(inputs.pop(key, None) or []) for key in LISTS}
        values = {**defaults_of(cls), **{key: value[0] for key, value in inputs.items() if value}}
        model, clip, hgr, vae = (values.get(key) for key in ("model", "clip", "hgr", "vae"))
        plan = make_plan(values["name"], hgr, values, model)
        prompts = gather_prompts(values["text"], values["file"], values.get("prompts"), plan.runs.seed)
        pictures = gather_pictures(model, vae, *(lists[key] for key in LISTS), prompts)
        folder = session_folder(plan.name)
        session = LoraSession(plan, folder, speaker(), model, clip, hgr, prompts, pictures)
        digest = session.identify()
        if not values["resume"]:
            output_path(plan.name, digest)  # refuses before anything is deleted
            begin_again(folder)
        session.prepare()
        path = output_path(plan.name, digest)
        return cls._outputs(session, session.train(), path, vae)

    @classmethod
    def _outputs(cls, session: LoraSession, lora: dict, path: Path, vae: VAE | None) -> io.NodeOutput:
        plan, training = session.plan, session.training
        counts = training.pool.counts(session.hgr.info.categories)
        about = {**session.facts, "digest": session.digest, "steps": training.step, "judged": counts}
        settings = {"lora": asdict(plan.lora), "learning_rate": plan.learning_rate, "strengths": plan.categories.strengths}
        save_lora(path, lora, {**about, **settings, "seed": plan.runs.seed, "change": asdict(session.change)})
        drawn = preview(session.model, session.clip, vae, lora, session.quiet_prompts(PREVIEWED), plan.runs)
        losses = {"loss": [entry["loss"] for entry in session.history]}
        text = report(path, counts, session.change, training.step)
        session.progress.update("preview", 1.0, "done")
        return io.NodeOutput(lora, losses, drawn, text, ui=ui.PreviewImage(drawn, cls=cls))


def _sources() -> list:
    return [
        make_input(io.Model, "model", tooltip="The model to make safe. It is not changed; SafeCFG Apply in it is left out."),
        make_input(io.Clip, "clip", tooltip="The CLIP that belongs to the model."),
        make_input(HGR_TYPE, "hgr", tooltip="The judge and teacher: an HGR for this model's family."),
        make_input(io.Vae, "vae", optional=True, tooltip="For the preview, and to encode images."),
        make_input(
            PROMPTS_TYPE, "prompts", optional=True,
            tooltip="From SafeCFG Prompt Pairs: its harmful, safe and clean prompts, as one shuffled list of strings without labels.",
        ),
        make_input(
            io.Image, "images", optional=True,
            tooltip="Unlabelled pictures, one or a list (core's Load Image Dataset nodes). They are noised, and join the runs. Needs a VAE.",
        ),
        make_input(io.Latent, "latents", optional=True, tooltip="The same as latents, one or a list."),
        make_input(
            io.String, "captions", optional=True, force_input=True,
            tooltip="A text for each picture (images first, then latents). Without it, the prompts take turns.",
        ),
        latent_input(),
    ]  # fmt: skip


def _prompt_inputs() -> list:
    return [
        make_input(
            io.String, "text", default="", multiline=True, placeholder="one prompt per line, harmful and clean, in any order",
            tooltip="Prompts, one per line, as your users write them: harmful and clean ones in any order. Half harmful is a good mix.",
        ),
        make_input(io.String, "file", default="", tooltip="A text file in ComfyUI's input folder with one prompt per line. Empty: none."),
        make_input(
            io.String, "name", default="my_safe_lora",
            tooltip="Name of the file in models/loras, and of the folder below output/safecfg/safe_loras.",
        ),
        make_input(
            io.String, "categories", default="", advanced=True,
            tooltip="Strength per category, as in SafeCFG Apply: `weapons = off` leaves weapons alone. Empty: all on.",
        ),
    ]  # fmt: skip


def _lora_inputs() -> list:
    return [
        number(io.Int, "rank", 64, 1, 256, "Rank of the LoRA: more can learn more, and makes a larger file."),
        number(io.Float, "alpha", 64.0, 0.1, 512.0, "The LoRA is scaled by alpha / rank.", step=0.5, advanced=True),
        make_input(
            io.Combo, "layers", options=list(LAYERS), default=LAYERS[0], advanced=True,
            tooltip="Which layers the LoRA changes. cross-attention: where a UNet (SD1.5, SDXL) reads the prompt; trained faster on the "
            "demo model, and changed clean pictures less. auto: those, or linear for models without them, such as Flux and SD3.",
        ),
        number(io.Int, "steps", 1500, 1, 1_000_000, "Training steps of `batch` samples each.", display_name="training_steps"),
        number(
            io.Float, "learning_rate", 5e-4, 1e-6, 1e-1, "Peak learning rate. Lower it when the curves jump.",
            step=1e-5, advanced=True, round=False,
        ),
        number(
            io.Int, "runs", 480, 1, 100_000,
            "Sampling runs to learn from. Two thirds follow the model, with and without SafeCFG; a third follows the LoRA itself, from the middle "
            "of the training on. They are kept as latents and never decoded.",
        ),
    ]  # fmt: skip


def _run_inputs() -> list:
    return [each for each in run_inputs() if each.id != "negatives"]  # a LoRA learns against the empty negative
