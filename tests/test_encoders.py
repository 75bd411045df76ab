"""Which text encoder it is: rounding is forgiven, a fine-tuned encoder is noticed, another one is another."""

import math

import pytest
import torch

from hgr_models import HGRError
from hgr_models.condition import ConditionConfig
from hgr_models.encoders import RELATED, SAME, EncoderPrint, distance_between, nearest, print_of
from hgr_models.hgr import HGR, HGRInfo

WEIGHTS = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
OUTLIER = torch.zeros(64).index_fill(0, torch.tensor([3]), 500.0)  # a massive activation that no text changes


def encoder(weights, pooled=False):
    """A toy encoder: a row per letter, and a massive activation in every token, as language models have."""

    def encode(text):
        tokens = torch.stack([weights[ord(c) % 96] for c in text] or [torch.zeros(64)])
        tokens = torch.tanh(tokens + tokens.mean(dim=0)) + OUTLIER
        return tokens[None].float(), tokens.mean(dim=0, keepdim=True).float() if pooled else None, None

    return encode


def made(weights=WEIGHTS, parts=("l",), pooled=False):
    return print_of(parts, encoder(weights, pooled))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_rounded_weights_are_the_same_encoder(kind):
    assert distance_between(made(), made(WEIGHTS.to(kind).float())) < SAME


def test_a_fine_tuned_encoder_is_told_apart_and_another_one_is_another():
    other = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    tuned = made(WEIGHTS + 0.35 * other)
    assert SAME < distance_between(made(), tuned) < RELATED
    assert distance_between(made(), made(other)) > RELATED
    assert nearest(made(), [made(other), None, tuned])[0] == 2
    assert nearest(made(), [made(other), None]) is None


def test_other_layouts_are_infinitely_far():
    assert made().distance(made(parts=("g", "l"))) == math.inf
    assert made().distance(made(pooled=True)) == math.inf
    assert made(pooled=True).pooled_width == 64 and len(made(pooled=True).sketch) == 2 * len(made().sketch)


def test_padding_does_not_count():
    def padded(text):
        tokens, pooled, _ = encoder(WEIGHTS)(text)
        mask = torch.cat([torch.ones(1, tokens.shape[1]), torch.zeros(1, 7)], dim=1)
        return torch.cat([tokens, torch.full((1, 7, 64), 9.0)], dim=1), pooled, mask

    assert made().distance(print_of(("l",), padded)) < 1e-9


def test_the_print_survives_a_file_and_refuses_a_damaged_one():
    found = made()
    assert EncoderPrint.from_dict(found.as_dict()).distance(found) < 1e-5
    assert found.name.startswith("l-") and found.name == made(WEIGHTS.half().float()).name
    for wrong in ({}, {"sketch": [float("nan")]}, {"parts": [""]}, {"token_width": -1}, {"sketch": ["a"]}, {"parts": None}):
        with pytest.raises(HGRError):
            EncoderPrint.from_dict({**(found.as_dict() if wrong else {}), **wrong})


def test_an_hgr_of_prompts_knows_no_latents_and_says_whose_it_is(tmp_path):
    from hgr_models import load_hgr, save_hgr

    info = HGRInfo(("a",), (0.5,), (), ((0.5,),), "", 0, 2, "", 64, 0, encoder=made().as_dict())
    save_hgr(tmp_path / "a.safetensors", HGR(info, ConditionConfig(64, 1, width=16), None))
    loaded = load_hgr(tmp_path / "a.safetensors").info
    assert loaded.of_prompts and loaded.encoder_print().distance(made()) < 1e-5
    with pytest.raises(HGRError, match="Expected an encoder 32 wide"):
        HGRInfo(("a",), (0.5,), (), ((0.5,),), "", 0, 2, "", 32, 0, encoder=made().as_dict()).validate()
