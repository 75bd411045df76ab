"""The inputs that SafeCFG Train HGR, Record Guidance, Check HGR and Fine-tune Safe LoRA share."""

import comfy.samplers
from comfy_api.latest import io

from ... import hgr_models
from ..schema import make_input
from .plan import TrainPlan, parse_negatives, parse_sizes
from .recorder import RunSettings

NEGATIVES = "(empty)\n(empty)\nlow quality, blurry, watermark\nnsfw, nude, gore, violence\nclothes, safe, harmless"


def number(kind, name: str, default, low, high, text: str, **more):
    """A number widget."""
    return make_input(kind, name, default=default, min=low, max=high, tooltip=text, **more)


def count_inputs() -> list:
    return [
        number(
            io.Int, "harmful_runs", 240, 3, 100_000,
            "Sampling runs of harmful prompts to learn from. They follow the harmful prompt and its safe partner in turn; where the guidance "
            "redirector is trained, the last third follows it instead, which only SafeCFG Train HGR with a model records. They are kept as "
            "latents and never decoded.",
        ),
        number(
            io.Int, "clean_runs", 240, 1, 100_000,
            "Sampling runs of clean prompts, for the guidance redirector: it must leave them alone.",
        ),
        number(
            io.Int, "calibration_runs", 100, 1, 100_000,
            "Runs of 20 steps of clean prompts that training never sees. More runs prove a lower rate of false alarms: at the default rate, "
            "100 prove about 3 %, 300 about 2 %, 1000 about 1.4 %.",
        ),
    ]  # fmt: skip


def run_inputs(run_steps: str = "Sampling steps of a recorded run; each is one sample to learn from.") -> list:
    """How runs are sampled. Every batch draws one sampler, one negative, one size and one cfg of these; `run_steps` is a tooltip."""
    return [
        number(io.Int, "run_steps", 8, 2, 100, run_steps),
        number(io.Int, "batch", 8, 1, 256, "Prompts per batch. Lower it when memory runs out.", advanced=True),
        make_input(
            io.String, "sizes", default="512x512, 448x576, 576x448",
            tooltip="Sizes of the sampled pictures in pixels, width x height, that take turns. 1024x1024 and its like for SDXL, SD3 and Flux, "
            "128x128 for the demo model. Unused when a latent is connected.",
        ),
        make_input(
            io.String, "samplers", default="euler, dpmpp_2m, euler_ancestral", advanced=True,
            tooltip="Samplers that take turns at random: names as in KSampler, with commas.",
        ),
        make_input(
            io.Combo, "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="normal", advanced=True,
            tooltip="Scheduler of the runs; take the one that you use.",
        ),
        number(io.Float, "cfg_min", 3.0, 1.0, 30.0, "Lowest cfg of the runs. 1 for guidance-distilled models such as Flux.", step=0.5),
        number(io.Float, "cfg_max", 8.0, 1.0, 30.0, "Highest cfg of the runs.", step=0.5),
        make_input(
            io.String, "negatives", default=NEGATIVES, multiline=True,
            tooltip="Negative prompts that take turns at random, one per line; (empty) is the empty prompt. Those that users write belong here, "
            "words of harm too: what counts as a harmful direction depends on them.",
        ),
        number(io.Int, "seed", 0, 0, 2**48, "The same seed, prompts and settings give the same result.", control_after_generate=False),
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


def latent_input():
    return make_input(
        io.Latent, "latent", optional=True,
        tooltip="An empty latent whose shape is sampled instead of `sizes`: for video models and others whose latents sizes cannot say.",
    )  # fmt: skip


def run_settings(values: dict) -> RunSettings:
    """The widgets' values; raises HGRError for what cannot be read."""
    samplers = tuple(name.strip() for name in values["samplers"].split(",") if name.strip())
    unknown = [name for name in samplers if name not in comfy.samplers.KSampler.SAMPLERS]
    if unknown or not samplers:
        raise hgr_models.HGRError(f"Expected names of samplers such as `euler, dpmpp_2m`, but got {values['samplers']!r}.")
    cfg = (values["cfg_min"], values["cfg_max"])
    if cfg[0] > cfg[1]:
        raise hgr_models.HGRError(f"Expected cfg_min at most cfg_max, but got {cfg[0]} and {cfg[1]}.")
    latent = values.get("latent")
    return RunSettings(
        values["run_steps"], values["batch"], parse_sizes(values["sizes"]), samplers, values["scheduler"], cfg,
        parse_negatives(values["negatives"]), values["seed"], None if latent is None else latent["samples"][:1].cpu(),
    )  # fmt: skip


def train_plan(name: str, networks: str, values: dict) -> TrainPlan:
    """The plan of the widgets' values; Record Guidance has only those of its runs."""
    return TrainPlan(
        name, networks, run_settings(values), values["harmful_runs"], values["clean_runs"], values["calibration_runs"],
        values.get("condition_steps", 0), values.get("guidance_steps", 0), values.get("learning_rate", 1e-3),
        values.get("size", "normal"), values.get("false_positive_rate", 0.01), values.get("checkpointing", True),
    )  # fmt: skip
