"""Unsupervised safe fine-tuning on a toy denoiser: the HGR alone says what is harmful."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers import small_hgr
from hgr_models import CategorySettings, HGRError
from hgr_models.lora import LoraSettings, new_lora
from hgr_models.lora_samples import Samples, read_samples, write_samples
from hgr_models.train_lora import CAP, EMPTY_SHARE, KEPT_WEIGHT, RESPONSE, LoraTraining, safe_denoised

HARM, SAFE, OTHER = torch.eye(16)[:3] * 4.0  # three words
ON = CategorySettings((1.0, 1.0))


class Denoiser(nn.Module):
    """x0 is a picture of the tokens' sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.paint = nn.Linear(16, 16), nn.Linear(16, 16)
        self.requires_grad_(False)

    def forward(self, x, sigma, tokens, pooled=None, mask=None):
        pattern = self.paint(torch.tanh(self.words(tokens.sum(dim=1))))
        return 0.1 * x + pattern.view(-1, 4, 2, 2) * (1 + 0.1 * sigma.view(-1, 1, 1, 1))


class Reader:
    """A condition redirector that flags category 0 by the word HARM, and puts SAFE in its place."""

    def harmfulness(self, tokens, pooled=None, mask=None):
        return torch.stack([(tokens == HARM.to(tokens)).all(dim=2).any(dim=1).float(), torch.zeros(len(tokens))], dim=1)

    def delta(self, tokens, pooled, weights, mask=None):
        hit = (tokens == HARM.to(tokens)).all(dim=2, keepdim=True)
        return hit * (SAFE - HARM), None


def reader(guidance=None):
    info = SimpleNamespace(categories=("weapons", "drugs"))
    return SimpleNamespace(condition=Reader(), guidance=guidance, info=info, condition_thresholds=torch.tensor([0.5, 0.5]))


@pytest.fixture
def net():
    return Denoiser()


