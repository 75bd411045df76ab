"""`SafeCFG My Prompts`: the prompts of the user's own pictures, of a file, or of a text."""

import json
import logging
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io
from PIL import Image

from ...hgr_models import HGRError
from ...hgr_models import pairs as pp
from ..host.schema import MY_PROMPTS_TYPE, make_input, make_schema
from ..reporting.audit import prompt_texts

PICTURES, TEXT = "my pictures", "text"
LARGEST = 2**24  # bytes of metadata of a picture that are read

logger = logging.getLogger(__name__)


def prompts_of_picture(path: Path) -> list[str]:
    """The positive prompts that a picture was made with: from ComfyUI's graph, or the parameters of other programs; [] where none is told."""
    try:
        with Image.open(path) as picture:
            about = dict(getattr(picture, "text", None) or picture.info)
    except (OSError, ValueError, SyntaxError):  # no picture, or a damaged one
        return []
    graph, parameters = about.get("prompt"), about.get("parameters")
    if isinstance(graph, str) and len(graph) < LARGEST:
        return prompts_of_graph(graph)
    return [positive_of(parameters)] if isinstance(parameters, str) and positive_of(parameters) else []


def prompts_of_graph(text: str) -> list[str]:
    """The texts of the positive prompts of every sampler in a graph (API format)."""
    try:
        graph = json.loads(text)
        nodes = {str(key): node for key, node in graph.items() if isinstance(node, dict) and isinstance(node.get("inputs"), dict)}
    except (ValueError, AttributeError, RecursionError):
        return []
    samplers = [
        key for key, node in nodes.items() if "guider" in node["inputs"] or {"positive", "negative"} <= node["inputs"].keys()
    ]
    return pp.distinct(t for key in samplers for t in prompt_texts(nodes, key) or () if t.strip())


def positive_of(parameters: str) -> str:
    """The prompt in what Stable Diffusion web UIs write: everything before the negative prompt and the settings."""
    lines = []
    for line in parameters.splitlines():
        if line.startswith(("Negative prompt:", "Steps:")):
            break
        lines.append(line)
    return "\n".join(lines).strip()


def pictures_in(folder: str, most: int) -> list[Path]:
    """The newest PNG and WebP files of ComfyUI's output folder, or of a folder below it. Raises HGRError for another place."""
    root = Path(folder_paths.get_output_directory()).resolve()
    place = (root / folder).resolve()
    if place != root and root not in place.parents:
        raise HGRError(f"Expected a folder below ComfyUI's output folder, but got {folder!r}.")
    if not place.is_dir():
        raise HGRError(f"There is no folder {folder!r} below ComfyUI's output folder.")
    files = [p for p in place.rglob("*") if p.suffix.lower() in (".png", ".webp") and p.is_file()]
    return sorted(files, key=lambda p: p.stat().st_mtime, reverse=True)[:most]


def input_lists() -> list[str]:
    """The files of prompts that lie in ComfyUI's input folder itself."""
    folder = Path(folder_paths.get_input_directory())
    return sorted(f.name for f in folder.glob("*") if f.suffix.lower() in pp.SUFFIXES and f.is_file())


def gather(source: str, folder: str, text: str, most: int) -> tuple[list[str], str]:
    """Distinct prompts of a source, at most `most`, and where they come from in words."""
    if source == TEXT:
        found, where = [line.strip() for line in text.splitlines() if line.strip()], "the text"
    elif source == PICTURES:
        files, found = pictures_in(folder, 4 * most), []
        bar = comfy.utils.ProgressBar(len(files))
        for file in files:
            comfy.model_management.throw_exception_if_processing_interrupted()
            found += prompts_of_picture(file)
            bar.update(1)
        where = f"{len(files)} pictures in {folder or 'the output folder'}"
    elif source in input_lists():
        found, where = pp.read_prompts(Path(folder_paths.get_input_directory(), source)), source
    else:
        raise HGRError(
            f"There is no source {source!r}. Put a .txt, .csv or .json file into ComfyUI's input folder, or choose another."
        )
    if not (found := pp.distinct(found)[:most]):
        raise HGRError(f"Found no prompts in {where}. Pictures need the metadata that ComfyUI writes; choose another source.")
    return found, where


class OwnPrompts(io.ComfyNode):
    """Gathers prompts; nothing is judged here."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_OwnPrompts",
            display_name="SafeCFG My Prompts",
            description="Gathers the prompts that you really use: those of the pictures in ComfyUI's output folder, of a file, or of a text. "
            "Connect them to SafeCFG Calibrate HGR or SafeCFG Check HGR, to see how many would be flagged by mistake and to change that.",
            search_aliases=["png metadata prompts", "my prompts", "calibration prompts"],
            inputs=[
                make_input(
                    io.Combo, "source", options=[PICTURES, TEXT, *input_lists()], default=PICTURES,
                    tooltip="my pictures: the metadata of PNG and WebP files in ComfyUI's output folder. text: one prompt per line. Or a .txt, "
                    ".csv, .tsv or .json file in the input folder, with a column prompt or text.",
                ),
                make_input(
                    io.String, "folder", default="",
                    tooltip="For my pictures: a folder below the output folder. Empty: all of it. The newest pictures come first.",
                ),
                make_input(io.String, "text", default="", multiline=True, tooltip="For text: one prompt per line."),
                make_input(io.Int, "most", default=2000, min=1, max=100_000, tooltip="At most so many prompts; some hundreds say enough."),
                make_input(
                    io.String, "leave_out", default="", multiline=True, placeholder="nude, gore",
                    tooltip="Words or phrases, separated by commas: prompts with one of them do not count. For prompts that should be flagged.",
                ),
            ],
            outputs=[
                MY_PROMPTS_TYPE.Output(display_name="my_prompts", tooltip="The prompts, for SafeCFG Calibrate HGR and SafeCFG Check HGR."),
                io.String.Output(display_name="summary", tooltip="How many there are, and where they come from."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, source: str | None = PICTURES) -> str | bool:
        """Not every host looks a V3 node's choice up in its list."""
        known = source in (None, PICTURES, TEXT) or source in input_lists()
        return True if known else f"There is no file {source!r} in ComfyUI's input folder. Choose another source."

    @classmethod
    def fingerprint_inputs(cls, source: str = PICTURES, **_) -> str | float:
        return float("nan") if source != TEXT else ""  # pictures and files change

    @classmethod
    def execute(
        cls, source: str = PICTURES, folder: str = "", text: str = "", most: int = 2000, leave_out: str = ""
    ) -> io.NodeOutput:
        found, where = gather(source, folder, text, most)
        kept, gone = pp.without_words(found, leave_out)
        if not kept:
            raise HGRError(f"All {len(found)} prompts have a word of `leave_out`. Name fewer words.")
        summary = f"{len(kept)} different prompts from {where}" + (f"; {gone} left out" if gone else "")
        logger.info("SafeCFG My Prompts: %s.", summary)
        return io.NodeOutput(tuple(kept), summary)
