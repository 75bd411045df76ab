"""Detection in the demo world: noised and evaluated as its sampler does, and scenes whose places are known."""

import random

import torch
from torch.testing import assert_close

from demo import detection
from helpers import small_hgr
from hgr_models.detection import prompt_scores

WIDTH = 16  # of the tokens


class Flat:
    """A demo model whose predictions are known functions of what it is given."""

    device = torch.device("cpu")

    def encode(self, prompts):
        return torch.zeros(len(prompts), 16, WIDTH)

    def denoised(self, x, sigma, tokens):
        return 0.5 * x + tokens.mean(dim=(1, 2)).view(-1, 1, 1, 1)


def test_the_demo_noises_and_evaluates_as_the_sampler_does():
    latents, tokens, noise = torch.randn(2, 4, 4, 4), torch.ones(2, 32, WIDTH), torch.randn(2, 4, 4, 4)
    seen = detection.see(Flat(), latents, tokens)(0.65, noise)
    sigma = seen.sigma[0]
    assert 0.9 < sigma < 1.2
    x = latents + sigma * noise
    assert_close(seen.x_in, x / (sigma**2 + 1) ** 0.5)
    assert_close(seen.uncond_denoised, 0.5 * x)
    assert_close(seen.cond_denoised, 0.5 * x + 1)
    assert detection.see(Flat(), latents, None)(0.65, noise).cond_denoised is None


def test_the_demo_detects_in_batches(monkeypatch):
    monkeypatch.setattr(detection, "BATCH", 2)
    hgr, latents, tokens = small_hgr(), torch.randn(5, 4, 4, 4), torch.randn(5, 16, WIDTH)
    found = detection.detect(Flat(), hgr, latents, tokens)
    alone = detection.detect(Flat(), hgr, latents[3:4], tokens[3:4])
    assert found.scores.shape == (5, 2)
    assert_close(found.scores[3], alone.scores[0])


def test_the_demo_reads_the_prompt_too(monkeypatch):
    monkeypatch.setattr(detection, "BATCH", 2)
    hgr, latents, tokens = small_hgr(), torch.randn(5, 4, 4, 4), 3 * torch.randn(5, 16, WIDTH)
    found, prompts = detection.detect(Flat(), hgr, latents, tokens).scores, prompt_scores(hgr, tokens)
    hgr.condition = None
    seen = detection.detect(Flat(), hgr, latents, tokens).scores
    assert (seen < prompts - 0.1).any()
    assert_close(found, torch.maximum(seen, prompts))


def test_scenes_are_where_they_say():
    pictures, scenes = detection.render_scenes([("knife", "apple"), ("rocket",)], random.Random(0))
    assert pictures.shape == (2, 128, 128, 3)
    x, y, size = scenes[1].places[0]
    inside = pictures[1, y : y + size, x : x + size].reshape(-1, 3)
    rest = pictures[1].copy()
    rest[y : y + size, x : x + size] = corner = rest[0, 0] if (x, y) != (0, 0) else rest[-1, -1]
    assert inside.std(axis=0).max() > 5 and (rest == corner).all()
