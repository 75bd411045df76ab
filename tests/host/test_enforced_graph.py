"""Server-wide enforcement, the rewriting of prompts: every way round SafeCFG that a workflow can try."""

import copy
import json
import random

import pytest
from safecfg.nodes.enforcement.enforced_graph import LOWEST, OURS, Refusal, check_nodes, pack_of, rewrite
from safecfg.nodes.enforcement.names import GUARD

import nodes as core
from enforce_fakes import CLASSES, SAMPLER, node, unguarded, workflow


def run(prompt, allowed=()) -> dict:
    check_nodes(prompt, CLASSES, allowed)
    return rewrite(prompt, CLASSES)


def test_a_workflow_without_safecfg_gets_it():
    before = workflow()
    after = run(before)
    assert unguarded(before) == [("4", "model")] and unguarded(after) == []
    assert after["4"]["inputs"]["model"] == ["safecfg_1_0", 0]
    assert after["safecfg_1_0"]["class_type"] == GUARD and after["safecfg_1_0"]["inputs"] == {"value": ["1", 0]}
    assert before == workflow() and run(after) == after
    without = rewrite(before, CLASSES, judge=False)
    assert {k: v for k, v in without.items() if k not in ("4", "safecfg_1_0")} == {k: v for k, v in before.items() if k != "4"}


WEAK = {
    "hgr": ["8", 0],
    "strength": 0.0,
    "categories": "red = off",
    "redirect": "condition",
    "strict": False,
    "start_percent": 0.99,
}
TRIED = {
    "Apply with strength 0": {"n8": node("SafeCFG_LoadHGR", hgr_name="x"), "n9": node("SafeCFG_Apply", model=["1", 0], **WEAK)},
    "patches after Apply": {"n9": node("LoraLoaderModelOnly", model=["8", 0]), "n8": node("SafeCFG_Apply", model=["1", 0])},
    "a merge": {"n7": node("UNETLoader"), "n9": node("Switch", a=["7", 0], b=["1", 0])},
    "a switch": {"n9": node("Switch", a=["1", 0], b=["1", 0])},
    "a switch of a switch": {"n8": node("Switch", a=["1", 0]), "n9": node("Switch", a=["8", 0], b=["2", 0])},
    "an Enforced node of its own": {"n9": node(GUARD, value=["1", 0])},
    "its own node under our name": {
        "n9": node("UNETLoader"),
        "safecfg_1_0": node("UNETLoader"),
        "safecfg_9_0": node("VAELoader"),
    },
    "a missing link": {"n9": node("Switch", a=["99", 0])},
    "a cycle": {"n8": node("Switch", a=["9", 0]), "n9": node("Switch", a=["8", 0])},
}


@pytest.mark.parametrize("nodes", TRIED.values(), ids=TRIED.keys())
def test_whatever_the_workflow_puts_before_the_sampler(nodes):
    prompt = workflow(**nodes, n4=node("KSampler", model=["9", 0], **SAMPLER))
    after = run(prompt)
    assert unguarded(after) == [] and run(after) == after
    source, slot = after["4"]["inputs"]["model"]
    assert after[source]["class_type"] == GUARD and slot == 0
    assert all(after[name]["class_type"] == entry["class_type"] for name, entry in prompt.items())


def test_guiders_are_looked_at_too():
    prompt = workflow(n4=node("SamplerCustomAdvanced", guider=["9", 0]), n9=node("CFGGuider", model=["1", 0], cfg=2.0))
    after = run(prompt)
    assert unguarded(after) == [] and after["4"]["inputs"]["guider"] == ["safecfg_9_0", 0]


