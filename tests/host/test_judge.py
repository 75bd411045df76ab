"""Server-wide enforcement, the last line: latents that leave are judged, whatever made them."""

import pytest
import torch
from safecfg.hgr_models.detection import Detection
from safecfg.nodes.enforcement import judge, plain_runs
from safecfg.nodes.enforcement.enforced_graph import rewrite
from safecfg.nodes.enforcement.enforced_model import bare_model, enforced
from safecfg.nodes.enforcement.names import GUARD, LATENT_GUARD, PICTURE_GUARD
from safecfg.nodes.reporting import traces

from enforce_fakes import CLASSES, SAMPLER, fake, node, unguarded, workflow
from fakes import ALWAYS, NEVER, make_hgr, sample
from test_guiders import cfg_guider


class Look:
    """Stands in for looking with the model: `harm` tells whether a latent (C, H, W) is harmful; counts the rows it sees."""

    def __init__(self, monkeypatch, harm):
        self.harm, self.rows, self.calls = harm, 0, 0
        monkeypatch.setattr(judge, "look", self)
        monkeypatch.setattr(judge, "_judged", type(judge._judged)())
        monkeypatch.setattr(judge, "is_for", lambda hgr, model: True)
        monkeypatch.setattr(judge, "bare_model", lambda model: model)

    def __call__(self, model, hgr, latents, negative, positive=None, looks=None):
        self.calls, self.rows = self.calls + 1, self.rows + len(latents)
        scores = torch.tensor([[0.9 if self.harm(latent) else 0.1, 0.1] for latent in latents])
        return Detection(scores, torch.zeros(len(latents), 2, 1, 1))


def from_a_run(latents):
    """Remembers latents as those that an enforced run returned."""
    for digest in traces.digests(latents):
        traces.STORE.put(digest, "run", _Trace())
    return latents


class _Trace:
    size, seed = 0, 7


@pytest.fixture
def latents():
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def marked(latent) -> bool:
    """The mark of harm: a large value in the upper left corner."""
    return float(latent[0, 0, 0]) > 50


def test_flagged_latents_leave_as_zeros(monkeypatch, latents):
    latents[1, 0, 0, 0] = 99.0
    look = Look(monkeypatch, marked)
    given = {"samples": from_a_run(latents), "batch_index": [0, 1, 2]}
    out, held = judge.judge_latent(given, ["model"], [make_hgr()])
    assert held == ((), ("red",), ()) and out["batch_index"] == [0, 1, 2] and not out["samples"][1].any()
    assert torch.equal(out["samples"][[0, 2]], latents[[0, 2]]) and (look.calls, look.rows) == (1, 3)


def test_clean_latents_pass_untouched_and_are_judged_once(monkeypatch, latents):
    look = Look(monkeypatch, marked)
    given = {"samples": from_a_run(latents)}
    for _ in range(2):
        out, held = judge.judge_latent(given, ["model"], [make_hgr_once()])
        assert out is given and held == ((), (), ())
    assert look.rows == 3
    judge.judge_latent({"samples": torch.cat([latents[:1], from_a_run(latents[:1] + 1)])}, ["model"], [make_hgr_once()])
    assert look.rows == 4


_HGR = make_hgr()


def make_hgr_once():
    return _HGR


def test_what_no_run_returned_is_looked_at_turned_and_mirrored(monkeypatch, latents):
    latents = 1.5 * latents  # of no run
    latents[1, 0, -1, 0] = 99.0  # upside down
    look = Look(monkeypatch, marked)
    _, held = judge.judge_latent({"samples": latents}, ["model"], [make_hgr()])
    assert held == ((), ("red",), ()) and look.rows == 8 * 3
    _, held = judge.judge_latent({"samples": from_a_run(latents + 1e-3)}, ["model"], [make_hgr()])
    assert held == ((), (), ())  # as a run drew it, one look is enough


def test_what_a_plain_run_returned_is_held_back_only_when_it_is_sure(monkeypatch, latents):
    monkeypatch.setattr(judge, "were_plain", lambda digests: [True] + [False for _ in list(digests)[1:]])
    Look(monkeypatch, lambda latent: False)
    for score, harm in ((0.55, ((), ("red",))), (0.65, (("red",), ("red",)))):
        scores = Detection(torch.tensor([[score, 0.1]] * 2), torch.zeros(2, 2, 1, 1))
        monkeypatch.setattr(judge, "look", lambda *a, scores=scores, **k: scores)
        monkeypatch.setattr(judge, "_judged", type(judge._judged)())
        _, held = judge.judge_latent({"samples": from_a_run(latents[:2] * 0.7)}, ["model"], [make_hgr()])
        assert held == harm


