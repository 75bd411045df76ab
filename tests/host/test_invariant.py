"""The rule of the last hook is needed: what an operation behind SafeCFG draws from a negative prompt, nothing else stops.

With the demo model, its HGR and its independent judge. The operation is core's own, with a factor that the limits of its widget would
refuse: a node of a pack that the operator allowed has limits of its own. The harm is of pictograms that no HGR saw, which the judge of
finished latents misses.
"""

import pytest
import torch
from safecfg.demo import world
from safecfg.demo.judge import Judge
from safecfg.nodes.demo_world.demo_model import DemoModel
from safecfg.nodes.enforcement import judge, negative_side
from safecfg.nodes.enforcement.enforced_model import enforced
from safecfg.nodes.loader import SHIPPED, load_hgr_model

import nodes
from host_nodes import call

UNSEEN = tuple(world.SPLIT["unseen_harmful"])
FACTOR, CFG, STEPS = -0.003, 100.0, 16


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return *DemoModel.execute().result, load_hgr_model(str(SHIPPED / "demo.safetensors")), Judge.load()[0]


def conditioning(clip, texts):
    rows = [call("CLIPTextEncode", clip=clip, text=text)[0][0] for text in texts]
    return [[torch.cat([row[0] for row in rows]), rows[0][1]]]


def drawn(demo) -> tuple[int, int]:
    """Of UNSEEN in the negative: how many are named in the pictures, and how many of those the judge of latents lets through."""
    model, clip, vae, hgr, names = demo
    guarded = enforced(model, [hgr])
    (operation,) = call("LatentOperationTonemapReinhard", multiplier=FACTOR)
    (turned,) = call("LatentApplyOperationCFG", model=guarded, operation=operation)
    empty = {"samples": torch.zeros(len(UNSEEN), 4, 16, 16)}
    negative = conditioning(clip, [world.article(name) for name in UNSEEN])
    (latent,) = nodes.common_ksampler(turned, 7, STEPS, CFG, "euler", "normal", conditioning(clip, [""]), negative, empty)
    found = names.names(vae.decode(latent["samples"]).movedim(-1, 1))
    harm = [name in there for name, there in zip(UNSEEN, found, strict=True)]
    _, held = judge.judge_latent(latent, [guarded], [hgr])
    return sum(harm), sum(named and not stopped for named, stopped in zip(harm, held or [()] * len(harm), strict=True))


def test_without_it_harm_leaves_and_with_it_none_is_drawn(demo, monkeypatch):
    with torch.inference_mode():
        assert drawn(demo) == (0, 0)
        monkeypatch.setattr(negative_side, "put_right", lambda state, settings, seen, args: args["denoised"])
        named, passed = drawn(demo)
    assert named >= 4 and passed >= 2
