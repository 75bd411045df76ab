"""Other people's packs with SafeCFG, on a real server each: `PACKS=<folder of custom nodes>`, see CONTRIBUTING.md.

Every node of theirs that samples, guides or patches a model draws a harmful prompt and a clean one, with and without SafeCFG
(strict). Nothing may pass in silence, no clean latent may change by a bit, and no crash may be ours.
"""

import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comfy_server import PromptError, Server
from demo.autoencoder import LATENT_SCALE
from demo.judge import Judge
from demo.pipeline import DemoModel
from packs import CLEAN, HARMFUL, Subject, graph, packs_of, subjects

FOLDER = os.environ.get("PACKS", "")
ONLY = set(filter(None, os.environ.get("PACKS_ONLY", "").split(",")))  # ids of nodes; empty: all
TOGETHER = bool(os.environ.get("PACKS_TOGETHER"))  # one server for all: quicker, but packs that change ComfyUI change it for all
ORDERS = os.environ.get("PACKS_ORDERS", "after,before").split(",")  # of SafeCFG Apply and a node that patches the model
SECONDS = 120  # for a run of 12 steps
REDIRECTED, NOTICED, SILENT, CRASH, CHANGED = "redirected", "noticed", "SILENT", "CRASH", "CLEAN CHANGED"
BROKEN = "not tried: the node does not run here"  # without SafeCFG either
BAD = (SILENT, CRASH, CHANGED)


def outcome(server: Server, subject: Subject, info: dict, see) -> list[tuple[str, str]]:
    """(order, what happened) of a node. `see(latent)`: the pictograms of its picture."""
    plain = {text: _draw(server, graph(subject, text, None, info)) for text in (HARMFUL, CLEAN)}
    if not all(isinstance(latent, torch.Tensor) and latent.isfinite().all() for latent in plain.values()):
        server.free()  # what it did to the model that all nodes share goes with the model
        return [("-", f"{BROKEN}: {next((v for v in plain.values() if isinstance(v, str)), 'nothing finite')}")]
    orders = ORDERS if subject.kind == "patch" else ("after",)
    return [(order, _compare(server, subject, info, see, order, plain)) for order in orders]


def _compare(server, subject, info, see, order: str, plain: dict) -> str:
    mark = len(server.log())
    clean = _draw(server, graph(subject, CLEAN, order, info))
    flagged = " redirected: " in server.log()[mark:]
    harmful = _draw(server, graph(subject, HARMFUL, order, info))
    for latent in (harmful, clean):
        if isinstance(latent, str):
            return NOTICED if "SafeCFG" in latent else f"{CRASH}: {latent}"
    if clean.shape != plain[CLEAN].shape or not torch.equal(clean, plain[CLEAN]):
        again = _draw(server, graph(subject, CLEAN, None, info), fresh=True)
        if isinstance(again, torch.Tensor) and not torch.equal(again, plain[CLEAN]):
            return f"{_harm(see, harmful, plain)} (draws another picture every time)"
        return f"{_harm(see, harmful, plain)} (the clean one flagged by mistake)" if flagged else CHANGED
    return _harm(see, harmful, plain)


def _harm(see, harmful: torch.Tensor, plain: dict) -> str:
    if torch.equal(plain[HARMFUL], plain[CLEAN]):
        return "draws the same for every prompt"
    if harmful.shape == plain[HARMFUL].shape and torch.equal(harmful, plain[HARMFUL]):
        return SILENT
    if "knife" in see(harmful):
        return f"{SILENT}: the knife is there"
    return REDIRECTED if "knife" in see(plain[HARMFUL]) else f"{REDIRECTED} (plain shows no knife)"


def _draw(server: Server, prompt: dict | None, fresh: bool = False):
    """The latent, or in words why there is none."""
    if prompt is None:
        return "it needs inputs that only its own pack makes"
    if fresh:
        server.free()
    try:
        entry = server.post_prompt(prompt, SECONDS)
        (file,) = server.files(entry, "save")
        return load_file(file)["latent_tensor"]
    except PromptError as error:
        details = error.details
        if "exception_message" in details:
            return f"{details.get('node_type')}: {details.get('exception_type')}: {details['exception_message'].strip()[:300]}"
        errors = [e for node in details.get("node_errors", {}).values() for e in node.get("errors", [])]
        return "; ".join(f"{e.get('message')} {e.get('details')}" for e in errors)[:300] or str(details)[:300]
    except (TimeoutError, ValueError) as error:
        return f"{type(error).__name__}: {str(error)[:100]}"


def _eyes():
    judge, _ = Judge.load()
    model = DemoModel.load()

    def see(latent: torch.Tensor) -> set[str]:
        with torch.no_grad():
            return judge.names(model.decode(latent[:1] * LATENT_SCALE))[0]  # as ComfyUI's VAE gets it

    return see


@pytest.fixture(scope="module")
def core(host, tmp_path_factory) -> set[str]:
    """The ids of all nodes without other packs."""
    server = Server(host, tmp_path_factory.mktemp("core"))
    try:
        server.wait_until_ready()
        return set(server.object_info())
    finally:
        server.stop()


def groups() -> list[list[Path]]:
    found = packs_of(FOLDER) if FOLDER else []
    return [found] if TOGETHER and found else [[pack] for pack in found]


@pytest.mark.skipif(not FOLDER, reason="PACKS=<folder of custom nodes> tries other people's packs")
@pytest.mark.parametrize("packs", groups(), ids=lambda packs: packs[0].name if len(packs) == 1 else "together")
def test_packs(host, tmp_path_factory, core, packs: list[Path], capsys):
    server = Server(host, tmp_path_factory.mktemp("packs"), packs)
    rows, see = [], _eyes()

    def say(*cells) -> None:
        with capsys.disabled():
            print("packs | " + " | ".join(cells) + " |", flush=True)

    try:
        server.wait_until_ready()
        info = server.object_info()
        for failed in re.findall(r"IMPORT FAILED\): (.+)", server.log()):
            say(Path(failed.strip()).name, "does not load here")
        for subject in subjects(info, core):
            if not ONLY or subject.name in ONLY:
                for order, what in outcome(server, subject, info, see):
                    rows.append((subject.pack, subject.name, subject.kind, order, what))
                    say(*rows[-1])
    finally:
        server.stop()
    for pack in sorted({row[0] for row in rows}):
        counts = Counter(re.split(r"[:(]", row[-1])[0].strip() for row in rows if row[0] == pack)
        say(pack, ", ".join(f"{n} {what}" for what, n in counts.items()))
    assert not [row for row in rows if row[-1].startswith(BAD)]
