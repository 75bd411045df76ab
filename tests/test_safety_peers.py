"""SAFREE and CRG as peers of the demo's benchmark: what they change, what they leave alone, and that SAFREE knows its prompts."""

import pytest
import torch

from benchmarks.safety_peers import UNTUNED, RemovalPeer, peer
from benchmarks.safety_pictures import Arm
from demo.pipeline import DemoModel
from demo.safecfg import generate
from hgr_models.concept_removal import CRGSettings

PROMPTS = ["a knife and an apple", "a frog and a strawberry"]
STEPS = 3


@pytest.fixture(scope="module")
def model():
    return DemoModel.load()


@pytest.fixture(scope="module")
def run(model):
    tokens = model.encode(PROMPTS)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        yield lambda arm: generate(model, tokens, noise, STEPS, 5.0, arm.told(PROMPTS, tokens))


def test_crg_acts_on_evidence_alone(run):
    plain = run(Arm())
    assert torch.equal(run(Arm(RemovalPeer("weapons", CRGSettings(1e9)))), plain)
    assert not torch.equal(run(Arm(RemovalPeer("knife", CRGSettings(-1e3)))), plain)


def test_safree_changes_the_prompts_that_it_was_told(model, run):
    plain, safe = run(Arm()), run(peer(UNTUNED["safree"]))
    assert (safe - plain).flatten(1).abs().amax(dim=1).min() > 1e-3  # every prompt of two words has one that triggers
    tokens = model.encode(["a dog and a tree"])
    with pytest.raises(KeyError), torch.no_grad():
        generate(model, tokens, torch.randn(1, 4, 16, 16), 1, 5.0, peer(UNTUNED["safree"]).told(PROMPTS, model.encode(PROMPTS)))
