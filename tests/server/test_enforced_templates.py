"""Our own templates on a server that enforces SafeCFG: they run, or are refused for a reason that SECURITY.md names.

With the demo model in a checkpoint's place and few steps. Clean pictures are those of a server that enforces nothing, to the last bit.
"""

import json
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

import redteam
from templates import TEMPLATES, read
from thumbnails import DEMO, on_the_demo
from workflow_format import to_prompt

CLEAN = "a frog and a strawberry"
TEXTS = {"CLIPTextEncode": "text", "SafeCFG_PromptBatch": "text", "PrimitiveStringMultiline": "value", "PrimitiveString": "value"}
# What an enforced server does not run, as SECURITY.md says: training, recording and checking; guidance that acts after the HGR.
REFUSED = {
    "03": "SafeCFG_TrainHGR", "31": "SafeCFG_TrainHGR", "32": "SafeCFG_RecordGuidance", "33": "SafeCFG_FineTuneSafeLoRA",
    "34": "SafeCFG_CalibrateHGR", "44": "SafeCFG_Evaluate",
    "07": "SafeCFG_ConceptGuidance", "42": "SafeCFG_ConceptGuidance", "43": "SafeCFG_ConceptGuidance",
}  # fmt: skip
STOPPED = "06"  # a guider without a negative prompt, and the demo's HGR looks at the guidance
RUN = [name for name in TEMPLATES if name[:2] not in (*REFUSED, STOPPED)]


@pytest.fixture(scope="module")
def enforced(host, tmp_path_factory):
    found = redteam.start(host, tmp_path_factory.mktemp("enforced_templates"))
    try:
        yield found
    finally:
        found.stop()


def prompt_of(server, name: str, text: str | None = None) -> dict:
    """A template as it is queued, on the demo model, with few steps; `text` in place of every prompt."""
    workflow, info = read(name), server.object_info()
    if "bypass" not in info["LoraModelLoader"]["input"]["required"]:  # an older loader lacks that widget
        for node in workflow["nodes"]:
            node["widgets_values"] = (
                node["widgets_values"][:1] if node["type"] == "LoraModelLoader" else node.get("widgets_values", [])
            )
    prompt = to_prompt(workflow, info)
    if any(node["class_type"] in DEMO for node in prompt.values()):
        prompt = on_the_demo(prompt)
    for node in prompt.values():
        inputs, kind = node["inputs"], node["class_type"]
        if "Sampler" in kind and isinstance(inputs.get("steps"), int):
            inputs["steps"] = 6
        if text is not None and kind in TEXTS and isinstance(inputs[TEXTS[kind]], str) and inputs[TEXTS[kind]].strip():
            inputs[TEXTS[kind]] = text
    return prompt


def pictures(server, prompt: dict) -> dict[str, list[np.ndarray]]:
    """By node, every picture that a run saves or shows."""
    entry = server.post_prompt(prompt)
    files = {key: server.files(entry, key) for key in entry["outputs"]}
    found = {key: [np.asarray(Image.open(file)) for file in some if file.suffix == ".png"] for key, some in files.items()}
    return {key: some for key, some in found.items() if some}


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) > 0 and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", RUN)
def test_a_template_runs_and_its_clean_pictures_stay(server, enforced, name):
    prompt = prompt_of(server, name, CLEAN)
    plain, guarded = pictures(server, prompt), pictures(enforced, prompt)
    assert plain and plain.keys() == guarded.keys() and all(same(plain[key], guarded[key]) for key in plain)


def test_a_guider_without_a_negative_is_stopped(server, enforced, prompt_error):
    """It runs where the HGR has a condition redirector alone, as one made of prompts."""
    prompt = prompt_of(server, next(name for name in TEMPLATES if name.startswith(STOPPED)), CLEAN)
    assert pictures(server, prompt)
    with pytest.raises(prompt_error) as caught:
        enforced.post_prompt(prompt)
    assert caught.value.details["exception_type"] == "safecfg.SafeCFGError"
    assert "no negative prompt" in (said := caught.value.details["exception_message"]) and "[safecfg:not-redirected]" in said


def test_what_a_template_draws_without_safecfg_is_redirected(server, enforced):
    """The Quickstart's "plain CFG", which an enforced server does not draw: its knife is SafeCFG's picture there."""
    prompt = prompt_of(server, "Quickstart")
    titles = {node["title"]: str(node["id"]) for node in read("Quickstart")["nodes"] if node["type"] == "PreviewImage"}
    plain, guarded = pictures(server, prompt), pictures(enforced, prompt)
    harmful, safe = titles["Harmful prompt, plain CFG"], titles["Harmful prompt, SafeCFG"]
    assert not same(plain[harmful], guarded[harmful]) and same(guarded[harmful], guarded[safe])
    clean = titles["Clean prompt, plain CFG"]
    assert same(plain[clean], guarded[clean])


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name[:2] in REFUSED])
def test_a_template_is_refused_for_the_node_that_no_enforced_server_runs(enforced, name):
    prompt = prompt_of(enforced, name)
    assert REFUSED[name[:2]] in {node["class_type"] for node in prompt.values()}
    request = urllib.request.Request(
        enforced.url + "/prompt", json.dumps({"prompt": prompt}).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    error = json.loads(caught.value.read())["error"]
    assert (caught.value.code, error["type"], error["code"]) == (400, "safecfg", "node-not-allowed")
    assert "is not for a server that enforces SafeCFG" in error["details"] and "SAFECFG_ENFORCE_ALLOW" in error["details"]
