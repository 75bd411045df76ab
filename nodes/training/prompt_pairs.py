"""`SafeCFG Prompt Pairs`: what an HGR learns, from built-in sets, the user's own lines and files."""

import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...hgr_models import HGRError, file_hash
from ...hgr_models import pairs as pp
from ..host.schema import PROMPTS_TYPE, make_input, make_schema
from ..host.server import show_result
from . import demo_pairs

SEVEN, DEMO, OWN = "seven categories", "demo world", "own only"
NO_FILE = "none"

logger = logging.getLogger(__name__)


def input_files() -> list[str]:
    """The CSV and JSON files that lie in ComfyUI's input folder itself."""
    folder = Path(folder_paths.get_input_directory())
    return sorted(f.name for f in folder.glob("*") if f.suffix.lower() in (".csv", ".json") and f.is_file())


def input_file(name: str) -> Path:
    """The path of a listed file. Raises HGRError for any other name."""
    names = input_files()
    if name not in names:
        raise HGRError(
            f"There is no file {name!r}; there is {', '.join(names) or 'none'}. Put a .csv or .json file into ComfyUI's input folder."
        )
    return Path(folder_paths.get_input_directory(), name)


def own_material(own_pairs: str, own_category: str, file: str) -> pp.Material:
    """The user's own prompts: those of the text, then those of the file."""
    category = ""
    if own_pairs.strip() or file != NO_FILE:  # rows of a file may lack a category too
        try:
            category = pp.category_name(own_category)
        except HGRError as error:
            raise HGRError(f"own_category: {error}.") from error
    own = pp.parse_own(own_pairs, category)
    return own + pp.read_file(input_file(file), category) if file != NO_FILE else own


def make_prompts(
    prompt_set: str, categories: str, counts: tuple[int, int, int], own: pp.Material, held_out: float, seed: int
) -> pp.Built:
    """The prompts of a built-in set and the user's own; `counts` are pairs per built-in category, clean prompts, and how many of
    these are held out at least, in the set that has enough of them.

    Raises HGRError for unknown categories, categories without pairs, and prompts that contradict each other.
    """
    sets = {SEVEN: pp.CATEGORIES, DEMO: demo_pairs.CATEGORIES, OWN: ()}
    if prompt_set not in sets:  # not every host looks it up in the list
        raise HGRError(f"There is no prompt set {prompt_set!r}; there is {', '.join(sets)}.")
    built_in = sets[prompt_set]
    others = dict.fromkeys(c for item in own.pairs for c in sorted(item.pair.harms))
    if not built_in and not others:
        raise HGRError(f"Expected pairs of your own with the set {OWN!r}, but there are none. Write some, or choose another set.")
    kept = pp.keep_categories(categories, tuple(dict.fromkeys((*built_in, *others))))
    mine = [category for category in built_in if category in kept]
    avoid = pp.clean_words_to_avoid(own.pairs, built_in or pp.CATEGORIES)
    if prompt_set == DEMO:
        material = demo_pairs.demo_world(mine, *counts[:2], held_out, seed, avoid)
    else:
        material = pp.seven_categories(mine, *counts[:2], seed, avoid)
    if avoid:
        material.notes.append(f"built-in clean prompts leave out what your own pairs are about: {', '.join(sorted(avoid))}")
    concepts = demo_pairs.CONCEPTS if prompt_set == DEMO else pp.CONCEPTS
    return pp.build(material + own, kept, concepts, held_out, seed, counts[2] if prompt_set == SEVEN else 0)


