"""The user's model as a frozen function with gradients: its weights, its precision, and models that carry none."""

import folder_paths
import pytest
import torch
from safecfg import hgr_models
from safecfg.hgr_models.shards import HARMFUL, Recording
from safecfg.nodes.training import frozen_model, gradient, session
from safecfg.nodes.training.plan import recording_folder

from test_training import demo, folders, train  # noqa: F401 (two are fixtures)


def test_a_loader_s_weights_are_shared_and_come_back():
    with torch.inference_mode():
        network = torch.nn.Linear(4, 4)
    own = network.weight
    x = torch.ones(2, 4, requires_grad=True)
    with frozen_model.normal_weights(network):
        assert network.weight.data_ptr() == own.data_ptr()
        network(x).square().sum().backward()
    assert network.weight is own and own.is_inference() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("made_in", [True, False])
@pytest.mark.parametrize("moved_in", [True, False])
def test_weights_that_were_moved_carry_gradients(made_in, moved_in):
    """Core moves weights between devices in and outside inference mode; here their type changes, which does the same to them."""
    with torch.inference_mode(made_in):
        network = torch.nn.Linear(4, 4).requires_grad_(False)
    with torch.inference_mode(moved_in):
        network.to(torch.bfloat16).to(torch.float32)
    own, x = network.weight, torch.ones(2, 4, requires_grad=True)
    with frozen_model.normal_weights(network):
        network(x).square().sum().backward()
    assert network.weight is own and x.grad.abs().sum() > 0


def test_fp16_is_what_the_model_computes_in(demo):  # noqa: F811
    """Weights in fp8 or fp32 may be computed in fp16, whose small gradients need a scaled loss."""
    assert not frozen_model.FrozenModel(demo[0], {}).half
    cast = demo[0].clone()
    cast.add_object_patch("manual_cast_dtype", torch.float16)
    assert frozen_model.FrozenModel(cast, {}).half


def test_a_model_that_cannot_be_loaded_again_is_refused_before_anything_is_recorded(demo, monkeypatch):  # noqa: F811
    model = demo[0].clone()
    monkeypatch.setattr(model, "is_dynamic", lambda: True, raising=False)
    model.cached_patcher_init = None
    monkeypatch.setattr(session, "without_safecfg", lambda model: model)
    with pytest.raises(hgr_models.HGRError, match="Load Checkpoint.*--disable-dynamic-vram"):
        train((model, demo[1]))
    assert not any(recording_folder("mine").glob("*.safetensors"))


def test_gradients_are_exact_with_and_without_checkpointing(demo):  # noqa: F811
    train(demo)
    recording = Recording.open(recording_folder("mine"))
    points, prompts = recording.draw(HARMFUL, 2, torch.Generator().manual_seed(0))
    model = frozen_model.FrozenModel(demo[0], {})
    gradients = []
    for checkpointing in (False, True):
        with model.loaded((2, 4, 16, 16), checkpointing):
            assert gradient.gradient_error(model, points, prompts) < 0.02
            tokens = prompts.tokens.clone().requires_grad_(True)
            gradients += torch.autograd.grad(model.predict(points, prompts, tokens, None).square().sum(), tokens)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * float(gradients[0].abs().max()))  # summed in another order
    assert gradients[0].any()
    with torch.no_grad(), model.loaded((2, 4, 16, 16), False):
        torch.testing.assert_close(
            model.predict(points, prompts, prompts.tokens, None), points.cond_denoised, atol=0.02, rtol=0.02
        )


def test_a_model_without_gradients_gets_the_guidance_redirector_alone(demo, monkeypatch):  # noqa: F811
    predict = frozen_model.FrozenModel.predict
    cut = lambda self, points, prompts, tokens, pooled: predict(self, points, prompts, tokens.detach(), pooled) + 0 * tokens.sum()  # noqa: E731
    monkeypatch.setattr(frozen_model.FrozenModel, "predict", cut)
    _, _, _, summary = train(demo)
    assert "guidance redirector alone" in summary
    assert hgr_models.load_hgr(folder_paths.get_full_path("hgr", "mine.safetensors")).condition is None
    with pytest.raises(hgr_models.HGRError, match="carries no exact gradients.*Set `train` to prompts"):
        train(demo, "other", train="condition")


def test_a_model_that_fails_in_its_backward_pass_is_told_before_anything_is_recorded(demo, monkeypatch):  # noqa: F811
    def broken(self, points, prompts, tokens, pooled):
        out = tokens.sum() + torch.zeros_like(points.x)
        out.register_hook(lambda _: (_ for _ in ()).throw(RuntimeError("a kernel without a backward pass")))
        return out

    monkeypatch.setattr(frozen_model.FrozenModel, "predict", broken)
    with pytest.raises(hgr_models.HGRError, match="no exact gradients.*a kernel without a backward pass.*Set `train` to prompts"):
        train(demo, train="condition")
    assert not any(recording_folder("mine").glob("*.safetensors"))
