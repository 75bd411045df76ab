"""The HGRs of text encoders in models/hgr and among those that ship: found by what the encoder says, or made once.

`find_or_make` is what SafeCFG Protect, SAFECFG_ENFORCE=auto and the node that makes them ahead call.
"""

import logging
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ... import hgr_models
from ...hgr_models import pairs as pp
from ...hgr_models.encoders import RELATED, SAME, EncoderPrint, distance_between
from ...hgr_models.files import remove_stale_parts
from ...hgr_models.training_state import begin_again
from ..host import known_hgrs, server
from ..host.architecture import architecture_of
from ..host.embedded import clip_for
from ..host.encoder_print import check_clip, encoder_of, is_patched, is_quantised, unpatched
from ..host.families import base_of_model, family_of_hgr, family_of_model
from ..host.hooks import without_safecfg
from ..loader import FOLDER, SHIPPED, HGRModel, load_hgr_model, register_folder
from ..training import cards, forward_check
from ..training.frozen_model import BATCH_ERRORS, OtherClipError
from ..training.inputs import NEGATIVES, run_settings, train_plan
from ..training.launch import with_reserved
from ..training.plan import PROMPTS, make_folder_for_hgr, recording_folder
from ..training.recorder import RunSettings
from ..training.session import OtherTraining, Session

# Of the built-in set where a CPU encodes: pairs of each category, clean prompts, and how many of these calibrate.
PAIRS, CLEAN, CALIBRATION = 200, 1500, 500
HELD_OUT, SEED = 0.1, 0  # share of the pairs that no training sees
PRESET = "quick"
ROUNDED = 0.4  # distance that 8 to 4 bits a weight explain, in encoders as deep as users have
# Runs that a model is asked about once: seconds on a GPU. On a CPU no further one begins after a minute.
CHECKED = forward_check.Extent(pairs=4, steps=2, seconds=60.0)
RUNS = {  # of a training that records nothing
    "harmful_runs": 3, "clean_runs": 1, "calibration_runs": 1, "run_steps": 8, "batch": 8, "sizes": "auto", "samplers": "euler",
    "scheduler": "auto", "cfg_min": 0.0, "cfg_max": 0.0, "negatives": NEGATIVES, "seed": SEED,
}  # fmt: skip

logger = logging.getLogger(__name__)
_making = threading.RLock()  # a server may make one while a workflow wants it


@dataclass(frozen=True)
class Found:
    """An HGR's file that fits an encoder, the print of the one it was made with, and how far the encoder is from that."""

    path: str
    distance: float
    networks: tuple[str, ...]
    made_with: EncoderPrint | None = None

    def seen_by(self, encoder: EncoderPrint) -> "Found":
        """The same with the distance of another encoder, which is to be used with it."""
        return self if self.made_with is None else replace(self, distance=distance_between(encoder, self.made_with))

    def in_words(self, why: str = "one of the two is fine-tuned") -> str:
        """What to tell the user when the encoder is another one; empty when it is the same."""
        if self.distance <= SAME:
            return ""
        return (
            f"{self.path} was made with a text encoder that answers {100 * self.distance:.0f} % differently: {why}. It may "
            "miss harm or touch clean pictures. SafeCFG Train HGR makes one for exactly this encoder."
        )


@lru_cache(maxsize=256)
def _info(path: str, size: int, modified: int) -> tuple[hgr_models.HGRInfo, tuple[str, ...]] | None:
    try:
        return hgr_models.read_info(path)
    except hgr_models.HGRError as error:
        logger.warning("SafeCFG: %s", error)
        return None


def candidates() -> list[tuple[str, hgr_models.HGRInfo, tuple[str, ...]]]:
    """Path, metadata and networks of every HGR that can be read."""
    register_folder()
    for folder in folder_paths.get_folder_paths(FOLDER):
        remove_stale_parts(Path(folder))  # a killed server's, which has its file by now
    found = []
    for name in known_hgrs.names():
        path = folder_paths.get_full_path(FOLDER, name)
        if path is None:  # removed since core listed it
            continue
        with suppress(OSError):  # or just now
            stat = Path(path).stat()
            if (info := _info(path, stat.st_size, stat.st_mtime_ns)) is not None:
                found.append((path, *info))
    return found


def find(clip: CLIP, model: ModelPatcher | None = None, nearest: float = SAME) -> Found | None:
    """The HGR that fits a CLIP best: nearest encoder first, then one that also watches guidance. None where there is none.

    Its condition redirector was made with this encoder, up to a distance `nearest`, and it removes all built-in categories; or
    it ships for exactly this MODEL, if one is given, as the demo's does. A file with a guidance redirector must be
    of the MODEL's family.
    """
    return _find(encoder_of(clip), model, nearest)


