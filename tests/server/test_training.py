"""The training templates in the real server, with a few steps: the result lies in models/hgr, and a cancelled training goes on."""

import re
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from hgr_models import load_hgr
from templates import read
from workflow_format import to_prompt

FEW = {
    "harmful_runs": 6, "clean_runs": 4, "calibration_runs": 4, "run_steps": 2, "batch": 4, "condition_steps": 4, "guidance_steps": 4,
    "prompt_steps": 4,
    "size": "small",
}  # fmt: skip


def prompt_of(server, template, **changes):
    """A template as the front end sends it, with few runs and steps."""
    workflow = read(template)
    prompt = to_prompt(workflow, server.object_info())
    for node in prompt.values():
        if node["class_type"] in ("SafeCFG_TrainHGR", "SafeCFG_RecordGuidance", "SafeCFG_CheckHGR"):
            node["inputs"] |= {k: v for k, v in {**FEW, **changes}.items() if k in node["inputs"]}
        if node["class_type"] == "SafeCFG_PromptPairs":
            node["inputs"] |= {"pairs_per_category": 4, "clean_prompts": 20}
    return prompt


def node_of(prompt, kind):
    return next(key for key, node in prompt.items() if node["class_type"] == kind)


@pytest.mark.parametrize("networks", ["prompts", "both"])
def test_the_template_trains_checks_and_draws(server, networks):
    prompt = prompt_of(server, "Train an HGR on the demo", train=networks, name=f"test_{networks}")
    entry = server.post_prompt(prompt)
    hgr = load_hgr(Path(server.base) / "models" / "hgr" / f"test_{networks}.safetensors")
    assert hgr.info.categories == ("weapons", "drugs", "death") and (hgr.guidance is not None) == (networks == "both")
    (curves,) = server.files(entry, node_of(prompt, "SafeCFG_TrainHGR"))
    assert curves.stat().st_size > 5000
    report = entry["outputs"][node_of(prompt, "SafeCFG_CheckHGR")]["text"][0]
    assert "harmful runs: flagged by the prompt" in report
    previews = [key for key, node in prompt.items() if node["class_type"] == "PreviewImage"]
    assert len(previews) == 2 and all(server.files(entry, key) for key in previews)


def test_recorded_in_one_node_trained_in_the_next(server):
    server.post_prompt(prompt_of(server, "Record now, train later"))
    hgr = load_hgr(Path(server.base) / "models" / "hgr" / "my_recording.safetensors")
    assert hgr.condition is None and hgr.guidance is not None


def test_cancel_in_the_front_end_keeps_what_there_is(server, prompt_error):
    prompt = prompt_of(server, "Train an HGR on the demo", train="condition", name="cancelled", condition_steps=100_000)

    def cancel():
        while not re.search("cancelled: .*condition redirector: step", server.log()):
            time.sleep(0.2)
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/interrupt", method="POST"), timeout=10)

    threading.Thread(target=cancel, daemon=True).start()
    with pytest.raises(prompt_error):
        server.post_prompt(prompt)
    folder = Path(server.base) / "output" / "safecfg" / "recordings" / "cancelled"
    assert (folder / "training.state").exists() and not (Path(server.base) / "models" / "hgr" / "cancelled.safetensors").exists()


def test_the_checkpoint_template_names_known_nodes_and_widgets(server):
    prompt = prompt_of(server, "Make an HGR for your checkpoint")
    assert prompt[node_of(prompt, "SafeCFG_TrainHGR")]["inputs"]["sizes"] == "auto"
