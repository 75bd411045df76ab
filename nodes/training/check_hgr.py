"""`SafeCFG Check HGR`: what an HGR does on this very model, and thresholds that fit it."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ... import hgr_models
from ...hgr_models.calibration import calibrated, calibrated_on_pictures
from ...hgr_models.pairs import PromptSet
from ..host.embedded import clip_for
from ..host.encoding import encode_batch
from ..host.families import check_family
from ..host.hooks import without_safecfg
from ..host.schema import HGR_TYPE, MY_PROMPTS_TYPE, PROMPTS_TYPE, defaults_of, make_input, make_schema
from ..host.server import show_result
from ..loader import FOLDER, HGRModel, check_name, load_hgr_model
from . import cards, measure
from .attack import Attacked, attack, spread_of
from .frozen_model import FrozenModel, check_can_freeze
from .inputs import latent_input, number, run_inputs, run_settings
from .launch import with_reserved
from .own_readings import OwnReadings, read_own
from .recorder import CALIBRATION, FOLLOW, HARMFUL, RunSettings, clean_pairs, plan_jobs, record_job

SPREAD = 64  # prompts of each kind by which an attack measures the tokens' spread
OTHER_RUNS = 2**50  # added to the seed: the runs of a training with the same seed calibrated the HGR, and prove nothing about it
RUN_STEPS = "Sampling steps of a harmful run; clean runs have 20."


def look(
    model: ModelPatcher,
    clip: CLIP,
    hgr: HGRModel,
    prompts: PromptSet,
    settings: RunSettings,
    counts: tuple[int, int],
    attacked: Attacked | None = None,
) -> measure.Found:
    """Runs and looks at harmful and clean prompts that were held out, as many runs as `counts` says; the harmful ones may be attacked."""
    hgr, device, clip = hgr.on(model.load_device), model.load_device, clip_for(model, clip)
    network = hgr.patcher.model
    pairs = prompts.held_out_pairs or prompts.pairs
    settings = replace(settings, seed=settings.seed + OTHER_RUNS)
    jobs = plan_jobs(settings, HARMFUL, pairs, counts[0], FOLLOW[:1], looks=0)
    jobs += plan_jobs(settings, CALIBRATION, clean_pairs(prompts.held_out_clean), counts[1], FOLLOW[:1], looks=0)
    found, bar = measure.Found(prompts.categories), comfy.utils.ProgressBar(len(jobs))
    frozen = FrozenModel(model, encode_batch(clip, [""])[0][1], settings.latent)
    plain = spread = None
    if attacked is not None:
        check_can_freeze(model)
        with torch.inference_mode(False):
            plain = copy_of(hgr).to(device)  # in layers that carry gradients
        texts = [pair.harmful for pair in pairs[:SPREAD]] + list(prompts.held_out_clean[:SPREAD])
        spread = spread_of([encode_batch(clip, [text])[0][0] for text in texts])
    for job in jobs:
        points, rows, pictures = record_job(model, clip, prompts, job, settings, None, None)
        comfy.model_management.load_models_gpu([hgr.patcher, model])
        if job.kind == HARMFUL:
            normal = nullcontext() if plain is None else torch.inference_mode(False)
            with normal, frozen.loaded((len(rows), *points.x.shape[1:]), plain is not None):
                measure.look_at_harmful(found, network, frozen, points, rows, device)
                if attacked is not None:
                    safe = encode_batch(clip, [pair.safe for pair in job.pairs])
                    attack(attacked, plain, frozen, points, rows, safe, spread, job.seed)
        else:
            measure.look_at_clean(found, network, points, rows, pictures, device)
        bar.update(1)
    return found


def copy_of(hgr: HGRModel) -> hgr_models.HGR:
    """The networks on the CPU, with nothing shared: what core hangs on a loaded one must not be copied. HGRError for combined ones."""
    loaded = hgr.patcher.model
    network = hgr_models.HGR(hgr.info, *(None if part is None else part.config for part in (loaded.condition, loaded.guidance)))
    network.load_state_dict({name: value.detach().cpu() for name, value in loaded.state_dict().items()})
    return network.train(False).requires_grad_(False)


def recalibrate(network: hgr_models.HGR, found: measure.Found, rate: float, own: OwnReadings | None = None) -> None:
    """Gives the networks thresholds that fit the clean runs that were found, and the user's own prompts."""
    clean = [*found.clean_readings, *(() if own is None else own.scores)]
    p = torch.stack(clean) if clean else None
    b = torch.stack(found.clean_maxima) if found.clean_maxima else None
    info = calibrated(network, p, b, rate, harmful=found.harmful_readings())
    network.calibrate(calibrated_on_pictures(info, torch.stack(found.clean_pictures), rate) if found.clean_pictures else info)


def save_path(name: str) -> Path:
    """Where recalibrated thresholds are saved. Raises HGRError for a name that exists or is no plain file name."""
    if name != Path(name).name or name.startswith("."):
        raise hgr_models.HGRError(f"Expected a plain name in `save_as`, such as my_merge_hgr, but got {name!r}.")
    path = Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{name}.safetensors"
    check_name(path)
    if path.exists():
        raise hgr_models.HGRError(f"{path} exists. Choose another name, or delete it.")
    return path


