"""`SafeCFG Fine-tune Safe LoRA` on the demo model: what it makes, leaves alone, and takes up again."""

import copy
import dataclasses
import inspect
import json

import comfy.model_management as mm
import comfy.samplers
import folder_paths
import pytest
import torch
from comfy_extras import nodes_train
from safecfg import hgr_models
from safecfg.hgr_models.hgr import NO_LATENTS
from safecfg.hgr_models.lora import load_lora, lora_from
from safecfg.hgr_models.lora_samples import read_samples
from safecfg.hgr_models.pairs import PromptPair, PromptSet
from safecfg.nodes.demo_world.demo_model import DemoModel
from safecfg.nodes.host.families import base_of_model
from safecfg.nodes.loader import SHIPPED, HGRModel, core_patcher, load_hgr_model
from safecfg.nodes.redirect.apply import apply
from safecfg.nodes.safe_lora import session
from safecfg.nodes.safe_lora.fine_tune import FineTuneSafeLora, session_folder
from safecfg.nodes.safe_lora.inputs import gather_prompts
from safecfg.nodes.training import frozen_model

import nodes as core_nodes
from fakes import CPU, Once, guide, make_settings

HARMFUL = ("a knife and an apple", "a gun", "a syringe")
CLEAN = ("a frog and a strawberry", "a dog", "a rabbit and a rocket")
SMALL = {
    "text": "\n".join((*HARMFUL, *CLEAN)), "file": "", "name": "mine", "categories": "", "rank": 4, "alpha": 4.0, "layers": "linear and conv",
    "steps": 6, "learning_rate": 1e-2, "runs": 9, "run_steps": 3, "batch": 3, "sizes": "64x64", "samplers": "euler, dpmpp_2m",
    "scheduler": "normal", "cfg_min": 3.0, "cfg_max": 7.0, "seed": 3, "checkpointing": False, "resume": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def demo():
    """(MODEL, CLIP, VAE) of the demo."""
    with torch.inference_mode():
        return DemoModel.execute().result


@pytest.fixture(scope="module")
def hgr():
    with torch.inference_mode():
        return load_hgr_model(str(SHIPPED / "demo.safetensors"))


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Clean folders for output, input and LoRAs."""
    for name in ("output", "input", "loras"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def tune(demo, hgr, vae=False, lists=None, **widgets):
    """The node's outputs; every input comes as a list, as the host gives it."""
    values = {**SMALL, "model": demo[0], "clip": demo[1], "hgr": hgr, **({"vae": demo[2]} if vae else {}), **widgets}
    with torch.inference_mode():
        return FineTuneSafeLora.execute(**{k: [v] for k, v in values.items()}, **(lists or {})).result


def predicted(model, demo, text="a knife and an apple"):
    """x0 prediction of a MODEL at one noise level, through core's guider."""
    with torch.inference_mode():
        conds = [[[demo[1].encode_from_tokens_scheduled(demo[1].tokenize(t))[0][0], {}]] for t in (text, "")]
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*conds)
        return guide(guider, Once(), sigmas=(8.0, 0.0), size=16).alone["positive"].clone()


def test_an_ordinary_lora_that_cores_loaders_apply(demo, hgr):
    weights = {k: v.clone() for k, v in demo[0].model.state_dict().items()}
    base = predicted(demo[0], demo)
    lora, losses, preview, report = tune(demo, hgr, vae=True)
    loader = nodes_train.LoraModelLoader
    run = loader.execute if hasattr(loader, "execute") else loader().load_lora_model
    with torch.inference_mode():
        (by_file,) = core_nodes.LoraLoaderModelOnly().load_lora_model_only(demo[0], "mine.safetensors", 1.0)
        by_socket, nothing = (run(demo[0], lora, strength)[0] for strength in (1.0, 0.0))
    changed = predicted(by_file, demo)
    assert len(by_file.patches) == len(lora) // 3 > 50  # core found a layer for every adapter
    assert torch.equal(changed, predicted(by_socket, demo)) and (changed - base).abs().max() > 0.01
    assert torch.equal(predicted(nothing, demo), base)
    with lora_from(lora).attached(demo[0].model.diffusion_model):
        attached = predicted(demo[0], demo)
    torch.testing.assert_close(changed, attached, rtol=1e-3, atol=1e-3)
    assert torch.equal(predicted(demo[0], demo), base)
    after = demo[0].model.state_dict()
    assert all(torch.equal(weights[k], after[k]) for k in weights) and not demo[0].patches and not demo[0].wrappers
    assert not any(p.requires_grad for p in demo[0].model.parameters())
    assert preview.shape[1] == 2 * 64 and preview.shape[2] in (64, 128, 192, 256) and not torch.equal(*preview[0].chunk(2))
    assert len(losses["loss"]) == 1 and "harmful: weapons" in report and "from their safe target" in report