REFUSED = {
    "counts outputs from the end": (workflow(n4=node("KSampler", model=["1", -3], **SAMPLER)), "output -3 of node 1"),
    "an output that does not exist": (workflow(n4=node("KSampler", model=["1", 3], **SAMPLER)), "output 3 of node 1"),
    "True as output 1": (workflow(n4=node("KSampler", model=["1", True], **SAMPLER)), "output True of node 1"),
    "0.0 as output 0": (workflow(n4=node("KSampler", model=["1", 0.0], **SAMPLER)), r"output 0\.0 of node 1"),
    "a link that appears in validation": (workflow(n4=node("KSampler", model={"__value__": ["1", 0]})), "node 4 hides a link"),
    "the same, deeper": (workflow(n4=node("KSampler", model=[{"x": {"__value__": ["1", 0]}}])), "node 4 hides a link"),
    "a sampler of another pack": (
        workflow(n4=node("TheirSampler", model=["1", 0])),
        r"node 4 \(TheirSampler\) of their-pack may",
    ),
    "an unconnected node of another pack": (workflow(n9=node("TheirSampler")), "TheirSampler.*SAFECFG_ENFORCE_ALLOW"),
    "a picture from a service": (workflow(n9=node("TheirApi")), "of comfy_api_nodes may sample"),
    "a class that another pack slipped in": (workflow(n9=node("Slipped")), "of their_module may sample"),
    "nodes that appear while it runs": (workflow(n9=node("FutureCoreLoop")), "adds nodes while it runs"),
    "a prompt that the HGR does not see": (workflow(n9=node("PerpNegGuider", model=["1", 0])), "third prompt"),
    "training an HGR over ours": (workflow(n9=node("SafeCFG_TrainHGR")), "not for a server that enforces"),
    "guidance that draws the negative": (
        workflow(n9=node("FreSca", scale_low=0, scale_high=1)),
        "scale_low of node 9 .* at least 1",
    ),
    "the same, as text": (workflow(n9=node("FreSca", scale_low="0.5")), "at least 1, but got '0.5'"),
    "the same, wrapped": (workflow(n9=node("FreSca", scale_low={"__value__": 0.5})), "at least 1"),
    "the same, not a number": (workflow(n9=node("FreSca", scale_low=float("nan"))), "at least 1, but got nan"),
    "a list": ([], "object with a node per id"),
    "a node that is none": (workflow(n9=None), "inputs as node '9'"),
    "a node without inputs": (workflow(n9={"class_type": "KSampler"}), "inputs as node '9'"),
    "inputs that are a list": (workflow(n9={"class_type": "KSampler", "inputs": []}), "inputs as node '9'"),
    "a type that is a list": (workflow(n9={"class_type": ["KSampler"], "inputs": {}}), "class_type and inputs"),
}