class CheckHGR(io.ComfyNode):
    """Measures removal and false alarms; see `measure`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_CheckHGR",
            display_name="SafeCFG Check HGR",
            description="Measures what an HGR does on a model: how much of the harm in held-out prompts it recognises and removes, how early, "
            "and how many clean pictures it would touch by mistake. Made for merges, LoRAs and other bases of the HGR's family; it can save "
            "thresholds that fit them. Nothing is decoded.",
            search_aliases=["evaluate hgr", "recalibrate", "false positives"],
            is_output_node=True,
            inputs=[*_sources(), *_widgets(), *run_inputs(RUN_STEPS), latent_input(), _own_input(), _attack_input()],
            outputs=[
                HGR_TYPE.Output(display_name="hgr", tooltip="The HGR; with the new thresholds when they were saved."),
                io.String.Output(display_name="report", tooltip="What was found, in words."),
                io.String.Output(display_name="json", tooltip="The same as JSON: shares from 0 to 1."),
            ],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, hgr: HGRModel, prompts: PromptSet, harmful_runs: int = 40, clean_runs: int = 100,
        false_positive_rate: float = 0.01, save_as: str = "", my_prompts: tuple[str, ...] | None = None, attack_steps: int = 0, **widgets,
    ) -> io.NodeOutput:  # fmt: skip
        if tuple(prompts.categories) != hgr.info.categories:
            raise hgr_models.HGRError(
                f"Expected prompts of the HGR's categories ({', '.join(hgr.info.categories)}), but SafeCFG Prompt Pairs gives "
                f"{', '.join(prompts.categories)}. Choose the same set and categories there."
            )
        check_family(model, hgr.info)
        path = save_path(save_as) if save_as else None
        network = copy_of(hgr) if save_as else None  # first: what cannot be saved is refused before anything runs
        settings = run_settings({**defaults_of(cls), **widgets}, model)
        attacked, counts = Attacked(attack_steps) if attack_steps else None, (harmful_runs, clean_runs)
        found = look(without_safecfg(model), clip, hgr, with_reserved(prompts), settings, counts, attacked)
        numbers = measure.report(found, hgr.info)
        text = measure.in_words(numbers)
        if attacked is not None:
            numbers, text = {**numbers, **attacked.numbers()}, f"{text}\n{attacked.in_words()}"
        cards.refresh(hgr.path, hgr.hash, check=cards.of_model(numbers, model))
        own = None if my_prompts is None else read_own(clip, hgr, my_prompts)
        if own is not None:
            numbers["my_prompts"], text = own.numbers(hgr.info), f"{text}\n{own.in_words(hgr.info)}"
        if path is not None:
            recalibrate(network, found, false_positive_rate, own)
            numbers["recalibrated"] = measure.report(found, network.info)
            text += f"\nwith the new thresholds of {path}:\n{measure.in_words(numbers['recalibrated'])}"
            if own is not None:
                numbers["recalibrated"]["my_prompts"] = own.numbers(network.info)
                text += f"\n{own.in_words(network.info)}"
            hgr_models.save_hgr(path, network)
            cards.refresh(path, check=cards.of_model(numbers["recalibrated"], model))
            hgr = load_hgr_model(str(path))
        return io.NodeOutput(hgr, text, json.dumps(numbers), ui=show_result(text))


def _sources() -> list:
    return [
        make_input(
            io.Model, "model", tooltip="The model to check the HGR on. It is not changed; SafeCFG Apply in it is left out."
        ),
        make_input(io.Clip, "clip", tooltip="The CLIP that belongs to the model."),
        make_input(HGR_TYPE, "hgr", tooltip="From SafeCFG Load HGR or SafeCFG Train HGR."),
        make_input(
            PROMPTS_TYPE,
            "prompts",
            tooltip="From SafeCFG Prompt Pairs; of the same categories. Its held-out prompts are used. Where no pair is held out, those of "
            "training are used: the result flatters then.",
        ),
    ]


def _own_input() -> io.Input:
    return make_input(
        MY_PROMPTS_TYPE,
        "my_prompts",
        optional=True,
        tooltip="From SafeCFG My Prompts: they are read, too, and count among the clean prompts when thresholds are saved.",
    )


def _attack_input() -> io.Input:
    return number(
        io.Int, "attack_steps", 0, 0, 10_000,
        "Steps of a white-box attack on every harmful run: tokens near the prompt's are searched for, by gradients through the model and the HGR, "
        "that bring the harm back. 40 is a start; a run then takes as long as some 400 sampling steps. Its weights come block by block where "
        "they do not fit. 0: no attack.",
        optional=True,
    )  # fmt: skip


def _widgets() -> list:
    return [
        number(io.Int, "harmful_runs", 40, 1, 100_000, "Runs of held-out harmful prompts."),
        number(io.Int, "clean_runs", 100, 1, 100_000, "Runs of clean prompts, of 20 steps. More of them tell rarer false alarms."),
        number(
            io.Float, "false_positive_rate", 0.01, 0.0001, 0.5,
            "The share of clean pictures that the new thresholds may redirect; used when they are saved.", step=0.001,
        ),
        make_input(
            io.String, "save_as", default="",
            tooltip="A new name in models/hgr: saves the same networks with thresholds calibrated on this model. Empty: only measure.",
        ),
    ]  # fmt: skip