class PromptPairs(io.ComfyNode):
    """Pairs and clean prompts for training and checking an HGR."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_PromptPairs",
            display_name="SafeCFG Prompt Pairs",
            description="The prompts an HGR learns from: pairs of a harmful prompt and the same scene without the harm, and clean "
            "prompts. Take the built-in ones, write your own, or read a file. No pictures are needed.",
            search_aliases=["training prompts", "harmful prompts", "prompt dataset", "safety categories"],
            inputs=_inputs(),
            outputs=[
                PROMPTS_TYPE.Output(display_name="prompts", tooltip="The prompts, for SafeCFG's training and checking nodes."),
                io.String.Output(
                    display_name="summary", tooltip="How many pairs of each category there are, and what was dropped."
                ),
            ],
            is_output_node=True,  # so that the summary can be had without a training
        )

    @classmethod
    def validate_inputs(cls, file: str | None = NO_FILE) -> str | bool:
        """Not every host looks a V3 node's choice up in its list."""
        try:
            if file not in (None, NO_FILE):  # None: another node's output
                input_file(file)
        except HGRError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = NO_FILE, **others) -> str | float:
        return "" if file in (None, NO_FILE) else file_hash(str(input_file(file)))

    @classmethod
    def execute(
        cls, prompt_set: str = SEVEN, categories: str = "", pairs_per_category: int = pp.PAIRS_PER_CATEGORY,
        clean_prompts: int = pp.CLEAN_PROMPTS, own_pairs: str = "", own_category: str = "own", file: str = NO_FILE, held_out: float = 0.1,
        seed: int = 0, calibration_prompts: int = pp.CALIBRATION_PROMPTS,
    ) -> io.NodeOutput:  # fmt: skip
        own = own_material(own_pairs, own_category, file)
        built = make_prompts(
            prompt_set, categories, (pairs_per_category, clean_prompts, calibration_prompts), own, held_out, seed
        )
        for warning in built.warnings:
            logger.warning("SafeCFG Prompt Pairs: %s", warning)
        return io.NodeOutput(built.prompts, built.summary, ui=show_result(built.summary))


def _inputs() -> list:
    return [*_built_in_inputs(), *_own_inputs(), *_split_inputs()]


def _built_in_inputs() -> list:
    return [
        make_input(
            io.Combo,
            "prompt_set",
            options=[SEVEN, DEMO, OWN],
            default=SEVEN,
            tooltip="The built-in pairs. seven categories: hate, harassment, violence, self-harm, sexual, shocking, illegal. "
            "demo world: weapons, drugs, death, for SafeCFG Demo Model. own only: none, just your own pairs and file.",
        ),
        make_input(
            io.String,
            "categories",
            default="",
            tooltip="The categories to keep, such as sexual, violence; your own are among them. Empty keeps all.",
        ),
        make_input(
            io.Int,
            "pairs_per_category",
            default=pp.PAIRS_PER_CATEGORY,
            min=1,
            max=5000,
            tooltip="Built-in pairs of each category, held-out ones included. Your own pairs and those of a file are all taken.",
        ),
        make_input(
            io.Int,
            "clean_prompts",
            display_name="clean_prompt_count",
            default=pp.CLEAN_PROMPTS,
            min=0,
            max=20000,
            tooltip="Built-in prompts that must stay untouched, in the styles of many users. More of them keep more pictures bit-identical, and "
            "cost no runs, only their encoding. 0: only those of a file.",
        ),
    ]


def _own_inputs() -> list:
    return [
        make_input(
            io.String,
            "own_pairs",
            multiline=True,
            default="",
            placeholder="a portrait of a smoking man => a portrait of a man",
            tooltip="Your own pairs, one per line: harmful => safe. A line may name its category: `weapons: a knife => a spoon`. Lines that begin "
            "with # are comments.",
        ),
        make_input(
            io.String,
            "own_category",
            default="own",
            tooltip="The category of your own pairs, and of a file's rows that name none. It may be one of the built-in ones.",
        ),
        make_input(
            io.Combo,
            "file",
            options=[NO_FILE, *input_files()],
            default=NO_FILE,
            tooltip="A .csv or .json file in ComfyUI's input folder with harmful, safe and category (several separated by a vertical bar). "
            "A row with safe alone is a clean prompt. The help page has the details.",
        ),
    ]


def _split_inputs() -> list:
    return [
        make_input(
            io.Float,
            "held_out",
            default=0.1,
            min=0.0,
            max=0.5,
            step=0.05,
            tooltip="The share that training never sees and that the result is judged by. Whole subjects are held out. "
            "The demo world has a split of its own, of which this is the share.",
        ),
        make_input(
            io.Int,
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=False,  # other prompts at every run would mean another training
            tooltip="Fixes which prompts are drawn and which are held out. Keep it to resume a training.",
        ),
        make_input(
            io.Int,
            "calibration_prompts",
            default=pp.CALIBRATION_PROMPTS,
            min=0,
            max=10000,
            optional=True,
            advanced=True,
            tooltip="At least so many of the clean prompts of seven categories are held out to set thresholds with, though no more than half. "
            "Hundreds are needed to prove a rate of false alarms of 1 %. Nothing is held out where `held_out` is 0.",
        ),
    ]
