"""Both trainings from shards on disk: they learn, resume to the last bit, and survive gradients that are not finite."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import small_hgr
from hgr_models import HGRError
from hgr_models.calibration import calibrated, harmful_readings
from hgr_models.recording import Points, Prompts, record_runs
from hgr_models.shards import CLEAN, HARMFUL, Recording, Texts, read_shard, write_runs, write_texts
from hgr_models.train_condition import ConditionTraining
from hgr_models.train_guidance import GuidanceTraining, mixed
from hgr_models.training import Training, autocast, disguise, learning_rate, thinned

LATENTS = ("x", "uncond_denoised", "cond_denoised", "partner_denoised")
FIELDS = (*LATENTS[:1], "sigma", "c_in", *LATENTS[1:], "shown", "prompt")  # of Points, in their order

HARM, SAFE, OTHER, NEW = torch.eye(16)[:4] * 4.0  # four words


def predict(x, sigma, tokens):
    """A toy denoiser: x0 is a pattern of the tokens' sum."""
    pattern = tokens.sum(dim=1).view(-1, 4, 2, 2).repeat(1, 1, x.shape[2] // 2, x.shape[3] // 2)
    return 0.1 * x + pattern * (1 + 0.1 * sigma.view(-1, 1, 1, 1))


def predict_with(points, prompts, tokens, pooled):
    return predict(points.x, points.sigma, tokens)


def c_in(sigma):
    return (sigma**2 + 1).rsqrt()


def toy_prompts(count, harmful=True):
    other = OTHER * torch.rand(count, 1)
    word, ones = (HARM, 1.0) if harmful else (SAFE, 0.0)
    tokens, safe = (torch.stack([w.expand(count, -1), other], 1) for w in (word, SAFE))
    harms = torch.tensor([[ones, 0.0]]).repeat(count, 1)
    return Prompts(tokens, safe, torch.zeros(count, 2, 16), harms, harms)


def write_toy(folder, size=4, about=None):
    """Two shards of runs and two of texts."""
    torch.manual_seed(0)
    about = about or {"seed": 0}
    for kind in (HARMFUL, CLEAN):
        prompts = toy_prompts(16, kind == HARMFUL)
        noise = torch.randn(16, 4, size, size)
        points = record_runs(predict, c_in, prompts, torch.tensor([5.0, 2.0, 0.5, 0.0]), noise, "prompt", torch.full((16,), 3.0))
        write_runs(folder / f"runs_{kind}_{size}.safetensors", kind, points, prompts, about)
        texts = Texts(prompts.tokens, None, None, prompts.harms)
        write_texts(folder / f"texts_{kind}_{size}.safetensors", texts, about)
    return points, prompts


def test_some_harmful_runs_are_held_out(tmp_path):
    """Always the same ones, also when more are recorded; and never all of a size."""
    points, prompts = write_toy(tmp_path)
    assert Recording.open(tmp_path).divided()[1] is None  # one shard of its size
    for i in range(40):
        write_runs(tmp_path / f"more_{i}.safetensors", HARMFUL, points, prompts, {"seed": 0})
    train, held_out = Recording.open(tmp_path).divided()
    names = {s.path.name for s in held_out.shards}
    assert 0 < len(names) < 8 and not names & {s.path.name for s in train.shards}
    assert len(train.shards) + len(names) == len(Recording.open(tmp_path).shards)
    write_runs(tmp_path / "again.safetensors", HARMFUL, points, prompts, {"seed": 0})
    assert names <= {s.path.name for s in Recording.open(tmp_path).divided()[1].shards}


def trained(folder, kind, steps, total, state=None):
    """A training after `steps` of `total`, from its start or from a state."""
    torch.manual_seed(1)
    hgr = small_hgr(zero=True).requires_grad_(True)
    training = kind(hgr, total, seed=3)
    recording = Recording.open(folder)
    if kind is ConditionTraining:
        training.measure(recording)
    if state is not None:
        training.load_state(*state)
    arguments = [predict_with] if kind is ConditionTraining else []
    return training, [training.train_step(recording, *arguments) for _ in range(steps - training.step)]


def test_points_come_back_with_their_prompts(tmp_path):
    points, prompts = write_toy(tmp_path)
    shard = read_shard(tmp_path / "runs_clean_4.safetensors")
    rows = torch.tensor([0, 17, 35])
    back, about = shard.points(rows)
    torch.testing.assert_close(back.x, points.x[rows], rtol=1e-3, atol=1e-3)
    guidance = (points.cond_denoised - points.uncond_denoised)[rows]
    torch.testing.assert_close(back.cond_denoised - back.uncond_denoised, guidance, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(about.tokens, prompts.tokens[points.prompt[rows]], rtol=1e-3, atol=1e-3)
    assert back.sigma.tolist() == points.sigma[rows].tolist() and not about.harms.any()


def test_values_beyond_half_precision_keep_their_range(tmp_path):
    texts = Texts(torch.full((2, 3, 4), 1e5), torch.ones(2, 5), torch.ones(2, 3), torch.ones(2, 1))
    write_texts(tmp_path / "a.safetensors", texts, {})
    back = Recording.open(tmp_path).draw_texts(True, 4, torch.Generator())
    assert back.tokens.eq(1e5).all() and back.pooled.shape == (4, 5) and back.mask.shape == (4, 3)


def test_draws_stack_and_repeat(tmp_path):
    write_toy(tmp_path, size=4)
    write_toy(tmp_path, size=6)
    recording = Recording.open(tmp_path)
    assert recording.shapes() == [(4, 4, 4), (4, 6, 6)] and recording.count(HARMFUL) == 96
    draws = [recording.draw(HARMFUL, 9, torch.Generator().manual_seed(5))[0].x for _ in range(2)]
    assert torch.equal(*draws)
    seen = {recording.draw(CLEAN, 2, torch.Generator().manual_seed(i))[0].x.shape[-1] for i in range(20)}
    assert seen == {4, 6}
    points, prompts = recording.draw(HARMFUL, 9, torch.Generator(), (4, 6, 6))
    assert points.x.shape == (9, 4, 6, 6) and prompts.harms[:, 0].all() and len(prompts) == 9


@pytest.mark.parametrize("kind", [ConditionTraining, GuidanceTraining])
def test_training_learns_and_resumes_to_the_last_bit(tmp_path, kind):
    write_toy(tmp_path)
    through, reports = trained(tmp_path, kind, 60, 60)
    half, _ = trained(tmp_path, kind, 20, 60)
    tensors, about = half.state()
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path.parent / f"{kind.__name__}.safetensors")
    stored = load_file(tmp_path.parent / f"{kind.__name__}.safetensors")
    resumed, rest = trained(tmp_path, kind, 60, 60, (stored, about))
    assert [r.loss for r in rest] == [r.loss for r in reports[20:]]
    for network in ("network", "mean.module"):
        a, b = (dict(eval_path(t, network).state_dict()) for t in (through, resumed))
        assert all(torch.equal(a[k], b[k]) for k in a)
    first, last = reports[0], reports[-1]
    assert last.error < 0.7 * first.error and last.accuracy[0] > 0.85 and first.before > 0.3
    model = (predict_with,) if kind is ConditionTraining else ()
    assert through.error_on(Recording.open(tmp_path), *model) < 0.7 * first.error


def test_calibration_reads_what_the_recording_shows_of_harm(tmp_path):
    write_toy(tmp_path)
    hgr, cpu = small_hgr(seed=1), torch.device("cpu")
    p, b = harmful_readings(hgr, Recording.open(tmp_path), cpu)
    assert b.shape == (16, len(hgr.info.guidance_levels) + 1, 2) and p.shape[1] == 2
    for readings in (p, b):  # the toy's harmful samples show the first category alone
        assert readings[..., 1].isnan().all() and readings[..., 0].nan_to_num(0).amax() > 0
    low = torch.full((10, 2), 1e-4)
    low[0] = 0.01  # one clean prompt far above the others: its tail would lift the threshold
    harmful = torch.tensor([[0.02, torch.nan]] * 10)
    alone, beside = (calibrated(hgr, low, None, 0.01, 0.0, (h, None)).condition_thresholds for h in (None, harmful))
    assert 0.01 < beside[0] < 0.02 < alone[0] and beside[1] == alone[1]


def eval_path(training, path):
    for name in path.split("."):
        training = getattr(training, name)
    return training


def test_gradients_that_are_not_finite_are_skipped_and_then_an_error(tmp_path):
    write_toy(tmp_path)
    training, _ = trained(tmp_path, ConditionTraining, 2, 100)
    recording, before = Recording.open(tmp_path), training.network.state_dict()
    before = {k: v.clone() for k, v in before.items()}
    training.scale = 1024.0
    broken = lambda points, prompts, tokens, pooled: predict_with(points, prompts, tokens, pooled) * float("nan")  # noqa: E731
    training.train_step(recording, broken)
    assert training.scale == 256.0 and training.step == 3
    assert all(torch.equal(before[k], v) for k, v in training.network.state_dict().items())
    with pytest.raises(HGRError, match="in a row are not finite"):
        for _ in range(40):
            training.train_step(recording, broken)


def test_a_folder_without_shards_and_bad_shards_are_named(tmp_path):
    with pytest.raises(HGRError, match="no shards in .*Record guidance first"):
        Recording.open(tmp_path)
    write_toy(tmp_path)
    path = tmp_path / "runs_clean_4.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(HGRError, match="runs_clean_4.safetensors is not a complete shard"):
        Recording.open(tmp_path)
    path.write_bytes(data)
    save_file({"x": torch.zeros(1)}, tmp_path / "z.safetensors")
    with pytest.raises(HGRError, match="format version 1 in .*z.safetensors"):
        Recording.open(tmp_path)
    (tmp_path / "z.safetensors").unlink()
    write_toy(tmp_path, size=6, about={"seed": 1})
    with pytest.raises(HGRError, match="recorded with other settings"):
        Recording.open(tmp_path)


def test_harmful_and_clean_texts_do_not_share_a_shard(tmp_path):
    write_texts(tmp_path / "a.safetensors", Texts(torch.ones(2, 3, 4), None, None, torch.tensor([[0.0], [1.0]])), {})
    with pytest.raises(HGRError, match="mixes harmful and clean"):
        Recording.open(tmp_path)


def test_recordings_without_common_latent_sizes_are_refused(tmp_path):
    write_toy(tmp_path, size=4)
    (tmp_path / "runs_clean_4.safetensors").unlink()
    with pytest.raises(HGRError, match="same latent size"):
        trained(tmp_path, GuidanceTraining, 1, 10)


def test_rows_come_from_every_shard_alike(tmp_path):
    """Shards of 1, 5 and 2 texts, each text a number of its own: all eight are drawn, about equally often."""
    start = 1
    for name, size in (("a", 1), ("b", 5), ("c", 2)):
        values = torch.arange(start, start + size).float()
        texts = Texts(values.view(-1, 1, 1).expand(-1, 3, 4).clone(), None, None, torch.ones(size, 1))
        write_texts(tmp_path / f"{name}.safetensors", texts, {})
        start += size
    drawn = Recording.open(tmp_path).draw_texts(True, 1600, torch.Generator().manual_seed(0)).tokens[:, 0, 0].int()
    counts = drawn.bincount(minlength=9)
    assert counts[0] == 0 and counts[1:].min() > 150 and counts[1:].max() < 250


def test_finish_puts_the_averaged_weights_into_the_network():
    training = Training(torch.nn.Linear(2, 1), steps=1, rate=0.1, decay=0.9, seed=0)
    torch.nn.init.constant_(training.mean.module.weight, 7.0)
    training.finish()
    assert training.network.weight.tolist() == [[7.0, 7.0]]


def test_false_alarms_are_drawn_for_what_is_not_harmful():
    """The first prompt has both harms, and its partner still has the second: no alarm is drawn for that one."""
    points = Points(*(torch.zeros(2, 4, 2, 2) if name in LATENTS else torch.zeros(2) for name in FIELDS))
    prompts = toy_prompts(2)
    prompts.harms, prompts.removed = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    points.cond_denoised, points.partner_denoised = torch.ones(2, 4, 2, 2), torch.full((2, 4, 2, 2), 3.0)
    batch, harms, weights = mixed(points, prompts, points[:1], torch.tensor([[0.9, 0.9], [0.2, 0.8]]))
    assert batch.cond_denoised[:, 0, 0, 0].tolist() == [1.0, 1.0, 3.0, 1.0]  # two prompts, a partner, a clean one
    assert harms.tolist() == [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    assert weights.tolist() == [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


def test_disguise_perturbs_a_share_in_units_per_channel():
    tokens, scale = torch.ones(4000, 2, 3), torch.tensor([0.0, 1.0, 10.0])
    tokens[:, 1, 2] = 0.0  # padding stays
    moved = disguise(tokens, scale, 0.25, torch.Generator().manual_seed(0)) - tokens
    assert not moved[:, 1, 2].any()
    moved = moved[:, :1]
    hit = moved.flatten(1).any(dim=1)
    assert 0.2 < hit.float().mean() < 0.3 and not moved[..., 0].any()
    assert moved[hit][..., 2].std() / moved[hit][..., 1].std() == pytest.approx(10, rel=0.2)


def test_thinned_tokens_lack_a_share_of_the_channels_the_same_in_every_token():
    tokens = 5 + torch.randn(400, 3, 50, generator=torch.Generator().manual_seed(1))
    tokens[:, 2] = 0.0  # padding stays
    thin = thinned(tokens, torch.full((50,), 5.0), 0.2, torch.Generator().manual_seed(0))
    gone = thin[:, 0] == 5
    assert 0.18 < gone.float().mean() < 0.22 and torch.equal(gone, thin[:, 1] == 5) and not thin[:, 2].any()
    torch.testing.assert_close(
        thin[:, :2][~gone[:, None].expand(-1, 2, -1)] - 5, (tokens[:, :2] - 5)[~gone[:, None].expand(-1, 2, -1)] / 0.8
    )
    assert gone.any(dim=0).all() and not gone.all(dim=0).any()  # other ones in every row


def test_learning_rate_warms_up_and_decays():
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0.02, abs=1e-3)
    assert learning_rate(0, 5, 1.0) == 1.0


@pytest.mark.parametrize(("processor", "enabled"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_bfloat16_is_left_to_processors_that_have_it(monkeypatch, processor, enabled):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    with autocast(torch.device("cpu")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if enabled else torch.float32)
