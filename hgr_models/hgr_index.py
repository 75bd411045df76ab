"""`index.json` in `models/hgr`: which HGRs are known, for which models, and where they are described. Nothing is ever downloaded.

    {"safecfg_index": 1, "hgrs": [{
        "file": "my_hgr.safetensors", "sha256": "64 hexadecimal digits",
        "url": "https://...",            where people get it: shown as text
        "architectures": ["SDXL"],       models that it is for, as SafeCFG names them; [] for one of a text encoder alone
        "bases": ["..."],                fingerprints of the base models that it was trained on
        "encoder": {...},                the text encoder's print, as in the HGR's metadata; {} where it has none
        "categories": ["sexual", ...], "networks": ["condition"], "licence": "apache-2.0"}]}

`python -m hgr_models.hgr_index my_hgr.safetensors --url https://... --for SDXL` writes an entry. Keys that are not known are ignored.
"""

import argparse
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from re import compile as pattern
from typing import Any

from .architectures import ARCHITECTURES
from .checkpoint import file_hash, read_info
from .encoders import RELATED, EncoderPrint, distance_between
from .errors import HGRError
from .files import write_text
from .metadata import is_file, json_object

NAME = "index.json"
VERSION_KEY, VERSION = "safecfg_index", 1
LARGEST, MOST = 2**24, 10_000  # bytes of a file, and entries in it
LONGEST = 500  # letters of a text
DIGEST = pattern(r"[0-9a-f]{64}")
URL = pattern(r"https?://[!-~]+")  # as text: no spaces, no control characters
FILE = pattern(r"[^/\\\x00-\x1f]+\.safetensors")
LISTS = ("architectures", "bases", "categories", "networks")