def test_plain_runs(tiny_model, tiny_cond):
    """Text alone, from an empty latent, nothing flagged; another node's hook, a LoRA or another latent makes it something else."""
    hgr = make_hgr(NEVER, NEVER)
    model, conds = enforced(tiny_model, [hgr]), (tiny_cond(1), tiny_cond(2))
    hooked, lora = model.clone(), tiny_model.clone()
    hooked.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    lora.add_patches({"diffusion_model.out.2.weight": ("diff", (torch.ones(4, 32, 3, 3),))})
    flags = enforced(tiny_model, [make_hgr(ALWAYS, NEVER)])
    for made, plain in ((model, True), (hooked, False), (enforced(lora, [hgr]), False), (flags, False)):
        assert plain_runs.were_plain(traces.digests(sample(made, *conds, steps=2, seed=3 + plain))) == [plain]
    at_cfg_1 = sample(model, *conds, cfg=1.0, steps=2)
    assert plain_runs.were_plain(traces.digests(at_cfg_1)) == [True]
    assert plain_runs.begins_plain(cfg_guider(model, tiny_cond), at_cfg_1)
    assert not plain_runs.begins_plain(cfg_guider(model, tiny_cond), at_cfg_1 + 1)
    pictured = [[conds[0][0][0], {"unclip_conditioning": []}]]
    guider = cfg_guider(model, lambda seed: pictured if seed == 1 else tiny_cond(seed))
    guider.conds = guider.original_conds  # as in a run
    assert not plain_runs.begins_plain(guider, torch.zeros_like(at_cfg_1))


def test_views_are_the_other_seven():
    square = torch.arange(4.0).view(1, 1, 2, 2)
    found = {tuple(view.flatten().tolist()) for view in judge.views(square)} | {(0.0, 1.0, 2.0, 3.0)}
    assert len(judge.views(square)) == 7 and len(found) == 8


def test_nothing_that_a_client_writes_takes_part(tiny_model):
    """No prompt, no LoRA, no hook: a judge that can be led is none."""
    ((tokens, extras),) = judge.empty_prompt(make_hgr().info)
    assert tokens.shape == (1, 77, 16) and not tokens.any() and extras == {}
    model = enforced(tiny_model, [make_hgr()]).clone()
    model.add_patches({"diffusion_model.out.2.weight": ("diff", (torch.ones(4, 32, 3, 3),))})
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    bare = bare_model(model)
    assert not bare.patches and bare.patches_uuid != model.patches_uuid and bare.model_options == {"transformer_options": {}}
    assert not any(bare.wrappers.values()) and model.patches


def test_a_real_look(tiny_model, latents):
    """The networks themselves; they have random weights, and thresholds that everything or nothing exceeds."""
    hgr = make_hgr(ALWAYS, ALWAYS)
    for limit, harm in ((0.0, ("red", "blue")), (1.0, ())):
        info = type(hgr.info)(**{**vars(hgr.info), "picture_thresholds": (limit, limit)})
        judged = type(hgr)(hgr.patcher, info, hgr.path, f"{hgr.hash}{limit}")
        _, held = judge.judge_latent({"samples": from_a_run(latents)}, [enforced(tiny_model, [hgr])], [judged])
        assert held == (harm,) * 3


def test_pictures_become_notices():
    pictures = torch.rand(2, 16, 16, 3)
    out = judge.picture_with_notices(pictures, ((), ("red",)))
    assert torch.equal(out[0], pictures[0]) and not torch.equal(out[1], pictures[1])
    assert judge.picture_with_notices(pictures, ((), ())) is pictures and judge.picture_with_notices(pictures, ()) is pictures
    frames = torch.rand(6, 16, 16, 3)  # two videos of three frames
    out = judge.picture_with_notices(frames, (("red",), ()))
    assert torch.equal(out[3:], frames[3:]) and not (out[:3] == frames[:3]).flatten(1).all(dim=1).any()
    odd = judge.picture_with_notices(torch.rand(3, 16, 16, 3), ((), ("red",)))  # whose are they?
    assert torch.equal(odd[0], odd[1]) and torch.equal(odd[1], odd[2])
    assert not judge.picture_with_notices(torch.rand(3, 16, 16), (("red",),)).any()
    assert judge.picture_with_notices("a file", (("red",),)) == "a file"


