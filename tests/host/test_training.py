"""`SafeCFG Train HGR` and `SafeCFG Record Guidance` on the demo model: what they make, leave alone, and take up again."""

import json
import pathlib
from types import SimpleNamespace

import comfy.model_management as mm
import comfy.utils
import folder_paths
import pytest
import torch
from safecfg import hgr_models
from safecfg.hgr_models import files, trainer
from safecfg.hgr_models.detection import LEVELS
from safecfg.hgr_models.guidance import GuidanceConfig
from safecfg.hgr_models.pairs import PromptPair, PromptSet
from safecfg.hgr_models.shards import CALIBRATION, CLEAN, HARMFUL, PICTURES, Recording
from safecfg.nodes.demo_world.demo_model import DemoModel
from safecfg.nodes.detection.detect_harm import DetectHarm
from safecfg.nodes.redirect.apply import Apply
from safecfg.nodes.training import session
from safecfg.nodes.training.plan import recording_folder
from safecfg.nodes.training.prompt_recorder import plan_batches
from safecfg.nodes.training.record_guidance import RecordGuidance
from safecfg.nodes.training.train_hgr import TrainHGR

from fakes import INFO

SMALL = {
    "harmful_runs": 6, "clean_runs": 4, "calibration_runs": 4, "run_steps": 3, "batch": 2, "sizes": "128x128, 96x128",
    "samplers": "euler, dpmpp_2m", "scheduler": "normal", "cfg_min": 3.0, "cfg_max": 7.0, "negatives": "(empty)\na gun", "seed": 3,
}  # fmt: skip
TRAIN = {
    **SMALL, "train": "both", "resume": True, "condition_steps": 4, "prompt_steps": 5, "guidance_steps": 6, "learning_rate": 1e-3, "size": "small",
    "false_positive_rate": 0.05, "checkpointing": False,
}  # fmt: skip
APPLY = {
    "strength": 1.0, "threshold_offset": 0.0, "start_percent": 0.0, "end_percent": 1.0, "redirect": "both", "categories": "",
    "strict": True, "remember_flagged": True, "audit_log": "off",
}  # fmt: skip


@pytest.fixture(scope="module")
def demo():
    """(MODEL, CLIP) of the demo, its weights as core's loaders make them: inference tensors that require a gradient."""
    with torch.inference_mode():
        model, clip, _ = DemoModel.execute().result
        network = model.model.diffusion_model.requires_grad_(True)
    assert all(p.is_inference() for p in network.parameters())
    return model, clip


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A clean output folder and models/hgr."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "hgr", ([str(tmp_path / "hgr")], {".safetensors"}))


def prompt_set(**changes):
    pair = lambda a, b, c: PromptPair(a, b, frozenset({c}), frozenset({c}), a)  # noqa: E731
    pairs = (
        pair("a knife and an apple", "a flower and an apple", "weapons"),
        pair("a gun", "a flower", "weapons"),
        pair("a syringe and a dog", "a cup and a dog", "drugs"),
    )
    clean = tuple(f"a {a} and a {b}" for a in ("dog", "cat", "cow", "fox") for b in ("book", "chair", "tree"))
    values = {
        "categories": ("weapons", "drugs"), "pairs": pairs, "clean": clean, "held_out_pairs": (), "held_out_clean": (),
        "concept_prompts": {"weapons": "weapons", "drugs": "drugs"},
    }  # fmt: skip
    return PromptSet(**{**values, **changes})


def train(demo, name="mine", prompts=None, **widgets):
    model, clip = demo
    with torch.inference_mode():  # as the host runs nodes
        return TrainHGR.execute(name=name, model=model, clip=clip, prompts=prompts or prompt_set(), **{**TRAIN, **widgets}).result


def weights(path):
    return {k: v.clone() for k, v in hgr_models.load_hgr(path).state_dict().items()}


def test_what_the_guidance_redirector_needs_grows_with_the_latents(demo):
    """A step keeps so much for its backward pass; core is asked to make room for it."""
    plan = lambda size: SimpleNamespace(runs=SimpleNamespace(sizes=(size,), latent=None))  # noqa: E731
    config = GuidanceConfig(4, 2)
    of = lambda size: SimpleNamespace(  # noqa: E731
        model=demo[0], plan=plan(size), new_info=lambda: INFO, configs=lambda: (None, config)
    )
    small, large = (session.estimate.guidance_bytes(of(size)) for size in ((128, 128), (256, 256)))
    assert 3 < large / small < 4.5
    values = 64 * 32 * 32 // 4 * config.width  # of one feature map
    assert 20 < large / (2 * values) < 200


def test_the_estimate_counts_the_prompts_that_are_encoded():
    """Long prompts of large encoders do not all fit on the disk's share; those that do not cost no time."""
    prompts = prompt_set()
    for each in (1.0, 1e8, 1e9):
        assert session.estimate.share_kept(prompts, each) == plan_batches(prompts, each)[1]
    assert plan_batches(prompts, 1e9)[1] < 1


