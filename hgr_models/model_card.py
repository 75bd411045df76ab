"""The model card of an HGR: Markdown with a YAML header, as model hubs accept it, beside the file (`my_hgr.md`).

A card is written from the HGR's own metadata and from what was measured with exactly this file, by its SHA-256. The measured numbers stay
in the card, as JSON in a comment: a card that is written again keeps them as long as the file is the same. What a user changes in the
header, and writes below the last line, is kept.
"""

import hashlib
import json
import os
from pathlib import Path
from re import S as ACROSS_LINES
from re import compile as pattern

from .card_tables import check_table, evaluation_tables, harm_in_short, shareable, table
from .checkpoint import file_hash, read_info
from .errors import HGRError
from .files import write_text
from .hgr import HGRInfo
from .metadata import json_object
from .words import bound_in_words, cell, encoder_in_words, proof_in_words

LARGEST = 2**22  # bytes of a card that is read
STATE = pattern(r"<!-- safecfg (\{[^\n]*\}) -->\n")
KEPT = "<!-- What you write below this line is kept. -->\n"
HEADER = pattern(r"\A---\n.*?\n---\n", ACROSS_LINES)
MEASURED = ("check", "evaluation")  # what a card remembers, by the node that measured it
# The model that a family began with, as the hub calls it: by the names of core's encoders and the width of the tokens.
ORIGINS = {
    (("l",), 768): "stable-diffusion-v1-5/stable-diffusion-v1-5",
    (("g", "l"), 2048): "stabilityai/stable-diffusion-xl-base-1.0",
    (("g", "l", "t5xxl"), 4096): "stabilityai/stable-diffusion-3-medium",
    (("l", "t5xxl"), 4096): "black-forest-labs/FLUX.1-dev",
}
TAGS = ("safecfg", "comfyui", "safety", "classifier-free-guidance", "content-moderation")
LIMITS = """\
- It is one layer of safety and no guarantee. Who serves pictures to others still needs a check of the result.
- It knows the categories that it was trained on, and of other harm what its words give away.
- The calibration proves a rate of false alarms for prompts such as those that it was calibrated on; other styles may be flagged more often.
- An attack that knows the network can get around it."""


def card_path(hgr_file: str | os.PathLike) -> Path:
    """Where the card of an HGR's file lies."""
    return Path(hgr_file).with_suffix(".md")


def write_card(hgr_file: str | os.PathLike, **measured: dict) -> Path:
    """Writes or refreshes the card of an HGR's file, whole or not at all, and gives its path.

    `check`: numbers of SafeCFG Check HGR; `evaluation`: those of SafeCFG Evaluate (see `card_tables`). What an earlier card of the
    same file measured is kept where it is not given. Raises HGRError where a file of that name is no card of this pack, or is
    damaged, where the HGR cannot be read, or nothing can be written.
    """
    path, digest = card_path(hgr_file), file_hash(hgr_file)
    info, networks = read_info(hgr_file)
    header, state, own = _read(path)
    kept = {name: state[name] for name in MEASURED if name in state} if state.get("sha256") == digest else {}
    kept |= {name: numbers for name, numbers in measured.items() if numbers is not None}
    if "evaluation" in kept:
        kept["evaluation"] = shareable(kept["evaluation"])
    made = header_of(info)
    if header is None or _sum(header) == state.get("header"):
        header = made  # nobody has changed it
    # A mark that never fits, where the user has: it stays theirs.
    state = {"sha256": digest, "header": _sum(made) if header == made else "", **kept}
    body = body_of(info, networks, Path(hgr_file).name, digest, kept)
    text = json.dumps(state).replace("<", "\\u003c").replace(">", "\\u003e")
    write_text(path, f"{header}\n{body}\n<!-- safecfg {text} -->\n{KEPT}{own}")
    return path


def measured_of(hgr_file: str | os.PathLike) -> dict[str, dict]:
    """What the card beside an HGR's file remembers of exactly this file; {} without a card. Raises HGRError for a damaged one."""
    _, state, _ = _read(card_path(hgr_file), theirs=True)
    if state.get("sha256") != file_hash(hgr_file):
        return {}
    return {name: state[name] for name in MEASURED if name in state}


def short_card(info: HGRInfo, networks: tuple[str, ...], measured: dict[str, dict]) -> str:
    """A few lines for a node: what an HGR is for, what its calibration proves, and what was measured with it."""
    lines = [f"for {_family(info)}", f"categories: {', '.join(map(cell, info.categories))}; networks: {' and '.join(networks)}"]
    proof = info.training.get("calibration")
    lines.append(bound_in_words(proof) if isinstance(proof, dict) else "not calibrated")
    lines.append(harm_in_short(measured.get("evaluation")) or "not evaluated yet")
    return "\n".join(lines)


