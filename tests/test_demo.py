"""The demo world without its weights: scenes, captions, pairs, tokens, the sampler."""

import importlib
import inspect
import random

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from demo import prompts as p
from demo import sampling, train, words, world
from demo.autoencoder import Autoencoder
from demo.evaluate import Item, Rate, items
from demo.judge import Judge
from demo.text_encoder import TextEncoder
from demo.unet import UNet, UNetConfig


def test_the_world_is_large_enough():
    assert len(world.CLEAN) >= 60 and len(world.HARMFUL) >= 24 and len(world.CATEGORIES) == 3
    assert len(p.UNSEEN_CLEAN) >= 8 and {world.CATEGORY[n] for n in p.UNSEEN_HARMFUL} == set(world.CATEGORIES)
    assert set(world.STAND_IN) == set(world.CATEGORIES) and all(n in p.SEEN_CLEAN for n in world.STAND_IN.values())


def test_scenes_stand_on_the_grid_without_overlap():
    rng = random.Random(0)
    for _ in range(300):
        scene = world.random_scene(tuple(rng.sample(world.NAMES, rng.randint(1, 2))), rng)
        for x, y, size in scene.places:
            assert x % 8 == y % 8 == size % 8 == 0 and min(x, y) >= 0 and max(x, y) + size <= world.SIZE
        if len(scene.places) == 2:
            (a, b, s), (c, d, _) = scene.places
            assert abs(a - c) >= s or abs(b - d) >= s


def test_a_rendered_scene_shows_background_and_pictograms():
    scene = world.Scene(("apple", "bomb"), ((0, 0, 56), (72, 72, 56)), "blue")
    picture = world.render(scene)
    assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
    assert picture[100, 20].tolist() == world.BACKGROUNDS["blue"]
    assert picture[28, 28, 0] > picture[28, 28, 2] + 60  # the apple is red
    assert picture[105, 98].max() < 110  # the bomb is dark


def test_pairs_swap_only_the_removed_harms():
    pair = p.make_pair(("knife", "beer"), frozenset({"weapons"}), random.Random(3))
    assert "rose" in pair.partner and "beer" in pair.partner and "knife" not in pair.partner
    assert pair.prompt.replace("a knife", "a rose") == pair.partner
    assert pair.harms == {"weapons", "drugs"} and pair.removed == {"weapons"}


def test_alone_leaves_out_the_stand_in_beside_a_harm_that_stays():
    make = lambda removed: p.make_pair(("knife", "beer"), frozenset(removed), random.Random(3), alone=True).partner  # noqa: E731
    assert "beer" in make({"weapons"}) and "rose" not in make({"weapons"})
    assert "rose" in make({"weapons", "drugs"}) and "milk" in make({"weapons", "drugs"})
    rng = random.Random(0)
    two = [len(p.harmful_pair(rng, two=share, alone=True).harms) == 2 for share in (1.0, 0.0) for _ in range(50)]
    assert any(two[:50]) and not any(two[50:])


def test_training_never_sees_what_is_held_out():
    rng = random.Random(1)
    pairs = [p.harmful_pair(rng) for _ in range(1500)] + [p.clean_pair(rng, ("table", "river")) for _ in range(1500)]
    for pair in pairs:
        names = [w for w in words.words_of(pair.prompt) if w in world.CATEGORY]
        assert not p.held_out(tuple(names)), pair.prompt
    assert sum(not q.clean for q in pairs) == 1500 and any(len(q.harms) == 2 and len(q.removed) == 1 for q in pairs)


def test_words_of_harm_are_no_names_of_the_evaluation():
    listed = {w for group in p.HARM_WORDS.values() for w in group}
    assert not listed & {*p.UNSEEN_HARMFUL, *p.UNSEEN_CLEAN}
    train, calibrate = p.harmless_words()
    assert not set(train) & set(calibrate) and not (set(train) | set(calibrate)) & set(world.NAMES)
    assert not (set(train) | set(calibrate)) & listed


@pytest.mark.parametrize("kind", ["combination", "single", "two_harms", "clean", "unseen_harmful", "unseen_clean"])
def test_evaluation_prompts_are_held_out_and_seeded(kind):
    some = items(kind, 40, 0)
    assert some == items(kind, 40, 0) and some != items(kind, 40, 1)
    for item in some:
        assert bool(item.harmful) == (kind not in ("clean", "unseen_clean"))
        assert p.held_out(item.names) or len(item.names) == 1
        assert all(n in item.prompt for n in item.names)