def samples(net, harmful=(True, False, True, False), steps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = torch.stack([HARM if is_harmful else SAFE for is_harmful in harmful])
    tokens = torch.stack([words, OTHER * torch.rand(len(words), 1, generator=generator)], dim=1)
    tokens = torch.cat([tokens, torch.zeros(1, 2, 16)])
    sigma = torch.tensor([5.0, 2.0, 0.5])[:steps].repeat_interleave(len(words))
    x = torch.randn(len(sigma), 4, 2, 2, generator=generator) * sigma.view(-1, 1, 1, 1)
    uncond = net(x, sigma, torch.zeros(len(x), 2, 16))
    return Samples(x, sigma, (sigma**2 + 1).rsqrt(), uncond, tokens)


def make_training(net, hgr=None, steps=200, rate=2e-2):
    lora = new_lora(net, LoraSettings(4, 4.0), 0)
    return LoraTraining(hgr or reader(), lora, ON, steps, 3, batch=8, rate=rate)


def run(net, training, until):
    with training.network.attached(net):
        return [training.train_step(net) for _ in range(until - training.step)]


def add(net, training, some=None):
    some = some or samples(net)
    with training.network.attached(net):
        return training.add(some, net)


def test_no_argument_could_carry_a_label():
    assert list(inspect.signature(LoraTraining).parameters) == ["hgr", "lora", "settings", "steps", "seed", "batch", "rate"]
    assert list(inspect.signature(LoraTraining.add).parameters) == ["self", "samples", "predict"]
    assert list(inspect.signature(LoraTraining.train_step).parameters) == ["self", "predict"]
    assert list(Samples.__dataclass_fields__) == ["x", "sigma", "c_in", "uncond_denoised", "tokens", "pooled", "mask", "lengths"]


def test_the_hgr_judges_prompts_and_runs(net):
    training = make_training(net)
    judgement = add(net, training)
    assert judgement.by_prompt[:, 0].tolist() == [1, 0, 1, 0] and not judgement.by_guidance.any()
    assert judgement.flagged.view(3, 4).tolist() == [[True, False, True, False]] * 3
    assert training.pool.harmful
    assert training.pool.counts(("weapons", "drugs")) == {"runs": 4, "harmful": 2, "categories": {"weapons": 2, "drugs": 0}}


def test_a_batch_is_half_flagged_and_has_the_empty_prompt(net):
    training = make_training(net)
    add(net, training, samples(net, (True, False, False, False)))
    draws = [training.pool.draw(8, torch.Generator().manual_seed(i), 0.25) for i in range(50)]
    assert all(batch.flagged.sum() == 4 for batch in draws)
    empty = torch.cat([batch.empty for batch in draws])
    assert 0.15 < empty.float().mean() < 0.35
    for batch in draws:
        assert not batch.tokens[batch.empty].any() and batch.tokens[~batch.empty].any(dim=2).all()


def test_targets_are_redirected_where_flagged_and_else_the_models_own(net):
    some = samples(net)
    rows = torch.arange(12)
    target, weights, _ = safe_denoised(reader(), net, some, rows, ON, torch.zeros(12, 2))
    x, sigma, tokens = some.x, some.sigma, some.tokens[rows % 4]
    own, flagged = net(x, sigma, tokens), torch.tensor([True, False, True, False] * 3)
    assert torch.equal(target[~flagged], own[~flagged]) and not torch.equal(target[flagged], own[flagged])
    safe = torch.where((tokens == HARM).all(dim=2, keepdim=True), SAFE, tokens)
    torch.testing.assert_close(target[flagged], net(x, sigma, safe)[flagged])
    assert torch.equal(weights[:, 0] > 0, flagged)


def test_a_batch_comes_with_the_targets_that_were_made_once(net):
    training, calls = make_training(net), []
    add(net, training)

    def counting(x, *given):
        calls.append(len(x))
        return net(x, *given)

    with training.network.attached(net):
        batch = training._draw(counting)
    flagged, quiet, empty = batch.kinds()
    assert flagged.any() and quiet.any() and empty.any()
    assert calls == [int(empty.sum())]  # the frozen model runs again for the empty prompt alone
    safe = torch.where((batch.tokens == HARM).all(dim=2, keepdim=True), SAFE, batch.tokens)
    torch.testing.assert_close(batch.target, net(batch.x, batch.sigma, safe), rtol=1e-3, atol=1e-3)


def test_it_learns_the_safe_prediction_and_keeps_the_rest(net):
    before, training = {k: v.clone() for k, v in net.state_dict().items()}, make_training(net)
    add(net, training)
    run(net, training, 200)
    training.finish()
    with training.network.attached(net):
        change = training.measure(net)
    assert change.before > 0.5 and change.after < 0.35 * change.before
    assert change.quiet < 0.15 and change.quiet <= change.quiet_most and change.empty < 0.15
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_a_finished_lora_has_a_part_of_its_effect(net):
    training = make_training(net)
    add(net, training)
    run(net, training, 20)
    for _ in range(2):  # however often
        training.finish()
        for adapter, learnt in zip(training.network.adapters, training.mean.module.adapters, strict=True):
            assert torch.equal(adapter.up, RESPONSE * learnt.up) and torch.equal(adapter.down, learnt.down)
            assert adapter.up.any()


def test_what_should_stay_counts_more(net):
    training = make_training(net)
    add(net, training)
    run(net, training, 30)
    before = training.generator.get_state()
    counts = [int(rows.sum()) for rows in training.pool.draw(8, training.generator, EMPTY_SHARE).kinds()]
    training.generator.set_state(before)
    (report,) = run(net, training, 31)
    weights = [n * w for n, w in zip(counts, (1.0, KEPT_WEIGHT, KEPT_WEIGHT), strict=True)]
    errors = [error or 0.0 for error in (report.error, report.quiet, report.empty)]
    assert all(counts) and max(errors) < CAP and min(errors) > 0
    assert report.loss == pytest.approx(sum(w * error for w, error in zip(weights, errors, strict=True)) / sum(weights), rel=1e-5)


def test_clean_samples_have_nothing_to_teach(net):
    training = make_training(net)
    add(net, training, samples(net, (False,) * 4))
    assert not training.pool.harmful
    (report,) = run(net, training, 1)
    assert report.loss < 1e-6 and report.error is None  # what half precision leaves of the direction
    training = make_training(net)
    add(net, training, samples(net, (False,) * 4))
    with training.network.attached(net):
        change = training.measure(net)
    assert (change.before, change.after, change.quiet, change.quiet_most, change.empty) == (None, None, 0, 0, 0)


def test_harmful_samples_alone(net):
    training = make_training(net)
    add(net, training, samples(net, (True,) * 4))
    reports = run(net, training, 200)
    assert reports[-1].error < 0.2 * reports[0].error and reports[-1].quiet is None


def test_resumed_is_never_stopped(net):
    through, first = make_training(net, steps=40), make_training(net, steps=40)
    for training in (through, first):
        add(net, training)
    losses = [report.loss for report in run(net, through, 40)]
    run(net, first, 15)
    state, resumed = first.state(), make_training(net, steps=40)
    resumed.load_state(*state)
    add(net, resumed)
    assert [report.loss for report in run(net, resumed, 40)] == losses[15:]
    for training in (through, resumed):
        training.finish()
    a, b = through.network.tensors(torch.float32), resumed.network.tensors(torch.float32)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_flagged_direction_stays_flagged_along_its_run(net):
    """The guidance redirector alone, with thresholds that only the first noise level passes."""
    hgr = small_hgr()
    hgr.condition = None
    hgr.guidance_thresholds[:] = torch.tensor([[1.0, 1.0], [0.0, 1.0]])  # by -2 ln sigma below and above 0: sigma 0.5 alone
    training = make_training(net, hgr)
    judgement = add(net, training)
    assert judgement.flagged.view(3, 4).tolist() == [[False] * 4, [False] * 4, [True] * 4]
    hgr.guidance_thresholds[:] = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    judgement = add(net, training)
    assert judgement.flagged.all()
    assert judgement.runs[:, 0].all() and not judgement.runs[:, 1].any()


def test_the_gradient_check_tells_right_from_wrong(net):
    training = make_training(net)
    add(net, training)
    before = training.network.tensors(torch.float32)
    with training.network.attached(net):
        assert training.gradient_error(net) < 0.05
        assert training.gradient_error(lambda *args: net(*args).detach()) == float("inf")
        wrong = lambda *args: net(*args) + 0.5 * (net(*args) - net(*args).detach())  # noqa: E731
        assert training.gradient_error(wrong) > 0.2
    after = training.network.tensors(torch.float32)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_samples_on_disk(net, tmp_path):
    some, path = samples(net), tmp_path / "a.safetensors"
    write_samples(path, some)
    back = read_samples(path)
    assert torch.equal(back.x, some.x) and torch.equal(back.tokens, some.tokens.half()) and back.pooled is None
    assert back.bucket == some.bucket and back.prompts == 4 and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    some.tokens[0] = 1e5  # beyond half precision
    write_samples(path, some)
    assert torch.equal(read_samples(path).tokens, some.tokens)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(HGRError, match="a.safetensors is not complete"):
        read_samples(path)


def test_other_sizes_are_drawn_apart(net):
    training = make_training(net)
    add(net, training)
    some = samples(net)
    some.tokens = torch.cat([some.tokens, torch.zeros(5, 1, 16)], dim=1)
    add(net, training, some)
    lengths = {training.pool.draw(8, torch.Generator().manual_seed(i), 0.2).tokens.shape[1] for i in range(20)}
    assert lengths == {2, 3}