def header_of(info: HGRInfo) -> str:
    """The YAML header. The licence is the owner's to choose; a base model is named where the encoder tells the family."""
    encoder = info.encoder_print()
    origin = None if encoder is None else ORIGINS.get((encoder.parts, encoder.token_width))
    lines = [
        "license: other",
        "license_name: not-chosen-yet",
        # Without the relation the hub calls it a fine-tune of the base model.
        *([f"base_model: {origin}", "base_model_relation: adapter"] if origin else []),
        "library_name: safecfg",
        f"pipeline_tag: {'text-to-video' if info.latent_dimensions == 3 else 'text-to-image'}",
        "tags:",
        *(f"- {tag}" for tag in TAGS),
    ]
    return "\n".join(["---", *lines, "---", ""])


def body_of(info: HGRInfo, networks: tuple[str, ...], name: str, digest: str, measured: dict[str, dict]) -> str:
    """The card below its header, in Markdown."""
    parts = [
        f"# {cell(name)}",
        "A Harmful Guidance Redirector (HGR) for [SafeCFG](https://github.com/safecfg/comfyui-safecfg): small networks that recognise harmful "
        "guidance while a picture is sampled, and turn it into that of the safe version of the same prompt. A picture that is not flagged stays "
        "bit-identical.",
        f"In ComfyUI: put the file into `models/hgr`, then *SafeCFG Load HGR* and *SafeCFG Apply*. In diffusers: "
        f'`safecfg.diffusers.protect(pipe, safecfg.load_hgr("{cell(name)}"))`.',
        table(("", ""), _facts(info, networks, digest)),
        "## Training",
        table(("setting", "value"), _settings(info)) if info.training else "Its file does not say how it was trained.",
        "## Thresholds",
        _thresholds(info, networks),
        *_measured_parts(measured),
        "## Limits",
        LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def _measured_parts(measured: dict[str, dict]) -> list[str]:
    parts = []
    if "evaluation" in measured:
        parts += ["## Pictures, judged", *evaluation_tables(measured["evaluation"])]
    if "check" in measured:
        parts += ["## Runs, checked in latent space", check_table(measured["check"])]
    return parts or ["## Measured", "Nothing yet: *SafeCFG Evaluate* and *SafeCFG Check HGR* fill this in."]


def _family(info: HGRInfo) -> str:
    if info.of_prompts:
        return f"every model that reads the text encoder {encoder_in_words(info)}"
    of = f"{info.latent_format} latents, {info.prediction} prediction"
    return f"{cell(info.architecture)} ({of})" if info.architecture else f"a model of {of}"


def _facts(info: HGRInfo, networks: tuple[str, ...], digest: str) -> list[tuple[str, str]]:
    facts = [
        ("for", _family(info)),
        ("text encoder", encoder_in_words(info)),
        ("categories", ", ".join(map(cell, info.categories))),
        ("networks", " and ".join(networks)),
        ("SHA-256 of the file", f"`{digest}`"),
    ]
    return facts + ([("fingerprint of the base model", f"`{cell(info.base)}`")] if info.base else [])


def _settings(info: HGRInfo) -> list[tuple[str, str]]:
    """What the file says of its training: numbers and short texts; nested ones by both names."""
    rows = []
    for name, value in info.training.items():
        if name in ("calibration", "prompts"):
            continue
        parts = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(cell(f"{name} {part}".strip().replace("_", " ")), cell(v)) for part, v in parts]
    prompts = info.training.get("prompts")
    return rows + ([("SHA-256 of the prompts", f"`{cell(prompts)}`")] if prompts else [])


def _thresholds(info: HGRInfo, networks: tuple[str, ...]) -> str:
    columns = [("prompt", info.condition_thresholds)] if "condition" in networks else []
    if "guidance" in networks:
        columns += [(f"guidance, noise level {i}", row) for i, row in enumerate(info.guidance_thresholds, 1)]
    columns += [("picture", info.picture_thresholds)] if info.picture_thresholds else []
    rows = [(cell(name), *(f"{values[k]:.6g}" for _, values in columns)) for k, name in enumerate(info.categories)]
    made = table(("category", *(name for name, _ in columns)), rows)
    return "\n\n".join([made, "\n".join(f"- {line}" for line in proof_in_words(info.training.get("calibration")))])


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, theirs: bool = False) -> tuple[str | None, dict, str]:
    """Header, state and the user's own end of the card at a path; (None, {}, "") without one, and, `theirs`, for another's file."""
    try:
        if not path.is_file():
            return None, {}, ""
        if path.stat().st_size > LARGEST:
            raise HGRError(f"Expected a model card of at most {LARGEST} bytes in {path}, but it is larger. Move it away.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HGRError(f"The model card {path} cannot be read ({error}). Move it away, and it is written anew.") from error
    found = list(STATE.finditer(text))
    if not found:
        if theirs:
            return None, {}, ""
        raise HGRError(
            f"{path} is no model card of SafeCFG, so it is left as it is. Give it another name, and a card is written."
        )
    state = json_object(found[-1].group(1), path, "a model card")
    if not all(isinstance(state.get(name, {}), dict) for name in MEASURED):
        raise HGRError(f"The model card {path} is damaged. Move it away, and it is written anew.")
    header = HEADER.match(text)
    return header.group() if header else None, state, text[found[-1].end() :].removeprefix(KEPT)