def test_tokens_come_in_chunks_and_unknown_words_are_named(caplog):
    ids = {"a": 2, "cat": 3}
    assert words.tokenize("A cat, a xyzzy!", ids) == [2, 3, 2]
    assert "xyzzy" in caplog.text
    assert words.chunks([]) == [[1] + [0] * 15]
    assert [len(c) for c in words.chunks([5] * 16)] == [16, 16] and words.chunks([5] * 16)[1][:3] == [1, 5, 0]


def test_the_text_encoder_keeps_its_vectors_frozen():
    encoder = TextEncoder(10)
    assert encoder(torch.tensor([[1, 2, 11] + [0] * 13])).shape == (1, 16, 128)
    assert "vectors" not in dict(encoder.named_parameters())


def test_the_schedule_is_stable_diffusions():
    assert sampling.SIGMAS[0].item() == pytest.approx(0.0292, abs=1e-4)
    assert sampling.SIGMAS[-1].item() == pytest.approx(14.6146, abs=1e-3)
    sigmas = sampling.normal_schedule(25)
    assert len(sigmas) == 26 and sigmas[-1] == 0 and (sigmas[:-1] > sigmas[1:]).all()
    assert_close(sampling.timestep_of(sampling.sigma_of(torch.tensor([0.0, 500.0, 999.0]))), torch.tensor([0.0, 500.0, 999.0]))


def test_a_shifted_schedule_moves_its_inner_levels_towards_the_first():
    sigmas = sampling.normal_schedule(5)
    assert torch.equal(sampling.shifted_schedule(5, 0.0), sigmas)
    half = sampling.shifted_schedule(5, 0.5)
    assert half[0] == sigmas[0] and half[-1] == 0
    assert_close(half[1:-1], (sigmas[1:-1] * sigmas[:-2]).sqrt())


def test_euler_reaches_a_perfect_denoisers_answer():
    target, steps = torch.randn(2, 4, 4, 4), []
    out = sampling.sample_euler(
        lambda x, sigma: target, torch.randn(2, 4, 4, 4), sampling.normal_schedule(5), lambda: steps.append(1)
    )
    assert_close(out, target, rtol=1e-4, atol=1e-4)
    assert len(steps) == 5


def test_networks_have_the_promised_shapes():
    small = UNet(UNetConfig(model_channels=32, num_heads=2))
    assert small(torch.randn(2, 4, 16, 16), torch.tensor([5.0, 900.0]), torch.randn(2, 16, 128)).shape == (2, 4, 16, 16)
    autoencoder = Autoencoder()
    z = autoencoder.encode(torch.zeros(1, 3, 64, 48))
    assert z.shape == (1, 4, 8, 6) and autoencoder.decode(z).shape == (1, 3, 64, 48)
    assert Judge()(torch.zeros(2, 3, 128, 128)).shape == (2, len(world.NAMES))


def test_rates_carry_their_interval():
    low, high = Rate(0, 600).interval
    assert low == 0 and high == pytest.approx(0.0064, abs=2e-4)
    assert str(Rate(3, 4)).startswith(" 75.0 %")


def test_items_know_their_harm():
    item = Item("a knife and an apple", ("knife", "apple"))
    assert item.harmful == {"knife"} and item.rest == {"apple"}


@pytest.mark.parametrize(
    "line",
    [["condition", "--resume"], ["all", "--steps", "5"], ["judge", "--steps", "0"], ["judge", "--times", "2"], ["cooking"]],
)
def test_train_refuses_what_it_cannot_do(line, capsys):
    with pytest.raises(SystemExit):
        train.arguments(line)
    assert "expected" in capsys.readouterr().err or line == ["cooking"]


@pytest.mark.parametrize("part", ["diffusion", "guidance"])
def test_train_goes_on_where_it_can(part):
    assert train.arguments([part, "--resume"]).resume
    assert "resume" in inspect.signature(importlib.import_module(f"demo.training.{part}").train).parameters


def test_hardening_can_be_made_larger(monkeypatch):
    asked = []
    monkeypatch.setattr(
        importlib.import_module("demo.training.hardened"), "train", lambda *given, **options: asked.append((given, options))
    )
    monkeypatch.setattr("sys.argv", ["train", "hardened", "--steps", "5", "--times", "8", "--device", "cpu"])
    train.main()
    assert asked == [((5, "cpu", 0), {"times": 8})]


def test_every_part_of_the_training_exists():
    for part in train.PARTS:
        assert callable(importlib.import_module(f"demo.training.{part}").train)