def test_an_hgr_of_prompts_alone_teaches(demo, folders):
    """The condition redirector judges and turns; nothing looks at guidance, and the HGR knows no latents."""
    whole = hgr_models.load_hgr(SHIPPED / "demo.safetensors")
    thresholds = {"guidance_thresholds": ((0.5,) * 3,), "picture_thresholds": ()}
    whole.guidance, whole.info = None, dataclasses.replace(whole.info, **NO_LATENTS, **thresholds)
    hgr_models.save_hgr(folders / "prompts.safetensors", whole)
    with torch.inference_mode():
        of_prompts = load_hgr_model(str(folders / "prompts.safetensors"))
    assert of_prompts.info.of_prompts and of_prompts.patcher.model.guidance is None
    _, _, _, report = tune(demo, of_prompts)
    judged = load_lora(folder_paths.get_full_path_or_raise("loras", "mine.safetensors"))[1]["judged"]
    assert judged["categories"]["weapons"] > 0 and judged["categories"]["drugs"] > 0 and "from their safe target" in report
    with torch.inference_mode():
        (turned,) = core_nodes.LoraLoaderModelOnly().load_lora_model_only(demo[0], "mine.safetensors", 1.0)
    assert (predicted(turned, demo) - predicted(demo[0], demo)).abs().max() > 0.01


def test_the_file_says_where_it_comes_from(demo, hgr):
    lora, *_ = tune(demo, hgr)
    tensors, about = load_lora(folder_paths.get_full_path_or_raise("loras", "mine.safetensors"))
    assert all(torch.equal(lora[k], tensors[k]) for k in lora) and lora.keys() == tensors.keys()
    assert about["hgr"] == hgr.hash and about["base"] == base_of_model(demo[0]) and len(about["prompts"]) == 64
    assert about["lora"] == {"rank": 4, "alpha": 4.0, "layers": "linear and conv"} and about["steps"] == 6
    judged = about["judged"]
    assert judged["runs"] == 9 and 3 <= judged["harmful"] <= 6 and sum(judged["categories"].values()) >= judged["harmful"]
    assert not json.dumps(about).count("knife")


def cancel_after(monkeypatch, part, text):
    """Cancels as the front end does, when a part's message has a text."""
    update = session.Progress.update

    def cancelling(self, name, share, message):
        if name == part and text in message:
            mm.interrupt_current_processing()
        update(self, name, share, message)

    monkeypatch.setattr(session.Progress, "update", cancelling)


STOPS = [("recording", "batch 1 of 2"), ("training", "step 2 of"), ("training", "step 5 of")]


def test_cancelled_and_resumed_is_never_stopped(demo, hgr, monkeypatch):
    through, *_ = tune(demo, hgr, name="through")
    for i, stop in enumerate(STOPS):
        name = f"stopped{i}"
        with monkeypatch.context() as patch:
            cancel_after(patch, *stop)
            with pytest.raises(mm.InterruptProcessingException):
                tune(demo, hgr, name=name)
        assert folder_paths.get_full_path("loras", f"{name}.safetensors") is None
        stopped, *_ = tune(demo, hgr, name=name)
        assert all(torch.equal(through[k], stopped[k]) for k in through), stop
    runs = sorted(path.stem for path in session_folder("through").glob("*.safetensors"))
    assert runs == ["late-00000", "runs-00000", "runs-00001"]


def test_clean_data_leaves_the_model_as_it_is(demo, hgr):
    base = predicted(demo[0], demo)
    lora, losses, preview, report = tune(demo, hgr, vae=True, text="\n".join(CLEAN))
    assert "judged 0 of 6 samples harmful" in report and "All of the data is clean" in report
    assert "Clean samples change by 0 % (at most 0 %), the empty prompt by 0 %" in report
    with torch.inference_mode():
        (model,) = core_nodes.LoraLoaderModelOnly().load_lora_model_only(demo[0], "mine.safetensors", 1.0)
    assert torch.equal(predicted(model, demo), base) and torch.equal(*preview[0].chunk(2))
    assert not any(t.any() for k, t in lora.items() if "lora_up" in k) and losses == {"loss": []}


def test_what_it_will_take_counts_the_targets(demo, hgr, monkeypatch):
    """They stay in memory in 16 bits, while two latents in 32 bits of every step are on disk."""
    costs, estimate = [], session.LoraSession._estimate
    monkeypatch.setattr(session.LoraSession, "_estimate", lambda self: costs.append(estimate(self)) or costs[-1])
    for runs in (3, 9):
        tune(demo, hgr, name=f"runs{runs}", runs=runs)
    (few, many) = costs
    assert many.disk > few.disk and 4 * (many.memory - few.memory) == many.disk - few.disk


def test_harmful_data_alone_is_never_decoded(demo, hgr, monkeypatch):
    info = dataclasses.replace(hgr.info, condition_thresholds=(0.0,) * 3)  # everything is harmful
    network = copy.deepcopy(hgr.patcher.model)
    network.calibrate(info)
    strict = HGRModel(core_patcher(network, load_device=CPU, offload_device=CPU), info, "strict", "0")
    monkeypatch.setattr(demo[2], "decode", lambda *_: pytest.fail("decoded"))
    _, losses, preview, report = tune(demo, strict, vae=True)
    assert "judged 9 of 9" in report and preview.shape == (1, 96, 640, 3)
    assert losses["loss"][-1] > 0 and "Clean samples change by - (at most -)" in report


