"""Server-wide enforcement beside workflows of plain users: ComfyUI's own templates (of the package that its front end shows) and ours.

They need models that are not here, so what the server makes of the prompts is looked at: nothing is refused that needs no pack,
every use of a MODEL is guarded, and every decode of something sampled is judged.
"""

import asyncio
import copy
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safecfg.nodes import NODES
from safecfg.nodes.enforcement.enforced_graph import OURS, Refusal, check_nodes, rewrite
from safecfg.nodes.enforcement.names import GUARD, LATENT_GUARD, PICTURE_GUARD, is_link

import nodes as core
from enforce_fakes import GUARDS, unguarded

sys.path.append(str(Path(__file__).parents[1]))
from saved_graph import links_of
from templates import TEMPLATES, read

PACKAGES = ("comfyui_workflow_templates_json", "comfyui_workflow_templates")
FEWEST = 20  # workflows without a pack that this must find, or it tests nothing


@pytest.fixture(scope="module")
def classes():
    """All nodes that the host brings, and ours; the host's own list is put back."""
    before = dict(core.NODE_CLASS_MAPPINGS)
    asyncio.run(core.init_builtin_extra_nodes())
    yield {**core.NODE_CLASS_MAPPINGS, **{node.GET_SCHEMA().node_id: node for node in [*NODES, *GUARDS]}}
    core.NODE_CLASS_MAPPINGS.clear()
    core.NODE_CLASS_MAPPINGS.update(before)


@pytest.fixture(scope="module")
def public(classes) -> dict[str, dict]:
    """By name, the prompt of every public workflow all of whose nodes this host has."""
    roots = [Path(spec.submodule_search_locations[0]) / "templates" for name in PACKAGES if (spec := find_spec(name))]
    files = [file for root in roots for file in sorted(root.glob("*.json"))]
    if not files:
        pytest.skip("needs the package comfyui-workflow-templates, as the host's requirements.txt names it")
    saved = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    prompts = {name: links_of(workflow) for name, workflow in saved.items() if isinstance(workflow, dict) and "nodes" in workflow}
    return {
        name: prompt for name, prompt in prompts.items() if {node["class_type"] for node in prompt.values()} <= classes.keys()
    }


def decodes(prompt: dict) -> list[tuple[str, str]]:
    """Ids of nodes that decode something sampled, with the input that it comes in by; found by their names alone."""

    def sampled(node_id: str, seen: set) -> bool:
        if node_id in seen or node_id not in prompt:
            return False
        seen.add(node_id)
        node = prompt[node_id]
        return "Sampler" in node["class_type"] or any(sampled(v[0], seen) for v in node["inputs"].values() if is_link(v))

    found = [(i, "samples") for i, node in prompt.items() if "Decode" in node["class_type"] and "samples" in node["inputs"]]
    return [(i, name) for i, name in found if sampled(prompt[i]["inputs"][name][0], set())]


def without_guards(prompt: dict) -> dict:
    """A rewritten prompt with the guards taken out again."""

    def plain(value):
        while is_link(value) and prompt[value[0]]["class_type"] in (GUARD, LATENT_GUARD, PICTURE_GUARD):
            inputs = prompt[value[0]]["inputs"]
            value = inputs.get("value", inputs.get("samples"))
        return value

    ours = {i for i, node in prompt.items() if node["class_type"] in (GUARD, LATENT_GUARD, PICTURE_GUARD)}
    return {
        i: {**node, "inputs": {name: plain(value) for name, value in node["inputs"].items()}}
        for i, node in prompt.items()
        if i not in ours
    }


def test_no_public_workflow_that_needs_no_pack_is_refused(public, classes):
    assert len(public) >= FEWEST
    refused = {}
    for name, prompt in public.items():
        try:
            check_nodes(prompt, classes, ())
            rewrite(prompt, classes)
        except Refusal as error:
            refused[name] = str(error)
    assert refused == {}


def test_every_model_is_guarded_and_every_decode_judged(public, classes):
    samplers = judged = 0
    for name, prompt in public.items():
        rewritten = rewrite(copy.deepcopy(prompt), classes)
        assert unguarded(rewritten, classes) == [], name
        assert without_guards(rewritten) == prompt, name
        for by_clip in (False, True):
            once = rewrite(prompt, classes, by_clip=by_clip)
            assert rewrite(once, classes, by_clip=by_clip) == once, (name, by_clip)
        for node_id, value in decodes(prompt):
            assert rewritten[rewritten[node_id]["inputs"][value][0]]["class_type"] == LATENT_GUARD, (name, node_id)
            judged += 1
        samplers += sum("Sampler" in node["class_type"] for node in prompt.values())
    assert judged >= FEWEST and samplers >= judged / 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_our_templates_are_refused_only_for_nodes_that_no_enforced_server_runs(name, classes):
    prompt = links_of(read(name))
    foreign = {
        node["class_type"]
        for node in prompt.values()
        if node["class_type"].startswith("SafeCFG_") and node["class_type"] not in OURS
    }
    if foreign:
        with pytest.raises(Refusal, match="is not for a server that enforces") as error:
            check_nodes(prompt, classes, ())
        assert error.value.code == "node-not-allowed" and any(node in str(error.value) for node in foreign)
        return
    check_nodes(prompt, classes, ())
    rewritten = rewrite(prompt, classes)
    assert unguarded(rewritten, classes) == []
    for node_id, value in decodes(prompt):
        assert rewritten[rewritten[node_id]["inputs"][value][0]]["class_type"] == LATENT_GUARD