@dataclass(frozen=True)
class KnownHGR:
    """An entry of an index. `bases`: fingerprints; `encoder`: None where the HGR's file names none."""

    file: str
    sha256: str
    url: str = ""
    architectures: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    encoder: EncoderPrint | None = None
    categories: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    licence: str = ""

    def in_words(self) -> str:
        """What a message says of it."""
        where = f" from {self.url}" if self.url else ""
        terms = f", licence {self.licence}" if self.licence else ""
        return (
            f"{self.file}{where} (SHA-256 {self.sha256[:12]}..., {', '.join(self.categories) or 'categories not named'}{terms})"
        )

    def as_dict(self) -> dict:
        """The entry as JSON."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {**values, "encoder": {} if self.encoder is None else self.encoder.as_dict()}


def read_index(path: str | os.PathLike) -> list[KnownHGR]:
    """The entries of an index; [] where there is no file. Raises HGRError, naming the file and the entry, for anything else."""
    path = Path(path)
    if not is_file(path):
        return []
    try:
        if path.stat().st_size > LARGEST:
            raise HGRError(f"Expected an index of HGRs of at most {LARGEST} bytes in {path}, but it is larger.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HGRError(f"The index of HGRs {path} cannot be read ({error}).") from error
    found = json_object(text, path, "an index of HGRs")
    if found.get(VERSION_KEY) != VERSION or not isinstance(found.get("hgrs"), list) or len(found["hgrs"]) > MOST:
        raise HGRError(
            f'Expected {{"{VERSION_KEY}": {VERSION}, "hgrs": [...]}} with at most {MOST} entries in {path}, but it is another file or of '
            "another version. `python -m hgr_models.hgr_index --help` says what belongs in it."
        )
    return [_entry(values, f"entry {number} of {path}") for number, values in enumerate(found["hgrs"], 1)]


def write_index(path: str | os.PathLike, entries: list[KnownHGR]) -> None:
    """Writes an index, whole or not at all."""
    write_text(path, json.dumps({VERSION_KEY: VERSION, "hgrs": [entry.as_dict() for entry in entries]}, indent=1) + "\n")


def entry_of(hgr_file: str | os.PathLike, url: str = "", architectures: tuple[str, ...] = (), licence: str = "") -> KnownHGR:
    """The entry of an HGR's file; its own architecture is among those that it is for.

    Raises HGRError for what no index may hold, and for an architecture that is none of ARCHITECTURES: no model would ever ask for it.
    """
    for name in architectures:
        if name not in ARCHITECTURES:
            raise HGRError(
                f"Expected an architecture as SafeCFG names it, but got {name!r}. {_nearest(name)}There are: {'; '.join(ARCHITECTURES)}."
            )
    info, networks = read_info(hgr_file)
    names = tuple(dict.fromkeys([*filter(None, [info.architecture]), *architectures]))
    known = KnownHGR(
        Path(hgr_file).name, file_hash(hgr_file), url, names, (info.base,) if info.base else (), info.encoder_print(),
        info.categories, networks, licence,
    )  # fmt: skip
    return _entry(known.as_dict(), f"the entry of {hgr_file}")


def _nearest(name: str) -> str:
    """A question that names the architecture which somebody may have meant; "" where none is near."""
    by_lower = {known.lower(): known for known in ARCHITECTURES}
    found = get_close_matches(name.lower(), by_lower, n=1)
    return f"Did you mean {by_lower[found[0]]!r}? " if found else ""


def with_entry(entries: list[KnownHGR], new: KnownHGR) -> list[KnownHGR]:
    """Entries with a new one, in the place of the one of the same bytes, where there is one."""
    return [*(entry for entry in entries if entry.sha256 != new.sha256), new]


def fitting(
    entries: list[KnownHGR], architecture: str = "", base: str = "", encoder: EncoderPrint | None = None
) -> list[KnownHGR]:
    """The entries for a model or a text encoder, best first: trained on this base, of this encoder, of this architecture.

    An entry that names an encoder which is not related to `encoder` is left out, whatever else fits.
    """
    ranked = []
    for i, entry in enumerate(entries):
        distance = math.inf
        if (
            encoder is not None
            and entry.encoder is not None
            and (distance := distance_between(encoder, entry.encoder)) >= RELATED
        ):
            continue
        of_base, of_name = base != "" and base in entry.bases, architecture != "" and architecture in entry.architectures
        if of_base or of_name or distance < RELATED:
            ranked.append(((not of_base, distance, not of_name, i), entry))
    return [entry for _, entry in sorted(ranked, key=lambda pair: pair[0])]


def _entry(values: Any, where: str) -> KnownHGR:
    if not isinstance(values, Mapping):
        raise HGRError(f"Expected an object as {where}, but got {type(values).__name__}.")
    texts = {name: values.get(name, "") for name in ("file", "sha256", "url", "licence")}
    for name, form in (("file", FILE), ("sha256", DIGEST), ("url", URL)):
        text = texts[name]
        if not isinstance(text, str) or len(text) > LONGEST or not (form.fullmatch(text) or (name == "url" and text == "")):
            wanted = {"file": "a plain name that ends in .safetensors", "sha256": "64 hexadecimal digits", "url": "http(s)://..."}
            raise HGRError(f"Expected {wanted[name]} as {name} in {where}, but got {str(text)[:80]!r}.")
    lists = {name: values.get(name, []) for name in LISTS}
    for name, found in {**lists, "licence": [texts["licence"]]}.items():
        if not isinstance(found, list) or len(found) > MOST or not all(map(_is_text, found)):
            raise HGRError(f"Expected a list of short texts as {name} in {where}, but got {str(found)[:80]!r}.")
    encoder = values.get("encoder", {})
    try:
        known = None if encoder == {} else EncoderPrint.from_dict(encoder)
    except HGRError as error:
        raise HGRError(f"The encoder of {where} is wrong: {error}") from error
    return replace(KnownHGR(**texts), encoder=known, **{name: tuple(found) for name, found in lists.items()})


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST and value.isprintable()


def main(line: list[str] | None = None) -> None:
    """Adds an HGR's file to an index; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m hgr_models.hgr_index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the HGR's .safetensors file")
    parser.add_argument("--index", type=Path, help=f"default: {NAME} beside the file; it is made where there is none")
    parser.add_argument("--url", default="", help="where people get the file")
    parser.add_argument(
        "--for",
        dest="names",
        action="append",
        default=[],
        metavar="ARCHITECTURE",
        help="such as SDXL, as the first column of docs/MODELS.md names it; repeat it",
    )
    parser.add_argument("--licence", default="", metavar="NAME")
    args = parser.parse_args(line)
    index = args.index or args.file.with_name(NAME)
    try:
        known = entry_of(args.file, args.url, tuple(args.names), args.licence)
        write_index(index, with_entry(read_index(index), known))
    except HGRError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{index}: {known.in_words()}")


if __name__ == "__main__":
    main()
