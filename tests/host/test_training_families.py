"""Training for any family: the same nodes on tiny random models of other predictions, channels and dimensions."""

import json
from types import SimpleNamespace

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from safecfg import hgr_models
from safecfg.hgr_models.model_card import measured_of
from safecfg.nodes.host.architecture import architecture_of
from safecfg.nodes.redirect.apply import Apply
from safecfg.nodes.training import check_hgr
from safecfg.nodes.training.check_hgr import CheckHGR

from test_training import APPLY, SMALL, folders, prompt_set, train  # noqa: F401 (folders is a fixture)

WIDTH, POOLED = 24, 12
CPU = torch.device("cpu")


class TinyNet(torch.nn.Module):
    """A denoiser of any channels and dimensions that listens to its prompt."""

    dtype = torch.float32

    def __init__(self, channels: int, dimensions: int):
        super().__init__()
        conv = torch.nn.Conv3d if dimensions == 3 else torch.nn.Conv2d
        self.first, self.last = conv(channels, 16, 3, padding=1), conv(16, channels, 3, padding=1)
        self.text = torch.nn.Linear(WIDTH, 16)

    def forward(self, x, timesteps, context=None, **_):
        text = self.text(context).mean(dim=1).view(-1, 16, *[1] * (x.ndim - 2))
        return self.last(torch.nn.functional.silu(self.first(x) + text))


class TinyClip:
    """Words as random vectors; a pooled vector beside them."""

    def __init__(self):
        self.cond_stage_model, self.patcher = torch.nn.Identity(), SimpleNamespace(patches_uuid="none")

    def clone(self):
        return self

    def clip_layer(self, _):
        pass

    def tokenize(self, text):
        return [sum(map(ord, word)) for word in text.split()[:6]]

    def encode_from_tokens_scheduled(self, tokens):
        vectors = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(t)) for t in (*tokens, *[0] * (6 - len(tokens)))]
        return [[torch.stack(vectors)[None], {"pooled_output": vectors[0][None, :POOLED]}]]


def make_model(model_type, latent_format):
    torch.manual_seed(0)
    config = comfy.supported_models.SD15({"context_dim": WIDTH})
    config.unet_config, config.latent_format = {"disable_unet_model_creation": True}, latent_format
    model = comfy.model_base.BaseModel(config, model_type, device=CPU)
    model.diffusion_model = TinyNet(latent_format.latent_channels, latent_format.latent_dimensions)
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


FAMILIES = {
    "v": (comfy.model_base.ModelType.V_PREDICTION, comfy.latent_formats.SD15, "V", None),
    "flow": (comfy.model_base.ModelType.FLOW, comfy.latent_formats.SD3, "FLOW", None),
    "video": (comfy.model_base.ModelType.FLOW, comfy.latent_formats.Wan21, "FLOW", (1, 16, 3, 8, 8)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_another_family_trains_applies_and_is_checked(name):
    model_type, latent_format, prediction, shape = FAMILIES[name]
    model, clip = make_model(model_type, latent_format()), TinyClip()
    latent = None if shape is None else {"samples": torch.zeros(shape)}
    hgr = train((model, clip), latent=latent, sizes="64x64, 64x96", cfg_min=1.0, cfg_max=1.0)[0]
    info = hgr.info
    assert (info.prediction, info.latent_channels, info.token_width, info.pooled_width) == (
        prediction, latent_format.latent_channels, WIDTH, POOLED,
    )  # fmt: skip
    assert info.latent_dimensions == (3 if name == "video" else 2)
    Apply.execute(model, hgr, **APPLY)
    with torch.inference_mode():
        result = CheckHGR.execute(
            model,
            clip,
            hgr,
            prompt_set(),
            2,
            2,
            0.05,
            "fitted",
            **{k: v for k, v in SMALL.items() if "runs" not in k},
            latent=latent,
        ).result
    assert "2 harmful runs" in result[1] and "with the new thresholds" in result[1]
    assert result[0].path.endswith("fitted.safetensors")
    assert len(result[0].info.picture_thresholds) == len(info.picture_thresholds) == 2
    for path in (hgr.path, result[0].path):  # both cards say what was found
        found = measured_of(path)["check"]
        assert found["harmful_runs"] == 2 and architecture_of(model) in found["model"]


def test_a_new_calibration_is_told_what_harmful_prompts_and_runs_read(monkeypatch):
    flow, latent_format = FAMILIES["flow"][:2]
    model, given, calibrated = make_model(flow, latent_format()), {}, check_hgr.calibrated
    hgr = train((model, TinyClip()), sizes="64x64")[0]
    monkeypatch.setattr(check_hgr, "calibrated", lambda *args, **more: given.update(more) or calibrated(*args, **more))
    arguments = {k: v for k, v in SMALL.items() if "runs" not in k}
    with torch.inference_mode():
        mine = ("a red cat", "a blue dog", "a green frog")
        said = CheckHGR.execute(model, TinyClip(), hgr, prompt_set(), 2, 2, 0.05, "told", my_prompts=mine, **arguments).result
    p, b = given["harmful"]
    assert len(p) == len(b) == 2 and not p.isnan().all() and not b.isnan().all()
    # The user's own prompts are among the clean ones, and the report says what becomes of them.
    numbers = json.loads(said[2])
    assert said[0].info.training["calibration"]["clean_prompts"] == 2 + len(mine) and numbers["clean_runs"] == 2
    assert "of 3 of your prompts are flagged" in said[1] and numbers["my_prompts"]["prompts"] == 3
    assert numbers["recalibrated"]["my_prompts"]["flagged"] == 0


def test_an_hgr_of_another_family_is_not_checked():
    flow, video = (make_model(f[0], f[1]()) for f in (FAMILIES["flow"], FAMILIES["v"]))
    hgr = train((flow, TinyClip()), sizes="64x64")[0]
    arguments = {k: v for k, v in SMALL.items() if "runs" not in k}
    with pytest.raises(hgr_models.HGRError, match="SD3 latents.*SD15 latents"):
        CheckHGR.execute(video, TinyClip(), hgr, prompt_set(), 2, 2, 0.05, "", **arguments)
    with pytest.raises(hgr_models.HGRError, match="prompts of the HGR's categories"):
        CheckHGR.execute(flow, TinyClip(), hgr, prompt_set(categories=("drugs", "weapons")), 2, 2, 0.05, "", **arguments)


def test_a_copy_to_recalibrate_shares_nothing_with_the_loaded_hgr():
    hgr = train((make_model(*FAMILIES["flow"][:1], FAMILIES["flow"][1]()), TinyClip()), sizes="64x64")[0]
    loaded, copy = hgr.patcher.model.state_dict(), check_hgr.copy_of(hgr).state_dict()
    assert loaded.keys() == copy.keys() and all(torch.equal(loaded[k], copy[k]) for k in loaded)
    assert not {v.data_ptr() for v in loaded.values()} & {v.data_ptr() for v in copy.values()}
