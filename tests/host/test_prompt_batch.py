"""`SafeCFG Prompt Batch`: every line as if it had been encoded alone."""

import pytest
import torch
from safecfg.nodes.demo_world.demo_model import demo_clip
from safecfg.nodes.demo_world.prompt_batch import PromptBatch, encode_batch


@pytest.fixture(scope="module")
def clip():
    return demo_clip()


def test_rows_are_the_prompts(clip):
    conditioning, count = PromptBatch.execute(clip, "a knife\n\n  a (rabbit:1.2) and a rocket \n").result
    ((tokens, extra),) = conditioning
    assert count == 2 and tokens.shape == (2, 16, 128) and extra["pooled_output"] is None
    for row, prompt in zip(tokens, ["a knife", "a (rabbit:1.2) and a rocket"], strict=True):
        assert torch.equal(row[None], clip.encode_from_tokens(clip.tokenize(prompt)))


def test_shorter_prompts_get_empty_chunks(clip):
    long = "a frog and a strawberry " * 5
    ((tokens, _),) = encode_batch(clip, ["a knife", long])
    empty = clip.encode_from_tokens(clip.tokenize(""))
    assert tokens.shape == (2, 32, 128)
    assert torch.equal(tokens[:1], torch.cat([clip.encode_from_tokens(clip.tokenize("a knife")), empty], dim=1))
    assert torch.equal(tokens[1:], clip.encode_from_tokens(clip.tokenize(long)))


def test_an_empty_text_is_said(clip):
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptBatch.execute(clip, " \n ")


class LanguageModel:
    """An encoder with one token per word, as language models are, with or without an attention mask."""

    def __init__(self, masked=True, **extra):
        self.masked, self.extra = masked, extra

    def tokenize(self, text):
        return {"llm": [[(1, 1.0)] * len(text.split())]}

    def encode_from_tokens_scheduled(self, tokens):
        count = len(tokens["llm"][0])
        extra = {"pooled_output": torch.full((1, 4), float(count)), **self.extra}
        return [[torch.full((1, count, 8), 2.0), {**extra, "attention_mask": torch.ones(1, count)} if self.masked else extra]]


def test_masked_encoders_are_padded():
    ((tokens, extra),) = encode_batch(LanguageModel(guidance=3.5), ["a b c", "a"])
    assert tokens.shape == (2, 3, 8) and extra["pooled_output"][:, 0].tolist() == [3, 1] and extra["guidance"] == 3.5
    assert extra["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]] and (tokens[1, 1:] == 0).all()


class Padding(LanguageModel):
    """An encoder that pads to 3 tokens, as T5 does, and marks nothing."""

    def tokenize(self, text):
        words = [(len(word), 1.0) for word in text.split()]
        return {"t5": [words + [(0, 1.0)] * (3 - len(words))]}

    def encode_from_tokens_scheduled(self, tokens):
        return [[torch.tensor([[[float(token)] * 2 for token, _ in tokens["t5"][0]]]), {}]]


def test_encoders_that_pad_share_a_batch_with_more_padding():
    ((tokens, _),) = encode_batch(Padding(), ["aa bb cc dd e", "aaa"])
    assert tokens[..., 0].tolist() == [[2, 2, 2, 2, 1], [3, 0, 0, 0, 0]]


def test_a_mask_that_core_dropped_is_given_back():
    clip = LanguageModel(masked=False)
    clip.cond_stage_model = torch.nn.ModuleList([torch.nn.Identity()])
    clip.cond_stage_model[0].return_attention_masks = True
    ((tokens, extra),) = encode_batch(clip, ["a b c", "a"])
    assert tokens.shape == (2, 3, 8) and extra["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in encode_batch(clip, ["a b", "c d"])[0][1]


def test_what_cannot_share_a_batch_is_said():
    with pytest.raises(ValueError, match="different lengths"):
        encode_batch(LanguageModel(masked=False), ["a b c", "a"])
    with pytest.raises(ValueError, match="extra tensors"):
        encode_batch(LanguageModel(layers=torch.ones(3, 1, 2)), ["a", "b"])
