"""What ComfyUI's front end shows in each language: English as the schemas say it, Chinese and Japanese complete.

After a change of the schemas, `UPDATE_LOCALES=1` makes the first test write the English file anew; the others are translated by hand.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from safecfg.nodes import NODES
from safecfg.nodes.enforcement.enforce import Enforced, EnforcedLatent, EnforcedPicture, Refused

ROOT = Path(__file__).parents[2]
TRANSLATED = ("zh", "ja")
NAMES = {"clip", "vae", "hgr", "latent", "lora", "auroc"}  # the same in every language
HAN, KANA = re.compile(r"[\u4e00-\u9fff]"), re.compile(r"[\u3040-\u30ff]")
WRITTEN_IN = {"zh": lambda text: HAN.search(text) and not KANA.search(text), "ja": KANA.search}
KEPT = (
    r"`[^`]+`",
    r"\w+_\w+",
    r"[\w-]+(?:/[\w-]+)+",
    r"\w*\.(?:safetensors|csv|json)",
    r"[A-Z]{2,}\d*",
)  # names, paths, initials
GUARDS = (Enforced, Refused, EnforcedLatent, EnforcedPicture)
SCHEMAS = {schema.node_id: schema for schema in (node.define_schema() for node in [*NODES, *GUARDS])}


def node_texts(schema) -> dict:
    """A node's texts in the front end's format. An output that is named by its type alone gets core's name for the type."""
    inputs = {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs}
    outputs = {
        str(n): {**({"name": o.display_name} if o.display_name else {}), "tooltip": o.tooltip}
        for n, o in enumerate(schema.outputs)
    }
    parts = {"inputs": inputs, "outputs": outputs}
    return {"display_name": schema.display_name, "description": schema.description, **{k: v for k, v in parts.items() if v}}


def read(language: str, name: str):
    return json.loads((ROOT / "locales" / language / f"{name}.json").read_text(encoding="utf-8"))


def flat(texts: dict, prefix: str = "") -> dict[str, str]:
    """Nested texts by their path, as in `SafeCFG_Apply.inputs.model.tooltip`."""
    parts = [flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v} for k, v in texts.items()]
    return {key: text for part in parts for key, text in part.items()}


def english() -> dict[str, str]:
    return flat({name: node_texts(schema) for name, schema in SCHEMAS.items()})


def both(language: str) -> list[tuple[str, str, str]]:
    """(path, English text, its translation) of every text."""
    translated = flat(read(language, "nodeDefs"))
    return [(key, text, translated[key]) for key, text in english().items()]


def test_english_is_what_the_schemas_say():
    texts = {name: node_texts(schema) for name, schema in SCHEMAS.items()}
    if os.environ.get("UPDATE_LOCALES"):
        path = ROOT / "locales" / "en" / "nodeDefs.json"
        path.write_text(json.dumps(texts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    assert read("en", "nodeDefs") == texts


def test_only_files_that_the_host_reads():
    found = {path.relative_to(ROOT / "locales").as_posix() for path in (ROOT / "locales").rglob("*") if path.is_file()}
    assert found == {f"{language}/{name}.json" for language in ("en", *TRANSLATED) for name in ("nodeDefs", "main")}


@pytest.mark.parametrize("language", TRANSLATED)
def test_every_text_is_translated(language):
    translated = flat(read(language, "nodeDefs"))
    assert translated.keys() == english().keys()
    assert not [key for key, text in translated.items() if not text.strip()]
    assert not [key for key, text, other in both(language) if other.casefold() == text.casefold() and text not in NAMES]
    sentences = [(key, other) for key, _, other in both(language) if key.endswith(("tooltip", "description"))]
    assert not [key for key, other in sentences if not WRITTEN_IN[language](other)]


@pytest.mark.parametrize("language", TRANSLATED)
def test_names_and_numbers_are_kept(language):
    lost = []
    for key, text, other in both(language):
        if not key.endswith(".name"):
            kept = {part for pattern in KEPT for part in re.findall(pattern, text)}
            lost += [(key, part) for part in kept if part not in other]
            numbers = [Counter(re.findall(r"\d+(?:\.\d+)?", t)) for t in (text, other)]
            lost += [(key, number) for number in numbers[0] - numbers[1]]
    assert not lost


@pytest.mark.parametrize("language", TRANSLATED)
def test_choices_are_kept(language):
    """The front end does not translate the options of a combo."""
    translated, lost = read(language, "nodeDefs"), []
    for name, schema in SCHEMAS.items():
        for i in schema.inputs:
            words = [o for o in getattr(i, "options", None) or () if re.search(rf"\b{re.escape(o)}\b", i.tooltip)]
            lost += [(name, i.id, word) for word in words if word not in translated[name]["inputs"][i.id]["tooltip"]]
    assert not lost


@pytest.mark.parametrize("language", TRANSLATED)
def test_nodes_have_one_name_everywhere(language):
    """Texts name a node as its title does; longer names first, since SafeCFG Report is none of SafeCFG ROC Report."""
    translated = read(language, "nodeDefs")
    titles = {texts["display_name"]: translated[name]["display_name"] for name, texts in read("en", "nodeDefs").items()}
    assert all(title.startswith("SafeCFG ") for title in titles.values()) and len(set(titles.values())) == len(titles)
    mention = re.compile("|".join(sorted(map(re.escape, titles), key=len, reverse=True)))
    assert not [(k, m) for k, text, other in both(language) for m in mention.findall(text) if titles[m] not in other]


@pytest.mark.parametrize("language", TRANSLATED)
def test_equal_sentences_are_translated_alike(language):
    found = {}
    for key, text, other in both(language):
        if not key.endswith(".name"):
            found.setdefault(text, set()).add(other)
    assert not {text: others for text, others in found.items() if len(others) > 1}


@pytest.mark.parametrize("language", ("en", *TRANSLATED))
def test_no_text_is_taken_for_message_syntax(language):
    """The front end of 0.3.64 compiles these texts: a brace or an @ is an error there, and what follows a | is left out."""
    assert not [key for key, text in flat(read(language, "nodeDefs")).items() if re.search(r"[{}@|]", text)]


CALLS = {"meter": r'text\("(\w+)"(?:, \{([^}]*)\})?', "advanced": r'(?<=["? :])"(show|hide)"()'}


@pytest.mark.parametrize("part", CALLS)
@pytest.mark.parametrize("language", ("en", *TRANSLATED))
def test_the_front_ends_parts_have_their_texts(language, part):
    source = (ROOT / "web" / "js" / f"{part}.js").read_text(encoding="utf-8").replace('text("advanced", ', "")
    used = {key: set(re.findall(r"(?:^|,) *(\w+)", values)) for key, values in re.findall(CALLS[part], source)}
    texts = read(language, "main")["safecfg"][part]
    assert used and {key: set(re.findall(r"\{(\w+)\}", text)) for key, text in texts.items()} == used
    if language != "en":
        assert not set(texts.values()) & set(read("en", "main")["safecfg"][part].values())