def test_safecfg_in_the_model_is_left_out_and_categories_can_be_off(demo, hgr):
    plain, *_ = tune(demo, hgr)
    applied = apply(demo[0], hgr, make_settings(hgr))
    again, *_ = tune((applied, *demo[1:]), hgr, name="applied")
    assert all(torch.equal(plain[k], again[k]) for k in plain)
    *_, report = tune(demo, hgr, name="off", categories="weapons = off, drugs = off, death = off")
    assert "judged 0 of 6" in report


def test_an_hgr_of_another_family_is_refused(demo, hgr):
    for changes, message in (
        ({"prediction": "FLOW"}, "trained for a model of .* FLOW"),
        ({"token_width": 768}, "token width 768"),
    ):
        info = dataclasses.replace(hgr.info, **changes)
        with pytest.raises(hgr_models.HGRError, match=message):
            tune(demo, dataclasses.replace(hgr, info=info))


def test_a_model_without_gradients_is_refused(demo, hgr, monkeypatch):
    predict = frozen_model.FrozenModel.predict
    monkeypatch.setattr(frozen_model.FrozenModel, "predict", lambda *args: predict(*args).detach())
    with pytest.raises(hgr_models.HGRError, match="no exact gradients to a LoRA"):
        tune(demo, hgr)


def test_pictures_are_noised_and_join(demo, hgr):
    picture = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    lists = {"images": [picture, picture[:1, :, :32]], "captions": ["a gun", "a dog", "a cow"]}
    *_, report = tune(demo, hgr, vae=True, lists=lists)
    assert "of 12 samples" in report
    some = [read_samples(path) for path in sorted(session_folder("mine").glob("pictures-*"))]
    assert [tuple(s.x.shape[1:]) for s in some] == [(4, 8, 8), (4, 8, 4)] and [s.prompts for s in some] == [2, 1]
    levels = some[0].sigma.view(3, 2)[:, 0]
    assert (levels[:-1] > levels[1:]).all() and levels[-1] > 0
    latent = demo[2].encode(picture)
    with torch.inference_mode():
        x = demo[0].model.process_latent_in(latent)
    noise = (some[0].x.view(3, 2, 4, 8, 8) - x) / levels.view(3, 1, 1, 1, 1)
    torch.testing.assert_close(noise[0], noise[2], rtol=1e-2, atol=1e-2)  # x = picture + sigma * noise, always the same noise


def pairs():
    pair = PromptPair("a knife", "a flower", frozenset({"weapons"}), frozenset({"weapons"}), "knife")
    return PromptSet(("weapons",), (pair,), ("a dog", "a cat"), (), (), {"weapons": "weapons"})


def test_prompts_come_from_everywhere_without_labels(folders):
    (folders / "input" / "more.txt").write_text("a cow\n\na dog\n", encoding="utf-8")
    found = gather_prompts("a tree\n", "more.txt", pairs(), 1)
    assert sorted(found) == ["a cat", "a cow", "a dog", "a flower", "a knife", "a tree"]
    orders = {gather_prompts("a tree\n", "more.txt", pairs(), seed) for seed in range(5)}
    assert len(orders) > 1 and all(isinstance(text, str) for order in orders for text in order)
    assert not {"labels", "harms", "pairs"} & set(inspect.signature(session.LoraSession).parameters)


@pytest.mark.parametrize(
    "changes, lists, message",
    [
        ({"text": " \n"}, {}, "at least one prompt"),
        ({"file": "nothing.txt"}, {}, "name of a text file"),
        ({"file": "../loras"}, {}, "name of a text file"),
        ({"name": "a/b"}, {}, "Expected a plain name"),
        ({"categories": "nudity = 1"}, {}, "Unknown category"),
        ({}, {"images": [torch.zeros(1, 64, 64, 3)]}, "without a VAE"),
        ({}, {"latents": [{"samples": torch.zeros(1, 16, 8, 8)}]}, "latents with 4 channels"),
        ({}, {"latents": [{"samples": torch.zeros(2, 4, 8, 8)}], "captions": ["one"]}, "a caption for each of the 2 pictures"),
    ],
)
def test_bad_input_is_one_clear_error(demo, hgr, changes, lists, message):
    with pytest.raises(hgr_models.HGRError, match=message):
        tune(demo, hgr, lists=lists, **changes)


def test_other_settings_and_files_are_not_overwritten(demo, hgr, folders):
    tune(demo, hgr)
    with pytest.raises(hgr_models.HGRError, match="other settings.*Switch `resume` off"):
        tune(demo, hgr, seed=4)
    with pytest.raises(hgr_models.HGRError, match="comes from another fine-tuning"):
        tune(demo, hgr, seed=4, resume=False)
    precious = session_folder("mine") / "precious.safetensors"
    precious.write_bytes((folders / "loras" / "mine.safetensors").read_bytes())
    with pytest.raises(hgr_models.HGRError, match="precious"):
        tune(demo, hgr, resume=False)
    assert precious.exists()