def test_an_hgr_for_this_model_appears_and_applies(demo):
    before = {k: v.clone() for k, v in demo[0].model.state_dict().items()}
    hgr, losses, curves, summary = train(demo)
    path = folder_paths.get_full_path("hgr", "mine.safetensors")
    info = hgr_models.load_hgr(path).info
    assert info.categories == ("weapons", "drugs") and (info.token_width, info.latent_format) == (128, "SD15")
    assert info.prediction == "EPS" and len(info.guidance_thresholds) == 4 and len(info.base) == 64
    assert info.training["steps"] == {"condition": 4, "guidance": 6}
    assert hgr.path == path and isinstance(losses["loss"], list) and curves.shape[0] == 1 and curves.std() > 0
    assert "false alarms" in summary and "condition redirector: 4 steps" in summary
    card = pathlib.Path(path).with_suffix(".md").read_text(encoding="utf-8")
    for said in ("| settings networks | both |", "| settings seed | 3 |", info.training["prompts"], hgr.hash, "clean runs"):
        assert said in card, said
    Apply.execute(demo[0], hgr, **APPLY)
    after = demo[0].model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before) and not demo[0].wrappers
    assert all(p.requires_grad and p.is_inference() for p in demo[0].model.diffusion_model.parameters())  # as before


def test_the_recording_holds_runs_of_every_kind(demo):
    train(demo)
    recording = Recording.open(recording_folder("mine"))
    # two thirds of 6 harmful runs before there is an HGR and a third after, of 3 steps and 2 looks each
    assert (recording.count(HARMFUL), recording.count(CLEAN), recording.count(CALIBRATION)) == (30, 20, 80)
    assert recording.shapes() == [(4, 16, 12), (4, 16, 16)]
    follows = {shard.path.name.split("-")[1] for shard in recording.of_kind(HARMFUL)}
    assert follows == {"prompt", "policy"}
    for shard in recording.of_kind(HARMFUL):
        points, prompts = shard.points(torch.arange(shard.size))
        assert prompts.harms.any(dim=1).all() and torch.isfinite(points.x).all()
        assert (points.cond_denoised - points.partner_denoised).abs().mean() > 1e-3


def test_a_trained_hgr_judges_pictures(demo):
    """Its thresholds come from the finished calibration runs, seen as SafeCFG Detect Harm sees: beside the empty negative."""
    model, clip = demo
    hgr, recording = train(demo)[0], Recording.open(recording_folder("mine"))
    sampling, empty = model.model.model_sampling, clip.encode_from_tokens(clip.tokenize(""))
    levels = torch.tensor([float(sampling.percent_to_sigma(part)) for part in LEVELS])
    for shard in recording.of_kind(PICTURES):
        points, prompts = shard.runs(), shard.prompts()
        torch.testing.assert_close(points.sigma, levels.repeat_interleave(len(prompts)))
        with torch.inference_mode():
            denoised = model.model.apply_model(points.x, points.sigma, c_crossattn=empty.expand(len(points), -1, -1))
        torch.testing.assert_close(points.uncond_denoised, denoised, atol=0.02, rtol=0.02)
        assert (points.cond_denoised - points.uncond_denoised).abs().mean() > 1e-3
    assert recording.count(PICTURES) == 4 * len(LEVELS) and hgr.info.training["calibration"]["clean_pictures"] == 4
    with torch.inference_mode():
        text = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        latent = {"samples": torch.randn(1, 4, 16, 16)}
        found = DetectHarm.execute(model, hgr, text, 0.0, "", 0, 1, 0, latent=latent).result[1]
    assert list(json.loads(found)["categories"].values()) == pytest.approx(hgr.info.picture_thresholds, abs=1e-3)


def test_calibration_is_told_what_harmful_prompts_and_runs_read(demo, monkeypatch):
    """Without it, few clean samples give thresholds that no harm passes."""
    given, calibrated = {}, trainer.calibrated
    monkeypatch.setattr(trainer, "calibrated", lambda *args, **more: given.update(more) or calibrated(*args, **more))
    hgr = train(demo)[0]
    p, b = given["harmful"]
    categories = len(hgr.info.categories)
    assert p.shape[1] == b.shape[2] == categories
    shown = [~each.isnan() for each in (p, b)]
    assert all(each.any() and not each.all() for each in shown) and all(
        (e[s] > 0).all() for e, s in zip((p, b), shown, strict=True)
    )


def cancel_after(monkeypatch, part, step):
    """Cancels as the front end does, when a part reaches a step."""
    update = session.Progress.update

    def cancelling(self, name, share, message):
        if name == part and f" {step} of" in message:
            mm.interrupt_current_processing()
        update(self, name, share, message)

    monkeypatch.setattr(session.Progress, "update", cancelling)


def test_cancelled_and_resumed_is_never_stopped(demo, monkeypatch):
    train(demo, "through")
    for part, step in (("recording", 3), ("condition", 2), ("guidance", 2), ("recording on-policy", 1), ("guidance", 5)):
        with monkeypatch.context() as patch:
            cancel_after(patch, part, step)
            with pytest.raises(mm.InterruptProcessingException):
                train(demo, "stopped")
        assert folder_paths.get_full_path("hgr", "stopped.safetensors") is None
    train(demo, "stopped")
    through, stopped = (weights(folder_paths.get_full_path("hgr", f"{name}.safetensors")) for name in ("through", "stopped"))
    assert all(torch.equal(through[k], stopped[k]) for k in through)