@pytest.mark.parametrize(("prompt", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_rewritten_is_refused(prompt, reason):
    with pytest.raises(Refusal, match=reason):
        run(prompt)


def test_allowed_nodes_are_rewritten():
    prompt = workflow(n4=node("TheirSampler", model=["1", 0]), n8=node("TheirPipe"), n9=node("TheirPipe", pipe=["8", 0]))
    for allowed in ({"their-pack"}, {"TheirSampler", "TheirPipe"}):
        after = run(prompt, allowed)
        assert unguarded(after) == [] and after["9"]["inputs"]["pipe"] == ["safecfg_8_0", 0]
    with pytest.raises(Refusal, match="TheirPipe"):
        run(prompt, {"TheirSampler"})
    assert run(workflow(n8=node("TheirPipe"), n9=node("Switch", a=["8", 1])), {"their-pack"})["9"]["inputs"]["a"] == ["8", 1]


def test_numbers_by_link_are_held_to_the_widgets_limits():
    prompt = workflow(
        n4=node("KSampler", model=["1", 0], **{**SAMPLER, "cfg": ["9", 0], "seed": ["9", 0]}),
        n7=node("FreSca", model=["1", 0], scale_low=["9", 0], scale_high=1.2),
        n8=node("EmptyLatentImage", width=["9", 0]),
        n9=node("PrimitiveFloat", value=-7.0),
    )
    after = run(prompt)
    used = lambda name, key: after[after[name]["inputs"][key][0]]  # noqa: E731
    assert used("4", "cfg")["class_type"] == GUARD and used("4", "cfg")["inputs"] == {
        "value": ["9", 0],
        "low": 0.0,
        "high": 100.0,
    }
    assert used("4", "seed")["inputs"]["low"] == 0.0
    assert used("7", "scale_low")["inputs"]["low"] == LOWEST["FreSca", "scale_low"] == 1.0
    assert used("8", "width")["inputs"] == {"value": ["9", 0], "low": 16.0, "high": 16384.0}  # no model near it
    assert run(after) == after
    own = {**prompt, "9": node(GUARD, value=["99", 0], low=-9.0, high=9.0)}  # its own, looser
    assert run(own)["4"]["inputs"]["cfg"] != ["9", 0]


def test_random_prompts_are_rewritten_or_refused():
    """1,500 random graphs with odd links, ids and values: no link that can carry a MODEL is left."""
    rng, names, passed = random.Random(11), [*CLASSES, "Unknown"], 0
    ids = [str(i) for i in range(6)] + ["safecfg_1_0", "a:b"]
    values = [1, -1.0, "x", None, [], ["1"], [1, 0], {"__value__": 3}, {"__value__": [[1]]}, float("inf")]
    for _ in range(1500):
        prompt = {}
        for node_id in rng.sample(ids, rng.randint(1, 8)):
            links = {key: [rng.choice([*ids, "99"]), rng.choice([0, 0, 0, 1, 2])] for key in ("model", "value", "cfg", "guider")}
            inputs = {key: rng.choice([link, rng.choice(values)]) for key, link in links.items()}
            prompt[node_id] = node(rng.choice(names), **inputs)
        before = copy.deepcopy(prompt)
        try:
            after = run(prompt, {"their-pack"})
        except Refusal:
            continue
        assert prompt == before
        known = {name: entry for name, entry in after.items() if entry["class_type"] in CLASSES}
        assert unguarded(known) == [] and run(after, {"their-pack"}) == after
        json.dumps(after)
        passed += 1
    assert passed > 100


def test_our_nodes_are_classified():
    assert CLASSES.keys() >= OURS
    assert pack_of(core.KSampler) == "" and pack_of(CLASSES["TheirSampler"]) == "their-pack"


def test_the_clip_of_the_models_loader_chooses_the_hgr():
    """As the loader made it, whatever LoRA is on it; a workflow's own Enforced node cannot name another."""
    lora = node("LoraLoader", model=["1", 0], clip=["1", 1], lora_name="x", strength_model=1.0, strength_clip=1.0)
    prompt = workflow(n7=lora, n8=node("CheckpointLoaderSimple", ckpt_name="y"), n4=node("KSampler", model=["7", 0], **SAMPLER))
    after = rewrite(prompt, CLASSES, by_clip=True)
    assert (
        after["safecfg_1_0"]["inputs"] == {"value": ["1", 0], "clip": ["1", 1]} and rewrite(after, CLASSES, by_clip=True) == after
    )
    assert after["safecfg_7_0"]["inputs"] == {"value": ["7", 0], "clip": ["1", 1]}
    own = {**prompt, "9": node(GUARD, value=["1", 0], clip=["8", 1]), "4": node("KSampler", model=["9", 0], **SAMPLER)}
    after = rewrite(own, CLASSES, by_clip=True)
    assert after[after["4"]["inputs"]["model"][0]]["inputs"]["clip"] == ["1", 1]
    apart = workflow(n1=node("UNETLoader"), n7=node("CLIPLoader"), n2=node("CLIPTextEncode", clip=["7", 0], text="x"))
    apart["5"]["inputs"]["vae"] = ["9", 0]
    apart["9"] = node("VAELoader")
    assert rewrite(apart, CLASSES, by_clip=True)["safecfg_1_0"]["inputs"]["clip"] == ["7", 0]
    apart["8"] = node("CLIPLoader")
    assert "clip" not in rewrite(apart, CLASSES, by_clip=True)["safecfg_1_0"]["inputs"]
