"""`SafeCFG Evaluate`: prompt lists drawn with and without SafeCFG on the same seeds, judged, as a table."""

import json
from pathlib import Path

import folder_paths
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io, ui

from ... import hgr_models
from ...hgr_models.card_tables import harm_in_short
from ...hgr_models.files import write_text
from ..demo_world.demo_model import DemoConfig
from ..host.architecture import architecture_of
from ..host.families import base_of_model, family_of_model
from ..host.hooks import KEY
from ..host.schema import make_schema
from ..host.server import speaker
from ..loader import HGRModel
from ..training import cards
from . import distances, file_judges, inception, own_judges, protocol, table
from .arms import SAFE, parse_arms, said_of
from .draw import make_setup
from .features import text_tower, why_no_score
from .figures import clean_rows, harm_rows, seconds, share
from .inputs import evaluate_inputs
from .judges import Context, judge_folders, open_judges
from .keeping import contact_sheet, pictures_in
from .lists import CLEAN, PromptList, spread
from .outside_judges import add_outside
from .prompts import Prompts
from .session import Session, alarms_on
from .store import FORMAT, VERSION, Store


def evaluation_folder(name: str) -> Path:
    """Where an evaluation lies. Raises HGRError for a name that is no plain file name."""
    if name != Path(name).name or not name.strip() or name.startswith("."):
        raise hgr_models.HGRError(f"Expected a plain name, such as my_checkpoint, but got {name!r}.")
    return Path(folder_paths.get_output_directory()) / "safecfg" / "evaluations" / name


def model_facts(model: ModelPatcher) -> dict:
    """What tells a MODEL from another."""
    patches = sum(map(len, model.patches.values()))
    return {
        "family": family_of_model(model),
        "architecture": architecture_of(model),
        "base": base_of_model(model),
        "patches": patches,
    }


def hgr_facts(model: ModelPatcher, hgr: HGRModel | None) -> dict | None:
    """The HGR of the SafeCFG arm: the model's own, else the one that is connected."""
    if KEY in model.additional_models:
        settings = model.get_attachment(KEY)
        return {"file": Path(settings.hgr_name).name, "sha256": settings.hgr_hash, "categories": list(settings.info.categories)}
    if hgr is None:
        return None
    return {"file": Path(hgr.path).name, "sha256": hgr.hash, "categories": list(hgr.info.categories)}


def hgr_path(model: ModelPatcher, hgr: HGRModel | None) -> str:
    """The file of the HGR of the SafeCFG arm."""
    return model.get_attachment(KEY).hgr_name if KEY in model.additional_models else hgr.path


def vision_width(clip_vision: ClipVisionModel | None) -> int:
    """How wide the image embeddings of a CLIP vision model are; 0 without one."""
    projection = getattr(getattr(clip_vision, "model", None), "visual_projection", None)
    weight = getattr(projection, "weight", None)
    return 0 if weight is None else weight.shape[0]


def take_rows(lists: list[PromptList], limit: int) -> list[PromptList]:
    """The lists with at most `limit` prompts each (0: all)."""
    return [PromptList(each.name, each.kind, each.digest, spread(each.rows, limit), each.total) for each in lists]


def begin(model: ModelPatcher, clip: CLIP, vae: VAE, values: dict) -> tuple[Session, dict]:
    """A session of the widgets' values, and the facts that the results begin with. Raises HGRError for whatever does not fit."""
    chosen, folder = protocol.load(values["protocol"]), evaluation_folder(values["name"])
    hgr, clip_vision = values.get("hgr"), values.get("clip_vision")
    found, notes = protocol.gather(chosen, values["lists"], Path(folder_paths.get_input_directory()))
    lists = take_rows(found, values["prompts_per_list"])
    is_demo = isinstance(model.model.model_config, DemoConfig)
    context = Context(model, clip, vae, hgr, clip_vision, is_demo, judge_folders())
    judges = open_judges(values["judges"], [*own_judges.entries(context), *file_judges.entries(context)])
    prompts = Prompts(clip, values.get("positive_conditioning"), values.get("negative_conditioning"))
    setup, arms = make_setup(model, values, chosen.settings), parse_arms(values["arms"], model, clip, hgr)
    images, seed = (
        values["images_per_prompt"] or chosen.settings.get("images", 1),
        values["seed"] or chosen.settings.get("seed", 0),
    )
    text_clip = values.get("score_clip") or clip
    tower = text_tower(text_clip, vision_width(clip_vision)) if clip_vision is not None else None
    clean = any(each.kind == CLEAN for each in lists)
    fid = inception.entry(context)
    embed, fid_version = fid.open() if clean and not fid.missing else (None, "")
    drawn = {**setup.facts(), **prompts.facts()}
    about = {"model": model_facts(model), "hgr": hgr_facts(model, hgr), "settings": {**drawn, "images": images, "seed": seed}}
    facts = {
        "model": about["model"], "settings": drawn, "judges": [[j.name, j.version, list(j.labels)] for j in judges],
        "clip_vision": vision_width(clip_vision), "clip_score": tower is not None, **({"fid": fid_version} if embed else {}),
    }  # fmt: skip
    session = Session(
        context, setup, prompts, lists, arms, judges, images, seed, keep=values["keep_pictures"], folder=folder,
        store=Store(folder, facts, values["resume"]), say=speaker(), score_clip=text_clip, tower=tower, inception=embed,
    )  # fmt: skip
    lacking = [why_no_score(clip_vision, tower), inception.why_not(fid) if clean else ""]
    return session, {**about, "protocol": chosen, "notes": [*notes, *said_of(arms), *filter(None, lacking)]}