def _find(encoder: EncoderPrint, model: ModelPatcher | None, nearest: float = SAME) -> Found | None:
    """As `find`, for a print: that of a CLIP with bypass LoRAs costs four prompts at every look, since core gives those no name."""
    family, base, name = None, None, ""
    if model is not None:
        family, base, name = family_of_model(model), base_of_model(model), architecture_of(model)
    fits = []
    for path, info, networks in candidates():
        if "condition" not in networks or not (
            info.of_prompts or (family_of_hgr(info) == family and info.architecture in ("", name))
        ):
            continue
        own = base is not None and info.base == base
        distance = 0.0 if own else _distance(encoder, info)
        shipped = own and Path(path).parent == SHIPPED
        if distance <= nearest and (shipped or set(pp.CATEGORIES) <= set(info.categories)):
            fits.append(Found(path, distance, networks, None if own else info.encoder_print()))
    return min(fits, key=lambda f: (f.distance > SAME, "guidance" not in f.networks, f.distance), default=None)


def _distance(encoder: EncoderPrint, info: hgr_models.HGRInfo) -> float:
    made_with = info.encoder_print()
    return float("inf") if made_with is None else distance_between(encoder, made_with)


def find_or_make(clip: CLIP | None, model: ModelPatcher | None = None, say: Callable[[str], None] | None = None) -> HGRModel:
    """The HGR of a CLIP's encoder, loaded; where there is none it is made first, from the built-in categories.

    A CLIP with LoRAs shares the one of the encoder beneath them, while that is RELATED: every strength would take minutes. So does one
    whose file is rounded to a byte and less, up to ROUNDED. Either is said, with how far the answers are. `say` shows a line of
    progress. Interrupted, it goes on next time; the file appears whole or not at all. Raises HGRError for an encoder that no HGR can
    be made for.
    """
    check_clip(clip)
    say = say or speaker("Protect")
    with _making:
        encoder = encoder_of(clip)
        beneath, plain, why = _beneath(clip, encoder)
        found = _find(encoder, model) or _find(plain, model, ROUNDED if is_quantised(clip) else SAME)
        if found is None:
            if beneath is clip and is_patched(clip):
                logger.warning(
                    "SafeCFG: this CLIP's LoRAs or merges make another encoder of it, which gets an HGR of its own at every strength. Give "
                    "SafeCFG Protect the CLIP from before them to share one."
                )
            elif (related := _find(plain, model, RELATED)) is not None:
                logger.warning("SafeCFG: %s Making one now.", related.in_words())
            if known := _in_index(encoder, model):
                logger.warning("SafeCFG: %s Put it there to have it taken; one is made meanwhile.", known)
            path = str(make(beneath, say, model))
            found = Found(path, 0.0, (), plain)
        else:
            forget_begun(plain)
    if words := found.seen_by(encoder).in_words(why):
        logger.warning("SafeCFG: %s", words)
        say(words)
    return load_hgr_model(found.path)


def _beneath(clip: CLIP, encoder: EncoderPrint) -> tuple[CLIP, EncoderPrint, str]:
    """The CLIP whose HGR one of print `encoder` takes, and its print: itself, or without its LoRAs if that is RELATED; and what makes the
    two differ, in words."""
    if is_patched(clip):
        plain = unpatched(clip)
        made_with = encoder_of(plain)
        if distance_between(encoder, made_with) < RELATED:
            return plain, made_with, "it is the one without this CLIP's LoRAs or merges, which all their strengths share"
    return clip, encoder, "it is rounded to a byte a weight or less, or one of the two is fine-tuned"


def name_of(encoder: EncoderPrint) -> str:
    """What the HGR of a text encoder is called."""
    return f"encoder-{encoder.name}"


def forget_begun(encoder: EncoderPrint) -> None:
    """Removes what was begun for an encoder that has its HGR by now: a server may be killed between saving that and tidying up."""
    shutil.rmtree(recording_folder(f"{name_of(encoder)}-{PRESET}"), ignore_errors=True)


def _in_index(encoder: EncoderPrint, model: ModelPatcher | None) -> str:
    """What models/hgr's index knows for an encoder and a MODEL, in words."""
    names = ("", "") if model is None else (architecture_of(model), base_of_model(model))
    return known_hgrs.in_words(lambda info: False, *names, encoder)


