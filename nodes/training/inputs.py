"""The inputs that SafeCFG Train HGR, Record Guidance, Check HGR and Fine-tune Safe LoRA share."""

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ... import hgr_models
from ..host.schema import make_input
from .auto import AUTO, auto_runs
from .plan import NETWORKS, PRESETS, THOROUGH, TrainPlan, parse_negatives, parse_sizes
from .recorder import RunSettings

NEGATIVES = "(empty)\n(empty)\nlow quality, blurry, watermark\nnsfw, nude, gore, violence\nclothes, safe, harmless"


def number(
    kind: type[io.Int] | type[io.Float], name: str, default: float, low: float, high: float, text: str, **more
) -> io.Input:
    """A number widget."""
    return make_input(kind, name, default=default, min=low, max=high, tooltip=text, **more)


def count_inputs() -> list:
    return [
        number(
            io.Int, "harmful_runs", 240, 3, 100_000,
            "Sampling runs of harmful prompts to learn from. They follow the harmful prompt and its safe partner in turn; where the guidance "
            "redirector is trained, the last third follows it instead, which only SafeCFG Train HGR with a model records. They are kept as "
            "latents and never decoded. Training from prompts alone needs none.",
            advanced=True,
        ),
        number(
            io.Int, "clean_runs", 240, 1, 100_000,
            "Sampling runs of clean prompts, for the guidance redirector: it must leave them alone.",
            advanced=True,
        ),
        number(
            io.Int, "calibration_runs", 100, 1, 100_000,
            "Runs of 20 steps of clean prompts that training never sees. More runs prove a lower rate of false alarms: at the default rate, "
            "100 prove about 3 %, 300 about 2 %, 1000 about 1.4 %.",
            advanced=True,
        ),
    ]  # fmt: skip


def run_inputs(run_steps: str = "Sampling steps of a recorded run; each is one sample to learn from.") -> list:
    """How runs are sampled. Every batch draws one sampler, one negative, one size and one cfg of these; `run_steps` is a tooltip."""
    return [
        number(io.Int, "run_steps", 8, 2, 100, run_steps, advanced=True, display_name="steps_per_run"),
        number(io.Int, "batch", 8, 1, 256, "Prompts per batch. Lower it when memory runs out.", advanced=True),
        make_input(
            io.String, "sizes", display_name="picture_sizes", default=AUTO, advanced=True,
            tooltip="Sizes of the sampled pictures in pixels, width x height, that take turns, such as `512x512, 448x576`. auto: as the model "
            "draws best. Unused when a latent is connected.",
        ),
        make_input(
            io.String, "samplers", default="euler, dpmpp_2m, euler_ancestral", advanced=True,
            tooltip="Samplers that take turns at random: names as in KSampler, with commas.",
        ),
        make_input(
            io.Combo, "scheduler", options=[AUTO, *comfy.samplers.KSampler.SCHEDULERS], default=AUTO, advanced=True,
            tooltip="Scheduler of the runs; take the one that you use. auto: simple for flow models, normal for others.",
        ),
        number(
            io.Float, "cfg_min", 0.0, 0.0, 30.0,
            "Lowest cfg of the runs, at least 1. 0: as the model is used; 1 for guidance-distilled models such as Flux.", step=0.5, advanced=True,
        ),
        number(io.Float, "cfg_max", 0.0, 0.0, 30.0, "Highest cfg of the runs, at least 1. 0: as the model is used.", step=0.5, advanced=True),
        make_input(
            io.String, "negatives", default=NEGATIVES, multiline=True, advanced=True,
            tooltip="Negative prompts that take turns at random, one per line; (empty) is the empty prompt. Those that users write belong here, "
            "words of harm too: what counts as a harmful direction depends on them.",
        ),
        number(io.Int, "seed", 0, 0, 2**48, "The same seed, prompts and settings give the same result.", control_after_generate=False, advanced=True),
    ]  # fmt: skip


def end_inputs(what: str) -> list:
    """How a training uses memory, and whether it goes on; `what` is its name in a sentence."""
    return [
        make_input(
            io.Boolean, "checkpointing", default=True, advanced=True,
            tooltip="Gradient checkpointing: less memory for more time. Switch it off for small models.",
        ),
        make_input(
            io.Boolean, "resume", default=True,
            tooltip=f"Go on with the {what} of this name where it stopped. Off: begin again, and delete what was recorded under this name.",
        ),
    ]  # fmt: skip


def latent_input() -> io.Input:
    return make_input(
        io.Latent, "latent", optional=True,
        tooltip="An empty latent whose shape is sampled instead of `picture_sizes`: for video models and others whose latents sizes cannot say.",
    )  # fmt: skip


def run_settings(values: dict, model: ModelPatcher | None = None) -> RunSettings:
    """The widgets' values, those on auto as a MODEL is used; raises HGRError for what cannot be read."""
    auto = auto_runs(model)
    samplers = tuple(name.strip() for name in values["samplers"].split(",") if name.strip())
    unknown = [name for name in samplers if name not in comfy.samplers.KSampler.SAMPLERS]
    if unknown or not samplers:
        raise hgr_models.HGRError(f"Expected names of samplers such as `euler, dpmpp_2m`, but got {values['samplers']!r}.")
    cfg = tuple(values[name] or own for name, own in zip(("cfg_min", "cfg_max"), auto.cfg, strict=True))
    if not 1 <= cfg[0] <= cfg[1]:
        raise hgr_models.HGRError(f"Expected cfg_min of at least 1 and at most cfg_max, but got {cfg[0]} and {cfg[1]}.")
    latent, sizes, scheduler = values.get("latent"), values["sizes"].strip(), values["scheduler"]
    return RunSettings(
        values["run_steps"], values["batch"], auto.sizes if sizes == AUTO else parse_sizes(sizes), samplers,
        auto.scheduler if scheduler == AUTO else scheduler, cfg,
        parse_negatives(values["negatives"]), values["seed"], None if latent is None else latent["samples"][:1].to("cpu"),
    )  # fmt: skip


def train_plan(name: str, networks: str, values: dict, model: ModelPatcher | None = None) -> TrainPlan:
    """The plan of the widgets' values; Record Guidance has only those of its runs. Steps of 0 are those of the preset.

    Raises HGRError for a way to train or a preset that there is not.
    """
    preset = values.get("preset", "normal")
    for wanted, known in ((networks, NETWORKS), (preset, tuple(PRESETS))):
        if wanted not in known:  # not every host looks it up in the list
            raise hgr_models.HGRError(f"Expected one of {', '.join(known)}, but got {wanted!r}.")
    steps = PRESETS[preset]
    through_model = steps.polish_steps if networks == THOROUGH else steps.condition_steps
    return TrainPlan(
        name, networks, run_settings(values, model), values["harmful_runs"], values["clean_runs"], values["calibration_runs"],
        values.get("condition_steps", 0) or through_model, values.get("guidance_steps", 0) or steps.guidance_steps,
        values.get("learning_rate", 1e-3), values.get("size", "normal"), values.get("false_positive_rate", 0.01),
        values.get("checkpointing", True), values.get("prompt_steps", 0) or steps.prompt_steps,
    )  # fmt: skip