def results_of(session: Session, name: str, about: dict, found: dict, calibration: list) -> dict:
    """Everything in one dictionary, as `results.json` holds it: shares from 0 to 1, None where there is nothing to say."""
    arms, chosen = [arm.name for arm in session.arms], about["protocol"]
    outside, notes = add_outside(session.folder, found)
    notes = [*about["notes"], *notes, *session.left_out()]
    judges = [*(judge.facts() for judge in session.judges), *outside]
    lists = [
        {"name": each.name, "kind": each.kind, "sha256": each.digest, "prompts": len(each.rows), "of": each.total}
        for each in session.lists
    ]
    clean = clean_rows(session.lists, arms, found, distances.of_records)
    few = distances.few(clean, {"FD-CLIP": vision_width(session.context.clip_vision), "FID": inception.WIDTH})
    published = [f for f in chosen.published if f["list"] in {each.name for each in session.lists}]
    return {
        "format": FORMAT, "version": VERSION, "name": name, "model": about["model"], "hgr": about["hgr"], "settings": about["settings"],
        "protocol": {"name": chosen.name, "title": chosen.title, "judged": chosen.judged, "published": published}, "lists": lists,
        "judges": judges, "arms": [{"name": arm.name, "about": arm.about, "negative": arm.negative} for arm in session.arms],
        "rows": harm_rows(session.lists, arms, judges, found),
        "clean": clean, "calibration": calibration, "seconds": seconds(arms, found), "notes": [*notes, *few],
    }  # fmt: skip


class Evaluate(io.ComfyNode):
    """Draws, judges and counts; see `session.Session`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_Evaluate",
            display_name="SafeCFG Evaluate",
            description="Gives you a number for your own checkpoint: draws lists of prompts with and without SafeCFG on the same seeds, lets "
            "judges say what the pictures show, and writes a table with intervals, a contact sheet and JSON. It can be stopped at any time and "
            "goes on where it was. Harmful pictures are blurred.",
            search_aliases=["benchmark", "I2P", "attack success rate", "compare models", "model card"],
            is_output_node=True,
            not_idempotent=True,
            inputs=evaluate_inputs(),
            outputs=[
                io.String.Output(display_name="table", tooltip="What was found, as Markdown; also in table.md."),
                io.Image.Output(display_name="contact_sheet", tooltip="A prompt per row, an arm per column; harmful pictures as keep_pictures says."),
                io.String.Output(display_name="json", tooltip="Everything as JSON: shares from 0 to 1; also in results.json."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **_) -> str | float:
        return float("nan")  # lists and judges are files, which change

    @classmethod
    def execute(cls, model: ModelPatcher, clip: CLIP, vae: VAE, **values) -> io.NodeOutput:
        session, about = begin(model, clip, vae, values)
        calibration = []
        if folder := values["clean_pictures"].strip():
            alarms = alarms_on(session.judges, pictures_in(_below_input(folder)), folder)
            calibration = [{"judge": each["judge"], **share(each["hits"])} for each in alarms]
        found = session.run()
        results = results_of(session, values["name"], about, found, calibration)
        text, numbers = table.write(results), json.dumps(results, ensure_ascii=False, indent=1)
        session.say(harm_in_short(results))
        arms = [arm.name for arm in session.arms]
        sheet = contact_sheet(session.folder, session.lists, arms, found)
        write_text(session.folder / "table.md", text)
        write_text(session.folder / "results.json", numbers + "\n")
        if results["hgr"] is not None and any(arm["name"] == SAFE for arm in results["arms"]):
            cards.refresh(hgr_path(model, values.get("hgr")), results["hgr"]["sha256"], evaluation=results)
        return io.NodeOutput(text, sheet, numbers, ui={**ui.PreviewImage(sheet, cls=cls).as_dict(), "text": (text,)})


def _below_input(folder: str) -> Path:
    root = Path(folder_paths.get_input_directory()).resolve()
    place = (root / folder).resolve()
    if root not in place.parents or not place.is_dir():
        raise hgr_models.HGRError(f"Expected a folder of {root} as clean_pictures, but there is no {folder!r}.")
    return place