def make(clip: CLIP, say: Callable[[str], None], model: ModelPatcher | None = None) -> Path:
    """Trains an HGR of a CLIP's encoder from the built-in pairs, and keeps it under the encoder's name in models/hgr.

    With a MODEL the file says, too, how well that one draws what corrected prompts say.
    """
    encoder = encoder_of(clip)
    name = name_of(encoder)
    plan = train_plan(f"{name}-{PRESET}", PROMPTS, {**RUNS, "preset": PRESET})
    say("no HGR of this text encoder yet: making one, once")
    path = folder_to_keep() / f"{name}.safetensors"  # before minutes are spent
    prompts = with_reserved(built_in_prompts(fast=clip.patcher.load_device.type != "cpu"))
    session = Session(plan, recording_folder(plan.name), say, None, clip, prompts)
    if model is not None:
        session.checking = check_reads(model, clip, prompts)
    try:
        session.identify()
        session.prepare()
    except OtherTraining:  # stopped before the pack was updated: nobody named it, so nobody misses it
        begin_again(session.folder, keep_shards=False)
        session.identify()
        session.prepare()
    hgr = session.train(session.make_recording())
    # Before it is kept: cancelled here, the next run has all that was learnt, and checks it.
    if model is not None and (ratio := check(model, clip, hgr, prompts, say)) is not None:
        hgr.info.training["forward_check"] = ratio
        say(forward_check.in_words(ratio))
    hgr_models.save_hgr(path, hgr.cpu())
    forget_begun(encoder)  # gigabytes, which nobody asked for by name
    cards.refresh(path)
    say(f"made {path}")
    return path


def folder_to_keep() -> Path:
    """The first folder of models/hgr that can be written and has room: a shared one may not. Raises HGRError where none can."""
    first, *others = [Path(path) for path in folder_paths.get_folder_paths(FOLDER) if Path(path) != SHIPPED]
    try:
        make_folder_for_hgr(first)
        return first
    except hgr_models.HGRError:
        for folder in others:
            with suppress(hgr_models.HGRError):
                make_folder_for_hgr(folder)
                return folder
        raise


def check_reads(model: ModelPatcher, clip: CLIP, prompts: pp.PromptSet) -> float:
    """The seconds that `check` will take, 0 where the model cannot be asked.

    Raises HGRError where a MODEL cannot read a CLIP's tokens, which are made for another model, or answers with NaN.
    """
    model = without_safecfg(model)
    try:
        runs = small_runs(model)
        row = forward_check.check_reads(model, clip_for(model, clip), prompts, runs, always=False)
        return forward_check.seconds_of(row, runs, CHECKED)
    except (OtherClipError, forward_check.NotFiniteError):
        raise
    except BATCH_ERRORS:  # it wants more than a prompt
        logger.debug("SafeCFG: the model was not asked whether it reads this CLIP.", exc_info=True)
    return 0.0


def small_runs(model: ModelPatcher) -> RunSettings:
    """Runs one at a time, of half the size."""
    runs = run_settings(RUNS, model)
    return replace(runs, batch=1, sizes=(tuple(side // 2 for side in runs.sizes[0]),))


def check(
    model: ModelPatcher, clip: CLIP, hgr: hgr_models.HGR, prompts: pp.PromptSet, say: Callable[[str], None]
) -> float | None:
    """`forward_check.error_ratio` of a few small runs of a MODEL; None, and a warning, where it cannot be sampled like that.

    Raises HGRError where it answers corrected prompts with NaN: such an HGR is not kept.
    """
    model = without_safecfg(model)
    try:
        with torch.inference_mode():
            return forward_check.error_ratio(
                model, clip_for(model, clip), hgr.condition, prompts, small_runs(model), CHECKED, say
            )
    except forward_check.NotFiniteError:
        raise
    except BATCH_ERRORS as error:
        logger.warning("SafeCFG: the new HGR could not be checked by the model (%s).", error)
    return None


def built_in_prompts(fast: bool = False) -> pp.PromptSet:
    """The prompts of an HGR that nobody chose any for: those of SafeCFG Prompt Pairs, or fewer where encoding all of them is not `fast`."""
    if fast:
        return pp.default_prompts(SEED, HELD_OUT)
    material = pp.seven_categories(pp.CATEGORIES, PAIRS, CLEAN, SEED)
    return pp.build(material, pp.CATEGORIES, pp.CONCEPTS, HELD_OUT, SEED, CALIBRATION).prompts


def speaker(what: str) -> Callable[[str], None]:
    """A function that logs a line of text and shows it on the node that runs, if one does."""
    show = server.speaker()

    def say(text: str) -> None:
        logger.info("SafeCFG %s: %s", what, text)
        show(text)

    return say
