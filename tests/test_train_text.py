"""Training in text space: it learns, ends in the same bits however often it is stopped, and is measured on held-out pairs."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hgr_models import HGR, HGRError, HGRInfo, load_hgr, train_condition, train_text
from hgr_models.condition import ConditionConfig
from hgr_models.pair_shards import draw_pairs, pairs_of, write_pairs
from hgr_models.shards import CALIBRATION_TEXTS, HELD_OUT_PAIRS, Recording, Texts, read_shard, write_texts
from hgr_models.textspace import PairTexts
from hgr_models.train import Command, arguments
from hgr_models.train_text import TextTraining, partners_of, random_texts
from hgr_models.trainer import PROMPTS, Phase, Trainer, calibrate

WIDTH, LENGTH, HARMS = 12, 5, 2
VOCABULARY = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(5))  # words 0 and 1 are harmful; 2 and 3 stand in


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Less to read in every step: what is tested does not depend on it."""
    monkeypatch.setattr(train_condition, "READ_BATCH", 16)
    monkeypatch.setattr(train_condition, "JOINED", 4)
    monkeypatch.setattr(train_text, "READERS", 32)


def encoded(count, seed, pooled=False, mask=False):
    """Pairs of prompts of five words of which one is harmful; the partner has its stand-in."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(4, 20, (count, LENGTH), generator=generator)
    kind, place = (torch.randint(n, (count,), generator=generator) for n in (HARMS, LENGTH))
    partner, rows = words.clone(), torch.arange(count)
    words[rows, place], partner[rows, place] = kind, kind + 2
    tokens, partners = VOCABULARY[words], VOCABULARY[partner]
    harms = torch.nn.functional.one_hot(kind, HARMS).float()
    means = (tokens.mean(dim=1), partners.mean(dim=1)) if pooled else (None, None)
    there = torch.ones(count, LENGTH) if mask else None
    return PairTexts(tokens, means[0], there, partners, means[1], there, harms, harms)


def recording(folder, about=None, **how):
    write_pairs(folder / "a.safetensors", encoded(96, 0, **how), about or {})
    write_pairs(folder / "b.safetensors", encoded(32, 1, **how), about or {}, HELD_OUT_PAIRS)
    for seed, kind in ((2, None), (3, CALIBRATION_TEXTS)):
        clean = encoded(64, seed, **how)
        texts = Texts(clean.partner_tokens, clean.partner_pooled, clean.mask, torch.zeros(64, HARMS))
        write_texts(folder / f"{seed}.safetensors", texts, about or {}, **({"kind": kind} if kind else {}))
    return Recording.open(folder)


def make_hgr(pooled=0):
    torch.manual_seed(0)
    info = HGRInfo(("a", "b"), (0.5,) * 2, (), ((0.5,) * 2,), "", 0, 2, "", WIDTH, pooled)
    return HGR(info, ConditionConfig(WIDTH, HARMS, pooled, width=32), None)


def trained(recording, folder, steps, stops=(), pooled=0):
    """An HGR after `steps`, stopped and taken up again at each of `stops`."""
    for until in (*stops, steps):
        hgr = make_hgr(pooled)
        trainer = Trainer(folder)
        trainer.take_up()
        training = TextTraining(hgr, steps, seed=7, batch=24, rate=3e-3)
        training.measure(recording)
        trainer.begin(PROMPTS, training)
        trainer.run(Phase(PROMPTS, training, lambda t=training: t.train_step(recording), until))
    return hgr, trainer


def test_it_learns_the_partner_and_tells_harm(tmp_path):
    rows = recording(tmp_path)
    hgr, trainer = trained(rows, None, 300)
    training = trainer.trainings[PROMPTS]
    assert training.error_on(rows) < 0.3  # 0.9 without redirection
    info = calibrate(hgr, rows, 0.05, torch.device("cpu"))
    pairs = encoded(64, 9)
    p = hgr.condition.harmfulness(pairs.tokens)
    assert ((p > 0.5).float() == pairs.harms).float().mean() > 0.95
    assert all(t < 0.5 for t in info.condition_thresholds)
    assert trainer.history[-1]["step"] == 300 and trainer.history[-1]["part"] == PROMPTS


def test_the_reading_begins_at_harmless_and_never_sees_all_channels(tmp_path):
    rows = recording(tmp_path)
    training = TextTraining(make_hgr(), 10, seed=7)
    training.measure(rows)
    assert (training.network.harmfulness(encoded(64, 9).tokens) < 0.3).all()
    missing = torch.cat([(t.tokens == training.network.units(t.tokens)[0]).all(dim=1) for t in training._texts(rows)])
    assert 0.15 < missing.float().mean() < 0.25  # channels (N, WIDTH) that no token of a prompt has


def test_prompts_to_read_stray_clean_and_harmful_ones(tmp_path, monkeypatch):
    rows, read = recording(tmp_path), []
    for most in (1.0, 0.0):
        monkeypatch.setattr(train_condition, "STRAYED", most)
        training = TextTraining(make_hgr(), 10, seed=7)
        training.measure(rows)
        read.append(training._texts(rows))
    for strayed, drawn in zip(*read, strict=True):
        assert torch.equal(strayed.harms, drawn.harms) and not torch.equal(strayed.tokens, drawn.tokens)


@pytest.mark.parametrize("how", [{}, {"mask": True}, {"pooled": True}], ids=["tokens", "mask", "pooled"])
def test_a_stopped_training_ends_in_the_same_bits(tmp_path, how):
    rows = recording(tmp_path, **how)
    pooled = WIDTH if "pooled" in how else 0
    straight, _ = trained(rows, None, 14, pooled=pooled)
    (tmp_path / "state").mkdir()
    stopped, _ = trained(rows, tmp_path / "state", 14, stops=(3, 9), pooled=pooled)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), stopped.state_dict().values(), strict=True))


def test_steps_may_become_more_after_the_end(tmp_path):
    rows = recording(tmp_path)
    (tmp_path / "state").mkdir()
    trained(rows, tmp_path / "state", 6)
    _, trainer = trained(rows, tmp_path / "state", 10)
    assert trainer.trainings[PROMPTS].step == 10
    _, trainer = trained(rows, tmp_path / "state", 4)  # and fewer: what was learnt stays
    assert trainer.trainings[PROMPTS].step == 10


def test_the_averaged_weights_end_in_the_network_and_the_state_stays_as_it_was(tmp_path):
    rows = recording(tmp_path)
    hgr, trainer = trained(rows, None, 8)
    training = trainer.trainings[PROMPTS]
    mean = training.mean.module.state_dict()
    assert all(torch.equal(value, mean[name]) for name, value in hgr.condition.state_dict().items())
    stored = trainer._done[PROMPTS].state()[0]
    assert any(not torch.equal(stored[f"network.{name}"], value) for name, value in mean.items())


def test_what_an_earlier_run_learnt_of_a_later_phase_outlives_more_steps_of_an_earlier_one(tmp_path):
    rows, folder = recording(tmp_path), tmp_path / "state"
    folder.mkdir()
    later = lambda trainer: trainer.begin("condition", TextTraining(make_hgr(), 3, seed=8, batch=8))  # noqa: E731
    trainer = Trainer(folder)
    for training, name, seed in ((None, PROMPTS, 7), (None, "condition", 8)):
        training = trainer.begin(name, TextTraining(make_hgr(), 3, seed=seed, batch=8))
        trainer.run(Phase(name, training, lambda t=training: t.train_step(rows), 3))
    again = Trainer(folder)
    again.take_up()
    training = again.begin(PROMPTS, TextTraining(make_hgr(), 4, seed=7, batch=8))
    again.run(Phase(PROMPTS, training, lambda: training.train_step(rows), 4))
    assert training.step == 4
    once_more = Trainer(folder)
    assert {k: v["step"] for k, v in once_more.take_up()["trainings"].items()} == {PROMPTS: 4, "condition": 3}
    assert later(once_more).step == 3


def test_an_interruption_stores_what_is_there(tmp_path):
    rows = recording(tmp_path)

    def stop(at):
        if at.step == 5:
            raise KeyboardInterrupt

    (tmp_path / "state").mkdir()
    trainer = Trainer(tmp_path / "state", progress=stop)
    training = trainer.begin(PROMPTS, TextTraining(make_hgr(), 20, seed=7, batch=8))
    with pytest.raises(KeyboardInterrupt):
        trainer.run(Phase(PROMPTS, training, lambda: training.train_step(rows), 20))
    assert Trainer(tmp_path / "state").take_up()["trainings"][PROMPTS]["step"] == 5


def test_pairs_come_back_from_a_shard_row_by_row(tmp_path):
    rows = recording(tmp_path, pooled=True, mask=True)
    pairs = draw_pairs(rows, 40, torch.Generator().manual_seed(0))
    wanted = encoded(96, 0, pooled=True, mask=True)
    for i in range(40):
        (at,) = (wanted.tokens.half() == pairs.tokens[i]).flatten(1).all(dim=1).nonzero().flatten()[:1]
        for name, value in vars(pairs).items():
            assert torch.allclose(value[i], getattr(wanted, name)[at], atol=2e-3), name
    with pytest.raises(HGRError, match="no such samples"):
        draw_pairs(Recording([read_shard(tmp_path / "2.safetensors")]), 4, torch.Generator())


def test_pairs_are_prompts_to_read_and_partners_show_what_is_left(tmp_path):
    rows = recording(tmp_path)
    texts = rows.draw_texts(True, 8, torch.Generator().manual_seed(0))
    assert texts.harms.sum(dim=1).eq(1).all()
    pairs = encoded(4, 0)
    pairs.harms, pairs.removed = torch.ones(4, 2), torch.tensor([[1.0, 0.0]]).expand(4, 2)
    assert partners_of(pairs).harms.tolist() == [[0.0, 1.0]] * 4


def test_long_and_wide_pairs_come_in_smaller_batches():
    def count(length, width):
        info = HGRInfo(("a",), (0.5,), (), ((0.5,),), "", 0, 2, "", width, 4)
        pairs, read = random_texts(info, length, torch.device("meta"))
        assert pairs.tokens.shape == (len(pairs), length, width) and read.pooled.shape == (len(read), 4)
        return len(pairs), len(read)

    assert [count(*size) for size in ((77, 8), (154, 8), (256, 8), (256, 4096), (5000, 8))] == [
        (48, 192), (24, 128), (14, 77), (7, 19), (2, 3),
    ]  # fmt: skip


def test_a_pair_shard_that_lacks_its_partners_is_damaged(tmp_path):
    write_pairs(tmp_path / "a.safetensors", encoded(4, 0), {})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        about = file.metadata()
    tensors = load_file(tmp_path / "a.safetensors")
    del tensors["partners.tokens"]
    save_file(tensors, tmp_path / "a.safetensors", about)
    with pytest.raises(HGRError, match="no column partners.tokens"):
        read_shard(tmp_path / "a.safetensors")


def test_the_command_trains_from_prompts_alone(tmp_path):
    """`python -m hgr_models.train SHARDS --prompt-steps N --guidance-steps 0`: an HGR of the text encoder."""
    (tmp_path / "shards").mkdir()
    facts = {
        "categories": ["a", "b"], "token_width": WIDTH, "pooled_width": 0, "concept_prompts": {}, "prompts": "",
        "latent_format": "SD15", "latent_channels": 4, "latent_dimensions": 2, "prediction": "EPS", "guidance_levels": [0.0], "base": "x",
    }  # fmt: skip
    recording(tmp_path / "shards", about=facts)
    out = tmp_path / "a.safetensors"
    line = [str(tmp_path / "shards"), "--out", str(out), "--prompt-steps", "4", "--guidance-steps", "0"]
    Command(arguments(line)).run()
    info = load_hgr(out).info
    assert info.of_prompts and not info.base and info.training["steps"] == {PROMPTS: 4}


def test_what_all_prompts_of_a_shard_end_with_is_stored_once(tmp_path):
    """Three prompts of four tokens, of which the last two are the encoder's padding."""
    tokens = torch.arange(24.0).reshape(3, 4, 2)
    tokens[:, 2:] = torch.tensor([[7.0, 8.0], [9.0, 0.0]])
    harms = torch.ones(3, 1)
    write_pairs(tmp_path / "a.safetensors", PairTexts(tokens, None, None, tokens + 1, None, None, harms, harms), {})
    stored = load_file(tmp_path / "a.safetensors")
    assert stored["prompts.tokens"].shape == stored["partners.tokens"].shape == (3, 2, 2)
    assert stored["prompts.padding"].tolist() == [[7.0, 8.0], [9.0, 0.0]]
    shard = read_shard(tmp_path / "a.safetensors")
    read = pairs_of(shard, torch.tensor([2, 0]))
    assert torch.equal(read.tokens, tokens[[2, 0]]) and torch.equal(read.partner_tokens, tokens[[2, 0]] + 1)
    write_pairs(tmp_path / "b.safetensors", PairTexts(*[tokens[:1], None, None] * 2, harms[:1], harms[:1]), {})
    assert read_shard(tmp_path / "b.safetensors").bucket == shard.bucket  # they stack
    stored["prompts.padding"] = torch.zeros(2, 3)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        save_file(stored, tmp_path / "a.safetensors", file.metadata())
    with pytest.raises(HGRError, match="its padding does not fit its tokens"):
        read_shard(tmp_path / "a.safetensors")


def test_encoded_prompts_serve_every_model_of_their_encoder(tmp_path):
    facts = {"token_width": 2, "prompts": "x"}
    tokens, harms = torch.randn(2, 3, 2), torch.ones(2, 1)
    for name, more in (("a", {"base": "one"}), ("b", {"base": "", "latent_channels": 0}), ("c", {"prompts": "y"})):
        write_texts(tmp_path / f"{name}.safetensors", Texts(tokens, None, None, harms), {**facts, **more})
        if name == "b":
            assert Recording.open(tmp_path).shards[0].about == {**facts, "base": "one"}
    with pytest.raises(HGRError, match="c.safetensors was recorded with other settings"):
        Recording.open(tmp_path)
