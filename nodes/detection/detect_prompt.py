"""`SafeCFG Detect Prompt Harm`: how harmful is a prompt, before a single step is sampled, and which words make it so?"""

from comfy.sd import CLIP
from comfy_api.latest import io

from ...hgr_models.redaction import blame, redact
from ..host.schema import HGR_TYPE, make_input, make_schema
from ..loader import HGRModel
from ..reporting import drawing
from . import scores as texts
from .detector import detect_prompts
from .text_reading import TextReader

SHOWN = 12  # words in the text output
NO_WORDS = "Connect `text` and `clip` to see which words did it."


def words_in_words(found: list[tuple[str, float]], harmful: tuple[str, ...] | None) -> str:
    """The words that count most, with how many times less likely harm is without them; `harmful`: the smallest set, None if clean."""
    lines = ["clean" if harmful is None else f"harmful by: {' ... '.join(harmful)}"]
    top = sorted((pair for pair in found if pair[1] > 0.05), key=lambda pair: -pair[1])[:SHOWN]
    return "\n".join([*lines, *(f"{word}: {value:+.2f}" for word, value in top)])


class DetectPromptHarm(io.ComfyNode):
    """Scores prompts; see `detector.detect_prompts`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_DetectPromptHarm",
            display_name="SafeCFG Detect Prompt Harm",
            description="Tells how harmful a prompt is, per category, before a single step is sampled. It reads the encoded prompt and takes "
            "about a millisecond. A prompt can hide what it asks for: SafeCFG Detect Harm looks at the picture.",
            search_aliases=["nsfw prompt", "prompt safety", "moderation", "safety checker"],
            inputs=[
                make_input(
                    io.Conditioning,
                    "conditioning",
                    tooltip="The prompt, from CLIP Text Encode or SafeCFG Prompt Batch. Every prompt of a batch or of a combined conditioning "
                    "is judged on its own.",
                ),
                make_input(HGR_TYPE, "hgr", tooltip="From SafeCFG Load HGR; trained for the model that the CLIP belongs to."),
                *texts.rule_inputs("prompts"),
                make_input(
                    io.String,
                    "text",
                    optional=True,
                    force_input=True,
                    tooltip="The same prompt as text: with it and `clip` the node finds the words that make it harmful, by leaving each out.",
                ),
                make_input(io.Clip, "clip", optional=True, tooltip="The CLIP that encoded the prompt; needed with `text`."),
            ],
            outputs=[
                io.Float.Output(display_name="harmfulness", tooltip="0 to 1: the worst prompt in its worst category."),
                io.String.Output(
                    display_name="scores", tooltip="JSON: thresholds, and for every prompt its scores per category."
                ),
                io.Boolean.Output(display_name="harmful", tooltip="True when any prompt exceeds a threshold."),
                io.Boolean.Output(display_name="flagged", is_output_list=True, tooltip="The same for every prompt, as a list."),
                io.String.Output(
                    display_name="words",
                    tooltip="Which words did it: the smallest set that makes the prompt harmful, then words by how much lower the log odds of harm "
                    "are without them.",
                ),
                io.Image.Output(
                    display_name="picture",
                    tooltip="The scores against their thresholds, and the prompt with harmful words marked.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        conditioning: list,
        hgr: HGRModel,
        threshold: float = 0.0,
        categories: str = "",
        text: str | None = None,
        clip: CLIP | None = None,
    ) -> io.NodeOutput:
        rules = texts.Rules.of(hgr.info, hgr.info.condition_thresholds, threshold, categories)
        if (text is None) != (clip is None):
            raise ValueError(
                "Expected `text` and `clip` together: the words are found by encoding the text again. Connect both, or neither."
            )
        found = detect_prompts(hgr, conditioning)
        flagged = rules.flags(found)
        words, marked = (NO_WORDS, []) if clip is None else _words(TextReader(clip, hgr, rules), text)
        picture = drawing.prompt(_bars(rules, found.amax(dim=0).tolist()), marked)
        written = texts.write(rules, "prompts", found)
        return io.NodeOutput(max(rules.harmfulness(found)), written, any(flagged), flagged, words, picture[None])


def _words(reader: TextReader, text: str) -> tuple[str, list[tuple[str, float]]]:
    """What to say about a text's words, and its pieces with how much each adds (0 where it is no word)."""
    spans = blame(text, reader.excess)
    found = redact(text, reader.excess)
    harmful = None if float(reader.excess([text])[0]) <= 0 else found.left_out
    pieces, at = [], 0
    for (start, end), value in spans:
        pieces += [(text[at:start], 0.0), (text[start:end], value)]
        at = end
    return words_in_words([(text[a:b], value) for (a, b), value in spans], harmful), [*pieces, (text[at:], 0.0)]


def _bars(rules: texts.Rules, scores: list[float]) -> list[drawing.Bar]:
    rows = zip(rules.categories, scores, rules.thresholds, rules.counted, strict=True)
    return [drawing.Bar(name, score, limit if on else None) for name, score, limit, on in rows]
