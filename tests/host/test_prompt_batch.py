"""`SafeCFG Prompt Batch`: every line as if it had been encoded alone."""

import pytest
import torch
from safecfg.nodes.demo_world.demo_model import demo_clip
from safecfg.nodes.demo_world.prompt_batch import PromptBatch, batch
from safecfg.nodes.host.encoding import LENGTHS, encode_batch, encode_groups


@pytest.fixture(scope="module")
def clip():
    return demo_clip()


def test_rows_are_the_prompts(clip):
    conditioning, count = PromptBatch.execute(clip, "a knife\n\n  a (rabbit:1.2) and a rocket \n").result
    ((tokens, extra),) = conditioning
    assert count == 2 and tokens.shape == (2, 16, 128) and extra["pooled_output"] is None
    for row, prompt in zip(tokens, ["a knife", "a (rabbit:1.2) and a rocket"], strict=True):
        assert torch.equal(row[None], clip.encode_from_tokens(clip.tokenize(prompt)))


def test_a_long_prompt_leaves_its_neighbours_as_they_are(clip):
    long = "a frog and a strawberry " * 5
    first, second = batch(clip, ["a knife", long])
    assert torch.equal(first[0], clip.encode_from_tokens(clip.tokenize("a knife")).expand(2, -1, -1))
    assert torch.equal(second[0], clip.encode_from_tokens(clip.tokenize(long)).expand(2, -1, -1))
    assert first[1]["mask"].flatten().tolist() == [1, 0] and second[1]["mask"].flatten().tolist() == [0, 1]


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


def test_prompts_of_one_length_share_an_entry():
    (rows, ((tokens, extra),)), (other, ((alone, _),)) = encode_groups(LanguageModel(guidance=3.5), ["a b c", "a", "d e f"])
    assert (rows, other) == ([0, 2], [1]) and tokens.shape == (2, 3, 8) and alone.shape == (1, 1, 8)
    assert extra["pooled_output"][:, 0].tolist() == [3, 3] and extra["guidance"] == 3.5


def test_what_is_only_read_is_padded_and_masked():
    ((tokens, extra),) = encode_batch(LanguageModel(masked=False), ["a b c", "a"])
    assert tokens.shape == (2, 32, 8) and (tokens[1, 1:] == 0).all() and extra[LENGTHS].flatten().tolist() == [3, 1]
    assert extra["attention_mask"].sum(dim=1).tolist() == [3, 1]
    ((tokens, extra),) = encode_batch(LanguageModel(masked=False), ["a b", "c d"])
    assert tokens.shape == (2, 2, 8) and not {"attention_mask", LENGTHS} & extra.keys()


def test_text_that_only_the_second_prompt_carries_is_not_lost():
    class Quoted(LanguageModel):
        def encode_from_tokens_scheduled(self, tokens):
            ((tensor, extra),) = super().encode_from_tokens_scheduled(tokens)
            return [[tensor, {**extra, "conditioning_byt5small": torch.ones(1, 2, 4)} if tensor.shape[1] > 1 else extra]]

    ((_, extra),) = encode_batch(Quoted(), ["a", "a b"])
    assert "conditioning_byt5small" in extra
    assert [sorted(c[0][1].keys() & {"conditioning_byt5small"}) for _, c in encode_groups(Quoted(), ["a", "a b"])] == [
        [], ["conditioning_byt5small"],
    ]  # fmt: skip


class Video:
    """A MODEL of latents with 3 dimensions."""

    def get_model_object(self, name):
        return type("Format", (), {"latent_dimensions": 3})


def test_prompts_of_different_lengths_need_the_model():
    clip = LanguageModel(layers=torch.ones(1, 3, 2))
    with pytest.raises(ValueError, match=r"different lengths \(1, 3 tokens\). Connect `model`"):
        PromptBatch.execute(clip, "a b c\na")
    (first, second), count = PromptBatch.execute(clip, "a b c\na", Video()).result
    assert count == 2 and first[0].shape == (2, 3, 8) and second[0].shape == (2, 1, 8)
    assert first[1]["mask"].shape == (2, 1, 1, 1) and first[1]["layers"].shape == (2, 3, 2)