def test_other_settings_do_not_continue_a_training(demo):
    train(demo)
    with pytest.raises(hgr_models.HGRError, match="other settings.*Switch `resume` off"):
        train(demo, seed=4)
    with pytest.raises(hgr_models.HGRError, match="comes from another training. Choose another name"):
        train(demo, seed=4, resume=False)
    pathlib.Path(folder_paths.get_full_path("hgr", "mine.safetensors")).unlink()
    train(demo, seed=4, resume=False)


def test_beginning_again_does_not_cost_what_cannot_be_replaced(demo):
    """A finished file of that name, from other settings, is in the way: that is said before anything is deleted."""
    train(demo)
    folder = recording_folder("mine")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(hgr_models.HGRError, match="exists and comes from another training"):
        train(demo, resume=False, learning_rate=2e-3)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_foreign_file_in_the_folder_is_not_deleted(demo):
    folder = recording_folder("mine")
    folder.mkdir(parents=True)
    comfy.utils.save_torch_file({"x": torch.zeros(1)}, str(folder / "precious.safetensors"))
    with pytest.raises(hgr_models.HGRError, match="precious"):
        train(demo, resume=False)
    assert (folder / "precious.safetensors").exists()


@pytest.mark.parametrize("networks", ["condition", "guidance"])
def test_one_network_alone(demo, networks):
    train(demo, train=networks)
    hgr = hgr_models.load_hgr(folder_paths.get_full_path("hgr", "mine.safetensors"))
    assert (hgr.condition is not None, hgr.guidance is not None) == (networks == "condition", networks == "guidance")


def test_recorded_here_trained_without_a_model(demo):
    model, clip = demo
    with torch.inference_mode():
        for seed in (3, 4):  # two machines
            RecordGuidance.execute(model, clip, prompt_set(), "shared", **{**SMALL, "seed": seed})
        result = TrainHGR.execute(name="shared", **{**TRAIN, "train": "guidance"}).result
        with pytest.raises(hgr_models.HGRError, match="none is connected"):
            TrainHGR.execute(name="shared", **TRAIN)
    assert Recording.open(recording_folder("shared")).count(CLEAN) == 40  # two recordings of 4 runs, 3 steps and 2 looks each
    assert result[0].info.categories == ("weapons", "drugs")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sizes": "512"}, "Expected sizes such as"),
        ({"sizes": "512x512,"}, "Expected sizes such as"),
        ({"samplers": "euler, nonsense"}, "Expected names of samplers"),
        ({"cfg_min": 9.0}, "Expected cfg_min of at least 1 and at most cfg_max"),
        ({"name": "a/b"}, "Expected a plain name"),
        ({"name": ""}, "Expected a plain name"),
        ({"prompts": prompt_set(clean=("a dog",))}, "at least 2 clean prompts"),
    ],
)
def test_bad_input_is_one_clear_error(demo, changes, message):
    with pytest.raises(hgr_models.HGRError, match=message):
        train(demo, **changes)


def test_slow_text_encoders_are_part_of_the_estimate(demo, monkeypatch, caplog):
    clock, texts = [0.0], iter((100.0, 600.0))  # the first one loads the encoders

    def encode(_):
        clock[0] += next(texts)

    with monkeypatch.context() as patch:
        patch.setattr(session.estimate.time, "monotonic", lambda: clock[0])
        slow = session.estimate._seconds_per_text(SimpleNamespace(encode=encode, prompts=prompt_set()))
    assert slow == 600.0
    monkeypatch.setattr(session.estimate, "_seconds_per_text", lambda _: slow)
    with caplog.at_level("INFO"):
        train(demo, train="condition")
    (said,) = [message for message in caplog.messages if "takes about" in message]
    hours = float(said.split("takes about ")[1].split(" h")[0])
    assert 4.9 < hours < 5.1  # both sides of 3 pairs, 12 clean prompts, and 6 runs of 2 texts


def test_a_full_disk_is_seen_before_anything_is_recorded(demo, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(session.estimate.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(hgr_models.HGRError, match="recording needs about .* MB.*the disk has 0 MB free"):
        train(demo)
    assert not list(recording_folder("mine").iterdir())


def test_a_disk_that_fills_up_leaves_no_part_of_a_shard(demo, monkeypatch):
    def full(tensors, path, header):
        pathlib.Path(path).write_bytes(b"part")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        with pytest.raises(hgr_models.HGRError, match="safetensors cannot be written .*No space left.*Free some disk space"):
            train(demo)
    assert not list(recording_folder("mine").iterdir())
    train(demo)


def test_a_batch_larger_than_the_data_and_one_pair(demo):
    one = PromptPair("a knife", "a flower", frozenset({"weapons"}), frozenset({"weapons"}), "knife")
    train(
        demo,
        batch=50,
        harmful_runs=3,
        prompts=prompt_set(categories=("weapons",), pairs=(one,), concept_prompts={"weapons": "weapons"}),
    )