def judged_links(prompt: dict) -> dict:
    """The inputs of VAEs and savers that a guard is before, by node."""
    after = rewrite(prompt, CLASSES)
    assert rewrite(after, CLASSES) == after and unguarded(after) == []
    return after


def test_latents_leave_through_a_judge():
    after = judged_links(workflow())
    (guard, slot), (picture, _) = after["5"]["inputs"]["samples"], after["6"]["inputs"]["images"]
    assert after[guard]["class_type"] == LATENT_GUARD and slot == 0
    assert after[guard]["inputs"] == {"samples": ["4", 0], "model_0": ["safecfg_1_0", 0]}
    assert after[picture] == {**after[picture], "class_type": PICTURE_GUARD, "inputs": {"value": ["5", 0], "held": [guard, 1]}}
    assert rewrite(workflow(), CLASSES, judge=False)["5"]["inputs"]["samples"] == ["4", 0]


def test_the_judge_gets_the_model_of_the_loader():
    lora = node("LoraLoaderModelOnly", model=["1", 0], lora_name="x", strength_model=1.0)
    after = judged_links(workflow(n7=lora, n4=node("KSampler", model=["7", 0], **SAMPLER)))
    assert after[after["5"]["inputs"]["samples"][0]]["inputs"]["model_0"] == ["safecfg_1_0", 0]
    assert after[after["4"]["inputs"]["model"][0]] == {
        **after["safecfg_7_0"],
        "class_type": GUARD,
    }


def test_files_and_changed_latents_too():
    saver = node("SaveLatent", samples=["8", 0], filename_prefix="x")
    after = judged_links(workflow(n8=node("LatentFlip", samples=["4", 0], flip_method="x-axis: vertically"), n9=saver))
    assert after["8"]["inputs"]["samples"] == ["4", 0]
    assert after[after["9"]["inputs"]["samples"][0]]["inputs"]["samples"] == ["8", 0]


def test_latents_of_no_model_pass():
    encoded = node("VAEEncode", pixels=["7", 0], vae=["1", 2])
    loaded = node("LoadImage", image="x.png")
    after = judged_links(workflow(n7=loaded, n4=encoded))
    assert after["5"]["inputs"]["samples"] == ["4", 0]


def test_what_became_of_a_latent_is_guarded_once():
    """Of a type that nobody knows, it may hold a MODEL, too: the second guard comes behind the first, and no further round adds any."""
    classes = {**CLASSES, "Voxels": fake({"samples": ("LATENT", {})}, ("VOXEL",)), "Saves": fake({"voxels": ("VOXEL", {})}, ())}
    after = rewrite(workflow(n5=node("Voxels", samples=["4", 0]), n6=node("Saves", voxels=["5", 0])), classes)
    last = after[after["6"]["inputs"]["voxels"][0]]
    first = after[last["inputs"]["value"][0]]
    assert (last["class_type"], first["class_type"], first["inputs"]["value"]) == (GUARD, PICTURE_GUARD, ["5", 0])
    assert rewrite(after, classes) == after and unguarded(after, classes) == []


def test_the_guard_of_a_picture_hands_on_no_bare_model():
    own = {"n7": node(PICTURE_GUARD, value=["1", 0], held=["9", 0]), "n4": node("KSampler", model=["7", 0], **SAMPLER)}
    after = rewrite(workflow(**own), CLASSES)
    assert after[after["4"]["inputs"]["model"][0]]["inputs"]["value"] == ["7", 0] and unguarded(after) == []


def test_a_guard_of_the_workflows_own_is_no_judge():
    """One without a model, and one with pictures of its own choice."""
    own = {"n7": node(LATENT_GUARD, samples=["4", 0]), "n5": node("VAEDecode", samples=["7", 0], vae=["1", 2])}
    after = judged_links(workflow(**own))
    guard = after[after["5"]["inputs"]["samples"][0]]
    assert guard["class_type"] == LATENT_GUARD and guard["inputs"]["samples"] == ["7", 0] and "model_0" in guard["inputs"]
    own = {"n7": node(PICTURE_GUARD, value=["5", 0], held=["9", 0]), "n6": node("PreviewImage", images=["7", 0])}
    after = judged_links(workflow(**own))
    assert after[after["7"]["inputs"]["value"][0]]["inputs"]["value"] == ["5", 0]
